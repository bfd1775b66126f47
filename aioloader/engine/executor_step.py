"""The step of a window that runs synchronous calls in a user's executor, such as a `ProcessPoolExecutor`."""

from collections.abc import Sequence
from concurrent.futures import Executor
from concurrent.futures import Future as ConcurrentFuture
from functools import partial
from time import perf_counter
from typing import Any

from aioloader.core.entry import Entry
from aioloader.core.limit import Limit
from aioloader.engine.node import CHUNK_SECONDS
from aioloader.engine.sync_step import SyncStep
from aioloader.errors import SampleCancelledError
from aioloader.executors.chunk import Call, ChunkResult, apply_chunk
from aioloader.executors.threads import call_loop

__all__ = ["ExecutorStep"]


class _Chunk:
    """Samples that went to a user's executor together.

    Attributes:
        entries: The samples.
        begun: Their `Entry.begun` before.
        since: When they went.
        future: Of the executor.
    """

    __slots__ = ("begun", "entries", "future", "since")
    future: "ConcurrentFuture[ChunkResult]"

    def __init__(self, entries: list[Entry]) -> None:
        self.entries = entries
        self.begun = [entry.begun for entry in entries]
        self.since = perf_counter()


class ExecutorStep(SyncStep):
    """Runs calls in a user's executor of any kind, in chunks: functions and samples travel by pickle.

    What travels cannot be taken back, so a chunk is at most what the samples before it say is worth a millisecond, and
    is shared fairly among the places that are free.

    When it pauses, what the executor has not begun is cancelled and comes back. A chunk that it has begun, as far as
    it says, is waited for if it has more than one sample: the others would begin one after the other.

    Args:
        calls: See `SyncStep`.
        concurrency: Chunks under way; each has one slot of a `Limit`.
        executor: For instance a `ProcessPoolExecutor`.
    """

    def __init__(self, calls: Sequence[Call], concurrency: int | Limit, executor: Executor) -> None:
        super().__init__(calls, concurrency)
        self._executor = executor
        self._chunks: set[_Chunk] = set()
        self._called_back: set[ConcurrentFuture[ChunkResult]] = set()

    def at_hand(self) -> list[tuple[Any, float]]:
        # One sample of each chunk is under way, and only the executor knows which: most often there is but one.
        return [(chunk.entries[0].key, chunk.since) for chunk in self._chunks.copy() if chunk.future.running()]

    @property
    def quiet(self) -> bool:
        return all(len(chunk.entries) == 1 for chunk in self._chunks)

    @property
    def rests(self) -> bool:
        return not self._chunks  # also of those that the executor is yet to begin

    def hold(self) -> None:
        super().hold()
        for chunk in list(self._chunks):
            self._called_back.add(chunk.future)
            if not chunk.future.cancel():
                self._called_back.discard(chunk.future)

    def dispatch(self) -> None:
        self._scheduled = False
        if self.paused:
            self._set_aside()
            return
        inbox = self.inbox
        while inbox and self._active < self.concurrency and not (self.closed or self._run.stopping):
            if self.slots is not None and not self.slots.take():
                return
            fair = -(-len(inbox) // (self.concurrency - self._active))
            chunk = _Chunk([inbox.popleft() for _ in range(min(self._size, fair))])
            self._begins()
            self._stamp(chunk.entries)
            values = [entry.value for entry in chunk.entries]
            try:
                chunk.future = self._executor.submit(apply_chunk, self._calls, values, 2 * CHUNK_SECONDS)
            except RuntimeError as error:  # shut down, or broken
                if self.slots is not None:
                    self.slots.release()
                self._run.loop.call_soon(self._run.guarded, self._lost, chunk.entries, error)
            else:
                self._chunks.add(chunk)
                chunk.future.add_done_callback(partial(self._done, chunk))

    def _done(self, chunk: _Chunk, future: "ConcurrentFuture[ChunkResult]") -> None:
        # Called in a thread of the executor.
        if self.slots is not None:
            self.slots.release()
        error: BaseException | None
        if future.cancelled() and future in self._called_back:
            self._called_back.discard(future)
            call_loop(self._run.loop, self._run.guarded, self._returned, chunk, ChunkResult([], 0.0, 0.0))
            return
        if future.cancelled():
            error = SampleCancelledError("the executor was shut down before it ran these samples")
        else:
            error = future.exception()
        if error is None:
            call_loop(self._run.loop, self._run.guarded, self._returned, chunk, future.result())
        else:  # a worker process died, or something could not be pickled
            call_loop(self._run.loop, self._run.guarded, self._not_returned, chunk, error)

    def _returned(self, chunk: _Chunk, result: ChunkResult) -> None:
        self._chunks.discard(chunk)
        tried = len(result.outcomes)
        if not self.closed:  # its time was up: these have not begun, and go first
            for entry, begun in zip(chunk.entries[tried:], chunk.begun[tried:], strict=True):
                entry.begun = begun
            self.inbox.extendleft(reversed(chunk.entries[tried:]))
        self._landed(chunk.entries[:tried], result)

    def _not_returned(self, chunk: _Chunk, error: BaseException) -> None:
        self._chunks.discard(chunk)
        self._lost(chunk.entries, error)
