"""Iteration by both faces, pausing and closing."""

import asyncio
import threading
from typing import Self
from weakref import WeakSet

from anyio.to_thread import run_sync

from aioloader.core.forks import tell_of_fork
from aioloader.core.typevars import T_co
from aioloader.engine.async_delivery import AsyncDelivery
from aioloader.engine.delivery import Delivery
from aioloader.engine.faces import AsyncBatches, Batches
from aioloader.engine.loop_thread import LoopThread
from aioloader.engine.pausing import Paused
from aioloader.engine.progress import Progress
from aioloader.engine.run import CLOSE_SECONDS, Run
from aioloader.engine.sync_delivery import SyncDelivery
from aioloader.engine.tuner import Tuner
from aioloader.loader.states import Resumable
from aioloader.plan.parts import streams_of
from aioloader.plan.unsplit import gives_all, several_ranks, warn_of_unsplit
from aioloader.sources.resolve import warn_of_live

__all__ = ["Running"]


class Running(Resumable[T_co]):
    """A loader whose epochs run, several at once if need be, until they are over or closed."""

    _split_by = "add .shard(), or .shard(0, 1) if this is a rank's part already"  # what to do

    def __init__(self) -> None:
        super().__init__()
        self._deliveries: WeakSet[Delivery] = WeakSet()
        self._entered = 0  # `with` blocks
        self._loop_thread: LoopThread | None = None
        self._looked_for_ranks = False
        self._alone = False  # it makes a batch once more: other ranks do not matter
        tell_of_fork(self)

    def _forked(self) -> None:
        """See `Forkable`: epochs that are under way are the parent's, and so is all that is kept between them."""
        self._lock = threading.RLock()
        self._deliveries = WeakSet()
        self._loop_thread = None
        self._transfer = None
        self._processes = None
        self._forget_trace()

    # -- iteration ---------------------------------------------------------------------------------------------------

    def __iter__(self) -> Batches[T_co]:
        """An iterator for `for`: the loader runs on an event loop in a thread of its own."""
        warn_of_live(self, *(stream.make for stream in streams_of(self._plan)))
        self._check_usable()
        return Batches(self)

    def __aiter__(self) -> AsyncBatches[T_co]:
        """An iterator for `async for`: the loader runs on the caller's event loop."""
        self._check_usable()
        return AsyncBatches(self)

    def _check_usable(self) -> None:
        """Raise now, at `iter()`, what would make an epoch impossible."""

    def _open_run(self) -> Run:
        with self._beginning() as progress:
            window = self._build(progress)
            if progress.cursor is not None:
                window.resume(progress.cursor)
            for begin in window.beginnings:  # here, where a failure leaves everything as it was
                begin()
            run = Run(window, progress.epoch, progress, self._pauses)
            run.tracer, run.tuner = self._tracer, self._tuner
        self._watch(progress, run.meters)
        return run

    def _look_for_ranks(self) -> None:
        """Once, when the first epoch begins: trainers make their ranks between the loader and its first batch."""
        if not (self._looked_for_ranks or self._alone):
            self._looked_for_ranks = True
            world_size = several_ranks()
            if world_size and gives_all(self._plan):
                warn_of_unsplit(self, world_size, self._split_by)
            self._tell_of_ranks(world_size)

    def _tell_of_ranks(self, world_size: int) -> None:
        """Warn of what several ranks may not want; called once, as the first epoch begins.

        Args:
            world_size: How many there are; 0: nobody knows of others.
        """

    def _opened(self, delivery: Delivery) -> None:
        with self._lock:
            self._deliveries.add(delivery)
            tuner = self._tuner
        if tuner is not None:  # it may have come since the run was made
            delivery.tune(tuner)

    def _tune_newest(self, tuner: Tuner) -> None:
        for delivery in self._alive():
            if delivery.progress.meter is self._consumer:
                delivery.tune(tuner)

    def _alive(self) -> list[Delivery]:
        with self._lock:  # another thread may begin an epoch meanwhile
            return list(self._deliveries)

    def _ended(self, progress: Progress) -> None:
        """See `LoaderHooks`."""

    # -- pausing -----------------------------------------------------------------------------------------------------

    def paused(self, drain: bool = False) -> Paused:
        """A block, for `with` or `async with`, in which no sample begins, in any epoch of this loader.

        For what must not change under a sample's feet: the weights that a rollout generates with, a file that is
        replaced. What is under way goes on, and batches that are ready are given; a `next()` for which none is waits
        until the block is left. Sources are not read further either, nor does `flat_map` make more. Blocks may nest and
        overlap, in any threads, and epochs that begin inside begin paused.

        ```python
        async with loader.paused(drain=True):
            await engine.update_weights(policy)
        ```

        A sample begins with its first function, and where `flat_map`, `drop_if` or `shuffle(n)` is between maps, again
        with the first one after that; one that is found in a cache begins when it is looked up. What is already past
        that goes on through the functions after it, and through `batch` and what comes after. A sample that a thread
        (or a user's executor) has just taken counts as under way, though its function may be called a moment later;
        `drain=True` waits for it.

        `with` blocks its thread until the block is entered, and works in the thread of a `for` loop and in any other.
        `DataLoader(num_workers=0)` makes its samples in `next()` itself, so there is nothing to pause.

        Args:
            drain: Enter the block only when no sample is under way. Reading of sources is not waited for.

        Raises:
            RuntimeError: At `with`, in the thread of an event loop on which an epoch runs, for `drain=True` or where
                samples are made in other processes: these could not go on, or answer, while it waits. Use `async with`.
        """
        return Paused(self._pauses, drain=bool(drain))

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
        """End all running epochs and release what is kept between epochs. Idempotent.

        Returns when tasks and threads are gone, after a few seconds at most. Epochs of `async for` are only asked to
        end, since their loop may be the caller's: use `aclose` there. The loader itself stays usable.
        """
        for delivery in self._alive():
            if isinstance(delivery, SyncDelivery):
                delivery.close()
            elif isinstance(delivery, AsyncDelivery):
                delivery.closed = True
                delivery.run.leave()
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
                    delivery.run.leave()
        if self._loop_thread is not None or any(isinstance(d, SyncDelivery) for d in self._alive()):
            await run_sync(self.close)
        if self._processes is not None:
            await run_sync(self._close_processes)
        if self._transfer is None:
            self._close_kept()
        else:
            await run_sync(self._close_kept)  # it waits for copies, and unlocks memory

    def _close_kept(self) -> None:
        """Let go of what is kept from one epoch to the next."""
        self._close_trace()
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
