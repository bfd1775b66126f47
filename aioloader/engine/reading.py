"""Readers: one task iterates a user's iterable, on the loop or in one thread."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from time import perf_counter
from typing import TYPE_CHECKING, Any

from aioloader.engine.resumable import (
    Origin,
    after_origin,
    asked,
    begin_again,
    is_due,
    is_stateful,
    load_iterable,
    snapshot,
)
from aioloader.engine.sync_cursor import READ_SECONDS, SyncCursor
from aioloader.engine.torch_state import check_leak, context_state
from aioloader.executors.threads import TakesJobs

if TYPE_CHECKING:
    from aioloader.engine.run import Run

__all__ = ["AsyncReader", "Reader", "ThreadReader", "open_reader"]


class Reader(ABC):
    """Iterates one iterable for the task that owns it.

    Attributes:
        busy_seconds: Time in the user's code.
        awaiting_since: When (`perf_counter`) the user's async iterator was asked for what it has not given yet.
    """

    busy_seconds = 0.0
    awaiting_since: float | None = None

    @property
    def reading_since(self) -> float | None:
        """When it began to wait for what the user's iterable has not given yet; None: it does not wait."""
        return self.awaiting_since

    @abstractmethod
    async def read(self, limit: int) -> list[tuple[Any, Any]]:
        """Read 1 to `limit` samples, fewer when they are slow; `[]` at the end.

        Returns:
            Pairs of a sample and the cursor after it.

        Raises:
            Exception: The user's own, once, after the samples before it.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Close the user's generator, in the task and thread that iterated it."""


class AsyncReader(Reader):
    """Iterates an async iterable on the loop, and asks for its state in the thread: that may take time."""

    def __init__(self, name: str, run: "Run", threads: TakesJobs) -> None:
        self._name = name
        self._iterator: AsyncIterator[Any]
        self._run = run
        self._threads = threads
        self._stateful: Any = None  # is asked for its state, see `is_due`
        self._origin: Origin | None = None
        self._since = 0  # samples since the origin
        self._count = 0  # samples of the epoch

    async def open(self, iterable: AsyncIterable[Any], origin: Origin | None) -> None:
        """Begin at `origin`, or at the beginning."""
        if origin is not None:
            self._origin, self._count = origin, origin["at"]
        if is_stateful(iterable):
            if origin is None:
                await self._run.in_thread(self._threads, begin_again, iterable)
            else:
                await self._run.in_thread(self._threads, load_iterable, iterable, origin)
        self._iterator = aiter(iterable)
        if origin is not None or is_stateful(iterable) or is_stateful(self._iterator):
            self._stateful = await self._run.in_thread(self._threads, asked, iterable, self._iterator, origin)

    async def read(self, limit: int) -> list[tuple[Any, Any]]:
        before = context_state()
        self.awaiting_since = began = perf_counter()
        try:
            sample = await anext(self._iterator)
        except StopAsyncIteration:
            return []
        finally:
            self.awaiting_since = None
            self.busy_seconds += perf_counter() - began
        check_leak(before, self._name)
        self._count += 1
        self._since += 1
        if self._stateful is not None and is_due(self._count):
            origin = await self._run.in_thread(self._threads, snapshot, self._stateful, self._iterator, self._count)
            if origin is not None:
                self._origin, self._since = origin, 0
        return [(sample, after_origin(self._origin, self._since))]

    async def aclose(self) -> None:
        close = getattr(self._iterator, "aclose", None)
        if close is not None:
            await close()


class ThreadReader(Reader):
    """Drives a `SyncCursor` in one thread, about a millisecond's worth of samples per hop.

    The thread stops after the sample that took it past its millisecond. What if samples come in bursts, and that one
    comes in an hour? Those before it must not wait: two milliseconds after a hop began, whatever has been read by
    then goes on, and the hop stays under way for the one that is late.

    What if nothing has been read by then, since the thread has only just begun? It would read the first sample and go
    on for its millisecond, and the one that comes in an hour would keep all of them. So it is hurried: it stops after
    its next sample. It looks for that after each sample that it has put into `ready`, and the loop looks into `ready`
    after it has hurried it: one of them sees the other.
    """

    def __init__(self, cursor: SyncCursor, run: "Run", threads: TakesJobs) -> None:
        self._cursor = cursor
        self._run = run
        self._threads = threads
        self._hop: asyncio.Future[None] | None = None
        self._hop_began = 0.0
        self._ended = False
        self._failure: BaseException | None = None

    @property
    def reading_since(self) -> float | None:
        hop = self._hop
        return None if hop is None or hop.done() else self._hop_began

    async def read(self, limit: int) -> list[tuple[Any, Any]]:
        ready = self._cursor.ready
        while not ready:
            if self._hop is None:
                if self._ended or self._failure is not None:
                    break
                self._hop_began = perf_counter()
                self._cursor.hurried = False
                self._hop = self._run.submit(self._threads, self._read, limit)
                await asyncio.wait({self._hop}, timeout=2 * READ_SECONDS)
            else:  # it will end with the next sample
                self._cursor.hurried = True
                if not ready:
                    await asyncio.wait({self._hop})
            if self._hop.done():
                self._hop = None
        if ready:
            return [ready.popleft() for _ in range(min(limit, len(ready)))]
        failure, self._failure = self._failure, None
        if failure is None:
            return []
        self._ended = True
        try:
            raise failure
        finally:
            del failure  # an error keeps this frame: it must not keep the error

    def _read(self, limit: int) -> None:
        try:
            self._cursor.read(limit)
        except StopIteration:
            self._ended = True
        except BaseException as error:  # the consumer's: it is raised there, after the samples before it
            self._failure = error
        self.busy_seconds = self._cursor.busy_seconds

    async def aclose(self) -> None:
        # A hop that was cut off may not have begun: then it makes the iterator while everything ends. The thread
        # does one thing after the other, so what is submitted now comes after the hop, and closes that iterator.
        needed = self._cursor.closable if self._cursor.opened else self._hop is not None
        if needed:
            await self._run.in_thread(self._threads, self._cursor.close)


async def open_reader(iterable: Any, name: str, run: "Run", threads: TakesJobs, origin: Origin | None = None) -> Reader:
    """A reader for what a source function returned, at `origin` or at its beginning.

    Raises:
        TypeError: It can be iterated neither way.
    """
    if isinstance(iterable, AsyncIterable):
        reader = AsyncReader(name, run, threads)
        await reader.open(iterable, origin)
        return reader
    if isinstance(iterable, Iterable) or hasattr(iterable, "__getitem__"):
        return ThreadReader(SyncCursor(iterable, name, origin), run, threads)
    raise TypeError(f"{name} must give an iterable or an async iterable, got {type(iterable).__name__}")
