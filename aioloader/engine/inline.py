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
from aioloader.engine.resumable import (
    KnowsOrigin,
    Origin,
    after_origin,
    is_due,
    note_first,
    open_at,
    snapshot,
    split_cursor,
)
from aioloader.engine.torch_state import check_leak, context_state
from aioloader.executors.chunk import Call, refuse_coroutine
from aioloader.executors.current_sample import SampleContext, current_sample
from aioloader.insight.meters import StageMeter

if TYPE_CHECKING:
    from aioloader.engine.run import Run

__all__ = ["InlineBatches", "InlineMap", "InlineSource"]


class InlineSource(Node):
    """Reads a sync iterable, one sample per poll."""

    def __init__(self, iterable: Iterable[Any], name: str, epoch: int, *, keys: bool = False) -> None:
        self._iterable: Iterable[Any] | None = iterable
        self._iterator: Iterator[Any] | None = None
        self._keys = keys  # see `StreamSource`
        self._origin: Origin | None = None
        self._since = 0  # samples since the origin
        self._skipped = 0  # those that were delivered before a resume
        self._position = 0
        self._before = 0  # samples of the epoch before the origin that it was opened at
        self._count = 0  # samples read since then
        self._asked: Any = None
        self._epoch = epoch
        self.meter = StageMeter(name, "source", concurrency=1)

    def resume(self, cursor: Any) -> None:
        self._origin, self._skipped = split_cursor(cursor)
        self._before = 0 if self._origin is None else self._origin["at"]
        self._position = self._skipped + self._before

    def start(self, run: "Run", kick: Kick) -> None:
        raise AssertionError("an inline node belongs to no run")

    def poll(self, limit: int) -> list[Entry]:
        if self.ended:
            return []
        position = self._position
        before = context_state()
        began = perf_counter()
        try:
            if self._iterator is None:
                assert self._iterable is not None
                self._iterator, self._asked = open_at(self._iterable, self._origin)
            while self._since < self._skipped:  # read again, and dropped
                self._read(self._iterator)
            sample = self._read(self._iterator)
            check_leak(before, self.meter.name)
            if self._iterable is not None:  # what the keys were drawn from is known with the first one
                if isinstance(self._iterable, KnowsOrigin):
                    self._origin = self._iterable.origin
                self._iterable = None
        except StopIteration:
            self.ended = True
            return []
        except Exception as error:
            self.ended = True
            since = max(self._since, self._skipped)
            last = Entry.last(error, after_origin(self._origin, since) or None, position)
            annotate(error, self.meter.name, last, self._epoch)
            return [last]
        finally:
            self.meter.busy_seconds += perf_counter() - began
        self._position = self.meter.samples = position + 1
        cursor = self._since if self._origin is None else (self._origin, self._since)
        entry = Entry(sample, cursor, sample if self._keys or isinstance(sample, NAMES) else position, position)
        entry.state = DONE
        return [entry]

    def _read(self, iterator: Iterator[Any]) -> Any:
        sample = next(iterator)
        self._count += 1
        self._since += 1
        if self._asked is not None:
            if self._count == 1 and self._before:
                note_first(self._asked, iterator)
            elif is_due(self._before + self._count):
                self._ask()
        return sample

    def _ask(self) -> None:
        origin = snapshot(self._asked, self._iterator, self._before + self._count)
        if origin is None:
            self._asked = None
        else:
            self._skipped = max(0, self._skipped - self._since)
            self._origin, self._since = origin, 0

    def close(self) -> None:
        close = getattr(self._iterator, "close", None)
        if close is not None:
            close()


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
