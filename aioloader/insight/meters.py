"""Counters of a running loader, cheap enough to be always on.

They are written on the engine's loop and read from any thread, so the numbers of a snapshot may be some samples apart.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Final, Literal

from aioloader.core.address import Address
from aioloader.insight.actors import ActorStats
from aioloader.insight.gauges import Gauge, Gauges, WaitMeter, Waits
from aioloader.insight.policies import PolicyMeter

__all__ = ["ConsumerMeter", "IdleClock", "StageMeter", "ThreadClock", "Why"]

Kind = Literal["source", "async", "sync", "process", "ray", "fold"]
Why = Literal["input", "room"]

LATEST: Final = 4096
"""Batches whose waits are kept one by one."""


@dataclass(slots=True)
class StageMeter:
    """Counters of one stage in one epoch.

    Attributes:
        name: The stage as the user wrote it, `map(fetch)`.
        kind: How it runs.
        concurrency: The maximum number of samples under way at once; 0 for folds.
        samples: Calls for samples (or batches) that have ended, attempts that failed included.
        errors: How many of them failed.
        dropped: How many a predicate dropped, or a source.
        retries: Attempts after the first one of a sample.
        timeouts: Calls whose time was up.
        hedges: Second calls for samples whose first one took long.
        dropped_late: How many more `drop_if` dropped from batches just before collate; written in threads, under a
            lock.
        partial: Batches that were delivered before they were full, because `max_wait` was over.
        busy_seconds: Time in user code, summed over concurrent samples.
        cpu_seconds: CPU time of its threads or worker processes; 0 on the loop and in a user's executor.
        idle: When the stage had nothing under way, and why.
        room: The maximum number of entries, under way or finished, in its window; stages of one window share it.
        ahead: Entries that are held ready after it, outside of any window.
        ordered: Whether the window delivers entries in the order of the input.
        finished_sum: The sum, over all hand-overs, of finished entries in the window.
        handovers: How many hand-overs there were.
        gaps: See `Node.gaps`.
        address: Tells apart stages that have the same name, see `Address`.
        retired: Whether the stage has ended. If `repeat` makes it again, that goes on counting here.
        skipped: Errors that `skip_errors` left out.
        hits: Samples that came from this cache.
        misses: Samples that were not in it.
        cached_bytes: The size of its samples.
        live: For a source: its samples are still being produced.
        gauge: The stage at work, which can be asked how things are; None: it does not work any more.
        queued: Gives how many entries of its window are on their way to a consumer in another thread, and wait.
        epoch_length: Of a source of a mix: how many samples it has, as far as that is known.
        waits: How long entries of its window waited to be taken; stages of one window share it.
        policies: Counts what its policies do; None: it has none.
        told: What it answered in another process, when its counters came from there.
        actors: Gives what is known of its actors, from any thread; None: it has none.
    """

    name: str
    kind: Kind
    concurrency: int = 0
    samples: int = 0
    errors: int = 0
    dropped: int = 0
    dropped_late: int = 0
    retries: int = 0
    timeouts: int = 0
    hedges: int = 0
    partial: int = 0
    busy_seconds: float = 0.0
    cpu_seconds: float = 0.0
    idle: "IdleClock" = field(default_factory=lambda: IdleClock())
    room: int = 0
    ahead: int = 0
    ordered: bool = True
    finished_sum: int = 0
    handovers: int = 0
    gaps: bool = False
    address: Address = ()
    epoch_length: int | None = None
    retired: bool = False
    skipped: int = 0
    hits: int = 0
    misses: int = 0
    cached_bytes: int = 0
    live: bool = False
    gauge: Gauge | None = None
    queued: Callable[[], int] | None = None
    waits: WaitMeter | None = None
    policies: PolicyMeter | None = None
    told: Gauges | None = None
    actors: Callable[[], tuple[ActorStats, ...]] | None = None

    @property
    def gauges(self) -> Gauges:
        """How things are now, or, in another process, were when it last told."""
        if self.told is not None:
            return self.told
        return Gauges.asked(self.gauge, 0 if self.queued is None else self.queued(), self.waits, self.policies)

    def release(self, gauge: Gauge) -> None:
        """`gauge` does not work any more. The next round of a `repeat` may go on with this meter, and has another."""
        if self.gauge is gauge:
            self.gauge = None
            if self.policies is not None:
                self.policies.waiting = None

    def to_tell(self) -> "StageMeter":
        """The same for another process, as it is now."""
        return replace(self, gauge=None, queued=None, waits=None, policies=None, told=self.gauges, actors=None)


class IdleClock:
    """Measures the time in which nothing was under way, by the reason."""

    __slots__ = ("_began", "_seconds", "_why")

    def __init__(self) -> None:
        self._seconds: dict[Why, float] = {"input": 0.0, "room": 0.0}
        self._began = 0.0
        self._why: Why | None = None

    def wait_for(self, why: Why | None) -> None:
        """Begin to wait because of `why`; None: stop waiting."""
        if why is self._why:
            return
        now = perf_counter()
        if self._why is not None:
            self._seconds[self._why] += now - self._began
        self._began = now
        self._why = why

    def seconds(self, why: Why) -> float:
        """How long it has waited because of `why`, until now if it still does."""
        going_on = perf_counter() - self._began if self._why is why else 0.0
        return self._seconds[why] + going_on


@dataclass(slots=True)
class ConsumerMeter:
    """One epoch as the consumer saw it. Times are `perf_counter` seconds.

    Attributes:
        began: When the first `next()` was called; None before.
        ended: When the epoch ended; None while it goes on.
        first_after_seconds: How long the first batch took.
        batches: How many batches were delivered.
        waited_seconds: Time spent in `next()` after the first batch.
        loop: CPU time of the event loop's thread.
        end_seen: Whether the consumer knows that the epoch is over.
        last_waited_seconds: How long the newest batch took.
        asking: When each `next()` was called that waits now, by what is its own.
        asks_ranks: Whether it waits for other ranks, with `even="agree"`, now.
        latest: Of the latest batches, when each was asked for and how long it took.
        longest_seconds: The longest wait after the first batch.
    """

    began: float | None = None
    ended: float | None = None
    first_after_seconds: float | None = None
    batches: int = 0
    waited_seconds: float = 0.0
    loop: "ThreadClock | None" = None
    end_seen: bool = False
    last_waited_seconds: float = 0.0
    asking: dict[object, float] = field(default_factory=dict)
    asks_ranks: bool = False
    latest: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=LATEST))
    longest_seconds: float = 0.0

    @contextmanager
    def asks(self, since: float) -> Iterator[None]:
        """A `next()` that was called at `since` waits."""
        me = object()
        self.asking[me] = since
        try:
            yield
        finally:
            del self.asking[me]

    @property
    def waiting_seconds(self) -> float:
        """How long the consumer has been waiting, now."""
        since = min(list(self.asking.values()), default=None)  # a copy: others ask meanwhile
        return 0.0 if since is None or self.ended is not None else perf_counter() - since

    def delivered(self, called: float) -> None:
        """Count a batch that is delivered now, by a `next()` that was called at `called`."""
        waited = self.last_waited_seconds = perf_counter() - called
        if self.first_after_seconds is None:
            self.first_after_seconds = waited
        else:
            self.waited_seconds += waited
            if waited > self.longest_seconds:
                self.longest_seconds = waited
        self.latest.append((called, waited))
        self.batches += 1

    @property
    def waits(self) -> Waits:
        """Those for all batches but the first one."""
        latest = list(self.latest.copy())  # a copy is made in one step: it may grow meanwhile
        first = 1 if self.batches <= len(latest) else 0
        return Waits.of([waited for _, waited in latest[first:]], self.waited_seconds, self.longest_seconds)

    def waited_for_end(self, called: float) -> None:
        """Count the wait of a `next()` that was called at `called` and found the end; only the first counts."""
        if not self.end_seen and self.first_after_seconds is not None:
            self.end_seen = True
            self.waited_seconds += perf_counter() - called

    def finish(self) -> None:
        """Stop the clocks: the epoch has ended or was closed."""
        if self.ended is None:
            self.ended = perf_counter()
            if self.loop is not None:
                self.loop.stop()


class ThreadClock:
    """CPU seconds of the thread that makes this object, from then on; readable from any thread."""

    __slots__ = ("_began", "_clock", "_ended")

    def __init__(self) -> None:
        self._clock = _thread_clock()
        self._ended: float | None = None
        self._began = self._now()

    def _now(self) -> float:
        if self._clock is None:
            return 0.0
        try:
            return time.clock_gettime(self._clock)
        except OSError:  # the thread has ended before `stop`
            return self._began

    def stop(self) -> None:
        """Keep the value, so that the thread may end."""
        self._ended = self._now()

    def seconds(self) -> float:
        """CPU seconds so far; 0 where the system has no such clock."""
        return (self._now() if self._ended is None else self._ended) - self._began


def _thread_clock() -> int | None:
    get = getattr(time, "pthread_getcpuclockid", None)  # Linux and others, not macOS, not Windows
    return None if get is None else int(get(threading.get_ident()))
