"""How an epoch opens its caches: in a thread, since that may read."""

from collections.abc import Sequence
from contextlib import suppress
from copy import copy
from typing import TYPE_CHECKING, Any

from aioloader.cache.disk import DiskStore
from aioloader.cache.store import Store
from aioloader.engine.node import Kick
from aioloader.executors.threads import Threads

if TYPE_CHECKING:
    from aioloader.engine.run import Run

__all__ = ["Opening"]


class Opening:
    """Opens stores in a thread, since that may read, and says when it is done.

    Args:
        run: Of which epoch.
        stores: With the pipeline in front of each, in words.
        done: Called on the loop with what went wrong.
    """

    def __init__(self, run: "Run", stores: Sequence[tuple[Store, str]]) -> None:
        self._run = run
        self._stores = stores
        self._opened: list[Store] = []
        self._threads: Threads | None = None
        self._closed = False
        self.done = False
        self._error: BaseException | None = None

    def begin(self, ready: Kick) -> None:
        """Open them; `ready` is called when they are, unless that is at once."""
        slow = [(store, pipeline) for store, pipeline in self._stores if isinstance(store, DiskStore)]
        if not slow:
            self.done = True
            return
        self._threads = self._run.threads(1, "aioloader-cache")
        future = self._run.submit(self._threads, self._open, slow)
        future.add_done_callback(lambda future: self._run.guarded(self._landed, future, ready))

    def _open(self, slow: Sequence[tuple[Store, str]]) -> None:
        for store, pipeline in slow:
            store.open(pipeline)
            self._opened.append(store)
        if self._closed:  # meanwhile
            self._close_opened()

    def _landed(self, future: Any, ready: Kick) -> None:
        self.done = True
        self._error = None if future.cancelled() else future.exception()
        ready()

    @property
    def error(self) -> BaseException | None:
        """What went wrong: another object each time, since one that was raised keeps the frames it went through."""
        if self._error is not None:
            with suppress(Exception):
                return copy(self._error)
        return self._error

    def close(self) -> None:
        """The epoch is over."""
        self._closed = True
        self._close_opened()
        if self._threads is not None:
            self._threads.close()

    def _close_opened(self) -> None:
        while self._opened:
            try:
                store = self._opened.pop()
            except IndexError:  # the thread was faster
                return
            store.close()
