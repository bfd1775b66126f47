"""A reader whose entries are made ahead of time by a task."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from time import perf_counter
from typing import Any, Final, Protocol

from aioloader.core.entry import Entry
from aioloader.core.sizes import MeanBytes
from aioloader.core.source import SourceContext
from aioloader.sources.interleave import Lane

__all__ = ["Ahead", "ByteQuota", "Quota", "QuotaRule", "failed"]


STALL_SECONDS: Final = 0.02
"""As long as the shortest latencies of stores far away, and long compared with what parsing takes."""


class QuotaRule(Protocol):
    """How many entries one reader may have ready.

    Attributes:
        left: How many the next list may have.
    """

    left: int

    def allows(self, ready: int) -> bool:
        """Whether more may be read while so many are ready; sets `left`."""

    def saw(self, entries: list[Entry]) -> None:
        """These have been read."""


class Quota:
    """So many entries, or as many as are so large.

    Args:
        most: Entries; None: as many as `nbytes` are enough for.
        nbytes: Bytes of samples, by their running mean; None: they are not counted.

    Attributes:
        left: See `QuotaRule`.
    """

    def __init__(self, most: int | None, nbytes: float | None) -> None:
        self._most = most
        self._nbytes = nbytes
        self._bytes = MeanBytes()
        self.left = 1

    def allows(self, ready: int) -> bool:
        places = self._most
        if self._nbytes is not None:
            places = max(1, self._bytes.places(self._nbytes) or 1)
            places = places if self._most is None else min(places, self._most)
        assert places is not None
        self.left = places - ready
        return self.left > 0

    def saw(self, entries: list[Entry]) -> None:
        if self._nbytes is not None:
            for entry in entries:
                self._bytes.saw(entry.value)


class ByteQuota:
    """As many entries as took fewer bytes to fetch than may be ahead; when none is ready, more are read in any case.

    Args:
        most: Gives these bytes: they change while the reader reads.

    Attributes:
        left: See `QuotaRule`.
        entry_bytes: What an entry took, once that is known.
    """

    def __init__(self, most: Callable[[], int]) -> None:
        self._most = most
        self.left = 1
        self.entry_bytes = 0.0

    def allows(self, ready: int) -> bool:
        room = self._most() - ready * self.entry_bytes
        self.left = max(1, int(room / self.entry_bytes)) if self.entry_bytes else 1
        return room > 0 or not ready

    def saw(self, entries: list[Entry]) -> None:
        pass


class Ahead(Lane):
    """Reads the lists of entries that `make()` yields, in a task of its own.

    The task iterates the generator and closes it, also when it is cancelled at the end of the epoch.

    Args:
        context: The source's.
        make: Yields lists of entries. What it raises is raised by `read`, after the entries before it.
        lists: How many lists may be ready; the generator is not resumed while there are that many.
        quota: How many entries may be ready, instead of `lists`.
        made_all: Called when the generator has ended, and its last entries may not be taken yet.
        starved: Called when entries were waited for, `STALL_SECONDS` or longer, with how many these were.
    """

    def __init__(
        self,
        context: SourceContext,
        make: Callable[[], AsyncGenerator[list[Entry]]],
        *,
        lists: int = 1,
        quota: QuotaRule | None = None,
        made_all: Callable[[], object] | None = None,
        starved: Callable[[float], object] | None = None,
    ) -> None:
        self._make = make
        self._made_all = made_all
        self._starved = starved
        self._lists: asyncio.Queue[list[Entry] | None] = asyncio.Queue(lists if quota is None else 0)  # None: the end
        self._quota = quota
        self._waiting = 0  # entries in these lists
        self._room: asyncio.Future[None] | None = None  # the task waits for some
        self._current: list[Entry] = []
        self._next = 0  # in `current`
        self._error: BaseException | None = None
        self._ended = False
        context.spawn(self._read_ahead)

    async def _read_ahead(self) -> None:
        try:
            async with aclosing(self._make()) as made:
                await self._has_room()
                async for entries in made:
                    if entries:
                        self._waiting += len(entries)
                        if self._quota is not None:
                            self._quota.saw(entries)
                        await self._lists.put(entries)
                    del entries  # do not keep the samples alive
                    await self._has_room()
        except (Exception, KeyboardInterrupt, SystemExit) as error:  # not `CancelledError`, which cancels this task
            self._error = error
        if self._made_all is not None:
            self._made_all()
        await self._lists.put(None)

    async def _has_room(self) -> None:
        while self._quota is not None and not self._quota.allows(self._waiting):
            self._room = asyncio.get_running_loop().create_future()
            await self._room

    def take(self) -> Entry | None:
        if self._next == len(self._current):
            if not self._waiting or self._lists.empty():  # what is there may be the end
                return None
            self._current, self._next = self._lists.get_nowait() or [], 0
        entry = self._current[self._next]
        self._took(1)
        return entry

    async def read(self, limit: int) -> list[Entry]:
        if self._ended:
            return []
        if self._next == len(self._current):
            self._current = []  # do not keep the samples alive while waiting
            self._next = 0
            entries = await self._next_list()
            if entries is None:
                self._ended = True
                error, self._error = self._error, None
                if error is not None:
                    raise error
                return []
            self._current = entries
            del entries
        start = self._next
        self._took(min(limit, len(self._current) - start))
        return self._current[start : self._next]

    async def _next_list(self) -> list[Entry] | None:
        if self._starved is None:
            return await self._lists.get()
        began = perf_counter()
        entries = await self._lists.get()
        waited = perf_counter() - began
        if waited > STALL_SECONDS:
            self._starved(waited)
        return entries

    def _took(self, count: int) -> None:
        self._next += count
        self._waiting -= count
        if self._room is not None and not self._room.done():
            self._room.set_result(None)


def failed(error: BaseException, cursor: Any, key: Any) -> Entry:
    """An entry that raises `error` in its position."""
    entry = Entry(None, cursor, key, 0)
    entry.error = error
    return entry
