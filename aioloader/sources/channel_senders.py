"""Handles for several senders of a `Channel`, which is closed with the last of them: for tasks, and for threads."""

import asyncio
from types import TracebackType
from typing import Generic, Self
from weakref import WeakSet

from aioloader.core.typevars import T
from aioloader.errors import ChannelClosedError
from aioloader.sources.channel_queue import ChannelQueue
from aioloader.sources.channel_slot import Slot
from aioloader.sources.channel_waiting import WaitingThread

__all__ = ["Handle", "Sender", "SyncSender"]


class Handle(Generic[T]):
    """One of several senders; leaving its `with` block closes it.

    If the block ends with an exception, the others go on, and the consumer gets the first such exception at the end,
    because it has not got all samples.

    Its slots end with it. One of a task that has failed may live on, in the traceback of an error that is kept for the
    consumer; with its place, others would wait for ever.
    """

    def __init__(self, channel: ChannelQueue[T]) -> None:
        self._channel = channel
        self._open = True
        self._slots: WeakSet[Slot[T]] = WeakSet()
        channel._count_handle(1)

    def send_nowait(self, sample: T) -> None:
        """See `Channel.send_nowait`."""
        self._check_open()
        self._channel.send_nowait(sample)

    def reserve_nowait(self) -> Slot[T]:
        """See `Channel.reserve_nowait`."""
        self._check_open()
        return self._channel._reserve_nowait(self._slot)

    def close(self) -> None:
        """Close this sender, and give back its unused slots; closing the last one closes the channel. Idempotent."""
        self._close(None)

    def _close(self, error: Exception | None) -> None:
        self._channel._check_process()
        with self._channel._lock:
            if not self._open:
                return
            self._open = False
            slots = list(self._slots)
        for slot in slots:
            slot.release()
        self._channel._count_handle(-1, error)

    def _slot(self) -> Slot[T]:
        """For a place that was taken or promised, under the lock; given back where this was closed meanwhile."""
        if not self._open:
            self._channel._give_back()
            self._check_open()
        slot = Slot(self._channel, self._check_open)
        self._slots.add(slot)
        return slot

    def _check_open(self) -> None:
        if not self._open:
            raise ChannelClosedError("this sender is closed: the sample was not sent; make one with channel.sender()")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # A sender that stops because the channel was closed has no error of its own.
        failed = isinstance(error, Exception) and not isinstance(error, ChannelClosedError)
        self._close(error if failed else None)  # type: ignore[arg-type]  # checked in the line above


class Sender(Handle[T]):
    """Made by `Channel.sender()`, for a task."""

    async def send(self, sample: T) -> None:
        """See `Channel.send`."""
        self._check_open()
        await self._channel.send(sample)

    async def reserve(self) -> Slot[T]:
        """See `Channel.reserve`."""
        self._check_open()
        return await self._channel._reserve(self._slot)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, traceback)


class SyncSender(Handle[T]):
    """Made by `Channel.sender_sync()`, for threads without an event loop."""

    def send(self, sample: T, timeout: float | None = None) -> None:
        """Put `sample` into the channel; block until there is room.

        Args:
            sample: What to put there.
            timeout: The most seconds to wait; None means no limit.

        Raises:
            TimeoutError: There was no room in that time; `sample` has not been sent.
            ChannelClosedError: The channel is closed, or was closed meanwhile; `sample` has not been sent.
            RuntimeError: This thread runs an event loop, which would be blocked.
        """
        self._check_may_block("send")
        channel = self._channel
        with channel._lock:
            if channel._put(sample):
                return
            waiting = channel._wait_for_place(WaitingThread())
        try:
            waiting.woken.wait(timeout)
            with channel._lock:
                sent = channel._claim(waiting)
                if sent:
                    channel._fill(sample)
        except BaseException:  # a Ctrl-C
            channel._withdraw(waiting)
            raise
        if not sent:
            raise TimeoutError(f"the channel had no room for {timeout:g} s; the sample was not sent")

    def reserve(self, timeout: float | None = None) -> Slot[T]:
        """Take a place for a sample that is yet to be made; block until there is one. See `Channel.reserve`.

        Args:
            timeout: The most seconds to wait; None means no limit.

        Raises:
            TimeoutError: No place was free in that time.
            ChannelClosedError: The channel is closed, or was closed meanwhile.
            RuntimeError: This thread runs an event loop, which would be blocked.
        """
        self._check_may_block("reserve")
        channel = self._channel
        with channel._lock:
            if channel._take_place():
                return self._slot()
            waiting = channel._wait_for_place(WaitingThread())
        try:
            waiting.woken.wait(timeout)
            with channel._lock:
                if channel._claim(waiting):
                    return self._slot()
        except BaseException:
            channel._withdraw(waiting)
            raise
        raise TimeoutError(f"the channel had no free place for {timeout:g} s")

    def _check_may_block(self, method: str) -> None:
        self._check_open()
        if asyncio._get_running_loop() is not None:
            raise RuntimeError(
                f"{method}() of a sync sender blocks, and this thread runs an event loop; await channel.{method}"
            )
        self._channel._check_process()
