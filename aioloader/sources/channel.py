"""`Channel`: samples that other tasks and threads send while they are trained on."""

import asyncio
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from aioloader.core.checks import check_count
from aioloader.core.entry import Entry
from aioloader.core.source import CursorSource, EntryReader, SourceContext
from aioloader.errors import ChannelClosedError
from aioloader.sources.channel_ledger import ChannelLedger
from aioloader.sources.channel_waiting import WaitingSender, WaitingTask, WaitingThread, wake_all

__all__ = ["Channel", "Sender", "SyncSender"]


class Channel(CursorSource):
    """A live source: samples that other tasks or threads send, in the order in which they were sent.

    Tasks of any event loop send with `await send(sample)`, threads with `sender_sync().send(sample)`; both wait while
    the channel holds `maxsize` samples, so that a slow consumer slows down its producers. An epoch lasts until the
    channel is closed. All methods may be called from any thread.

    Several loaders, or several iterators of one, may read a channel: each sample goes to one of them. Samples that a
    loader has read ahead and not handed out when its iterator is closed, or its `take(n)` is complete, go back to the
    front of the channel, in order, and come in the next epoch.

    A live sample comes once: a saved state cannot bring it back in another process.

    Args:
        maxsize: How many samples the channel holds before senders wait, at least 1. Samples that go back to it may
            exceed this.

    ```python
    channel = Channel(maxsize=256)
    loader = Pipeline(channel).batch(64, max_wait=0.5)
    ```
    """

    replayable = False

    def __init__(self, maxsize: int) -> None:
        self._maxsize = check_count("maxsize", maxsize, least=1)
        # Reentrant: a signal handler or a finalizer may close the channel while its thread is in here.
        self._lock = threading.RLock()
        self._samples: deque[Any] = deque()
        self._senders: OrderedDict[WaitingSender, None] = OrderedDict()  # in order; only while there is no room
        self._promised = 0  # places for senders that were woken and have not put their sample there yet
        self._readers: dict[asyncio.Future[None], asyncio.AbstractEventLoop] = {}  # waiting readers, and their loops
        self._closed = False
        self._error: Exception | None = None
        self._handles = 0  # how many are open
        self._handle_error: Exception | None = None
        self._process = _process

    # -- sending -----------------------------------------------------------------------------------------------------

    async def send(self, sample: Any) -> None:
        """Put `sample` into the channel; wait for room, first come, first served.

        A call that is cancelled, also by a timeout around it, has not sent the sample and never will; one that returns
        has sent it.

        Raises:
            ChannelClosedError: The channel is closed, or was closed meanwhile; `sample` has not been sent.
        """
        self._check_process()
        with self._lock:
            if self._put(sample):
                return
            waiting = WaitingTask()
            self._senders[waiting] = None
        try:
            await waiting.woken
        except BaseException:  # also GeneratorExit, when the task is collected with its loop
            self._withdraw(waiting)
            raise
        self._put_promised(waiting, sample)  # in the same step as the wake-up: no cancellation can come in between

    def send_nowait(self, sample: Any) -> None:
        """Put `sample` into the channel if there is room.

        Raises:
            asyncio.QueueFull: There is no room.
            ChannelClosedError: The channel is closed.
        """
        self._check_process()
        with self._lock:
            if self._put(sample):
                return
        raise asyncio.QueueFull(
            f"the channel is full: it holds {self._maxsize} samples, its maxsize; await send(), which waits for room, "
            f"or leave the sample out"
        )

    def sender(self) -> "Sender":
        """A handle for one of several senders: the channel is closed when all its handles are closed.

        Make all of them before the first one is closed, and use each in a `with` or `async with` block:

        ```python
        async def rollout(sender):
            with sender:
                async for step in environment():
                    await sender.send(step)

        tasks = [asyncio.create_task(rollout(channel.sender())) for _ in range(8)]
        ```
        """
        return Sender(self)

    def sender_sync(self) -> "SyncSender":
        """A handle for a thread: its `send` blocks. Close it, or call `channel.close()` in the end."""
        return SyncSender(self)

    # -- the end -----------------------------------------------------------------------------------------------------

    def close(self, error: Exception | None = None) -> None:
        """End the epoch after the samples in the channel. Idempotent; the first call counts.

        Waiting senders get `ChannelClosedError`; their samples are not sent.

        Args:
            error: Raised to the consumer at the end, instead of a plain end.
        """
        if error is not None and not isinstance(error, Exception):
            raise TypeError(f"error must be an exception, for instance ValueError('...'), got {error!r}")
        self._check_process()
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._error = error
            refused = list(self._senders)
            self._senders.clear()
            readers = self._take_readers()
        for waiting in refused:
            waiting.wake()
        wake_all(readers)

    @property
    def closed(self) -> bool:
        """Whether `close` was called; the channel may still hold samples."""
        return self._closed

    def qsize(self) -> int:
        """How many samples the channel holds."""
        return len(self._samples)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.close(error if isinstance(error, Exception) else None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.close(error if isinstance(error, Exception) else None)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return f"<Channel: {len(self._samples)} samples, maxsize {self._maxsize}, {state}>"

    def __reduce__(self) -> Any:
        raise TypeError(
            "a Channel belongs to its process and cannot be pickled or copied; make it where it is read, and let other "
            "processes send to a task or thread there"
        )

    # -- reading -----------------------------------------------------------------------------------------------------

    def open(self, context: SourceContext, cursor: Any) -> EntryReader:
        """Read on. `cursor` has no effect, because live samples do not come again."""
        self._check_process()
        ledger: ChannelLedger = context.shared(self, lambda: ChannelLedger(self._put_back))
        return _ChannelReader(self, context, ledger)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _put(self, sample: Any) -> bool:
        """Append `sample` if there is room, and wake a reader. Call it under the lock."""
        if self._closed:
            raise self._refusal()
        if len(self._samples) + self._promised >= self._maxsize:
            return False
        self._append(sample)
        return True

    def _append(self, sample: Any) -> None:
        self._samples.append(sample)
        if self._readers:
            wake_all(self._take_readers())

    def _put_promised(self, waiting: WaitingSender, sample: Any) -> bool:
        """Put `sample` into the place that was promised to its sender; False if none was, and the sender gives up."""
        with self._lock:
            self._senders.pop(waiting, None)
            if self._closed:
                raise self._refusal()
            if not waiting.promised:
                return False
            waiting.promised = False
            self._promised -= 1
            self._append(sample)
        return True

    def _refusal(self) -> ChannelClosedError:
        refusal = ChannelClosedError("the channel is closed: the sample was not sent; stop sending, or make a new one")
        refusal.__cause__ = self._error
        return refusal

    def _withdraw(self, waiting: WaitingSender) -> None:
        """Remove a sender that gives up; a place that was promised to it goes to the next."""
        with self._lock:
            self._senders.pop(waiting, None)
            if waiting.promised:
                waiting.promised = False
                self._promised -= 1
                self._promise_places()

    def _promise_places(self) -> None:
        """Wake senders in order, one for each free place. Call it under the lock."""
        while self._senders and len(self._samples) + self._promised < self._maxsize:
            waiting, _ = self._senders.popitem(last=False)
            if waiting.alive:
                waiting.promised = True
                self._promised += 1
                waiting.wake()

    def _take_readers(self) -> "dict[asyncio.Future[None], asyncio.AbstractEventLoop]":
        readers, self._readers = self._readers, {}
        return readers

    def _take(self, limit: int) -> list[Any]:
        """Take up to `limit` samples, and give the room to waiting senders. Call it under the lock."""
        samples = self._samples
        taken = [samples.popleft() for _ in range(min(limit, len(samples)))]
        if self._senders:
            self._promise_places()
        return taken

    def _put_back(self, samples: Sequence[Any]) -> None:
        """Put samples that were read and not handed out in front of the others."""
        with self._lock:
            self._samples.extendleft(reversed(samples))
            readers = self._take_readers()
        wake_all(readers)

    def _count_handle(self, change: int, error: Exception | None = None) -> None:
        self._check_process()
        with self._lock:
            if self._handle_error is None:
                self._handle_error = error
            self._handles += change
            if self._handles:
                return
        self.close(self._handle_error)

    def _check_process(self) -> None:
        """Refuse to work in a forked child. Call it before taking the lock, which may be locked there for ever."""
        if self._process is not _process:
            raise RuntimeError(
                "this Channel was made before a fork and belongs to the parent process: samples sent to it here would "
                "never be read; let the parent send them, for instance after reading them from a pipe"
            )


class _Handle:
    """One of several senders; leaving its `with` block closes it.

    If the block ends with an exception, the others go on, and the consumer gets the first such exception at the end,
    because it has not got all samples.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._open = True
        channel._count_handle(1)

    def send_nowait(self, sample: Any) -> None:
        """See `Channel.send_nowait`."""
        self._check_open()
        self._channel.send_nowait(sample)

    def close(self) -> None:
        """Close this sender; closing the last one closes the channel. Idempotent."""
        self._close(None)

    def _close(self, error: Exception | None) -> None:
        self._channel._check_process()
        with self._channel._lock:
            if not self._open:
                return
            self._open = False
        self._channel._count_handle(-1, error)

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


class Sender(_Handle):
    """Made by `Channel.sender()`, for a task."""

    async def send(self, sample: Any) -> None:
        """See `Channel.send`."""
        self._check_open()
        await self._channel.send(sample)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, traceback)


class SyncSender(_Handle):
    """Made by `Channel.sender_sync()`, for threads without an event loop."""

    def send(self, sample: Any, timeout: float | None = None) -> None:
        """Put `sample` into the channel; block until there is room.

        Args:
            sample: Anything.
            timeout: The most seconds to wait; None means no limit.

        Raises:
            TimeoutError: There was no room in that time; `sample` has not been sent.
            ChannelClosedError: The channel is closed, or was closed meanwhile; `sample` has not been sent.
            RuntimeError: This thread runs an event loop, which would be blocked.
        """
        self._check_open()
        if asyncio._get_running_loop() is not None:
            raise RuntimeError("send() of a sync sender blocks, and this thread runs an event loop; await channel.send")
        channel = self._channel
        channel._check_process()
        with channel._lock:
            if channel._put(sample):
                return
            waiting = WaitingThread()
            channel._senders[waiting] = None
        try:
            waiting.woken.wait(timeout)
            sent = channel._put_promised(waiting, sample)
        except BaseException:  # a Ctrl-C
            channel._withdraw(waiting)
            raise
        if not sent:
            raise TimeoutError(f"the channel had no room for {timeout:g} s; the sample was not sent")


class _ChannelReader(EntryReader):
    """Takes samples out of a channel as they are asked for."""

    def __init__(self, channel: Channel, context: SourceContext, ledger: ChannelLedger) -> None:
        self._channel = channel
        self._context = context
        self._ledger = ledger

    async def read(self, limit: int) -> list[Entry]:
        channel = self._channel
        self._ledger.forget(self._context.handed_out)
        while True:
            with channel._lock:
                samples = channel._take(limit)
                if not samples:
                    if channel._closed:
                        break
                    arrival = self._context.loop.create_future()
                    channel._readers[arrival] = self._context.loop
            if samples:
                return self._ledger.entries(samples)
            try:
                await arrival
            finally:
                with channel._lock:
                    channel._readers.pop(arrival, None)
        if channel._error is not None:
            raise channel._error
        return []


_process: object = object()  # another one in each forked child


def _forked() -> None:
    global _process
    _process = object()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forked)
