"""Deliveries: how the batches of one epoch reach the iterator that asks for them."""

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Callable
from queue import Empty, SimpleQueue
from time import perf_counter
from typing import Any, Final, NoReturn
from weakref import WeakMethod, finalize

from aioloader.core.entry import LAST, Entry, presentable
from aioloader.engine.admission import ConsumerAdmission
from aioloader.engine.loop_thread import LoopThread, process_ends
from aioloader.engine.node import Node
from aioloader.engine.progress import Progress
from aioloader.engine.run import CLOSE_SECONDS, Run
from aioloader.engine.tuner import Tuner
from aioloader.engine.window import Window
from aioloader.errors import LoaderClosedError
from aioloader.executors.threads import call_loop

__all__ = ["AsyncDelivery", "Delivery", "InlineDelivery", "Receive", "SyncDelivery"]

Receive = Callable[[Any], Any]
"""Takes a batch over in the consumer's thread."""


class Delivery:
    """Hands one epoch's batches to one iterator.

    Args:
        progress: Of the epoch.
        receive: Called with each batch in the consumer's thread, if anything must be done there.
    """

    def __init__(self, progress: Progress, receive: Receive | None) -> None:
        self.progress = progress
        self._receive = receive
        self._output: Window | None = None  # where entries wait until they are handed out
        self._in_hand = 0  # batches that `take_ready` took, and nobody has used yet

    def ends_with(self, iterator: object) -> None:
        """Leave nothing behind when `iterator`, which holds this delivery, is dropped without `close`."""

    def start(self) -> None:
        """Begin, once it is known to those who may close it."""

    def tune(self, tuner: Tuner) -> None:
        """Let `tuner` find better values from now on, if there is anything to change. From any thread."""

    def _hand_out(self, entry: Entry, asked: float) -> Any:
        """The batch of `entry`, or its error, raised."""
        now = asked + self.progress.hand_out(entry, asked)
        if self._output is not None:
            self._output.handed_out(entry, now)
        error, value = entry.error, entry.value
        entry.error = entry.value = None  # an error keeps this frame: it must not keep the error
        if error is None:
            return value if self._receive is None else self._receive(value)
        if entry.state == LAST:
            self.progress.length = None  # a resume tries the source again, so this was no full epoch
        try:
            raise presentable(error)
        finally:
            del error


class InlineDelivery(Delivery):
    """Makes each batch in the consumer's own thread, inside `next`; nothing runs in between.

    Its nodes belong to no run. So it needs no finalizer, and works in a forked child too.
    """

    def __init__(self, node: Node, progress: Progress, receive: Receive | None) -> None:
        super().__init__(progress, receive)
        self._node = node

    def next(self, timeout: float | None, timeout_message: str) -> Any:
        """Make the next batch; no timeout can interrupt that.

        Raises:
            StopIteration: The epoch is over.
        """
        asked = perf_counter()
        progress = self.progress
        run = [] if progress.over else self._node.poll(1)
        while run and progress.skipped_steps and progress.is_skipped(run[0]):
            run = self._node.poll(1)
        if not run:
            progress.over = True
            progress.meter.finish()
            raise StopIteration
        run[0].begun = progress.meter.batches  # all of it happened in here
        return self._hand_out(run[0], asked)

    def close(self) -> None:
        self._node.close()
        self.progress.meter.finish()


class RunDelivery(Delivery):
    """Hands out what a run makes on its event loop."""

    def __init__(self, run: Run, receive: Receive | None) -> None:
        super().__init__(run.progress, receive)
        self.run = run
        self._output = run.output
        run.output.hands_out = True
        self.closed = False
        self._failure_told = False

    def ends_with(self, iterator: object) -> None:
        finalize(iterator, self.run.leave).atexit = False  # the exit hook of `loop_thread` also waits

    def tune(self, tuner: Tuner) -> None:
        self.run.be_tuned(tuner)

    def _take_failure(self, end: BaseException) -> BaseException:
        """The failure of the run, once; then `end`, so that catching errors and going on comes to an end."""
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
        """The error for an epoch that something else ended: it must not look like one that is over."""
        return LoaderClosedError("the loader was closed before this epoch was over; iterate it again for a new one")


