"""Worker processes that are played by one thread: in which order they answer, what they take, and when they die."""

import random
import threading
from collections import deque
from collections.abc import Callable, Hashable
from typing import Any, Final

from aioloader.executors.chunk import Call, ChunkResult, apply_chunk
from aioloader.executors.processes.segments import Arena, MappedSegments
from aioloader.executors.processes.stacked import stacked
from aioloader.executors.processes.wire import decode, encode
from aioloader.executors.processes.worker_pool import Died, Outcome

__all__ = ["PlayedPool", "Worker"]

QUEUED: Final = 2  # chunks that a worker has at most


class Worker:
    """A worker and the process that gets its results, both in this one.

    Attributes:
        new: The segments of the last result that were not known before.
    """

    def __init__(self) -> None:
        self.arena = Arena()
        self.mapped = MappedSegments()
        self.new: list[tuple[int, int, int]] = []

    def sends(self, samples: list[Any], batch: int = 0) -> list[Any]:
        """`samples` as they come out of shared memory; for `batch` see `stacked`."""
        self.arena.take_back(self.mapped.freed())
        stream, buffers = encode(stacked(samples, batch, self.arena.alloc))
        places = self.arena.place(buffers)
        received: list[Any]
        if places is None:  # through the socket
            received = decode(stream, [bytearray(buffer) for buffer in buffers])
            return received
        self.new = self.arena.hand_over(places)
        for number, size, fd in self.new:
            self.mapped.map(number, size, fd)
        received = decode(stream, self.mapped.buffers(places))
        return received


class PlayedPool:
    """A pool whose workers are played by one thread.

    Args:
        count: How many workers.
        calls: What they do.
        seconds_each: What they say of a sample.
        order: Chooses whose task is done next, and all else.

    Attributes:
        sizes: How many chunks were under way at each, and how large it was.
        worker: Results travel through its memory; None: they do not.
        cuts: The share of chunks whose time is up before they are done.
        fatal: A worker dies with these samples, once in each epoch.
    """

    def __init__(
        self, count: int, calls: tuple[Call, ...], seconds_each: Callable[[], float], order: random.Random
    ) -> None:
        self.count = count
        self.ended = None
        self.gone = False
        self.learned: tuple[float | None, float | None] = None, None
        self.sizes: list[tuple[int, int]] = []
        self.worker: Worker | None = None
        self.cuts = 0.0
        self.fatal: set[int] = set()
        self._died: set[tuple[Hashable, int]] = set()
        self._calls = calls
        self._seconds_each = seconds_each
        self._order = order
        self._queues: list[deque[tuple[Hashable, list[Any], int, Callable[[Outcome], None]]]] = [
            deque() for _ in range(count)
        ]
        self._changed = threading.Condition()
        self._holding: set[Hashable] = set()
        self._closed = False
        self._thread = threading.Thread(target=self._play)
        self._thread.start()

    def submit(self, owner: Hashable, values: Any, done: Callable[[Outcome], None], slot: int | None = None) -> None:
        with self._changed:
            under_way = sum(other == owner for queue in self._queues for other, *_ in queue)
            samples = sum(len(sent) for queue in self._queues for other, sent, *_ in queue if other == owner)
            assert under_way < QUEUED * self.count
            assert samples + len(values[3]) <= owner.meter.room  # type: ignore[attr-defined]  # the step
            *_, samples_sent, batch = values
            self.sizes.append((under_way, len(samples_sent)))
            min(self._queues, key=len).append((owner, samples_sent, batch, done))
            self._changed.notify()

    def _play(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: (any(self._queues) and not self._holding) or self._closed)
                if self._closed:
                    return
                slot = self._order.choice([slot for slot, queue in enumerate(self._queues) if queue])
                owner, values, batch, done = self._queues[slot][0]
                outcome = self._outcome(owner, slot, values, batch)
                self._queues[slot].popleft()
                done(outcome)

    def _outcome(self, owner: Hashable, slot: int, values: list[Any], batch: int) -> Outcome:
        if self._order.random() < self.cuts:
            values = values[: self._order.randint(1, len(values))]
        for at, value in enumerate(values):
            if value in self.fatal and (owner, value) not in self._died:
                self._died.add((owner, value))
                return Died(slot, 1, "has died", at)
        outcomes = apply_chunk(self._calls, values, 60.0).outcomes
        if self.worker is not None:
            outcomes = self.worker.sends(outcomes, batch)
        return ChunkResult(outcomes, self._seconds_each() * len(outcomes), 0.0)

    def prepare(self) -> None: ...

    def hold(self, owner: Hashable, said: Callable[[bool], None]) -> None:
        with self._changed:
            self._holding.add(owner)
        said(False)
        said(True)

    def let_go(self, owner: Hashable) -> None:
        with self._changed:
            self._holding.discard(owner)
            self._changed.notify()

    def expire(self, owner: Hashable, seconds: float) -> None: ...

    def forget(self, owner: Hashable) -> None:
        with self._changed:
            self._holding.discard(owner)
            for queue in self._queues:
                for task in [task for task in queue if task[0] == owner]:
                    queue.remove(task)
            self._changed.notify()

    def at_work(self, owner: Hashable) -> list[tuple[Any, int, float]]:
        return []

    def end_on(self, loop: Any) -> None: ...

    def close(self) -> None: ...

    def alive(self) -> list[str]:
        return []

    def end(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
