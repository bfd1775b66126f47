"""The two faces: `async for` on the caller's loop, `for` over a loop in a thread of ours, or without any loop.

The user's iterator holds a delivery, a delivery holds its run, and nothing holds the iterator: when the user drops it,
in whatever way, a finalizer ends the run. Iterators are classes, not generators: yielding inside a task group would
cancel the consumer and finalize in the wrong task.
"""

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator
from typing import Any

from aioloader.core.forks import tell_of_fork
from aioloader.core.typevars import T_co
from aioloader.engine.agreed_delivery import AgreedAsyncDelivery, AgreedSyncDelivery
from aioloader.engine.async_delivery import AsyncDelivery
from aioloader.engine.delivery import Delivery, InlineDelivery, Receive
from aioloader.engine.loop_thread import LoopThread
from aioloader.engine.progress import Progress
from aioloader.engine.run import Run
from aioloader.engine.starving import sync_delivery
from aioloader.engine.sync_delivery import SyncDelivery

__all__ = ["AsyncBatches", "Batches", "LoaderHooks"]


class LoaderHooks(ABC):
    """What a face needs to know of its loader."""

    _timeout: float | None = None  # seconds that one batch may take
    _gives_info = False  # pairs of a batch and its `BatchInfo`
    _timeout_message: str = "no batch came within {seconds:g} seconds"

    @abstractmethod
    def _open_run(self) -> Run:
        """Begin the next epoch; called at the first `next()`."""

    def _open_delivery(self) -> SyncDelivery | InlineDelivery:
        """Begin the next epoch for `for`; called at the first `next()`."""
        run = self._open_run()
        if (group := self._agreeing()) is not None:
            return AgreedSyncDelivery(run, self._receiver(), self._shared_loop(), group)
        return sync_delivery(run, self._receiver(), self._shared_loop())

    def _open_async_delivery(self) -> AsyncDelivery:
        """The same for `async for`."""
        run = self._open_run()
        if (group := self._agreeing()) is not None:
            return AgreedAsyncDelivery(run, self._receiver(), group)
        return AsyncDelivery(run, self._receiver())

    def _agreeing(self) -> Any:
        """The process group of the ranks that agree on each batch; None: they do not."""
        return None

    @abstractmethod
    def _receiver(self) -> Receive | None:
        """What takes a batch over in the consumer's thread, if anything must; asked after `_open_run`."""

    @abstractmethod
    def _opened(self, delivery: Delivery) -> None:
        """An epoch of this loader has begun; `delivery` is to be held weakly, for `close`."""

    @abstractmethod
    def _ended(self, progress: Progress) -> None:
        """The consumer was told that an epoch is over, maybe not for the first time."""

    @abstractmethod
    def _state_of(self, progress: Progress | None) -> dict[str, Any]:
        """The state of an iterator whose epoch is at `progress`, or has not begun."""

    @abstractmethod
    def _shared_loop(self) -> LoopThread | None:
        """The loop that a `with` block keeps for all epochs, if there is one."""


class EpochIterator:
    """What both iterators share: they know their loader, and from the first `next()` on the delivery of their epoch."""

    _delivery: Delivery | None = None

    def __init__(self, loader: LoaderHooks) -> None:
        self._loader = loader
        self._closed = False

    @property
    def cursor(self) -> Any:
        """Where to go on after the last batch that was handed out; None before the first."""
        return None if self._delivery is None else self._delivery.progress.cursor

    @property
    def batches(self) -> int:
        """Steps of its epoch that are done, those before a resume and those that raised included."""
        return 0 if self._delivery is None else self._delivery.progress.batches

    def state_dict(self) -> dict[str, Any]:
        """The state after the last batch that this iterator gave, see `Loader.state_dict`."""
        return self._loader._state_of(None if self._delivery is None else self._delivery.progress)

    def __repr__(self) -> str:
        how = "for" if isinstance(self, Batches) else "async for"
        if self._delivery is None:
            where = "closed before its epoch began" if self._closed else "its epoch has not begun"
        else:
            progress = self._delivery.progress
            over = ", over" if progress.over else ", closed" if self._closed else ""
            where = f"epoch {progress.epoch}, {progress.batches} batches handed out{over}"
        return f"<iterator of `{how}` over {self._loader!r}: {where}>"

    def _begin(self, delivery: Delivery) -> None:
        self._delivery = delivery
        delivery.ends_with(self)
        self._loader._opened(delivery)
        try:
            delivery.start()
        except BaseException:  # no thread can be started
            self._delivery = None
            raise

    def __reduce__(self) -> Any:
        raise TypeError("an iterator over batches cannot be pickled; pickle the loader")


