"""The two faces: `async for` on the caller's loop, `for` over a loop in a thread of ours.

An iterator object of the user holds a delivery, a delivery holds its run, and nothing holds the iterator: when the user
drops it, in whatever way, a finalizer ends the run. Iterators are classes, not generators: yielding inside a task group
would cancel the consumer and finalize in the wrong task.
"""

import asyncio
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from queue import Empty, SimpleQueue
from time import perf_counter
from typing import Any, Final, TypeVar
from weakref import finalize

from aioloader.core.entry import Entry, presentable
from aioloader.core.forks import tell_of_fork
from aioloader.engine.loop_thread import LoopThread, process_ends
from aioloader.engine.progress import Progress
from aioloader.engine.run import CLOSE_SECONDS, Run
from aioloader.errors import LoaderClosedError
from aioloader.executors.threads import call_loop

__all__ = ["AsyncBatches", "AsyncDelivery", "Batches", "Delivery", "LoaderHooks", "Receive", "SyncDelivery"]


Receive = Callable[[Any], Any]

T_co = TypeVar("T_co", covariant=True)


class LoaderHooks(ABC):
    """What a face needs to know of its loader."""

    _timeout: float | None = None  # seconds that one batch may take
    _gives_info = False  # pairs of a batch and its `BatchInfo`
    _timeout_message: str = "no batch came within {seconds:g} seconds"

    @abstractmethod
    def _open_run(self) -> Run:
        """Begin the next epoch; called at the first `next()`."""

    @abstractmethod
    def _receiver(self) -> Receive | None:
        """What takes a batch over in the consumer's thread, if anything must; asked after `_open_run`."""

    @abstractmethod
    def _opened(self, delivery: "Delivery") -> None:
        """A run of this loader is alive; it is to be held weakly, for `close`."""

    @abstractmethod
    def _state_of(self, progress: Progress | None) -> dict[str, Any]:
        """The state of an iterator whose epoch stands at `progress`, or has not begun."""

    @abstractmethod
    def _shared_loop(self) -> LoopThread | None:
        """The loop that a `with` block keeps for all epochs, if there is one."""


