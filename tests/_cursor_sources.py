"""Sources with cursors of their own, opened anywhere: what comes after each cursor."""

import json
from typing import Any

from aioloader import Pipeline
from aioloader.core.entry import Entry
from aioloader.core.source import CursorSource, EntryReader, SourceContext
from tests._support import Face, Steps


class Opened(CursorSource):
    """`source`, opened at `cursor`; `cursors` has those of the entries that were read."""

    def __init__(self, source: CursorSource, cursor: Any = None) -> None:
        self._source = source
        self._cursor = cursor
        self.cursors: list[Any] = []

    def open(self, context: SourceContext, cursor: Any) -> EntryReader:
        assert cursor is None
        return _Tapped(self._source.open(context, self._cursor), self.cursors)


class _Tapped(EntryReader):
    def __init__(self, reader: EntryReader, cursors: list[Any]) -> None:
        self._reader = reader
        self._cursors = cursors

    async def read(self, limit: int) -> list[Entry]:
        entries = await self._reader.read(limit)
        assert len(entries) <= limit
        self._cursors += [entry.cursor for entry in entries]
        return entries

    async def aclose(self) -> None:
        await self._reader.aclose()


def outcomes(source: CursorSource, face: Face = "for", cursor: Any = None) -> list[Any]:
    """The samples behind `cursor`, and the messages of errors in their places."""
    return outcomes_and_cursors(source, face, cursor)[0]


def outcomes_and_cursors(source: CursorSource, face: Face = "for", cursor: Any = None) -> tuple[list[Any], list[Any]]:
    """The same, and the cursor behind each."""
    opened = Opened(source, cursor)
    with Steps(Pipeline(opened), face) as steps:
        found = [str(outcome) if isinstance(outcome, Exception) else outcome for outcome in steps.outcomes()]
    return found, opened.cursors


def assert_opens_at_every_cursor(source: CursorSource) -> list[Any]:
    """From each cursor on comes what came after it, with the same cursors; through JSON, as a checkpoint would be.

    Returns:
        All outcomes.
    """
    found, cursors = outcomes_and_cursors(source)
    assert len(found) == len(cursors)
    for place, cursor in enumerate(cursors):
        rest, later = outcomes_and_cursors(source, cursor=json.loads(json.dumps(cursor)))
        assert rest == found[place + 1 :], f"behind {cursor}"
        assert json.dumps(later) == json.dumps(cursors[place + 1 :]), f"behind {cursor}"
    return found
