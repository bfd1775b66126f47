"""Gates hold the functions under test until the test opens them: no test needs a delay."""

import asyncio
import concurrent.futures
import threading
from collections.abc import Hashable, Iterable
from typing import Final

__all__ = ["Gate"]

DEADLINE_SECONDS: Final = 30.0
"""A wait fails after this time; waits of passing tests are much shorter."""


class Gate:
    """One gate per key, closed at first: functions under test wait at their gates until the test opens them.

    It works in async functions on any event loop, and in sync functions in threads. With it a test holds a loader in an
    exact state ("four samples under way, none finished") and inspects it, however slow the machine is.

    Example:
        ```python
        gate = Gate()

        async def fetch(key):
            await gate.passing(key)
            return key

        async def main():
            batches = aiter(Pipeline(range(100)).map(fetch, concurrency=4))
            first = asyncio.ensure_future(anext(batches))
            await gate.until_arrived(4)      # four samples wait at their gates
            assert gate.arrived == (0, 1, 2, 3)
            gate.open_all()
            assert await first == 0
        ```

    Args:
        deadline_seconds: A wait raises `TimeoutError` after this time.
    """

    def __init__(self, *, deadline_seconds: float = DEADLINE_SECONDS) -> None:
        self._deadline = deadline_seconds
        self._lock = threading.Lock()
        self._arrived: list[Hashable] = []
        self._opened: set[Hashable] = set()
        self._all_open = False
        self._waiting: dict[Hashable, list[concurrent.futures.Future[None]]] = {}
        self._watching: list[tuple[int, concurrent.futures.Future[None]]] = []

    @property
    def arrived(self) -> tuple[Hashable, ...]:
        """The keys of all calls so far, in order of arrival, whether they still wait or not."""
        with self._lock:
            return tuple(self._arrived)

    @property
    def standing(self) -> int:
        """How many calls wait at closed gates now."""
        with self._lock:
            return sum(not future.done() for futures in self._waiting.values() for future in futures)

    async def passing(self, key: Hashable = None) -> None:
        """Arrive at the gate of `key` and wait until it is open.

        Raises:
            TimeoutError: It was not opened before the deadline.
        """
        await self._wait(self._arrive(key), f"the gate of {key!r} was not opened")

    def pass_sync(self, key: Hashable = None) -> None:
        """Do the same as `passing`, in a sync function in a thread.

        Raises:
            TimeoutError: It was not opened before the deadline.
        """
        self._wait_sync(self._arrive(key), f"the gate of {key!r} was not opened")

    def open(self, *keys: Hashable) -> None:
        """Open the gates of `keys`, for calls that wait there and for later ones. Safe in any thread."""
        with self._lock:
            self._opened.update(keys)
            released = [future for key in keys for future in self._waiting.pop(key, ())]
        _release(released)

    def open_all(self) -> None:
        """Open every gate, also for new keys. Safe in any thread."""
        with self._lock:
            self._all_open = True
            released = [future for futures in self._waiting.values() for future in futures]
            self._waiting.clear()
        _release(released)

    async def until_arrived(self, n: int) -> None:
        """Wait until at least `n` calls have arrived since the gate was made.

        Raises:
            TimeoutError: Fewer had arrived at the deadline; the message says which.
        """
        await self._wait(self._watch(n), f"fewer than {n} calls arrived", tell_arrived=True)

    def wait_arrived(self, n: int) -> None:
        """Do the same as `until_arrived`, in a thread without an event loop.

        Raises:
            TimeoutError: Fewer had arrived at the deadline; the message says which.
        """
        self._wait_sync(self._watch(n), f"fewer than {n} calls arrived", tell_arrived=True)

    def _arrive(self, key: Hashable) -> concurrent.futures.Future[None]:
        future: concurrent.futures.Future[None] = concurrent.futures.Future()
        with self._lock:
            self._arrived.append(key)
            through = self._all_open or key in self._opened
            if not through:
                self._waiting.setdefault(key, []).append(future)
            count = len(self._arrived)
            seen = [watcher for n, watcher in self._watching if n <= count]
            self._watching = [(n, watcher) for n, watcher in self._watching if n > count]
        _release(seen)
        if through:
            _release([future])
        return future

    def _watch(self, n: int) -> concurrent.futures.Future[None]:
        future: concurrent.futures.Future[None] = concurrent.futures.Future()
        with self._lock:
            reached = len(self._arrived) >= n
            if not reached:
                self._watching.append((n, future))
        if reached:
            _release([future])
        return future

    async def _wait(
        self, future: concurrent.futures.Future[None], complaint: str, *, tell_arrived: bool = False
    ) -> None:
        if future.done():
            return
        try:
            async with asyncio.timeout(self._deadline):
                await asyncio.wrap_future(future)
        except TimeoutError:
            raise TimeoutError(self._complain(complaint, tell_arrived)) from None

    def _wait_sync(
        self, future: concurrent.futures.Future[None], complaint: str, *, tell_arrived: bool = False
    ) -> None:
        try:
            future.result(self._deadline)
        except TimeoutError:
            raise TimeoutError(self._complain(complaint, tell_arrived)) from None

    def _complain(self, complaint: str, tell_arrived: bool) -> str:
        arrived = f"; arrived: {self.arrived!r}" if tell_arrived else ""
        return f"{complaint} within {self._deadline:g} s{arrived}"


def _release(futures: Iterable[concurrent.futures.Future[None]]) -> None:
    for future in futures:
        # False if the waiter has been cancelled; after this it cannot be cancelled any more.
        if future.set_running_or_notify_cancel():
            future.set_result(None)
