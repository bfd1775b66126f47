"""Random orders of completion that are the same for the same seed, and take no time."""

import asyncio
import random
from collections.abc import Callable, Coroutine
from inspect import isawaitable
from typing import Any, Final
from weakref import WeakKeyDictionary

__all__ = ["virtual_order"]

QUIET_TURNS: Final = 4
"""The loop is idle after this many turns without a new call: enough for a loader to fill what has just become free."""


class virtual_order:  # noqa: N801 - used as a decorator
    """Makes concurrent calls of an async function end in a random order that is the same for the same seed.

    No time passes: calls wait until the loop is idle, that is, until no new call has come for a few of its turns. Then
    one of them, drawn from the seed, goes on. So every order that a network could cause occurs within a few seeds, in
    microseconds.

    Example:
        ```python
        async def double(x):
            return 2 * x

        loader = Pipeline(range(100)).map(virtual_order(seed=7)(double), concurrency=8)
        assert list(loader) == [2 * x for x in range(100)]
        ```

    Args:
        seed: Of the order. One object may wrap several functions, whose calls are then drawn together.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        # One for each loop: `for` has a private loop, and a test may use both.
        self._releasers: WeakKeyDictionary[asyncio.AbstractEventLoop, _Releaser] = WeakKeyDictionary()

    def __call__(self, fn: Callable[[Any], Any]) -> Callable[[Any], Coroutine[Any, Any, Any]]:
        """Wrap `fn`, sync or async, in a function that first waits for its turn."""

        async def in_virtual_order(sample: Any) -> Any:
            await self.turn()
            result = fn(sample)
            return await result if isawaitable(result) else result

        in_virtual_order.__name__ = getattr(fn, "__name__", "in_virtual_order")
        return in_virtual_order

    async def turn(self) -> None:
        """Wait for this call's turn."""
        loop = asyncio.get_running_loop()
        releaser = self._releasers.get(loop)
        if releaser is None:
            releaser = self._releasers[loop] = _Releaser(self._seed)
        await releaser.turn(loop)


class _Releaser:
    """Releases the calls of one loop, one each time that the loop is idle."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._waiting: list[asyncio.Future[None]] = []
        self._quiet_turns = 0
        self._running = False

    async def turn(self, loop: asyncio.AbstractEventLoop) -> None:
        future = loop.create_future()
        self._waiting.append(future)
        self._quiet_turns = 0
        if not self._running:
            self._running = True
            loop.call_soon(self._look, loop)
        await future

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._waiting = [future for future in self._waiting if not future.done()]  # some have been cancelled
        if not self._waiting:
            self._running = False
            return
        self._quiet_turns += 1
        if self._quiet_turns > QUIET_TURNS:
            self._quiet_turns = 0
            self._waiting.pop(self._random.randrange(len(self._waiting))).set_result(None)
        loop.call_soon(self._look, loop)
