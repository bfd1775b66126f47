"""A reader whose entries are made ahead of time by a task."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from aioloader.core.entry import Entry
from aioloader.core.source import EntryReader, SourceContext

__all__ = ["Ahead", "failed"]


class Ahead(EntryReader):
    """Reads the lists of entries that `make()` yields, in a task of its own.

    The task iterates the generator and closes it, also when it is cancelled at the end of the epoch.

    Args:
        context: The source's.
        make: Yields lists of entries. What it raises is raised by `read`, after the entries before it.
        lists: How many lists may be ready; the generator is not resumed while there are that many.
    """

    def __init__(
        self, context: SourceContext, make: Callable[[], AsyncGenerator[list[Entry]]], *, lists: int = 1
    ) -> None:
        self._make = make
        self._lists: asyncio.Queue[list[Entry] | None] = asyncio.Queue(lists)  # None: the end
        self._current: list[Entry] = []
        self._next = 0  # in `current`
        self._error: BaseException | None = None
        self._ended = False
        context.spawn(self._read_ahead)

    async def _read_ahead(self) -> None:
        try:
            async with aclosing(self._make()) as made:
                async for entries in made:
                    if entries:
                        await self._lists.put(entries)
                    del entries  # do not keep the samples alive
        except (Exception, KeyboardInterrupt, SystemExit) as error:  # not `CancelledError`, which cancels this task
            self._error = error
        await self._lists.put(None)

    @property
    def ready(self) -> bool:
        """Whether `read` returns without waiting."""
        return self._next < len(self._current) or not self._lists.empty()

    async def read(self, limit: int) -> list[Entry]:
        if self._ended:
            return []
        if self._next == len(self._current):
            self._current = []  # do not keep the samples alive while waiting
            self._next = 0
            entries = await self._lists.get()
            if entries is None:
                self._ended = True
                error, self._error = self._error, None
                if error is not None:
                    raise error
                return []
            self._current = entries
            del entries
        start = self._next
        self._next = min(start + limit, len(self._current))
        return self._current[start : self._next]


def failed(error: BaseException, cursor: Any, key: Any) -> Entry:
    """An entry that raises `error` in its position."""
    entry = Entry(None, cursor, key, 0)
    entry.error = error
    return entry
