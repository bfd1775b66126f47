"""What the steps of a window share that run synchronous calls off the loop."""

from collections.abc import Iterable, Sequence
from time import perf_counter
from typing import Any, Final

from aioloader.core.entry import DONE, Entry
from aioloader.core.limit import Limit
from aioloader.engine.node import CHUNK_SECONDS
from aioloader.engine.steps import Step
from aioloader.executors.chunk import Call, ChunkResult, Failed, Refusal
from aioloader.insight.meters import StageMeter

__all__ = ["CHUNK_SAMPLES", "SyncStep"]

ODD: Final = {Failed, Refusal}  # kinds of outcomes that are no samples
CHUNK_SAMPLES: Final = 256  # at most in one hop, so that memory is bounded for samples that cost nothing


class SyncStep(Step):
    """What the two ways to run synchronous calls off the loop share.

    Args:
        calls: The neighbouring synchronous stages that cross together.
        concurrency: Calls that may stand side by side.
        elastic: Whether the window gets more room for cheap samples, so that a hop is worth its cost.
    """

    tells_end = True
    times_samples = False  # the times of single samples are known, see `tracing`

    def __init__(self, calls: Sequence[Call], concurrency: int | Limit, *, elastic: bool = True) -> None:
        super().__init__(StageMeter(" + ".join(call.label for call in calls), "sync"), concurrency)
        self._calls = tuple(calls)
        self.selects = any(call.predicate for call in calls)
        self._elastic = elastic
        self._active = 0  # hops under way
        self._extra_room = 0
        self._scheduled = False
        self._seconds_each: float | None = None  # what a sample costs, as far as it is known

    def accept(self, entry: Entry) -> None:
        if self.closed:
            return
        if self.tap is not None:
            self.tap.add((entry,))
            return
        self.inbox.append(entry)
        if not self._scheduled:  # after the entries that come in this same turn
            self._scheduled = True
            self._run.soon(self.dispatch)

    @property
    def extra_room(self) -> int:
        return self._extra_room

    @property
    def under_way(self) -> int:
        """Crossings that have begun and are not over."""
        return self._active

    @property
    def standing(self) -> int:
        """Those of them in which a sample has been for longer than a hop of cheap ones takes."""
        return self._active

    def _begins(self) -> None:
        """One more hop."""
        self._active += 1
        self.meter.idle.wait_for(None)
        self._window.hop_began()

    @property
    def free_places(self) -> int:
        if self.slots is not None and self.inbox:
            return 0
        return (self.concurrency - self._active) * self._size - len(self.inbox)

    @property
    def _size(self) -> int:
        """Samples that one hop is worth."""
        cost = self._seconds_each
        if cost is None:
            return 1
        return max(1, min(CHUNK_SAMPLES, int(CHUNK_SECONDS / max(cost, 1e-9))))

    @property
    def _room_for_hops(self) -> int:
        """What the hops that may be under way have use for, beside a place for each call."""
        return 2 * self.concurrency * (self._size - 1)

    def _landed(self, entries: Iterable[Entry], result: ChunkResult, settled: int = 0) -> None:
        """A hop is over; back on the loop. The first `settled` of its samples went on before."""
        self._active -= 1
        tried = len(result.outcomes)
        self._settle(entries, result.outcomes[settled:])
        if self.trace is not None and not self.times_samples:
            self.trace.hop([*entries], result.busy_seconds)
        self.meter.busy_seconds += result.busy_seconds
        self.meter.cpu_seconds += result.cpu_seconds
        if tried and result.busy_seconds:
            each = result.busy_seconds / tried
            self._seconds_each = each if self._seconds_each is None else (self._seconds_each + each) / 2
            extra_room = self._room_for_hops if self._elastic else 0
            if extra_room != self._extra_room:
                self._extra_room = extra_room
                self._window.resize()
        self.dispatch()
        if self.tap is not None:
            self.tap.pump()
        if not self._active:
            self.meter.idle.wait_for("input")
        if self.closed:
            self._window.rested()

    def _settle(self, entries: Iterable[Entry], outcomes: Sequence[Any]) -> None:
        """Send samples on with their outcomes."""
        self.meter.samples += len(outcomes)  # first: a budget of retries is a share of them
        now = self._window.now = perf_counter()
        forward, done = self._forward, 0
        together = self._in_place
        entry: Entry
        if together and outcomes and not {*map(type, outcomes)} & ODD:  # as a rule
            for entry, entry.value in zip(entries, outcomes, strict=False):
                entry.since, entry.state = now, DONE
            self._window.finished_in_place(len(outcomes))
            return
        for entry, outcome in zip(entries, outcomes, strict=False):
            entry.since = now
            if type(outcome) is Refusal:
                if outcome.stop is not None:
                    entry.stop = outcome.stop
                self._drop(entry, nothing=outcome.nothing)
            elif type(outcome) is Failed:
                entry.seconds = outcome.seconds
                if outcome.stop is not None:
                    entry.stop = outcome.stop
                self._fail(entry, outcome.error, outcome.label)
            else:
                entry.value = outcome
                if together:
                    entry.state = DONE
                    done += 1
                else:
                    forward(entry)
        if done:
            self._window.finished_in_place(done)

    def _lost(self, entries: Sequence[Entry], error: BaseException) -> None:
        """A hop never ran, or did not come back."""
        call = self._calls[0]
        self._landed(entries, ChunkResult([Failed(error, call.label, call.stop) for _ in entries], 0.0, 0.0))
