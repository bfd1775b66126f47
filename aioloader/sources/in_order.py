"""Reads the parts of a source, such as files or spans of rows, one after the other while the next ones are open."""

from asyncio import Event
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from itertools import cycle
from typing import Generic, TypeVar

from aioloader.core.entry import Entry
from aioloader.core.source import SourceContext, SourceThreads
from aioloader.sources.interleave import Lane
from aioloader.sources.read_ahead import Ahead, QuotaRule

__all__ = ["InOrder"]

P = TypeVar("P")


class InOrder(Lane, Generic[P]):
    """The entries of all parts, in order. Each part is read by a task and a thread of its own.

    A part has its thread to itself, because its file is opened and closed in that thread. The threads are used in turn:
    a part is opened only when the one that used its thread before has been read to its end.

    Args:
        context: The source's.
        parts: Closed with the reader.
        read_part: Gives lists of the entries of a part, made in the given thread. The event is set when its turn has
            come: all of the part before it has been read, though not taken.
        open_ahead: How many parts after the current one are open.
        lists_ahead: How many lists may be ready, per open part.
        quota_of: How many entries of a part may be ready instead.
        may_open: Whether one more part is opened while these are; None: always.
        starved: Called when entries other than the first were waited for, see `Ahead`.

    Attributes:
        part: The one that the last entries belong to.
    """

    part: P

    def __init__(
        self,
        context: SourceContext,
        parts: AsyncGenerator[P],
        read_part: Callable[[P, SourceThreads, Event], AsyncGenerator[list[Entry]]],
        *,
        open_ahead: int,
        lists_ahead: int,
        quota_of: Callable[[P], QuotaRule | None] | None = None,
        may_open: Callable[[Sequence[P]], bool] | None = None,
        starved: Callable[[float], object] | None = None,
    ) -> None:
        self._context = context
        self._parts = parts
        self._read_part = read_part
        self._most_open = open_ahead + 1
        self._lists_ahead = lists_ahead
        self._quota_of = quota_of
        self._may_open = may_open
        self._starved = starved
        self._has_given = False
        self._threads = cycle([context.threads(1) for _ in range(self._most_open)])
        self._open: deque[tuple[P, Ahead]] = deque()
        self._has_more_parts = True
        self._turn = Event()  # of the next part
        self._turn.set()

    def take(self) -> Entry | None:
        if not self._open:
            return None
        self.part, reader = self._open[0]
        return reader.take()

    @property
    def open_parts(self) -> int:
        """How many are open now."""
        return len(self._open)

    async def begin(self) -> None:
        while self._has_more_parts and len(self._open) < self._most_open:
            if self._open and self._may_open is not None and not self._may_open([part for part, _ in self._open]):
                return
            await self._open_next()

    async def read(self, limit: int) -> list[Entry]:
        while True:
            await self.begin()
            if not self._open:
                return []
            self.part, reader = self._open[0]
            entries = await reader.read(limit)
            if entries:
                self._has_given = True
                return entries
            self._open.popleft()

    async def _open_next(self) -> None:
        try:
            part = await anext(self._parts)
        except StopAsyncIteration:
            self._has_more_parts = False
            return
        thread = next(self._threads)
        quota = None if self._quota_of is None else self._quota_of(part)
        make = partial(self._read_part, part, thread, self._turn)
        self._turn = Event()
        reader = Ahead(
            self._context,
            make,
            lists=self._lists_ahead,
            quota=quota,
            made_all=self._turn.set,
            starved=self._waited,
        )
        self._open.append((part, reader))

    def _waited(self, seconds: float) -> None:
        if self._has_given and self._starved is not None:
            self._starved(seconds)

    async def aclose(self) -> None:
        await self._parts.aclose()
