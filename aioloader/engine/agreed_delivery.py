"""The two deliveries of an epoch whose ranks agree before each batch, see `engine/agreement.py`."""

import asyncio
import threading
from time import perf_counter
from typing import TYPE_CHECKING, Any

from aioloader.core.entry import Entry
from aioloader.engine.agreement import Agreement, Question
from aioloader.engine.async_delivery import AsyncDelivery
from aioloader.engine.delivery import Receive
from aioloader.engine.loop_thread import LoopThread
from aioloader.engine.run import Run
from aioloader.engine.sync_delivery import SyncDelivery
from aioloader.errors import RankError
from aioloader.executors.threads import call_loop

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["AgreedAsyncDelivery", "AgreedSyncDelivery"]


class AgreedAsyncDelivery(AsyncDelivery):
    """`AsyncDelivery` on ranks that agree."""

    def __init__(self, run: Run, receive: Receive | None, group: "ProcessGroup") -> None:
        super().__init__(run, receive)
        self._agreement = Agreement(group, self.progress)
        self._turn = asyncio.Lock()  # first come, first served
        self._waiter: asyncio.Future[None] | None = None  # for an answer

    def _hand_out(self, entry: Entry, asked: float) -> Any:
        return entry  # not before all ranks have theirs

    def _kick(self, _: object = None) -> None:
        super()._kick()
        if (self.closed or self.run.given_back) and self._waiter is not None:
            _settle(self._waiter)

    async def next(self) -> Any:
        self._check_caller()
        async with self._turn:
            with self._agreement:
                return await self._next()

    async def _next(self) -> Any:
        if self._agreement.over:
            raise StopAsyncIteration
        asked = perf_counter()
        try:
            with self.progress.meter.asks(asked):
                entry = await self._agreed()
        except RankError:
            await self._finish()
            raise
        self.use_ready()
        if entry is None:
            await self._finish()
            self.run.consumer.waited_for_end(asked)
            self.progress.over = True
            raise StopAsyncIteration
        if self.closed or self.run.given_back:  # the source has it again
            raise self._cut_short()
        try:
            return super()._hand_out(entry, asked)
        finally:
            self._agreement.look_ahead(self.take_ready())

    async def _agreed(self) -> Entry | None:
        steps, mine = self._agreement.step(), None
        while True:
            try:
                question = steps.send(mine)
            except StopIteration as done:
                return done.value  # type: ignore[no-any-return]  # see `Steps`
            mine = None
            if question is None:
                mine = await self._mine()
            elif not question.answered:
                await self._wait(question)

    async def _mine(self) -> Entry | None:
        """This rank's next batch; None at its end."""
        try:
            return await super().next()  # type: ignore[no-any-return]  # see `_hand_out`
        except StopAsyncIteration:
            self.progress.over = False  # until all end
            return None
        except Exception as error:
            if error is not self.run.failure:
                raise
            return Entry.last(error, self.progress.cursor, None)

    async def _wait(self, question: Question) -> None:
        loop = self.run.loop
        self._waiter = waiter = loop.create_future()
        question.when_answered(lambda: call_loop(loop, _settle, waiter))
        self.progress.meter.asks_ranks = True
        try:
            await waiter
        finally:
            self.progress.meter.asks_ranks = False
            self._waiter = None
        if not question.answered:
            raise self._cut_short()


def _settle(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


class AgreedSyncDelivery(SyncDelivery):
    """`SyncDelivery` on ranks that agree."""

    def __init__(self, run: Run, receive: Receive | None, shared: LoopThread | None, group: "ProcessGroup") -> None:
        super().__init__(run, receive, shared)
        self._agreement = Agreement(group, self.progress)
        self._turn = threading.Lock()
        self._wake: threading.Event | None = None  # of who waits for an answer

    def _hand_out(self, entry: Entry, asked: float) -> Any:
        return entry  # not before all ranks have theirs

    def next(self, timeout: float | None, timeout_message: str) -> Any:
        if self.run.foreign:
            raise self._left_behind()
        with self._turn, self._agreement:
            if self._agreement.over:
                raise StopIteration
            asked = perf_counter()
            try:
                with self.progress.meter.asks(asked):
                    entry = self._agreed(timeout, timeout_message)
            except RankError:
                super().close()
                raise
            self.use_ready()
            if entry is None:
                super().close()
                self.run.consumer.waited_for_end(asked)
                self.progress.over = True
                raise StopIteration
            if self.run.given_back:  # the source has it again
                raise self._cut_short()
            try:
                return super()._hand_out(entry, asked)
            finally:
                self._agreement.look_ahead(self.take_ready())

    def _agreed(self, timeout: float | None, timeout_message: str) -> Entry | None:
        steps, mine = self._agreement.step(), None
        while True:
            try:
                question = steps.send(mine)
            except StopIteration as done:
                return done.value  # type: ignore[no-any-return]  # see `Steps`
            mine = None
            if question is None:
                mine = self._mine(timeout, timeout_message)
            elif not question.answered:
                self._wait_for_ranks(question)

    def _mine(self, timeout: float | None, timeout_message: str) -> Entry | None:
        """This rank's next batch; None at its end."""
        try:
            return super().next(timeout, timeout_message)  # type: ignore[no-any-return]  # see `_hand_out`
        except StopIteration:
            self.progress.over = False  # until all end
            return None
        except Exception as error:
            if error is not self.run.failure:
                raise
            return Entry.last(error, self.progress.cursor, None)

    def _wait_for_ranks(self, question: Question) -> None:
        """An event can be interrupted by Ctrl-C, as torch's own `wait` cannot."""
        self._wake = wake = threading.Event()
        question.when_answered(wake.set)
        self.progress.meter.asks_ranks = True
        try:
            if not self.closed:  # else `close` may have found no event to set
                wake.wait()
        finally:
            self.progress.meter.asks_ranks = False
            self._wake = None
        if not question.answered:
            raise self._cut_short()

    def close(self) -> None:
        super().close()
        if (wake := self._wake) is not None:
            wake.set()
