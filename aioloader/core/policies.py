"""`Retry`, `Hedge` and `Rate`: what is done about calls that fail, take long, or are too many."""

import random
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from math import ceil, inf, isfinite
from time import monotonic
from typing import Any, Final

from aioloader.core.checks import check_count
from aioloader.core.forks import tell_of_fork

__all__ = [
    "Budget",
    "Errors",
    "Hedge",
    "Policies",
    "Rate",
    "Retry",
    "as_retry",
    "check_exceptions",
    "check_policies",
    "retry_after",
]

Errors = type[Exception] | tuple[type[Exception], ...]

LATE_SECONDS: Final = 0.005  # a timer that rings so much late costs no tokens
FREE: Final = 10  # extra calls that a budget allows at first: a share of no calls would be none


def check_exceptions(name: str, kinds: Any) -> Errors:
    """`kinds` as exception types, for `except`.

    Raises:
        TypeError: It is neither an exception type nor a tuple of them.
    """
    types = kinds if isinstance(kinds, tuple) else (kinds,)
    if not types or not all(isinstance(kind, type) and issubclass(kind, Exception) for kind in types):
        raise TypeError(
            f"{name} must be an exception type or a tuple of them, got {kinds!r}; pass for instance "
            f"(OSError, TimeoutError)"
        )
    return types


def _number(name: str, value: Any, *, least: float, most: float = inf, hint: str = "") -> float:
    way_out = f"; {hint}" if hint else ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}{way_out}")
    if not (isfinite(value) and least <= value <= most):
        upper = "" if most == inf else f" to {most:g}"
        raise ValueError(f"{name} must be {least:g}{upper or ' or more'}, got {value!r}{way_out}")
    return float(value)


@dataclass(frozen=True)
class Retry:
    """A call that fails is made again, after a while.

    The n-th wait is `wait_initial * 2 ** (n - 1)` seconds and up to `jitter` more by chance, `wait_max` at most. Where
    the error says how long to wait (an attribute `retry_after`, or the header `Retry-After` of its response), it is
    that long at least. A sample that waits keeps its slot and its place, and takes no concurrency from others. After
    the last attempt, the user's own exception stands at the place of the sample, with a note that says how many there
    were.

    Args:
        attempts: Calls for one sample, at least 1: 3 means two retries.
        on: The exception types after which it is worth another attempt.
        wait_initial: Seconds.
        wait_max: Seconds.
        jitter: Seconds.
        budget: Retries as a share of all calls, 0 to 1, so that an outage is not made worse: beyond that, errors are
            final (the first ten retries are free). None: no limit.

    Raises:
        TypeError, ValueError: An argument is none of these.
    """

    attempts: int = 3
    on: Errors = Exception
    wait_initial: float = 0.1
    wait_max: float = 5.0
    jitter: float = 1.0
    budget: float | None = None

    def __post_init__(self) -> None:
        check_count("attempts", self.attempts, least=1, hint="attempts=1 makes no retry")
        object.__setattr__(self, "on", check_exceptions("on", self.on))
        for name in ("wait_initial", "wait_max", "jitter"):
            _number(name, getattr(self, name), least=0)
        if self.budget is not None:
            _number("budget", self.budget, least=0, most=1, hint="0.1 allows one retry for ten calls")

    def seconds_before(self, attempt: int, error: BaseException) -> float:
        """How long to wait before `attempt` (2 or more), since the one before failed with `error`."""
        wait = min(self.wait_max, self.wait_initial * 2.0 ** min(attempt - 2, 64) + random.random() * self.jitter)
        return max(wait, retry_after(error) or 0.0)


def as_retry(retry: Any) -> Retry | None:
    """`retry=` of a stage: attempts, a `Retry`, or None.

    Raises:
        TypeError, ValueError: It is none of these.
    """
    if retry is None or isinstance(retry, Retry):
        return retry
    if isinstance(retry, bool) or not hasattr(retry, "__index__"):
        raise TypeError(f"retry must be a number of attempts or a Retry, got {retry!r}; pass for instance retry=3")
    return Retry(check_count("retry", retry, least=1, hint="it is the number of attempts; leave it out for one"))


def retry_after(error: BaseException) -> float | None:
    """Seconds that the server asked to wait, if `error` tells; at most an hour."""
    try:
        value: Any = getattr(error, "retry_after", None)
        if value is None:
            headers = getattr(getattr(error, "response", None), "headers", None) or getattr(error, "headers", None)
            value = None if headers is None else headers.get("Retry-After")
        if value is None:
            return None
        try:
            seconds = float(value)
        except ValueError:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        return min(max(seconds, 0.0), 3600.0) if isfinite(seconds) else None
    except Exception:  # it is the user's object, and it may say anything
        return None


@dataclass(frozen=True)
class Hedge:
    """A second call for a sample whose first one takes long: the first result counts, the other call is cancelled.

    For async functions that may be called twice for one sample. The loser is cancelled and awaited. Both calls count in
    the concurrency of the stage.

    Args:
        after: Seconds; or a percentile of this stage's calls, `"p95"`: known after some twenty calls.
        budget: Second calls as a share of all calls, 0 to 1.

    Raises:
        TypeError, ValueError: An argument is none of these.
    """

    after: float | str = "p95"
    budget: float = 0.05

    def __post_init__(self) -> None:
        if isinstance(self.after, str):
            if self.percentile is None:
                raise ValueError(f"after must be seconds or a percentile from 'p1' to 'p99', got {self.after!r}")
        else:
            _number("after", self.after, least=0)
        _number("budget", self.budget, least=0, most=1, hint="0.05 allows one second call for twenty")

    @property
    def percentile(self) -> int | None:
        """1 to 99; None: `after` is in seconds."""
        after = self.after
        if not isinstance(after, str) or not after.startswith("p") or not after[1:].isdigit():
            return None
        number = int(after[1:])
        return number if 1 <= number <= 99 else None


