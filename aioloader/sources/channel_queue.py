"""What is in a `Channel`, who waits for a place in it, and when it ends."""

import asyncio
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from aioloader.core.typevars import T
from aioloader.errors import ChannelClosedError
from aioloader.sources.channel_waiting import WaitingSender, WaitingTask, wake_all

__all__ = ["ChannelQueue"]

S = TypeVar("S")
W = TypeVar("W", bound=WaitingSender)


class ChannelQueue(Generic[T]):
    """Samples and places; senders, slots and readers are made over it, see `Channel`.

    Args:
        maxsize: How many places there are.
        drops: Whether `send` drops the oldest sample where there is none.
    """

    def __init__(self, maxsize: int, *, drops: bool) -> None:
        self._maxsize = maxsize
        self._drops = drops
        self._dropped = 0
        # Reentrant: a signal handler or a finalizer may close the channel while its thread is in here.
        self._lock = threading.RLock()
        self._samples: deque[T] = deque()
        self._senders: OrderedDict[WaitingSender, None] = OrderedDict()  # in order; only while there is no room
        self._promised = 0  # places of slots, and of senders that were woken and have not put their sample there yet
        self._promising = False
        self._readers: dict[asyncio.Future[None], asyncio.AbstractEventLoop] = {}  # waiting readers, and their loops
        self._closed = False
        self._error: Exception | None = None
        self._handles = 0  # how many are open
        self._handle_error: Exception | None = None
        self._process = _process

    async def send(self, sample: T) -> None:
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
            waiting = self._wait_for_place(WaitingTask())
        try:
            await waiting.woken
            with self._lock:  # in the same step as the wake-up: no cancellation can come in between
                self._claim(waiting)
                self._fill(sample)
        except BaseException:  # also GeneratorExit, when the task is collected with its loop
            self._withdraw(waiting)
            raise

    def send_nowait(self, sample: T) -> None:
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
            f"the channel is full: {self._taken()}; await send(), which waits for room, or leave the sample out"
        )

    def close(self, error: Exception | None = None) -> None:
        """End the epoch after the samples in the channel. Idempotent; the first call counts.

        Those who wait in `send` and `reserve` get `ChannelClosedError`. So does `slot.send` of a slot that was reserved
        before: an end that waited for slots would not come if one of them was forgotten. Close the channel when all
        that should still come has been sent.

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

    @property
    def dropped(self) -> int:
        """How many samples were dropped for newer ones since the channel was made.

        In `stats()` a loader's source has those since it began to read, as of its last read.
        """
        return self._dropped

    # -- inside ------------------------------------------------------------------------------------------------------

    def _put(self, sample: T) -> bool:
        """Append `sample` if there is room, or if room may be made, and wake a reader. Call it under the lock.

        With `drop_oldest` the channel holds the newest samples that there are places for. What went back to it came
        before all others, and is dropped first; more than one for one `send` where it had exceeded `maxsize`. Nothing
        is dropped for what goes back, so that a `break` alone loses no sample. Where all places are reserved, the
        oldest sample without a place is `sample` itself.
        """
        if self._closed:
            raise self._refusal("the sample was not sent")
        if self._full:
            if not self._drops:
                return False
            while self._samples and self._full:
                self._samples.popleft()
                self._dropped += 1
            if self._full:
                self._dropped += 1
                return True
        self._append(sample)
        return True

    @property
    def _full(self) -> bool:
        return len(self._samples) + self._promised >= self._maxsize

    def _taken(self) -> str:
        """Who has the places, for errors."""
        if not self._promised:
            return f"it holds {len(self._samples)} samples, its maxsize"
        return f"it holds {len(self._samples)} samples, {self._promised} of its {self._maxsize} places are reserved"

    def _append(self, sample: T) -> None:
        self._samples.append(sample)
        if self._readers:
            wake_all(self._take_readers())

    def _fill(self, sample: T) -> None:
        """Put `sample` into a place that was promised. Call it under the lock."""
        self._promised -= 1
        self._append(sample)

    async def _reserve(self, slot: Callable[[], S]) -> S:
        """Take a place, and make what stands for it, under the lock: so no cancellation or close comes in between."""
        self._check_process()
        with self._lock:
            if self._take_place():
                return slot()
            waiting = self._wait_for_place(WaitingTask())
        try:
            await waiting.woken
            with self._lock:  # as in `send`
                self._claim(waiting)
                return slot()
        except BaseException:
            self._withdraw(waiting)
            raise

    def _reserve_nowait(self, slot: Callable[[], S]) -> S:
        self._check_process()
        with self._lock:
            if self._take_place():
                return slot()
        raise asyncio.QueueFull(f"the channel has no free place: {self._taken()}; await reserve(), or refuse the work")

    def _take_place(self) -> bool:
        """Take a place if one is free. Call it under the lock."""
        if self._closed:
            raise self._refusal("no place was reserved")
        if self._full:
            return False
        self._promised += 1
        return True

    def _wait_for_place(self, waiting: W) -> W:
        """Let it be woken when a place is promised to it. Call it under the lock."""
        self._senders[waiting] = None
        self._promise_places()  # there was none; but a slot may have been collected since, in this thread
        return waiting

    def _claim(self, waiting: WaitingSender) -> bool:
        """Take over the place that was promised to `waiting`; False: none was, and it gives up. Call it under the lock.

        Raises:
            ChannelClosedError: The channel was closed meanwhile.
        """
        if self._closed:
            raise self._refusal("nothing was sent or reserved")
        self._senders.pop(waiting, None)
        promised, waiting.promised = waiting.promised, False
        return promised

    def _refusal(self, what: str) -> ChannelClosedError:
        refusal = ChannelClosedError(f"the channel is closed: {what}; stop sending, or make a new one")
        refusal.__cause__ = self._error
        return refusal

    def _withdraw(self, waiting: WaitingSender) -> None:
        """Remove a sender that gives up; a place that was promised to it goes to the next."""
        with self._lock:
            self._senders.pop(waiting, None)
            if waiting.promised:
                waiting.promised = False
                self._give_back()

    def _give_back(self) -> None:
        """A place that was promised is free again. Call it under the lock."""
        self._promised -= 1
        if self._senders:
            self._promise_places()

    def _promise_places(self) -> None:
        """Wake senders in order, one for each free place. Call it under the lock.

        A slot that nobody knows any more gives its place back when it is collected. That may be in the middle of this
        function, in this thread, which has the lock already: then the call from there does nothing. What it freed is
        found by the loop inside, which looks again after each sender, or, when it had just seen that it was done, by
        the loop outside.
        """
        if self._promising:
            return
        while self._senders and not self._full:
            self._promising = True
            while self._senders and not self._full:
                waiting, _ = self._senders.popitem(last=False)
                if waiting.alive:
                    waiting.promised = True
                    self._promised += 1
                    waiting.wake()
            self._promising = False

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

    @property
    def _is_here(self) -> bool:
        """Whether this is the process that it belongs to, and no forked child."""
        return self._process is _process

    def _check_process(self) -> None:
        """Refuse to work in a forked child. Call it before taking the lock, which may be locked there for ever."""
        if not self._is_here:
            raise RuntimeError(
                "this Channel was made before a fork and belongs to the parent process: samples sent to it here would "
                "never be read; let the parent send them, for instance after reading them from a pipe"
            )


_process: object = object()  # another one in each forked child


def _forked() -> None:
    global _process
    _process = object()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forked)
