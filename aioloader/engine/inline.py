"""No concurrency at all: the same folds, but source and functions run in the consumer's thread, inside `next()`.

This is `num_workers=0` of the drop-in, and the reference that everything concurrent must equal.
"""

from collections.abc import Iterable, Sequence
from contextvars import copy_context
from time import perf_counter
from types import CoroutineType
from typing import TYPE_CHECKING, Any

from aioloader.core.cursors import CompletionCursor
from aioloader.core.entry import DONE, LAST, Entry, annotate
from aioloader.core.keys import NAMES
from aioloader.engine.node import Kick, Node
from aioloader.engine.resumable import split_cursor
from aioloader.engine.sync_cursor import SyncCursor
from aioloader.executors.chunk import Call, refuse_coroutine
from aioloader.executors.current_sample import SampleContext, current_sample
from aioloader.insight.meters import StageMeter

if TYPE_CHECKING:
    from aioloader.engine.run import Run

__all__ = ["InlineMap", "InlineSource"]


class InlineSource(Node):
    """Reads a sync iterable, no further than asked."""

    def __init__(self, iterable: Iterable[Any], name: str, epoch: int, *, keys: bool = False) -> None:
        self._samples = SyncCursor(iterable, name)
        self._keys = keys  # see `StreamSource`
        self._skipped = 0  # samples that were delivered before a resume, and are to be read again
        self._position = 0
        self._failed_at: Any = None  # where to go on if it fails now
        self._over = False
        self._failure: Exception | None = None
        self._epoch = epoch
        self.meter = StageMeter(name, "source", concurrency=1)
        self.meter.gauge = self._at_hand = _AtHand()
        self._entry: Entry | None = None  # that is under way

    def resume(self, cursor: Any) -> None:
        origin, self._skipped = split_cursor(cursor)
        self._samples.origin, self._failed_at = origin, cursor
        self._position = self._skipped + (0 if origin is None else origin["at"])

    def start(self, run: "Run", kick: Kick) -> None:
        raise AssertionError("an inline node belongs to no run")

    def poll(self, limit: int) -> list[Entry]:
        ready = self._samples.ready
        entries: list[Entry] = []
        while len(entries) < limit:
            if ready:
                sample, cursor = ready.popleft()
                if self._skipped:
                    self._skipped -= 1
                    continue
                position = self._position
                self._position = self.meter.samples = position + 1
                self._failed_at = cursor
                key = sample if self._keys or isinstance(sample, NAMES) else position
                entry = Entry(sample, cursor, key, position)
                entry.state = DONE
                entries.append(entry)
            elif entries or self._over:
                break
            else:
                self._read(max(limit, self._skipped))
        if not entries and self._failure is not None:
            entries = [Entry.last(self._failure, self._failed_at, self._position)]
            annotate(self._failure, self.meter.name, entries[0], self._epoch)
            self._failure = None
        self.ended = self._over and not (ready or self._failure)
        return entries

    def _read(self, limit: int) -> None:
        samples = self._samples
        self._at_hand.call = (None, perf_counter())
        try:
            samples.read(limit)
        except StopIteration:
            self._over = True
        except Exception as error:
            self._over = True
            self._failure = error
        finally:
            self.meter.busy_seconds = samples.busy_seconds
            self._at_hand.call = None

    def close(self) -> None:
        self._samples.close()


class _AtHand:
    """What is worked on, for statistics, which must not keep the nodes: generators are closed when these are gone.

    Attributes:
        call: The key and the beginning; None: nothing is under way.
    """

    held = 0

    def __init__(self) -> None:
        self.call: tuple[Any, float] | None = None

    def at_hand(self) -> list[tuple[Any, float]]:
        """See `Gauge`."""
        call = self.call
        return [] if call is None else [call]


class InlineMap(Node):
    """Calls the functions of one journey.

    Args:
        upstream: Gives the entries.
        calls: The functions, in order.
        epoch: For notes.
        ordered: False: cursors are those of a window that gives entries as they are finished, so that states are the
            same with and without workers.
    """

    def __init__(self, upstream: Node, calls: Sequence[Call], epoch: int, *, ordered: bool = True) -> None:
        self._upstream = upstream
        self._calls = calls
        self._epoch = epoch
        self._completion = None if ordered else CompletionCursor()
        self.meter = StageMeter(" + ".join(call.label for call in calls), "sync", concurrency=1)
        self.meter.gauge = self._at_hand = _AtHand()
        self._entry: Entry | None = None  # that is under way
        self._began = 0.0  # the last attempt at a sample of it

    def resume(self, cursor: Any) -> None:
        if self._completion is not None:
            cursor = self._completion.resume(cursor)
        if cursor is not None:
            self._upstream.resume(cursor)

    def start(self, run: "Run", kick: Kick) -> None:
        raise AssertionError("an inline node belongs to no run")

    def poll(self, limit: int) -> list[Entry]:
        while True:
            run = self._upstream.poll(1)
            self.ended = self._upstream.ended and not run
            if not run:
                return run
            if self._completion is not None and not (run := self._completion.comes(run)):
                continue
            entry = run[0]
            kept = copy_context().run(self._journey, entry)  # as `isolated`; the consumer must not see it either
            if self._completion is not None:
                if entry.state == LAST:
                    entry.cursor = self._completion.cursor
                else:
                    self._completion.leaves(entry)
            if kept:
                return run

    def retried(self, attempt: int) -> None:
        """A sample of the entry that is under way is tried for the `attempt`-th time."""
        self.meter.retries += 1
        self.meter.samples += 1  # for the attempt that has failed, as in the other steps
        if self._entry is not None:
            self._entry.attempts = max(self._entry.attempts, attempt)
            self._began = perf_counter()

    def _journey(self, entry: Entry) -> bool:
        """Take `entry` through the calls; False: a predicate refused it."""
        if entry.error is not None:
            return True
        began = self._began = perf_counter()
        self._at_hand.call = (entry.key, began)
        call = self._calls[0]
        sample = SampleContext()
        sample.name = self._entry = entry
        current_sample.set(sample)
        try:
            for call in self._calls:
                sample.seed = call.seed
                result = call.fn(entry.value)
                if type(result) is CoroutineType:
                    result = refuse_coroutine(result, call.label)
                if not call.predicate:
                    entry.value = result
                elif not result:
                    return False
        except Exception as error:
            annotate(error, call.label, entry, self._epoch)
            entry.seconds = perf_counter() - self._began
            entry.error = error
            entry.value = None
            self.meter.errors += 1
        finally:
            self.meter.busy_seconds += perf_counter() - began
            self.meter.samples += 1
            self._at_hand.call = self._entry = None
        return True

    def close(self) -> None:
        self._upstream.close()