class Batches(EpochIterator, Iterator[T_co]):
    """The iterator of `for`: one epoch. Making one starts nothing; the first `next()` does."""

    _delivery: SyncDelivery | InlineDelivery | None

    def __init__(self, loader: LoaderHooks) -> None:
        super().__init__(loader)
        self._starting = threading.RLock()  # a signal handler may close the iterator while its thread is in here
        tell_of_fork(self)

    def _forked(self) -> None:
        """See `Forkable`."""
        self._starting = threading.RLock()

    def __iter__(self) -> "Batches[T_co]":
        return self

    def __next__(self) -> T_co:
        if self._closed:
            raise StopIteration
        loader = self._loader
        delivery = self._delivery
        if delivery is None:
            with self._starting:  # of several threads, one begins the epoch
                if self._closed:
                    raise StopIteration
                delivery = self._delivery
                if delivery is None:
                    self._begin(delivery := loader._open_delivery())
        try:
            batch = delivery.next(loader._timeout, loader._timeout_message)
        except StopIteration:
            if not delivery.progress.resumed_at_end:
                loader._ended(delivery.progress)
                del self
                raise
            del delivery
            return self._following()
        except BaseException:
            # An exception that is kept keeps this frame: not with it the iterator, which would keep its epoch alive.
            del self
            raise
        return (batch, delivery.progress.info) if loader._gives_info else batch  # type: ignore[return-value]

    def _following(self) -> T_co:
        """This epoch was resumed after its last batch: the next one is what was to come."""
        with self._starting:
            if self._delivery is not None and self._delivery.progress.resumed_at_end:
                self._delivery = None
        return self.__next__()

    def close(self) -> None:
        """End the epoch now; returns when its tasks and threads are gone, in bounded time. Idempotent."""
        self._closed = True
        with self._starting:  # an epoch that another thread has just begun is not to be missed: it would never end
            delivery = self._delivery
        if delivery is not None:
            delivery.close()


class AsyncBatches(EpochIterator, AsyncIterator[T_co]):
    """The iterator of `async for`: one epoch, on the loop of the first `anext()`."""

    _delivery: AsyncDelivery | None

    def __aiter__(self) -> "AsyncBatches[T_co]":
        return self

    async def __anext__(self) -> T_co:
        if self._closed:
            raise StopAsyncIteration
        loader = self._loader
        delivery = self._delivery
        if delivery is None:
            self._begin(delivery := loader._open_async_delivery())
        try:
            if loader._timeout is None:
                batch = await delivery.next()
            else:
                batch = await _within(delivery, loader._timeout, loader._timeout_message)
        except StopAsyncIteration:
            if not delivery.progress.resumed_at_end:
                loader._ended(delivery.progress)
                raise
            if self._delivery is delivery:
                self._delivery = None  # it was resumed after its end: the next epoch is what was to come
            del delivery
            return await self.__anext__()
        except BaseException:
            del self  # as in `Batches`
            raise
        return (batch, delivery.progress.info) if loader._gives_info else batch  # type: ignore[return-value]

    async def aclose(self) -> None:
        """End the epoch now; returns when its tasks and threads are gone, in bounded time. Idempotent."""
        self._closed = True
        if self._delivery is not None:
            await self._delivery.aclose()


async def _within(delivery: AsyncDelivery, seconds: float, message: str) -> Any:
    """The next batch, unless it takes longer; then it comes with a later call."""
    try:
        async with asyncio.timeout(seconds) as scope:
            return await delivery.next()
    except TimeoutError:
        if not scope.expired():  # the user's own TimeoutError, from a sample
            raise
        raise RuntimeError(message.format(seconds=seconds)) from None
