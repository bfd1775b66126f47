"""Senders that wait for room in a `Channel`, and how waiting tasks and threads are woken from any thread."""

import asyncio
import threading
from abc import ABC, abstractmethod

from aioloader.executors.threads import call_loop

__all__ = ["WaitingSender", "WaitingTask", "WaitingThread", "wake_all"]


class WaitingSender(ABC):
    """A sender that waits for room.

    Why a reader that makes room does not move the sample of the next sender itself, and then wake the sender: there is
    a race. Before the sender's next step its task may be cancelled in the same iteration of the loop, for instance by a
    timeout (asyncio then throws `CancelledError` into it although the future that it waited for has a result), and a
    thread may get a Ctrl-C. The sender can neither take the sample back, which may have been trained on, nor swallow
    the cancellation, which others wait for. So it is only *promised* a place, and puts the sample there itself, in the
    step in which it returns. If it is cancelled before that, it has not sent the sample, and its place goes to the
    next; after that there is nothing to cancel.

    Attributes:
        promised: Whether a place in the channel is reserved for it. Guarded by the channel's lock.
    """

    promised = False

    @property
    @abstractmethod
    def alive(self) -> bool:
        """Whether it can still be woken up."""

    @abstractmethod
    def wake(self) -> None:
        """Wake the sender, from any thread."""


class WaitingTask(WaitingSender):
    """A task that waits in `Channel.send`; it awaits `woken`."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.woken = self._loop.create_future()

    @property
    def alive(self) -> bool:
        return not self._loop.is_closed()

    def wake(self) -> None:
        _set(self.woken, self._loop)


class WaitingThread(WaitingSender):
    """A thread that waits in `SyncSender.send`, for the event `woken`."""

    alive = True

    def __init__(self) -> None:
        self.woken = threading.Event()

    def wake(self) -> None:
        self.woken.set()


def wake_all(futures: "dict[asyncio.Future[None], asyncio.AbstractEventLoop]") -> None:
    """Complete futures, each on its loop."""
    for future, loop in futures.items():
        _set(future, loop)


def _set(future: "asyncio.Future[None]", loop: asyncio.AbstractEventLoop) -> None:
    if asyncio._get_running_loop() is loop:
        _complete(future)
    else:
        call_loop(loop, _complete, future)


def _complete(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