class AsyncDelivery(RunDelivery):
    """Hands batches to coroutines on the run's own loop."""

    def __init__(self, run: Run, receive: Receive | None) -> None:
        super().__init__(run, receive)
        loop = asyncio.get_running_loop()
        run.attach(loop)
        self._waiters: OrderedDict[asyncio.Future[None], None] = OrderedDict()  # calls of `next`, in order
        self._asking = 0  # calls of `next` under way
        if isinstance(run.output.admission, ConsumerAdmission):
            run.output.admission.waiting = lambda: self._asking
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

        This coroutine holds no batch while it waits, so cancelling it loses nothing: the batch stays in the window.

        Batches go to callers in the order of their calls. Between the moment a waiter is woken and its next step,
        others may call, and it may be cancelled. So a waiter keeps its place until it leaves, only the first one
        looks, and each that leaves, in whatever way, wakes the one that is first then.

        Raises:
            StopAsyncIteration: The epoch is over, and all of its tasks and threads are gone.
        """
        asked = perf_counter()
        run = self.run
        self._check_caller()
        mine: asyncio.Future[None] | None = None
        self._asking += 1
        if run.output.admission is not None:
            run.output.admission.changed()
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
                if before is not None:  # woken without need: it is still the first
                    del self._waiters[before]
                    self._waiters.move_to_end(mine, last=False)
                await mine
        finally:
            self._asking -= 1
            if mine is not None:
                del self._waiters[mine]
                self._kick()

    def _check_caller(self) -> None:
        """Refuse to wait for another process, or on another loop.

        Raises:
            RuntimeError: The caller is there.
        """
        self._check_process()
        if asyncio.get_running_loop() is not self.run.loop:
            raise RuntimeError("this iterator belongs to another event loop: make a new one with aiter(loader)")

    def take_ready(self) -> Entry | None:
        """The next batch, if it is there and may be looked at. It keeps its room until `use_ready`.

        While nobody is in `next`. With an admission it may not: what is taken counts as asked for.
        """
        run = self.run
        idle = self.closed or run.given_back or not run.started or run.failure is not None
        if idle or self.progress.skipped_steps or run.output.admission is not None or not run.output.room:
            return None
        taken = run.output.poll(1)
        if not taken:
            return None
        run.output.lend(1)
        self._in_hand = 1
        return taken[0]

    def use_ready(self) -> None:
        """What `take_ready` took is the consumer's, if it took any."""
        if self._in_hand:
            self._in_hand = 0
            self.run.output.give_back(1)

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


_ENDED: Final = _Ended()

LARGE_ROOM: Final = 8


