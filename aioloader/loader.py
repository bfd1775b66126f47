"""What `Pipeline` and `DataLoader` share: iteration by both faces, epochs, closing, insight."""

import asyncio
import threading
from abc import abstractmethod
from secrets import randbits
from time import perf_counter
from typing import Any, Self
from weakref import WeakSet, finalize

import anyio.to_thread

from aioloader.device import Transfer, Transferred
from aioloader.engine.faces import AsyncBatches, AsyncDelivery, Batches, Delivery, Opener, Receive, SyncDelivery
from aioloader.engine.loop_thread import LoopThread
from aioloader.engine.run import CLOSE_SECONDS, Run
from aioloader.engine.window import Window
from aioloader.executors.processes.host import Processes
from aioloader.insight.explain import explain
from aioloader.insight.meters import ConsumerMeter, StageMeter
from aioloader.insight.stats import Stats, snapshot
from aioloader.memory.pool import BatchMemory
from aioloader.stages.checks import check_count
from aioloader.stages.collate import Alloc

__all__ = ["Loader"]


class Loader(Opener):
    """An object whose every `iter()` or `aiter()` is one epoch of batches.

    Making an iterator is cheap and starts nothing; work starts, and the epoch is counted, at its first `next()`.
    Several iterators may be alive. When an epoch is over, or its iterator is dropped, no task and no thread of it
    remains; `close` ends everything that is left at once.
    """

    _knob = "its concurrency"  # what `explain` advises to raise where threads are the limit

    def __init__(self) -> None:
        self._next_epoch = 0
        self._lock = threading.Lock()
        self._deliveries: WeakSet[Delivery] = WeakSet()
        self._meters: list[StageMeter] = []
        self._consumer: ConsumerMeter | None = None
        self._epoch: int | None = None  # of the newest run
        self._entered = 0  # `with` blocks
        self._loop_thread: LoopThread | None = None
        self._transfer: Transfer | None = None
        self._memory: BatchMemory | None = None
        self._processes: Processes | None = None
        self._drawn_seed: int | None = None

    # -- what a kind of loader says ----------------------------------------------------------------------------------

    @abstractmethod
    def _build(self, epoch: int) -> Window:
        """The nodes of one epoch, not started."""

    def _check_usable(self) -> None:
        """Raise now, at `iter()`, what would make an epoch impossible."""

    # -- iteration ---------------------------------------------------------------------------------------------------

    def __iter__(self) -> Any:
        """An iterator for `for`: the loader runs on an event loop in a thread of its own."""
        self._check_usable()
        return Batches(self)

    def __aiter__(self) -> AsyncBatches[Any]:
        """An iterator for `async for`: the loader runs on the caller's event loop."""
        self._check_usable()
        return AsyncBatches(self)

    def set_epoch(self, epoch: int) -> None:
        """Let the next epoch be number `epoch`; those after it count on from there.

        Args:
            epoch: At least 0. Shuffle orders depend on it.
        """
        self._next_epoch = check_count("epoch", epoch, least=0)

    def _begin_epoch(self) -> int:
        """Count an epoch."""
        epoch = self._next_epoch
        self._next_epoch = epoch + 1
        return epoch

    def _sample_seed(self, seed: int | None) -> int:
        """For the random numbers of samples: the user's `seed`, else one that is drawn once for this loader."""
        if seed is not None:
            return seed
        with self._lock:
            if self._drawn_seed is None:
                self._drawn_seed = randbits(63)  # not from torch's generator, whose draws are the user's
            return self._drawn_seed

    def _open_run(self) -> Run:
        epoch = self._begin_epoch()
        run = Run(self._build(epoch), epoch)
        self._watch(epoch, run.meters, run.consumer)
        return run

    def _watch(self, epoch: int, meters: list[StageMeter], consumer: ConsumerMeter) -> None:
        """`stats` is about this epoch from now on."""
        self._epoch, self._meters, self._consumer = epoch, meters, consumer
        consumer.began = perf_counter()

    def _opened(self, delivery: Delivery) -> None:
        with self._lock:
            self._deliveries.add(delivery)

    def _alive(self) -> list[Delivery]:
        with self._lock:  # another thread may begin an epoch meanwhile
            return list(self._deliveries)

    def _receiver(self) -> Receive | None:
        transfer = self._transfer
        if transfer is None:
            return None
        # It stays the iterator's own: `close` may take it from the loader while a `next()` is under way.
        return lambda batch: transfer.receive(batch) if isinstance(batch, Transferred) else batch

    def _alloc(self, transfer: Transfer | None) -> Alloc:
        """Where the default collate puts batches: page-locked memory for a device that can use it, else our own."""
        if transfer is not None and transfer.backend.pins:
            return transfer.backend.alloc_pinned
        with self._lock:
            if self._memory is None:
                self._memory = BatchMemory()
            return self._memory.alloc

    def _open_processes(self) -> Processes:
        """Where worker processes come from; kept between epochs, with those that are to be kept."""
        with self._lock:
            if self._processes is None or self._processes.closed:  # closed: this is a forked child
                self._processes = Processes()
                finalize(self, self._processes.close).atexit = False  # the exit hook of `loop_thread` also waits
            return self._processes

    # -- closing -----------------------------------------------------------------------------------------------------

    def _shared_loop(self) -> LoopThread | None:
        with self._lock:
            if self._entered and self._loop_thread is None:
                self._loop_thread = LoopThread()
            return self._loop_thread

    def __enter__(self) -> Self:
        """Keep the event loop of `for` for all epochs of the block, so that clients made on it stay usable."""
        self._entered += 1
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._entered -= 1
        if not self._entered:
            self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    def close(self) -> None:
        """End all epochs that are under way, and let go of what is kept between epochs. Idempotent.

        Returns when tasks and threads are gone, at most a few seconds later. Epochs of `async for` are only told to
        end, since their loop may be the caller's: use `aclose` there. The loader itself stays usable.
        """
        for delivery in self._alive():
            if isinstance(delivery, SyncDelivery):
                delivery.close()
            elif isinstance(delivery, AsyncDelivery):
                delivery.closed = True
                delivery.run.request_stop_threadsafe()
        if self._loop_thread is not None:
            self._loop_thread.request_stop()
            self._loop_thread.join()
            self._loop_thread = None
        self._close_processes()
        self._close_kept()

    async def aclose(self) -> None:
        """`close` for async code: epochs of `async for` on this loop have ended when it returns. Idempotent."""
        for delivery in self._alive():
            if isinstance(delivery, AsyncDelivery):
                if delivery.run.loop is asyncio.get_running_loop():
                    await delivery.aclose()
                else:  # it ends on its own loop
                    delivery.closed = True
                    delivery.run.request_stop_threadsafe()
        if self._loop_thread is not None or any(isinstance(d, SyncDelivery) for d in self._alive()):
            await anyio.to_thread.run_sync(self.close)
        if self._processes is not None:
            await anyio.to_thread.run_sync(self._close_processes)
        self._close_kept()

    def _close_kept(self) -> None:
        """Let go of what is kept from one epoch to the next."""
        if self._transfer is not None:
            self._transfer.close()
            self._transfer = None
        with self._lock:
            memory, self._memory = self._memory, None
        if memory is not None:
            memory.close()

    def _close_processes(self) -> None:
        with self._lock:
            processes, self._processes = self._processes, None
        if processes is not None:
            processes.close()
            processes.join(2 * CLOSE_SECONDS)

    def __getstate__(self) -> dict[str, Any]:
        """The description; what is alive stays behind."""
        alive = Loader.__new__(type(self))
        Loader.__init__(alive)
        return {name: value for name, value in self.__dict__.items() if name not in alive.__dict__}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Loader.__init__(self)
        self.__dict__.update(state)

    # -- insight -----------------------------------------------------------------------------------------------------

    def stats(self) -> Stats:
        """A frozen snapshot of the newest epoch, running or over; zeros before the first."""
        return snapshot(self._epoch, self._meters, self._consumer)

    def explain(self) -> str:
        """One sentence that names what limits the loader, and the numbers it is drawn from."""
        return explain(self.stats(), self._knob)
