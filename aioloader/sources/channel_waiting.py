"""Who waits at a `Channel`, for room or for a sample, and how one is woken from any thread."""

import asyncio
import threading
from abc import ABC, abstractmethod

from aioloader.executors.threads import call_loop

__all__ = ["WaitingSender", "WaitingTask", "WaitingThread", "wake"]


class WaitingSender(ABC):
    """A sender that waits for room.

    The story of a race. A reader that makes room could move the sample of the sender whose turn it is, and wake the
    sender to tell. But between that and the sender's next step there is time: its task may be cancelled in the same
    turn of the loop, by a timeout for instance (asyncio then throws `CancelledError` into it although the future that
    it waited for has a result), and a thread may get a Ctrl-C. It can neither take the sample back, which may have been
    trained on, nor swallow the cancellation, which others wait for. So only the *place* is promised, and the sender
    puts the sample there itself, in the step in which it returns. What is cancelled before has not sent, and hands its
    place on; after it there is nothing left to cancel.

    Attributes:
        promised: One place in the channel is its own. Guarded by the channel's lock.
    """

    promised = False

    @property
    @abstractmethod
    def alive(self) -> bool:
        """Whether it can still be woken."""

    @abstractmethod
    def tell(self) -> None:
        """Wake the sender, from any thread."""


class WaitingTask(WaitingSender):
    """A task that waits in `Channel.send`; it awaits `told`."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.told = self._loop.create_future()

    @property
    def alive(self) -> bool:
        return not self._loop.is_closed()

    def tell(self) -> None:
        _set(self.told, self._loop)


class WaitingThread(WaitingSender):
    """A thread that waits in `SyncSender.send`, for the event `told`."""

    alive = True

    def __init__(self) -> None:
        self.told = threading.Event()

    def tell(self) -> None:
        self.told.set()


def wake(futures: "dict[asyncio.Future[None], asyncio.AbstractEventLoop]") -> None:
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