class SyncDelivery(RunDelivery):
    """Hands batches from the loop's thread to the consumer's through a plain thread queue, which the loop fills.

    Room in the last window counts until the consumer really has a batch (`Window.lend`). The loop is told of free room
    for half of a large window at once, or when the consumer is about to wait: with room for 16 the two threads need not
    wake each other for every batch (8.5 µs a batch; for a quarter at once 9.5). In a small one each place counts.
    """

    def __init__(self, run: Run, receive: Receive | None, shared: LoopThread | None) -> None:
        super().__init__(run, receive)
        run.left = False  # what is in the queue when the run is over may still be taken
        queued = WeakMethod(self._queued)  # statistics outlive the iterator, and must not keep its batches
        run.output.queued = lambda: 0 if (ask := queued()) is None else ask()
        self._queue: SimpleQueue[Entry | _Ended] = SimpleQueue()
        self._put = 0  # on the loop: batches put into the queue
        self._given = 0  # on the loop: those of them whose room was given back
        self._unreported = 0  # batches taken since the loop was told, roughly; only decides when to tell it
        self._report_at = run.output.room // 2 if run.output.room >= LARGE_ROOM else 1
        self._lazy = run.output.room == 0
        self._admission = run.output.admission
        if isinstance(self._admission, ConsumerAdmission):
            self._report_at = 1  # each batch that is handed out makes room
            self._admission.waiting = self._waiting
        self._asks = 0  # calls of `next` that wait for a batch, or have one
        self._asks_lock = threading.Lock()
        self._asked = 0  # on the loop: how many consumers wait
        self._pumping = False
        self._over = threading.Event()
        self._own_loop = None if shared is not None else LoopThread()
        self._loop_thread = shared or self._own_loop
        assert self._loop_thread is not None
        run.private_loop = True
        run.attach(self._loop_thread.loop)

    def start(self) -> None:
        """See `Delivery`. Who closes the loader from now on, or has done so already, ends it: see `Run.leave`."""
        assert self._loop_thread is not None
        supervisor = self.run.supervise(self._kick)
        self._loop_thread.start_task(supervisor, self.run.request_stop, self._supervisor_done)

    # -- on the loop -------------------------------------------------------------------------------------------------

    def _kick(self) -> None:
        if not self._pumping and self.run.started:
            self._pumping = True
            self.run.soon(self._pump)

    def _pump(self) -> None:
        """Move finished batches into the queue; without prefetch, only as many as consumers wait for."""
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
        if not process_ends():  # else the consumer is a daemon thread, which ends with the process
            self._queue.put(_ENDED)
        if self._own_loop is not None:
            self._own_loop.request_stop()

    def _queued(self) -> int:
        """Batches that wait in the queue; from any thread."""
        return 0 if self.closed else max(0, self._queue.qsize() - self._over.is_set())

    # -- in the consumer's thread ------------------------------------------------------------------------------------

    def next(self, timeout: float | None, timeout_message: str) -> Any:
        """Wait for the next batch, `timeout` seconds at most.

        Raises:
            StopIteration: The epoch is over, and all of its tasks and threads are gone.
            RuntimeError: `timeout_message`; the batch comes with a later call.
        """
        while True:
            asked = perf_counter()
            self._check_process()
            self._ask(1)
            try:
                if self._lazy or self._queue.empty():  # a batch in it may be for another thread that asked for it
                    self._report(waits=True)
                item = self._queue.get(timeout=timeout)
            except BaseException as error:
                self._ask(-1)
                if not isinstance(error, Empty):
                    raise
                raise RuntimeError(timeout_message.format(seconds=timeout)) from None
            if isinstance(item, _Ended):
                self._queue.put(item)  # for the next call
                self._end(asked)
            if self.run.given_back:  # the source has it again
                raise self._cut_short()
            self._unreported += 1
            if self._unreported >= self._report_at:
                self._report(waits=False)
            if not (self.progress.skipped_steps and self.progress.is_skipped(item)):
                return self._hand_out(item, asked)

    def take_ready(self) -> Entry | None:
        """See `AsyncDelivery`."""
        idle = self.closed or self.run.given_back or self.progress.skipped_steps or self._admission is not None
        if idle or self._queue.empty():
            return None
        self._in_hand = 1  # before it leaves the queue: the loop must not take its room for free
        item = self._queue.get_nowait()
        if isinstance(item, _Ended):
            self._queue.put(item)
            self._in_hand = 0
            return None
        return item

    def use_ready(self) -> None:
        """See `AsyncDelivery`."""
        if self._in_hand:
            self._in_hand = 0
            self._unreported += 1
            if self._unreported >= self._report_at:
                self._report(waits=False)

    def _end(self, asked: float) -> NoReturn:
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

    def _ask(self, calls: int) -> None:
        """With an admission, count calls of `next`, of whatever thread. Before they look into the queue, see there."""
        if self._admission is not None:
            with self._asks_lock:
                self._asks += calls

    def _waiting(self) -> int:
        """Calls of `next` without a batch.

        Each call is counted before it looks into the queue, and a batch is in no queue any more when it has been taken
        out. So a call that has just taken one does not seem to wait for another, whatever the moment in which the loop
        asks; what it has taken counts as alive until it is reported.
        """
        return max(0, self._asks - (self._put - self._queue.qsize()))

    def _report(self, *, waits: bool) -> None:
        """Make the loop look at the queue. It does not rely on counts of this thread, which a Ctrl-C may spoil."""
        self._unreported = 0
        call_loop(self.run.loop, self.run.guarded, self._reported, waits)

    def _reported(self, waits: bool) -> None:
        free = self._put - self._queue.qsize() - self._given - self._in_hand
        if free > 0:
            self._given += free
            self.run.output.give_back(free)
        if self._admission is not None:
            self._admission.changed()
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
