"""No concurrency at all: the same folds over sources and steps that run in the consumer's thread, in `next()`.

This is `num_workers=0` of the drop-in, and the reference that everything concurrent must equal.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from time import perf_counter
from types import CoroutineType
from typing import TYPE_CHECKING, Any

from aioloader.engine.entry import DONE, Entry, annotate, presentable
from aioloader.engine.faces import Receive, T_co
from aioloader.engine.node import Kick, Node
from aioloader.engine.torch_state import check_leak, context_state
from aioloader.executors.chunk import Call, refuse_coroutine
from aioloader.executors.sample import Sample, current_sample
from aioloader.insight.meters import ConsumerMeter, StageMeter

if TYPE_CHECKING:
    from aioloader.engine.run import Run

__all__ = ["InlineBatches", "InlineMap", "InlineSource"]


class InlineSource(Node):
    """Reads a sync iterable, one sample per poll."""

    def __init__(self, iterable: Iterable[Any], name: str, epoch: int, *, keys: bool = False) -> None:
        self._iterable: Iterable[Any] | None = iterable
        self._iterator: Iterator[Any] | None = None
        self._keys = keys  # see `StreamSource`
        self._position = 0
        self._skipped = 0  # samples that were delivered before a resume
        self._epoch = epoch
        self.meter = StageMeter(name, "source", concurrency=1)

    def resume(self, cursor: int) -> None:
        self._skipped = cursor

    def start(self, run: "Run", kick: Kick) -> None:
        raise AssertionError("an inline node belongs to no run")

    def poll(self, limit: int) -> list[Entry]:
        position = self._position
        before = context_state()
        began = perf_counter()
        try:
            if self._iterator is None:
                assert self._iterable is not None
                self._iterator = iter(self._iterable)
                self._iterable = None
            while self._position < self._skipped:  # read again, and dropped
                next(self._iterator)
                self._position += 1
            position = self._position
            sample = next(self._iterator)
            check_leak(before, self.meter.name)
        except StopIteration:
            self.ended = True
            return []
        except Exception as error:
            self.ended = True
            last = Entry.last(error, position, position)
            annotate(error, self.meter.name, last, self._epoch)
            return [last]
        finally:
            self.meter.busy_seconds += perf_counter() - began
        self._position = self.meter.samples = position + 1
        entry = Entry(sample, position + 1, sample if self._keys or isinstance(sample, int | str) else None, position)
        entry.state = DONE
        return [entry]

    def close(self) -> None:
        close = getattr(self._iterator, "close", None)
        if close is not None:
            close()


class InlineMap(Node):
    """Calls the functions of one journey."""

    def __init__(self, upstream: Node, calls: Sequence[Call], epoch: int) -> None:
        self._upstream = upstream
        self._calls = calls
        self._epoch = epoch
        self.meter = StageMeter(" + ".join(call.label for call in calls), "sync", concurrency=1)

    def resume(self, cursor: Any) -> None:
        self._upstream.resume(cursor)

    def start(self, run: "Run", kick: Kick) -> None:
        raise AssertionError("an inline node belongs to no run")

    def poll(self, limit: int) -> list[Entry]:
        while True:
            run = self._upstream.poll(1)
            self.ended = self._upstream.ended and not run
            if not run or self._journey(run[0]):
                return run

    def _journey(self, entry: Entry) -> bool:
        """Take `entry` through the calls; False: a predicate refused it."""
        if entry.error is not None:
            return True
        began = perf_counter()
        call = self._calls[0]
        sample = Sample()
        sample.name = entry
        token = current_sample.set(sample)
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
            current_sample.reset(token)
            self.meter.busy_seconds += perf_counter() - began
            self.meter.samples += 1
        return True

    def close(self) -> None:
        self._upstream.close()


class InlineBatches(Iterator[T_co]):
    """The iterator of a loader without workers.

    Args:
        open_nodes: Gives the last node, and the meters of all, at the first `next()`.
        receiver: Gives what takes a batch over, if anything must; asked after `open_nodes`.
    """

    def __init__(
        self, open_nodes: Callable[[], tuple[Node, ConsumerMeter]], receiver: Callable[[], Receive | None]
    ) -> None:
        self._open_nodes = open_nodes
        self._receiver = receiver
        self._receive: Receive | None = None
        self._node: Node | None = None
        self._meter: ConsumerMeter | None = None
        self._over = False
        self.cursor: Any = None

    def __iter__(self) -> "InlineBatches[T_co]":
        return self

    def __next__(self) -> T_co:
        if self._over:
            raise StopIteration
        asked = perf_counter()
        if self._node is None or self._meter is None:
            self._node, self._meter = self._open_nodes()
            self._receive = self._receiver()
        run = self._node.poll(1)
        if not run:
            self._over = True
            self._meter.finish()
            raise StopIteration
        entry = run[0]
        self.cursor = entry.cursor
        self._meter.delivered(asked)
        if entry.error is not None:
            raise presentable(entry.error)
        batch: T_co = entry.value if self._receive is None else self._receive(entry.value)
        return batch

    def close(self) -> None:
        """End the epoch. Idempotent."""
        self._over = True
        if self._node is not None:
            self._node.close()
            assert self._meter is not None
            self._meter.finish()

    def __reduce__(self) -> Any:
        raise TypeError("an iterator over batches cannot be pickled; pickle the loader")