@dataclass(frozen=True)
class Policies:
    """What is done about the calls of one stage.

    Attributes:
        retry: When one that fails is made again; None: never.
        timeout: Seconds for one attempt; None: no limit.
        hedge: When there is a second call beside the first one; None: never.
        rate: How many begin; None: as many as there is room for.
    """

    retry: Retry | None = None
    timeout: float | None = None
    hedge: Hedge | None = None
    rate: "Rate | None" = None


def check_policies(
    retry: Any, timeout: Any, hedge: Any, rate: Any, *, is_async: bool, executor: Any = None
) -> Policies | None:
    """What is done about the calls of a stage; None: nothing.

    Args:
        retry: See `Pipeline.map`, as for the following.
        timeout: See there.
        hedge: See there.
        rate: See there.
        is_async: The function is async.
        executor: Where it runs, if it is not.

    Raises:
        TypeError, ValueError: One of them is none, or does not fit the function.
    """
    if timeout is not None:
        timeout = _positive("timeout", timeout, "leave it out for no limit")
        if not is_async and executor != "process":
            raise ValueError(
                f"timeout cannot stop a thread, got {timeout=} for a function that runs in one; make it async, or pass "
                f"executor='process', or give the client inside of it a timeout of its own"
            )
    if hedge is not None:
        if not isinstance(hedge, Hedge):
            raise TypeError(f"hedge must be a Hedge, got {hedge!r}; pass for instance Hedge(after='p95', budget=0.05)")
        if not is_async:
            raise ValueError("hedge is for async functions, whose second calls can be cancelled; leave it out")
    if rate is not None and not isinstance(rate, Rate):
        raise TypeError(f"rate must be a Rate, got {rate!r}; pass for instance Rate(100), which may be shared")
    retry = as_retry(retry)
    if retry is not None and retry.attempts == 1:
        retry = None
    policies = Policies(retry, timeout, hedge, rate)
    return None if policies == Policies() else policies


class Budget:
    """Extra calls as a share of calls.

    Args:
        share: 0 to 1; None: any number.
    """

    def __init__(self, share: float | None) -> None:
        self._share = share
        self._used = 0

    def take(self, calls: int) -> bool:
        """Whether one more is allowed, after `calls` calls."""
        if self._share is not None and self._used >= FREE * (self._share > 0) + self._share * calls:
            return False
        self._used += 1
        return True


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
        self._per_second = _positive("per_second", per_second)
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

    def take(self) -> float:
        """Take a token: 0. Seconds until there may be one, if there is none now. Safe in any thread."""
        with self._lock:
            now = monotonic()
            most = self.burst + LATE_SECONDS * self._per_second
            self._tokens = min(most, self._tokens + (now - self._filled) * self._per_second)
            self._filled = now
            if self._tokens >= 1.0:
                self._tokens -= 1.0
                self._took(now)
                return 0.0
            return (1.0 - self._tokens) / self._per_second

    def _took(self, now: float) -> None:
        """A call begins."""

    def failed(self, error: BaseException) -> None:
        """A call has failed."""

    def __repr__(self) -> str:
        return f"Rate({self._per_second:g})" if self._burst is None else f"Rate({self._per_second:g}, {self._burst})"

    def __reduce__(self) -> Any:
        return Rate, (self._per_second, self._burst)


GROWTH_SECONDS: Final = 0.5  # twice as fast until the first refusal, then a little faster, after so long
STEP: Final = 1.02
BACK: Final = 0.9


class AdaptiveRate(Rate):
    """See `Rate.adaptive`.

    It doubles every half second until a call is refused for the first time. From then on, a refusal takes a tenth
    off, once for all calls that were under way at that time, and every half second without one adds a fiftieth: less
    than a server's own second, so that few calls are refused in vain.
    """

    def __init__(self, on: Errors, start: float, least: float, most: float) -> None:
        self._on = check_exceptions("on", on)
        self._least = _positive("least", least)
        self._most = most if most == inf else _positive("most", most)
        if not self._least <= start <= self._most:
            raise ValueError(f"start must be between least and most, got {start=}, {least=}, {most=}")
        super().__init__(start)
        self._searching = True
        self._changed = monotonic()

    def _took(self, now: float) -> None:
        if now - self._changed >= GROWTH_SECONDS:
            self._changed = now
            self._per_second = min(self._most, self._per_second * (2.0 if self._searching else STEP))

    def failed(self, error: BaseException) -> None:
        if not isinstance(error, self._on):
            return
        with self._lock:
            now = monotonic()
            if self._searching or now - self._changed >= GROWTH_SECONDS / 5:
                self._per_second = max(self._least, self._per_second * (0.5 if self._searching else BACK))
                self._tokens = min(self._tokens, 0.0)
                self._changed = now
            self._searching = False

    def __repr__(self) -> str:
        return f"Rate.adaptive(now {self._per_second:g})"

    def __reduce__(self) -> Any:
        return AdaptiveRate, (self._on, self._per_second, self._least, self._most)


def _positive(name: str, value: Any, hint: str = "loader.paused() lets nothing begin") -> float:
    number = _number(name, value, least=0, hint=hint)
    if not number:
        raise ValueError(f"{name} must be more than 0, got {value!r}; {hint}")
    return number
