"""Sources that record what is done to them."""

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from aioloader.testing.gate import Gate

__all__ = ["RecordingSource", "SourceEvent", "SyncRecordingSource"]

T = TypeVar("T")


@dataclass(frozen=True)
class SourceEvent:
    """One event of a recording source.

    Attributes:
        what: `open` when an iteration began, `read` when its next sample was requested, `yield` when that was
            delivered, `close` when the iteration ended for any reason.
        iteration: The number of the iteration, from 0.
        position: The number of the sample in the iteration; for `close`, how many were delivered.
        thread: The thread in which it happened.
        task: The asyncio task in which it happened; None in a thread without a running loop.
        loop: The running event loop, or None.
    """

    what: Literal["open", "read", "yield", "close"]
    iteration: int
    position: int
    thread: threading.Thread
    task: "asyncio.Task[Any] | None"
    loop: asyncio.AbstractEventLoop | None


class _RecordsReads(Generic[T]):
    """The base of both recording sources."""

    def __init__(self, samples: Iterable[T]) -> None:
        self.samples = samples
        self.events: list[SourceEvent] = []
        self.yielded: list[T] = []
        self._iterations = itertools.count()
        self._lock = threading.Lock()

    @property
    def opened(self) -> int:
        """How many iterations have begun."""
        return self._count("open")

    @property
    def started(self) -> int:
        """How many samples have been requested, over all iterations."""
        return self._count("read")

    @property
    def closed(self) -> int:
        """How many iterations have ended, exhausted, failed or closed, and have run their `finally`."""
        return self._count("close")

    def _count(self, what: str) -> int:
        with self._lock:
            return sum(event.what == what for event in self.events)

    def _begin(self) -> int:
        iteration = next(self._iterations)
        self._record("open", iteration, 0)
        return iteration

    def _record(self, what: Literal["open", "read", "yield", "close"], iteration: int, position: int) -> None:
        try:
            loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            loop = None
        task = None if loop is None else asyncio.current_task()
        event = SourceEvent(what, iteration, position, threading.current_thread(), task, loop)
        with self._lock:
            self.events.append(event)


class RecordingSource(_RecordsReads[T]):
    """An async iterable that records what is done to it, by which task and on which loop.

    It can be iterated several times, each time from the start.

    Args:
        samples: The samples; an endless iterable such as `itertools.count()` works for one iteration.
        gate: If given, each sample waits at the gate of its position before it is delivered.

    Attributes:
        events: All events, in order.
        yielded: The samples that were delivered, over all iterations.
    """

    def __init__(self, samples: Iterable[T], *, gate: Gate | None = None) -> None:
        super().__init__(samples)
        self._gate = gate

    async def __aiter__(self) -> AsyncIterator[T]:  # an async generator: closing it must reach the `finally`
        iteration = self._begin()
        position = 0
        try:
            iterator = iter(self.samples)
            while True:
                self._record("read", iteration, position)
                if self._gate is not None:
                    await self._gate.passing(position)
                try:
                    sample = next(iterator)
                except StopIteration:
                    return
                self._record("yield", iteration, position)
                self.yielded.append(sample)
                position += 1
                yield sample
        finally:
            self._record("close", iteration, position)


class SyncRecordingSource(_RecordsReads[T]):
    """The sync counterpart of `RecordingSource`: an iterable that records what is done to it, and in which thread.

    Args:
        samples: The samples; an endless iterable such as `itertools.count()` works for one iteration.
        gate: If given, each sample waits at the gate of its position before it is delivered.

    Attributes:
        events: All events, in order.
        yielded: The samples that were delivered, over all iterations.
    """

    def __init__(self, samples: Iterable[T], *, gate: Gate | None = None) -> None:
        super().__init__(samples)
        self._gate = gate

    def __iter__(self) -> Iterator[T]:
        iteration = self._begin()
        position = 0
        try:
            iterator = iter(self.samples)
            while True:
                self._record("read", iteration, position)
                if self._gate is not None:
                    self._gate.pass_sync(position)
                try:
                    sample = next(iterator)
                except StopIteration:
                    return
                self._record("yield", iteration, position)
                self.yielded.append(sample)
                position += 1
                yield sample
        finally:
            self._record("close", iteration, position)
