"""The delivery of `async for`: batches go to coroutines on the loop that makes them."""

import asyncio
from collections import OrderedDict
from time import perf_counter
from typing import Any

from aioloader.core.entry import Entry
from aioloader.engine.admission import ConsumerAdmission
from aioloader.engine.delivery import Receive, RunDelivery
from aioloader.engine.run import Run

__all__ = ["AsyncDelivery"]


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
                    if run.failure is not None or self.closed or run.given_back:
                        await self._check_open()
                    if run.started and (taken := run.output.poll(1)):
                        if self.progress.skipped_steps and self.progress.is_skipped(taken[0]):
                            continue
                        return self._hand_out(taken[0], asked)
                    if run.started and run.output.ended:
                        run.consumer.waited_for_end(asked)
                        self.progress.over = True
                        with run.consumer.asks(asked):
                            await self._finish()
                        raise StopAsyncIteration
                    if self._supervisor.done():  # its loop has cancelled it
                        raise self._cut_short()
                mine = self._line_up(mine, asked)
                await mine
        finally:
            self._asking -= 1
            if mine is not None:
                del self._waiters[mine]
                del run.consumer.asking[mine]
                self._kick()

    async def _check_open(self) -> None:
        """Refuse to wait for what will not come.

        Raises:
            BaseException: The run has failed, or was closed before its end.
        """
        if self.run.failure is not None:
            await self._finish()
            raise self._take_failure(StopAsyncIteration())
        if not self.run.output.ended:
            raise self._cut_short()

    def _line_up(self, before: "asyncio.Future[None] | None", asked: float) -> "asyncio.Future[None]":
        """A place among the waiters: the last one, or the first one for who was woken there without need.

        Args:
            before: The place until now.
            asked: When `next` was called.
        """
        mine, asking = self.run.loop.create_future(), self.run.consumer.asking
        self._waiters[mine], asking[mine] = None, asked
        if before is not None:
            del self._waiters[before], asking[before]
            self._waiters.move_to_end(mine, last=False)
        return mine

    def _check_caller(self) -> None:
        """Refuse to wait for another process, or on another loop.

        Raises:
            RuntimeError: The caller is there.
        """
        if self.run.foreign:
            raise self._left_behind()
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
