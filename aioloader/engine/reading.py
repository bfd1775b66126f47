"""Readers: how a user's iterable is iterated, by one task, on the loop or in one thread."""

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from io import IOBase
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from aioloader.engine.resumable import (
    KnowsOrigin,
    Origin,
    asked,
    begin_again,
    is_due,
    is_stateful,
    load_iterable,
    note_first,
    open_at,
    snapshot,
)
from aioloader.engine.torch_state import check_leak, context_state
from aioloader.executors.threads import TakesJobs

if TYPE_CHECKING:
    from aioloader.engine.run import Run

__all__ = ["AsyncReader", "Reader", "ThreadReader", "open_reader"]

READ_SECONDS: Final = 0.001  # what one hop into the source's thread should be worth


class Reader(ABC):
    """Iterates one iterable for the task that owns it.

    Attributes:
        marks: Pairs of a number of samples and the origin that cursors behind so many of them are counted from; there
            before the sample that they are about.
        awaiting_since: When (`perf_counter`) the user's async iterator was asked for what it has not given yet.
    """

    awaiting_since: float | None = None

    def __init__(self, name: str) -> None:
        self._name = name
        self.busy_seconds = 0.0
        self.marks: deque[tuple[int, Origin]] = deque()

    @abstractmethod
    async def read(self, limit: int) -> list[Any]:
        """Read 1 to `limit` samples, fewer when they are slow; `[]` at the end.

        Raises:
            Exception: The user's own, once, after the samples before it.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Close the user's generator, in the task and thread that iterated it."""


class AsyncReader(Reader):
    """Iterates an async iterable on the loop; what it is asked about its state, it is asked in the thread."""

    def __init__(self, name: str, run: "Run", threads: TakesJobs) -> None:
        super().__init__(name)
        self._iterator: AsyncIterator[Any]
        self._run = run
        self._threads = threads
        self._asked: Any = None
        self._number = 0
        self._at = 0  # samples before the first one

    async def open(self, iterable: AsyncIterable[Any], origin: Origin | None) -> None:
        """Begin at `origin`, or at the beginning."""
        if origin is not None:
            self._at = origin["at"]
        if is_stateful(iterable):
            if origin is None:
                await self._run.in_thread(self._threads, begin_again, iterable)
            else:
                await self._run.in_thread(self._threads, load_iterable, iterable, origin)
        self._iterator = aiter(iterable)
        if origin is not None or is_stateful(iterable) or is_stateful(self._iterator):
            self._asked = await self._run.in_thread(self._threads, asked, iterable, self._iterator, origin)

    async def read(self, limit: int) -> list[Any]:
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
        self._number += 1
        if self._asked is not None and is_due(at := self._at + self._number):
            origin = await self._run.in_thread(self._threads, snapshot, self._asked, self._iterator, at)
            if origin is not None:
                self.marks.append((self._number, origin))
        return [sample]

    async def aclose(self) -> None:
        close = getattr(self._iterator, "aclose", None)
        if close is not None:
            await close()


class ThreadReader(Reader):
    """Iterates a sync iterable in one thread, about a millisecond's worth of samples per hop.

    The thread stops after the sample that took it past its millisecond. What if samples come in bursts, and that one
    comes in an hour? Those before it must not wait: two milliseconds after a hop began, whatever has been read by
    then goes on, and the hop stays under way for the one that is late.
    """

    def __init__(
        self, iterable: Iterable[Any], name: str, run: "Run", threads: TakesJobs, origin: Origin | None
    ) -> None:
        super().__init__(name)
        self._iterable: Iterable[Any] | None = iterable
        self._origin = origin
        self._asked: Any = None
        self._number = 0
        self._at = 0 if origin is None else origin["at"]  # samples before the first one
        self._iterator: Iterator[Any] | None = None
        self._run = run
        self._threads = threads
        self._ready: deque[Any] = deque()  # the thread appends
        self._hop: asyncio.Future[None] | None = None
        self._ended = False
        self._failure: BaseException | None = None

    async def read(self, limit: int) -> list[Any]:
        while not self._ready:
            if self._hop is None:
                if self._ended or self._failure is not None:
                    break
                self._hop = self._run.submit(self._threads, self._read, limit)
                await asyncio.wait({self._hop}, timeout=2 * READ_SECONDS)
            else:  # it is at the sample that it will end with
                await asyncio.wait({self._hop})
            if self._hop.done():
                self._hop = None
        if self._ready:
            return [self._ready.popleft() for _ in range(min(limit, len(self._ready)))]
        failure, self._failure = self._failure, None
        if failure is None:
            return []
        self._ended = True
        try:
            raise failure
        finally:
            del failure  # an error keeps this frame: it must not keep the error

    def _read(self, limit: int) -> None:
        count = 0
        began = now = perf_counter()
        before = context_state()
        try:
            if self._iterator is None:
                assert self._iterable is not None
                self._iterator, self._asked = open_at(self._iterable, self._origin)
                if not isinstance(self._iterable, KnowsOrigin):
                    self._iterable = None
            while count < limit and now - began < READ_SECONDS:
                sample = next(self._iterator)
                check_leak(before, self._name)
                if self._iterable is not None:  # what the keys were drawn from is known with the first one
                    if isinstance(self._iterable, KnowsOrigin) and self._iterable.origin is not None:
                        self.marks.append((0, self._iterable.origin))
                    self._iterable = None
                self._number += 1
                if self._asked is not None:
                    if self._number == 1 and self._at:
                        note_first(self._asked, self._iterator)
                    elif is_due(self._at + self._number):
                        self._ask()
                self._ready.append(sample)
                del sample
                count += 1
                now = perf_counter()
        except StopIteration:
            self._ended = True
        except BaseException as error:  # the consumer's: it is raised there, after the samples before it
            self._failure = error
        self.busy_seconds += perf_counter() - began

    def _ask(self) -> None:
        origin = snapshot(self._asked, self._iterator, self._at + self._number)
        if origin is None:
            self._asked = None
        else:
            self.marks.append((self._number, origin))

    async def aclose(self) -> None:
        # A hop that was cut off may not have begun: then it makes the iterator while everything ends. The thread
        # does one thing after the other, so what comes behind the hop closes it.
        needed = self._hop is not None if self._iterator is None else _closable(self._iterator)
        if needed:
            await self._run.in_thread(self._threads, self._close)

    def _close(self) -> None:
        if _closable(self._iterator):
            self._iterator.close()  # type: ignore[union-attr]  # as was just asked


def _closable(iterator: Any) -> bool:
    """`Pipeline(open(path))`: iterating a file does not make it ours to close."""
    return hasattr(iterator, "close") and not isinstance(iterator, IOBase)


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
        return ThreadReader(iterable, name, run, threads, origin)
    raise TypeError(f"{name} must give an iterable or an async iterable, got {type(iterable).__name__}")
