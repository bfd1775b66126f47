"""The delivery of `for`: batches go from the loop's thread to the consumer's."""

import asyncio
import threading
from queue import Empty, SimpleQueue
from time import perf_counter
from typing import Any, Final, NoReturn
from weakref import WeakMethod

from aioloader.core.entry import Entry
from aioloader.engine.admission import ConsumerAdmission
from aioloader.engine.delivery import Receive, RunDelivery
from aioloader.engine.loop_thread import LoopThread, process_ends
from aioloader.engine.run import CLOSE_SECONDS, Run
from aioloader.executors.threads import call_loop

__all__ = ["SyncDelivery"]


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
            # Somebody waits for the first batch: a thread that is woken for more samples would have the interpreter
            # before him. Later that only wakes one more thread too early (3 % with room for 2).
            (self.run.soon if self._put else self.run.first)(self._pump)

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
            if self.run.foreign:
                raise self._left_behind()
            if self._admission is not None:
                self._ask(1)
            try:
                item = None if self._lazy or self._queue.empty() else self._ready()
                if item is None:
                    item = self._wait(asked, timeout, timeout_message)
            except BaseException:
                self._give_up()
                raise
            if isinstance(item, _Ended):
                self._tell_end()
                self._end(asked)
            if self.run.given_back:  # the source has it again
                raise self._cut_short()
            self._unreported += 1
            if self._unreported >= self._report_at:
                self._report(waits=False)
            if not (self.progress.skipped_steps and self.progress.is_skipped(item)):
                return self._hand_out(item, asked)

    def _ready(self) -> Entry | _Ended | None:
        """What is in the queue, if no other thread is quicker."""
        try:
            return self._queue.get_nowait()
        except Empty:
            return None

    def _wait(self, asked: float, timeout: float | None, timeout_message: str) -> Entry | _Ended:
        """What comes into the queue next, for a `next` that was called at `asked`."""
        asking, me = self.progress.meter.asking, object()
        asking[me] = asked
        try:
            if self._over.is_set() and self._queue.empty() and not process_ends():  # a Ctrl-C may have lost the end
                return _ENDED
            self._report(waits=True)
            return self._queue.get(timeout=timeout)
        except Empty:
            raise RuntimeError(timeout_message.format(seconds=timeout)) from None
        finally:
            del asking[me]

    def _give_up(self) -> None:
        """A call of `next` ends without a batch."""
        if self._admission is not None:
            self._ask(-1)
        if self._over.is_set():
            self._tell_end()

    def _tell_end(self) -> None:
        """To the next call, or one that waits in another thread."""
        if self._queue.empty():
            self._queue.put(_ENDED)

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
