"""`for` in the thread of an event loop: it works, and stops all other tasks of that loop while it waits."""

import asyncio
import sys
import warnings
from time import perf_counter
from typing import Any, Final
from weakref import WeakMethod

from aioloader.engine.delivery import Receive
from aioloader.engine.loop_thread import LoopThread
from aioloader.engine.run import Run
from aioloader.engine.sync_delivery import SyncDelivery

__all__ = ["BlockingDelivery", "sync_delivery"]

LONG_SECONDS: Final = 0.5
"""So long may other tasks stand still before it is worth a word."""


def sync_delivery(run: Run, receive: Receive | None, shared: LoopThread | None) -> SyncDelivery:
    """The delivery of `for`; one that watches where this thread runs an event loop.

    Not in a notebook: there a cell is meant to have the loop to itself, and the kernel's own tasks always wait.
    """
    blocks = asyncio._get_running_loop() is not None and "ipykernel" not in sys.modules
    return (BlockingDelivery if blocks else SyncDelivery)(run, receive, shared)


class BlockingDelivery(SyncDelivery):
    """Says once when its waits starve the other tasks of the loop that runs in the consumer's thread.

    Waits count while that loop has no turn in between: `await asyncio.sleep(0)` after each batch starves nobody. So a
    callback is left with the loop, and it begins the count anew when it is called.
    """

    def __init__(self, run: Run, receive: Receive | None, shared: LoopThread | None) -> None:
        super().__init__(run, receive, shared)
        self._consumer_loop = asyncio.get_running_loop()
        self._waited = 0.0
        self._told = False
        self._counting = True  # a callback is with the loop
        self._wait_for_turn()

    def _wait_for_turn(self) -> None:
        turned = WeakMethod(self._turned)  # a loop that stands still must not keep the epoch alive
        self._consumer_loop.call_soon(lambda: None if (call := turned()) is None else call())

    def _turned(self) -> None:
        self._waited = 0.0
        self._counting = False

    def next(self, timeout: float | None, timeout_message: str) -> Any:
        began = perf_counter()
        try:
            return super().next(timeout, timeout_message)
        finally:
            self._blocked(perf_counter() - began)

    def _blocked(self, seconds: float) -> None:
        if self._told or asyncio._get_running_loop() is not self._consumer_loop:
            return
        if not self._counting:
            self._counting = True
            self._wait_for_turn()
        self._waited += seconds
        if self._waited < LONG_SECONDS:
            return
        others = asyncio.all_tasks(self._consumer_loop) - {asyncio.current_task(self._consumer_loop)}
        if others:
            self._told = True
            warnings.warn(
                "`for` over a loader waits for batches in the thread of a running event loop, whose other tasks stand "
                "still meanwhile; use `async for`, or iterate in a thread of its own",
                RuntimeWarning,
                stacklevel=4,
            )
