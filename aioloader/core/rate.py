"""`Rate`: how many calls begin in a second; one that is given, or one that finds out what a server allows."""

import threading
from dataclasses import dataclass
from math import ceil, inf
from time import monotonic
from typing import Any, Final, Literal, TypeAlias

from aioloader.core.checks import Errors, check_count, check_exceptions, check_positive
from aioloader.core.forks import tell_of_fork

__all__ = ["Bound", "Rate"]

Bound: TypeAlias = Literal["given", "most", "refusals", "growth"]

SPARE: Final = 8

HINT: Final = "it is in calls a second, and loader.paused() lets none begin"


class Rate:
    """So many calls a second, in all stages that share it, on any loops and threads.

    A token bucket: it fills with `per_second` tokens a second up to `burst`, and each call takes one.

    Args:
        per_second: More than 0.
        burst: Calls that may begin at once after a pause, at least 1; None: those of 50 ms.

    Raises:
        TypeError, ValueError: An argument is none of these.
    """

    def __init__(self, per_second: float, burst: int | None = None) -> None:
        self._per_second = check_positive("per_second", per_second, HINT)
        self._burst = None if burst is None else check_count("burst", burst, least=1)
        self._tokens = float(self.burst)
        self._filled = monotonic()
        self._lock = threading.Lock()
        tell_of_fork(self)

    def _forked(self) -> None:
        """See `Forkable`."""
        self._lock = threading.Lock()

    @staticmethod
    def adaptive(on: Errors, start: float = 10.0, least: float = 1.0, most: float = inf) -> "AdaptiveRate":
        """A rate that finds out what a server allows: it grows steadily, and falls when a call is refused.

        Args:
            on: The exception types that say that there were too many calls.
            start: Calls a second at first.
            least: It never falls below that.
            most: It never grows beyond that.

        Raises:
            TypeError, ValueError: An argument is none of these.
        """
        return AdaptiveRate(on, start, least, most)

    @property
    def per_second(self) -> float:
        """Calls a second, as of now."""
        return self._per_second

    @property
    def burst(self) -> int:
        """Calls that may begin at once."""
        return max(1, ceil(self._per_second / 20)) if self._burst is None else self._burst

    @property
    def bound(self) -> Bound:
        """Why it is no more: it was given; or it is at its `most`, calls were refused, or it is still growing."""
        return "given"

    def take(self) -> float:
        """Take a token for a call that begins after so many seconds; 0: now. Safe in any thread.

        So those that wait have their turns in the order in which they asked, on whatever loops. Who does not need its
        turn any more gives it back.
        """
        with self._lock:
            now = monotonic()
            self._fill(now)
            self._tokens -= 1.0
            self._took(now, 1, waits=self._tokens < 0.0)
            return max(0.0, -self._tokens / self._per_second)

    def take_ready(self, most: int, soon: int = 0) -> int:
        """Take tokens for calls that begin now, as many as there are, up to `most`. Safe in any thread.

        Args:
            most: At most.
            soon: And for calls that begin as soon as they can, of the tokens that nobody asks for: an eighth of them at
                most. So where the rate is far from acting, it is asked once for many calls.
        """
        with self._lock:
            now = monotonic()
            self._fill(now)
            tokens = max(0, int(self._tokens))
            count = min(most, tokens)
            if soon:
                count += min(soon, (tokens - count) // SPARE)
            self._tokens -= count
            if count:
                self._took(now, count)
            return count

    def give_back(self, count: int = 1) -> None:
        """Calls did not begin for which there were tokens. Safe in any thread."""
        with self._lock:
            self._tokens += count

    def _fill(self, now: float) -> None:
        self._tokens = min(float(self.burst), self._tokens + (now - self._filled) * self._per_second)
        self._filled = now

    def _took(self, now: float, count: int, *, waits: bool = False) -> None:
        """So many calls begin, at once or, if they have to wait, later."""

    def failed(self, error: BaseException) -> None:
        """A call has failed."""

    def __repr__(self) -> str:
        return f"Rate({self._per_second:g})" if self._burst is None else f"Rate({self._per_second:g}, {self._burst})"

    def __reduce__(self) -> Any:
        return Rate, (self._per_second, self._burst)


@dataclass(frozen=True)
class _Pace:
    """How an adaptive rate grows: by `factor` whenever it has been too little for `seconds`."""

    factor: float
    seconds: float


DOUBLING: Final = _Pace(2.0, 0.2)  # until the first refusal
CLIMBING: Final = _Pace(1.05, 0.2)  # until the second one, which is near the truth
HOLDING: Final = _Pace(1.01, 0.5)

BACK: Final = (0.95, 0.95, 0.9, 0.8, 0.7)  # what is left after a refusal, the next one soon after it, and so on
HOLD_OFF_SECONDS: Final = 0.05  # nothing begins after a refusal, and twice as long after the next one
MOST_HOLD_OFF_SECONDS: Final = 0.8
GUESS: Final = 1.2
FIRST: Final = 1  # it counts as so many in a row: it has grown far beyond what is allowed
SOON_SECONDS: Final = 1.0
QUIET_SECONDS: Final = 5.0  # without refusals: the server allows more than before


class AdaptiveRate(Rate):
    """See `Rate.adaptive`.

    It doubles every fifth of a second until a call is refused for the first time, then goes back and climbs in small
    steps to the second refusal. From then on it adds a hundredth every half second, and a refusal takes a twentieth
    off. It grows only while calls wait for it: what is not asked for says nothing of the server.

    After a refusal nothing begins for a moment, in which those that were under way may be refused, too: they are not
    counted again. Servers that count by the second refuse all calls to its end, so the moment grows from one refusal to
    the next.
    """

    def __init__(self, on: Errors, start: float, least: float, most: float) -> None:
        self._on = check_exceptions("on", on)
        self._least = check_positive("least", least, HINT)
        self._most = most if most == inf else check_positive("most", most, HINT)
        start = check_positive("start", start, HINT)
        if not self._least <= start <= self._most:
            raise ValueError(
                f"start must be between least and most, got {start=:g}, {least=:g}, {most=:g}; start low, for it finds "
                f"out more"
            )
        super().__init__(start)
        self._pace = DOUBLING
        self._changed = self._refused = self._second = self._filled
        self._wanted = False  # since it was changed, a call has waited for it
        self._in_a_row = 0  # refusals, each soon after the one before
        self._begun = self._begun_before = 0  # in this second, and in the one before

    @property
    def bound(self) -> Bound:
        if self._per_second >= self._most:
            return "most"
        return "growth" if self._pace is DOUBLING else "refusals"

    def _took(self, now: float, count: int, *, waits: bool = False) -> None:
        if now - self._second >= 1.0:
            self._begun_before = self._begun if now - self._second < 2.0 else 0
            self._begun, self._second = 0, now
        self._begun += count
        pace = self._pace
        if pace is HOLDING and now - self._refused >= QUIET_SECONDS:
            pace = CLIMBING
        if now - self._changed >= pace.seconds:
            if self._wanted:
                self._per_second = min(self._most, self._per_second * pace.factor)
            self._changed = now
            self._wanted = False
        self._wanted = self._wanted or waits

    def _latest(self, now: float) -> float:
        """Calls that have begun in the last second; of a rate in use for less than that, calls a second."""
        elapsed = now - self._second
        if not self._begun_before:
            return self._begun / min(1.0, max(elapsed, self._pace.seconds))
        return self._begun + self._begun_before * max(0.0, 1.0 - elapsed)

    def failed(self, error: BaseException) -> None:
        if not isinstance(error, self._on):
            return
        with self._lock:
            now = monotonic()
            since, pace, in_a_row = now - self._refused, self._pace, self._in_a_row
            if pace is not DOUBLING and since < _hold_off(in_a_row):
                return
            self._in_a_row = in_a_row = FIRST if pace is DOUBLING else in_a_row + 1 if since < SOON_SECONDS else 0
            self._fill(now)
            if pace is DOUBLING:
                wanted = min(self._per_second / 2, self._latest(now) * GUESS)
            else:
                wanted = self._per_second * BACK[min(in_a_row, len(BACK) - 1)]
            self._per_second = max(self._least, wanted)
            self._tokens = min(self._tokens, 0.0) - _hold_off(in_a_row) * self._per_second
            self._changed = self._refused = now
            self._wanted = False
            self._pace = CLIMBING if pace is DOUBLING else HOLDING

    def __repr__(self) -> str:
        return f"Rate.adaptive(now {self._per_second:g})"

    def __reduce__(self) -> Any:
        return AdaptiveRate, (self._on, self._per_second, self._least, self._most)


def _hold_off(in_a_row: int) -> float:
    return min(MOST_HOLD_OFF_SECONDS, HOLD_OFF_SECONDS * 2.0 ** min(in_a_row, 30))
