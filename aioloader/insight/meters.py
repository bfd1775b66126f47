"""Counters that running parts keep; cheap enough to be always on.

Written on the engine's loop, read from any thread: a snapshot may be a few samples out of step with itself.
"""

import threading
import time
from dataclasses import dataclass, field
from time import perf_counter
from typing import Literal

from aioloader.core.address import Address

__all__ = ["ConsumerMeter", "IdleClock", "StageMeter", "ThreadClock", "Why"]

Kind = Literal["source", "async", "sync", "process", "fold"]
Why = Literal["input", "room"]


@dataclass(slots=True)
class StageMeter:
    """Counters of one stage in one epoch.

    Attributes:
        name: The stage as the user wrote it, `map(fetch)`.
        kind: How it runs.
        concurrency: Samples under way at once, at most; 0 for folds.
        samples: Samples (or batches) that it finished.
        errors: How many of them failed.
        dropped: How many a predicate left out.
        dropped_late: How many more `drop_if` left out of batches just before collate; written in threads, under a lock.
        partial: Batches that were given before they were full, because their time was up.
        busy_seconds: Time in user code, summed over samples that were under way side by side.
        cpu_seconds: CPU time of its threads or worker processes; 0 for what runs on the loop or in a user's executor.
        idle: When the stage had nothing under way, and why.
        room: Entries under way or finished that its window held at most; stages of one window share it.
        ahead: Entries that are held ready after it, where no other stage's window holds them.
        ordered: That window gives them in the order of the input.
        finished_sum: Finished entries in the window at each hand-over, summed.
        handovers: How many hand-overs there were.
        gaps: See `Node.gaps`.
        address: Tells stages apart that have the same name, see `Address`.
        retired: The stage has ended; if `repeat` makes it anew, it goes on counting here.
        hits: Samples that came from this cache.
        misses: Samples that were not in it.
        cached_bytes: What is in it.
    """

    name: str
    kind: Kind
    concurrency: int = 0
    samples: int = 0
    errors: int = 0
    dropped: int = 0
    dropped_late: int = 0
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
    retired: bool = False
    hits: int = 0
    misses: int = 0
    cached_bytes: int = 0


class IdleClock:
    """Splits the time in which nothing was under way by what it waited for."""

    __slots__ = ("_began", "_seconds", "_why")

    def __init__(self) -> None:
        self._seconds: dict[Why, float] = {"input": 0.0, "room": 0.0}
        self._began = 0.0
        self._why: Why | None = None

    def wait_for(self, why: Why | None) -> None:
        """From now on nothing is under way because of `why`; None: work goes on."""
        if why is self._why:
            return
        now = perf_counter()
        if self._why is not None:
            self._seconds[self._why] += now - self._began
        self._began = now
        self._why = why

    def seconds(self, why: Why) -> float:
        """How long it has waited for `why`, until now if it still does."""
        going_on = perf_counter() - self._began if self._why is why else 0.0
        return self._seconds[why] + going_on


@dataclass(slots=True)
class ConsumerMeter:
    """What the consumer saw of one epoch. Times are `perf_counter` seconds.

    Attributes:
        began: When the first `next()` was called; None before.
        ended: When the epoch ended; None while it goes on.
        first_after_seconds: How long the first batch took.
        batches: How many batches were delivered.
        waited_seconds: Time spent in `next()` after the first batch was there.
        loop: CPU time of the thread that the event loop runs in.
        end_seen: The consumer knows that the epoch is over.
    """

    began: float | None = None
    ended: float | None = None
    first_after_seconds: float | None = None
    batches: int = 0
    waited_seconds: float = 0.0
    loop: "ThreadClock | None" = None
    end_seen: bool = False
    last_waited_seconds: float = 0.0

    def delivered(self, asked: float) -> None:
        """A batch was handed out that had been asked for at `asked`."""
        waited = self.last_waited_seconds = perf_counter() - asked
        if self.first_after_seconds is None:
            self.first_after_seconds = waited
        else:
            self.waited_seconds += waited
        self.batches += 1

    def waited_for_end(self, asked: float) -> None:
        """There was no batch left, as turned out after waiting since `asked`; counts once."""
        if not self.end_seen and self.first_after_seconds is not None:
            self.end_seen = True
            self.waited_seconds += perf_counter() - asked

    def finish(self) -> None:
        """The epoch is over, or was given up."""
        if self.ended is None:
            self.ended = perf_counter()
            if self.loop is not None:
                self.loop.stop()


class ThreadClock:
    """CPU seconds of the thread that makes it, from then on, readable from any thread."""

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
        except OSError:  # the thread has ended, and nobody stopped this
            return self._began

    def stop(self) -> None:
        """Keep the figure: the thread may end now."""
        self._ended = self._now()

    def seconds(self) -> float:
        """CPU seconds so far; 0 where the system does not tell."""
        return (self._now() if self._ended is None else self._ended) - self._began


def _thread_clock() -> int | None:
    get = getattr(time, "pthread_getcpuclockid", None)  # Linux and others, not macOS, not Windows
    return None if get is None else int(get(threading.get_ident()))
