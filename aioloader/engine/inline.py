"""No concurrency at all: the same folds over sources and steps that run in the consumer's thread, in `next()`.

This is `num_workers=0` of the drop-in, and the reference that everything concurrent must equal.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import copy_context
from time import perf_counter
from types import CoroutineType
from typing import TYPE_CHECKING, Any

from aioloader.core.cursors import CompletionCursor
from aioloader.core.entry import DONE, LAST, Entry, annotate, presentable
from aioloader.core.keys import NAMES
from aioloader.engine.faces import LoaderHooks, Receive, T_co
from aioloader.engine.node import Kick, Node
from aioloader.engine.progress import Progress
from aioloader.engine.resumable import split_cursor
from aioloader.engine.sync_cursor import SyncCursor
from aioloader.executors.chunk import Call, refuse_coroutine
from aioloader.executors.current_sample import SampleContext, current_sample
from aioloader.insight.meters import StageMeter

if TYPE_CHECKING:
    from aioloader.engine.run import Run

__all__ = ["InlineBatches", "InlineMap", "InlineSource"]


class InlineSource(Node):
    """Reads a sync iterable, no further than asked."""

    def __init__(self, iterable: Iterable[Any], name: str, epoch: int, *, keys: bool = False) -> None:
        self._samples = SyncCursor(iterable, name)
        self._keys = keys  # see `StreamSource`
        self._skipped = 0  # samples from the origin on that were delivered before a resume
        self._position = 0
        self._failed_at: Any = None  # where to go on if it fails now
        self._over = False
        self._failure: Exception | None = None
        self._epoch = epoch
        self.meter = StageMeter(name, "source", concurrency=1)

    def resume(self, cursor: Any) -> None:
        origin, self._skipped = split_cursor(cursor)
        self._samples.origin, self._failed_at = origin, cursor
        self._position = self._skipped + (0 if origin is None else origin["at"])

    def start(self, run: "Run", kick: Kick) -> None:
        raise AssertionError("an inline node belongs to no run")

    def poll(self, limit: int) -> list[Entry]:
        ready = self._samples.ready
        if not (ready or self._over):
            self._read(limit)
        entries: list[Entry] = []
        while ready and len(entries) < limit:
            sample, self._failed_at = ready.popleft()
            position = self._position
            self._position = self.meter.samples = position + 1
            key = sample if self._keys or isinstance(sample, NAMES) else position
            entry = Entry(sample, self._failed_at, key, position)
            entry.state = DONE
            entries.append(entry)
        if not entries and self._failure is not None:
            entries = [Entry.last(self._failure, self._failed_at, self._position)]
            annotate(self._failure, self.meter.name, entries[0], self._epoch)
            self._failure = None
        self.ended = self._over and not (ready or self._failure)
        return entries

    def _read(self, limit: int) -> None:
        """Read up to `limit` samples, after those that were delivered before a resume, which are dropped.

        A Ctrl-C may cut this short, and the next call goes on.
        """
        samples = self._samples
        try:
            while self._skipped:
                samples.ready.clear()
                if samples.count < self._skipped:
                    samples.read(self._skipped - samples.count)
                else:
                    self._skipped = 0
            samples.read(limit)
        except StopIteration:
            self._over = True
        except Exception as error:
            self._over = True
            self._failure = error
        finally:
            self.meter.busy_seconds = samples.busy_seconds

    def close(self) -> None:
        self._samples.close()


class InlineMap(Node):
    """Calls the functions of one journey.

    Args:
        upstream: Gives the entries.
        calls: The functions.
        epoch: For notes.
        ordered: False: the cursors are those of a window that gives entries as they are finished, so that a state is
            the same with workers and without.
    """

    def __init__(self, upstream: Node, calls: Sequence[Call], epoch: int, *, ordered: bool = True) -> None:
        self._upstream = upstream
        self._calls = calls
        self._epoch = epoch
        self._completion = None if ordered else CompletionCursor()
        self.meter = StageMeter(" + ".join(call.label for call in calls), "sync", concurrency=1)

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
            kept = copy_context().run(self._journey, entry)  # as `isolated`; nor does it show to the consumer
            if self._completion is not None:
                if entry.state == LAST:
                    entry.cursor = self._completion.cursor
                else:
                    self._completion.leaves(entry)
            if kept:
                return run

    def _journey(self, entry: Entry) -> bool:
        """Take `entry` through the calls; False: a predicate refused it."""
        if entry.error is not None:
            return True
        began = perf_counter()
        call = self._calls[0]
        sample = SampleContext()
        sample.name = entry
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
            entry.error = error
            entry.value = None
            self.meter.errors += 1
        finally:
            self.meter.busy_seconds += perf_counter() - began
            self.meter.samples += 1
        return True

    def close(self) -> None:
        self._upstream.close()


class InlineBatches(Iterator[T_co]):
    """The iterator of a loader without workers.

    Args:
        opener: The loader.
        open_nodes: Gives the last node and where the epoch stands, at the first `next()`.
    """

    def __init__(self, opener: LoaderHooks, open_nodes: Callable[[], tuple[Node, Progress]]) -> None:
        self._opener = opener
        self._open_nodes = open_nodes
        self._receive: Receive | None = None
        self._node: Node | None = None
        self._progress: Progress | None = None
        self._over = False

    @property
    def cursor(self) -> Any:
        """Where to go on after the last batch that was handed out; None before the first."""
        return None if self._progress is None else self._progress.cursor

    def state_dict(self) -> dict[str, Any]:
        """The state after the last batch that this iterator gave, see `Loader.state_dict`."""
        return self._opener._state_of(self._progress)

    def __iter__(self) -> "InlineBatches[T_co]":
        return self

    def __next__(self) -> T_co:
        if self._over:
            raise StopIteration
        asked = perf_counter()
        if self._node is None or self._progress is None:
            self._node, self._progress = self._open_nodes()
            self._receive = self._opener._receiver()
        progress = self._progress
        run = self._node.poll(1)
        while run and progress.skipped_steps and progress.is_skipped(run[0]):
            run = self._node.poll(1)
        if not run:
            progress.over = True
            progress.meter.finish()
            if progress.resumed_at_end:  # it was resumed behind its end: the next epoch is what was to come
                self._node = None
                return self.__next__()
            self._over = True
            raise StopIteration
        entry = run[0]
        progress.hand_out(entry, asked)
        error, entry.error = entry.error, None  # an error keeps frames that know its entry: it must not keep the error
        if error is not None:
            try:
                raise presentable(error)
            finally:
                del self, error
        batch: T_co = entry.value if self._receive is None else self._receive(entry.value)
        return batch

    def close(self) -> None:
        """End the epoch. Idempotent."""
        self._over = True
        if self._node is not None:
            self._node.close()
            assert self._progress is not None
            self._progress.meter.finish()

    def __reduce__(self) -> Any:
        raise TypeError("an iterator over batches cannot be pickled; pickle the loader")
