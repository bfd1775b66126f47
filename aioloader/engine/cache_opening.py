"""Opening a cache at the beginning of an epoch: in a thread, since it may read files."""

from asyncio import Future
from contextlib import suppress
from copy import copy
from typing import TYPE_CHECKING

from aioloader.cache.disk import DiskStore
from aioloader.cache.store import Store
from aioloader.engine.node import Kick
from aioloader.executors.threads import Threads

if TYPE_CHECKING:
    from aioloader.engine.run import Run

__all__ = ["Opening"]


class Opening:
    """Opens a store in a thread; a store in memory is open at once.

    Args:
        run: The epoch.
        store: The cache.
        pipeline: What comes before the cache, in words.
        ready: Called on the loop when the thread is done; not for a store in memory.

    Attributes:
        done: The store is open, or opening it has failed.
    """

    def __init__(self, run: "Run", store: Store, pipeline: str, ready: Kick) -> None:
        self._store = store
        self._error: BaseException | None = None
        self._threads: Threads | None = None
        self._open_stores: list[Store] = []  # at most one; the loop or the thread, whichever pops it, closes it
        self._closed = False
        self.done = not isinstance(store, DiskStore)
        if not self.done:
            self._threads = run.threads(1, "aioloader-cache")
            future = run.submit(self._threads, self._open, pipeline)
            future.add_done_callback(lambda future: run.guarded(self._landed, future, ready))

    def _open(self, pipeline: str) -> None:
        self._store.open(pipeline)
        self._open_stores.append(self._store)
        if self._closed:  # in the meantime
            self._close_store()

    def _landed(self, future: "Future[None]", ready: Kick) -> None:
        self.done = True
        self._error = None if future.cancelled() else future.exception()
        ready()

    @property
    def error(self) -> BaseException | None:
        """Why opening failed: a new object each time, since an exception that is raised collects frames."""
        if self._error is not None:
            with suppress(Exception):
                return copy(self._error)
        return self._error

    def close(self) -> None:
        """The epoch is over."""
        self._closed = True
        self._close_store()
        if self._threads is not None:
            self._threads.close()

    def _close_store(self) -> None:
        with suppress(IndexError):
            self._open_stores.pop().close()
