"""Gauges of now: what is under way, since when, and how long finished samples wait to be taken.

Nothing is counted for them: whoever asks looks at what the steps have at hand, from any thread. What is looked at goes
on meanwhile, so numbers may be some samples apart.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

from aioloader.core.entry import Entry
from aioloader.core.safe_text import safe_repr, safe_repr_list
from aioloader.insight.policies import PolicyMeter, PolicyStats

__all__ = ["Gauge", "Gauges", "WaitMeter", "Waits"]

LATEST: Final = 1000  # waits that percentiles are of
ENOUGH: Final = 16  # samples that speak for all that are taken together


class Gauge(Protocol):
    """What a stage at work can be asked, from any thread."""

    def at_hand(self) -> Sequence[tuple[Any, float]]:
        """For each call under way, the key of its sample (None: not known) and when it began (`perf_counter`)."""

    @property
    def held(self) -> int:
        """Finished samples in its window that wait to be taken."""


@dataclass(frozen=True, slots=True)
class Waits:
    """How long finished samples waited until they were taken, in seconds.

    Attributes:
        sum: Of all samples of this epoch. Where many are taken together, that is by 8 to 16 of them, evenly spread; and
            where they are taken more often than twice in a millisecond, by those of the first time.
        max: The longest of those.
        p50: Half of the latest samples, about a thousand, waited for no longer than this.
        p95: Likewise, 95 of 100.
        p99: Likewise, 99 of 100.
    """

    sum: float = 0.0
    max: float = 0.0
    p50: float = 0.0
    p95: float = 0.0
    p99: float = 0.0

    @classmethod
    def of(cls, latest: list[float], total: float, longest: float) -> "Waits":
        """Of the `latest` ones, which need not be sorted, and of all of the epoch their `total` and the `longest`."""
        latest = sorted(latest)
        last = len(latest) - 1
        p50, p95, p99 = (max(0.0, latest[round(share * last)]) if latest else 0.0 for share in (0.5, 0.95, 0.99))
        return cls(max(0.0, total), longest, p50, p95, p99)


class WaitMeter:
    """Collects how long samples waited. One thread at a time tells it of them; any thread may ask."""

    __slots__ = ("_count", "_latest", "_max", "_singles", "_sum")

    def __init__(self) -> None:
        self._sum = 0.0
        self._max = 0.0
        self._latest: deque[tuple[float, list[float]]] = deque()  # as they came, so that nothing is made per sample
        self._count = 0  # of samples in it
        self._singles: deque[float] = deque(maxlen=LATEST)  # waits; one window has many of these or many of those

    def took(self, now: float, entries: Sequence[Entry], count: int) -> None:
        """`entries` are taken together, at `now`. Of many, some speak for all; they may speak for others as well.

        Args:
            now: As given by `perf_counter`.
            entries: At least one.
            count: How many were taken since the last call, these included.
        """
        since = [entry.since for entry in entries[:: (len(entries) - 1) // ENOUGH + 1]]
        size = len(since)
        self._sum += (now - sum(since) / size) * count
        since.sort()  # they are nearly in order: this takes a third of the time of `min`
        if (longest := now - since[0]) > self._max:
            self._max = longest
        latest = self._latest
        latest.append((now, since))
        self._count += size
        while self._count - len(latest[0][1]) >= LATEST:
            self._count -= len(latest.popleft()[1])

    def took_one(self, now: float, since: float) -> None:
        """The same for one, at a third of the cost."""
        wait = now - since
        self._sum += wait
        if wait > self._max:
            self._max = wait
        self._singles.append(wait)

    @property
    def waits(self) -> Waits:
        """As they are now."""
        runs, singles = self._latest.copy(), self._singles.copy()  # each in one step: they may grow meanwhile
        latest = [*singles, *(now - since for now, times in runs for since in times)]
        return Waits.of(latest, self._sum, self._max)


@dataclass(frozen=True, slots=True)
class Gauges:
    """What one stage answered.

    Attributes:
        under_way: Calls that have begun and not ended.
        oldest_since: When the first of them began (`perf_counter`, which all processes of a machine share).
        oldest_key: The key of its sample, as text; empty if it is not known.
        finished: Finished samples in its window that wait to be taken.
        waits: How long they waited so far.
        policies: See `StageStats`, but for `next_attempt_seconds`; None: it has none.
        next_attempt_at: When the first sample is tried again (`perf_counter`); None: there is none.
    """

    under_way: int = 0
    oldest_since: float | None = None
    oldest_key: str = ""
    finished: int = 0
    waits: Waits = field(default_factory=Waits)
    policies: PolicyStats | None = None
    next_attempt_at: float | None = None

    @classmethod
    def asked(
        cls, gauge: Gauge | None, queued: int, meter: WaitMeter | None, policies: PolicyMeter | None = None
    ) -> "Gauges":
        """Ask a stage.

        Args:
            gauge: The stage at work; None: it does not work any more.
            queued: Finished samples that are in no window any more and still wait.
            meter: Of its window; None: nothing has left it.
            policies: Of the stage; None: it has none.
        """
        waits = Waits() if meter is None else meter.waits
        stats, next_attempt_at = (None, None) if policies is None else policies.stats()
        finished, at_hand = queued, None
        if gauge is not None:
            at_hand = gauge.at_hand()
            finished += gauge.held
        key, since = min(at_hand, key=_since) if at_hand else (None, None)
        return cls(len(at_hand or ()), since, _named(key), finished, waits, stats, next_attempt_at)

    @property
    def at_rest(self) -> "Gauges":
        """What is left when the stage does not work any more: nothing waits."""
        policies = self.policies
        if policies is not None:
            policies = replace(policies, waiting_for_attempt=0, waiting_for_rate=0, waiting_for_second_call=0)
        return Gauges(waits=self.waits, policies=policies)


def _since(call: tuple[Any, float]) -> float:
    return call[1]


def _named(key: Any) -> str:
    if key is None:
        return ""
    return safe_repr_list(key) if type(key) is list else safe_repr(key)
