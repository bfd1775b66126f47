"""An event loop whose time is virtual: where nothing is ready, it is the time of the next timer at once."""

import asyncio
import selectors
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from aioloader.core import rate
from aioloader.engine import async_step, guard, loop_thread, retrying
from tests._support import DEADLINE

__all__ = ["Clock", "VirtualLoop", "virtual_time"]


class Clock:
    """What time it is."""

    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return self.now


class _Selector(selectors.DefaultSelector):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            return super().select(DEADLINE)
        events = super().select(0)
        if not events:
            self._clock.now += max(0.0, timeout)
        return events


class VirtualLoop(asyncio.SelectorEventLoop):
    """Its timers ring as soon as nothing else is to be done."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(_Selector(clock))
        self._virtual = clock

    def time(self) -> float:
        return self._virtual.time()

    @property
    def timers(self) -> list[Any]:
        """Those that have not been cancelled."""
        scheduled: list[Any] = self._scheduled  # type: ignore[attr-defined]
        return [timer for timer in scheduled if not timer.cancelled()]


@contextmanager
def virtual_time() -> Iterator[Clock]:
    """What looks at the time in here, and private loops that begin here, go by the clock that this gives."""
    clock = Clock()
    with (
        patch.object(async_step, "perf_counter", clock.time),
        patch.object(guard, "perf_counter", clock.time),
        patch.object(retrying, "perf_counter", clock.time),
        patch.object(rate, "monotonic", clock.time),
        patch.object(loop_thread, "new_event_loop", lambda: VirtualLoop(clock)),
    ):
        yield clock