class Delivery:
    """One epoch's batches on their way to one iterator."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.progress = run.progress
        self.closed = False
        self._failure_told = False

    def _hand_out(self, entry: Entry, asked: float) -> Any:
        """The value of `entry`, or its error, raised."""
        self.progress.hand_out(entry, asked)
        error, value = entry.error, entry.value
        entry.error = entry.value = None  # an error keeps this frame: it must not keep the error
        if error is None:
            return value
        try:
            raise presentable(error)
        finally:
            del error

    def _take_failure(self, end: BaseException) -> BaseException:
        """The failure of the run, once; then the end, so that "catch it and go on" comes to an end."""
        if self._failure_told or self.run.failure is None:
            return end
        self._failure_told = True
        return self.run.failure

    def _check_process(self) -> None:
        """Refuse to wait for what happens in another process.

        Raises:
            RuntimeError: This is a forked child.
        """
        if self.run.foreign:
            raise RuntimeError(
                "this iterator was begun before a fork and belongs to the parent process: its threads are not here; "
                "iterate the loader again, which begins an epoch of this process"
            )

    def _cut_short(self) -> LoaderClosedError:
        """An epoch that somebody else ended must not look like one that is over."""
        return LoaderClosedError("the loader was closed before this epoch was over; iterate it again for a new one")


class AsyncDelivery(Delivery):
    """Hands batches to coroutines on the run's own loop."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        loop = asyncio.get_running_loop()
        run.attach(loop)
        self._waiters: OrderedDict[asyncio.Future[None], None] = OrderedDict()  # calls of `next`, in order
        self._supervisor = loop.create_task(run.supervise(self._kick), name="aioloader-supervisor")
        self._supervisor.add_done_callback(self._kick)

    def _kick(self, _: object = None) -> None:
        """Wake the first waiter; it wakes the next when it leaves."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
            return

    async def next(self) -> Any:
        """Wait for the next batch.

        Nothing is in this coroutine's hands while it waits, so that cancelling it loses nothing: the batch stays in the
        window.

        Batches go to callers in the order of their calls, though between the wake-up of a waiter and its next step
        others may call, and it may be cancelled. So a waiter keeps its place until it leaves, only the first one looks,
        and whoever leaves, in whatever way, wakes the one that is first then.

        Raises:
            StopAsyncIteration: The epoch is over, and all of its tasks and threads are gone.
        """
        asked = perf_counter()
        run = self.run
        self._check_process()
        if asyncio.get_running_loop() is not run.loop:
            raise RuntimeError("this iterator belongs to another event loop: make a new one with aiter(loader)")
        mine: asyncio.Future[None] | None = None
        try:
            while True:
                if not self._waiters or next(iter(self._waiters)) is mine:
                    if run.failure is not None:
                        await self._finish()
                        raise self._take_failure(StopAsyncIteration())
                    if (self.closed or run.given_back) and not run.output.ended:
                        raise self._cut_short()
                    if run.started:
                        taken = run.output.poll(1)
                        if taken:
                            if self.progress.skipped_steps and self.progress.is_skipped(taken[0]):
                                continue
                            return self._hand_out(taken[0], asked)
                        if run.output.ended:
                            run.consumer.waited_for_end(asked)
                            self.progress.over = True
                            await self._finish()
                            raise StopAsyncIteration
                    if self._supervisor.done():  # its loop has cancelled it
                        raise self._cut_short()
                before, mine = mine, run.loop.create_future()
                self._waiters[mine] = None
                if before is not None:  # woken for nothing: it is still the first
                    del self._waiters[before]
                    self._waiters.move_to_end(mine, last=False)
                await mine
        finally:
            if mine is not None:
                del self._waiters[mine]
                self._kick()

    async def aclose(self) -> None:
        self.closed = True
        if self.run.foreign:
            return
        await self._finish()
        self._kick()

    async def _finish(self) -> None:
        self.run.request_stop()
        if asyncio.current_task() is not self._supervisor:
            await asyncio.wait([self._supervisor])


class _Ended:
    """The last thing in a thread queue: the run is over."""


LARGE_ROOM: Final = 8
_ENDED: Final = _Ended()
_LEFT_OUT: Final = object()  # instead of a batch that is not to be handed out


class SyncDelivery(Delivery):
    """Hands batches from the loop's thread to the consumer's through a plain thread queue, which the loop fills.

    Room in the last window counts until the consumer really has a batch (`Window.lend`). The loop is told of free room
    for half of a large window at once, or when the consumer is about to wait: with room for 16 the two threads need not
    wake each other for every batch (8.5 µs a batch; for a quarter at once 9.5). In a small one each place counts.
    """

    def __init__(self, run: Run, shared: LoopThread | None) -> None:
        super().__init__(run)
        run.left = False  # what is in the queue when the run is over may still be taken
        self._queue: SimpleQueue[Entry | _Ended] = SimpleQueue()
        self._put = 0  # on the loop: batches put into the queue
        self._given = 0  # on the loop: those of them whose room was given back
        self._unreported = 0  # about how many the consumer took since it told the loop; only decides when to tell
        self._report_at = run.output.room // 2 if run.output.room >= LARGE_ROOM else 1
        self._lazy = run.output.room == 0
        self._asked = 0  # on the loop: how many consumers wait
        self._pumping = False
        self._over = threading.Event()
        self._own_loop = None if shared is not None else LoopThread()
        self._loop_thread = shared or self._own_loop
        assert self._loop_thread is not None
        run.private_loop = True
        run.attach(self._loop_thread.loop)
        self._loop_thread.start_task(run.supervise(self._kick), run.request_stop, self._supervisor_done)

    # -- on the loop -------------------------------------------------------------------------------------------------

    def _kick(self) -> None:
        if not self._pumping and self.run.started:
            self._pumping = True
            self.run.soon(self._pump)

    def _pump(self) -> None:
        """Move what is finished into the queue; when nothing is made ahead, only what the consumer waits for."""
        self._pumping = False
        output = self.run.output
        if self.run.stopping or not self.run.started or (self._lazy and not self._asked):
            return
        taken = output.poll(self._asked) if self._lazy else output.take_finished()
        self._asked -= len(taken) if self._lazy else 0
        output.lend(len(taken))
        self._put += len(taken)
        for entry in taken:
            self._queue.put(entry)
        if output.ended:
            self.run.request_stop()

    def _supervisor_done(self, error: BaseException | None) -> None:
        if error is not None and self.run.failure is None and not isinstance(error, asyncio.CancelledError):
            self.run.failure = error
        self._over.set()
        if not process_ends():  # else the consumer is a daemon thread, which ends with the process, without a word
            self._queue.put(_ENDED)
        if self._own_loop is not None:
            self._own_loop.request_stop()

    # -- in the consumer's thread ------------------------------------------------------------------------------------

    def next(self, timeout: float | None) -> Any:
        """Wait for the next batch, `timeout` seconds at most.

        Raises:
            StopIteration: The epoch is over, and all of its tasks and threads are gone.
            queue.Empty: The time is over; the batch comes with a later call.
        """
        asked = perf_counter()
        self._check_process()
        if self._lazy or self._queue.empty():  # a batch that lies there may be another thread's, which asked for it
            self._report(waits=True)
        item = self._queue.get(timeout=timeout)
        if isinstance(item, _Ended):
            self._queue.put(item)  # for whoever asks next
            if self.progress.batches - self.progress.batches_before >= self._put:  # else another thread has one in hand
                self.run.drained()
            if self._own_loop is not None:
                self._own_loop.join()
            if self.run.failure is not None and not self.closed:
                raise self._take_failure(StopIteration())
            if self.run.output.ended:
                self.run.consumer.waited_for_end(asked)
                self.progress.over = True
                raise StopIteration
            raise self._cut_short()
        if self.run.given_back:  # the source has it again
            raise self._cut_short()
        self._unreported += 1
        if self._unreported >= self._report_at:
            self._report(waits=False)
        if self.progress.skipped_steps and self.progress.is_skipped(item):
            return _LEFT_OUT
        return self._hand_out(item, asked)

    def _report(self, *, waits: bool) -> None:
        """Tell the loop to look at the queue. Nothing depends on a count of this side, which a Ctrl-C may spoil."""
        self._unreported = 0
        call_loop(self.run.loop, self.run.guarded, self._reported, waits)

    def _reported(self, waits: bool) -> None:
        free = self._put - self._queue.qsize() - self._given
        if free > 0:
            self._given += free
            self.run.output.give_back(free)
        if self._lazy and waits:
            self._asked += 1
            self._kick()

    def close(self) -> None:
        self.closed = True
        if self.run.foreign:
            return
        self.run.leave()
        if self._own_loop is not None:
            self._own_loop.join()
        elif self._loop_thread is not None and not self._loop_thread.is_current():
            self._over.wait(2 * CLOSE_SECONDS)


async def _within(delivery: AsyncDelivery, seconds: float, message: str) -> Any:
    """The next batch, unless it takes longer; then it comes with a later call."""
    try:
        async with asyncio.timeout(seconds) as scope:
            return await delivery.next()
    except TimeoutError:
        if not scope.expired():  # the user's own TimeoutError, from a sample
            raise
        raise RuntimeError(message.format(seconds=seconds)) from None


class Batches(Iterator[T_co]):
    """The iterator of `for`: one epoch. Making one starts nothing; the first `next()` does."""

    def __init__(self, opener: LoaderHooks) -> None:
        self._opener = opener
        self._delivery: SyncDelivery | None = None
        self._starting = threading.RLock()  # a signal handler may close the iterator while its thread is in here
        self._receive: Receive | None = None
        self._closed = False
        tell_of_fork(self)

    def _forked(self) -> None:
        """See `Forkable`."""
        self._starting = threading.RLock()

    def __iter__(self) -> "Batches[T_co]":
        return self

    def __next__(self) -> T_co:
        if self._closed:
            raise StopIteration
        delivery = self._delivery
        if delivery is None:
            with self._starting:  # of several threads, one begins the epoch
                if self._closed:
                    raise StopIteration
                delivery = self._delivery or self._start()
        opener = self._opener
        try:
            while (batch := delivery.next(opener._timeout)) is _LEFT_OUT:
                pass
        except Empty:
            raise RuntimeError(opener._timeout_message.format(seconds=opener._timeout)) from None
        except StopIteration:
            if not delivery.progress.resumed_at_end:
                del self
                raise
            del delivery
            return self._following()
        except BaseException:
            # Whoever keeps the exception keeps this frame: not with it the iterator, which would keep its epoch alive.
            del self
            raise
        received: Any = batch if self._receive is None else self._receive(batch)
        return (received, delivery.progress.info) if opener._gives_info else received  # type: ignore[return-value]

    @property
    def cursor(self) -> Any:
        """Where to go on after the last batch that was handed out; None before the first."""
        return None if self._delivery is None else self._delivery.progress.cursor

    def state_dict(self) -> dict[str, Any]:
        """The state after the last batch that this iterator gave, see `Loader.state_dict`."""
        return self._opener._state_of(None if self._delivery is None else self._delivery.progress)

    def _following(self) -> T_co:
        """This epoch was resumed behind its last batch: the next one is what was to come."""
        with self._starting:
            if self._delivery is not None and self._delivery.progress.resumed_at_end:
                self._delivery = None
        return self.__next__()

    def _start(self) -> SyncDelivery:
        run = self._opener._open_run()
        self._receive = self._opener._receiver()
        self._delivery = delivery = SyncDelivery(run, self._opener._shared_loop())
        self._finalizer = finalize(self, run.leave)
        self._finalizer.atexit = False  # the exit hook of `loop_thread` also waits
        self._opener._opened(delivery)
        return delivery

    def close(self) -> None:
        """End the epoch now; returns when its tasks and threads are gone, in bounded time. Idempotent."""
        self._closed = True
        with self._starting:  # an epoch that another thread has just begun is not to be missed: it would never end
            delivery = self._delivery
        if delivery is not None:
            delivery.close()

    def __reduce__(self) -> Any:
        raise TypeError("an iterator over batches is alive on its threads and cannot be pickled; pickle the loader")


class AsyncBatches(AsyncIterator[T_co]):
    """The iterator of `async for`: one epoch, on the loop of the first `anext()`."""

    def __init__(self, opener: LoaderHooks) -> None:
        self._opener = opener
        self._delivery: AsyncDelivery | None = None
        self._receive: Receive | None = None
        self._closed = False

    def __aiter__(self) -> "AsyncBatches[T_co]":
        return self

    async def __anext__(self) -> T_co:
        if self._closed:
            raise StopAsyncIteration
        delivery = self._delivery or self._start()
        opener = self._opener
        try:
            if opener._timeout is None:
                batch = await delivery.next()
            else:
                batch = await _within(delivery, opener._timeout, opener._timeout_message)
        except StopAsyncIteration:
            if not delivery.progress.resumed_at_end:
                raise
            if self._delivery is delivery:
                self._delivery = None  # it was resumed behind its end: the next epoch is what was to come
            del delivery
            return await self.__anext__()
        except BaseException:
            del self  # as in `Batches`
            raise
        received: Any = batch if self._receive is None else self._receive(batch)
        return (received, delivery.progress.info) if opener._gives_info else received  # type: ignore[return-value]

    @property
    def cursor(self) -> Any:
        """Where to go on after the last batch that was handed out; None before the first."""
        return None if self._delivery is None else self._delivery.progress.cursor

    def state_dict(self) -> dict[str, Any]:
        """The state after the last batch that this iterator gave, see `Loader.state_dict`."""
        return self._opener._state_of(None if self._delivery is None else self._delivery.progress)

    def _start(self) -> AsyncDelivery:
        run = self._opener._open_run()
        self._receive = self._opener._receiver()
        self._delivery = delivery = AsyncDelivery(run)
        self._finalizer = finalize(self, run.leave)
        self._finalizer.atexit = False
        self._opener._opened(delivery)
        return delivery

    async def aclose(self) -> None:
        """End the epoch now; returns when its tasks and threads are gone, in bounded time. Idempotent."""
        self._closed = True
        if self._delivery is not None:
            await self._delivery.aclose()

    def __reduce__(self) -> Any:
        raise TypeError("an iterator over batches is alive on its loop and cannot be pickled; pickle the loader")
