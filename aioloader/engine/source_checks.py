"""Mistakes in a `CursorSource` that somebody has written: reported early, with the names of the classes.

Their own effects are late and silent: a reader that forgets to return ends the epoch as if it were over, a cursor that
JSON cannot hold fails at the first checkpoint, and an entry that is used twice has what the loader wrote into it.

The first list of a reader is checked as a whole, since a mistake is most often made from the start. Of later lists only
the last entry is, which costs about as much per list as one more sample in it.
"""

import inspect
from collections.abc import Awaitable
from typing import Any

from aioloader.core.entry import UNDER_WAY, Entry
from aioloader.core.safe_text import safe_repr
from aioloader.core.source import CursorSource, EntryReader, SourceContext

__all__ = ["ReadCheck", "opened"]


def opened(source: CursorSource, context: SourceContext, cursor: object) -> EntryReader:
    """The reader that `source` opens.

    Raises:
        TypeError: It gives something else.
    """
    reader: Any = source.open(context, cursor)
    if not isinstance(reader, EntryReader):
        if inspect.iscoroutine(reader):
            reader.close()
        raise TypeError(f"{_name(source)}.open must return an EntryReader, got {_what(reader)}")
    return reader


class ReadCheck:
    """Looks at what one reader gives.

    Args:
        source: Whose it is.
        reader: Is read.
    """

    def __init__(self, source: CursorSource, reader: EntryReader) -> None:
        self._source = source
        self._name = f"{_name(source)}: {_name(reader)}.read"
        self._is_first = True

    def awaitable(self, answer: object) -> Awaitable[Any]:
        """What `read` returned, which is to be awaited.

        Raises:
            TypeError: It cannot be.
        """
        if not inspect.iscoroutine(answer) and not inspect.isawaitable(answer):
            raise TypeError(f"{self._name} must be an `async def` that returns a list, got {_what(answer)} from it")
        return answer

    def look_at(self, entries: object, limit: int) -> None:
        """Refuse what is no list of new entries.

        Raises:
            TypeError: It is none, or a cursor or key is nothing that can be one.
            ValueError: There are more than `limit`, or they have been given before.
        """
        if not isinstance(entries, list):
            hint = "; [] is the end" if entries is None else "; pass it through list()"
            raise TypeError(f"{self._name} must return a list of entries, got {_what(entries)}{hint}")
        if not entries:
            return
        if len(entries) > limit:
            raise ValueError(
                f"{self._name} must return at most limit entries, got {len(entries)} where {limit=}; keep the others "
                f"for the next call"
            )
        if self._is_first:
            self._is_first = False
            self.look_at_all(entries)
            for entry in (entries[0], entries[-1]):
                self._check_cursor(entry.cursor)
        else:
            last = entries[-1]
            if type(last) is not Entry or last.cursor is None or last.state != UNDER_WAY:
                self._look_closely(last)

    def look_at_all(self, entries: list[Any]) -> None:
        """The same for each of them, whatever list it is."""
        for entry in entries:
            self._look_closely(entry)

    def _look_closely(self, entry: object) -> None:
        if not isinstance(entry, Entry):
            raise TypeError(
                f"{self._name} must return a list of entries, got one with {_what(entry)}; make it "
                f"Entry(sample, cursor, key)"
            )
        if entry.state != UNDER_WAY:
            raise ValueError(
                f"{self._name} returned an entry a second time (key {safe_repr(entry.key, 80)}); make a new Entry for "
                f"each sample and epoch, for the loader writes into it"
            )
        if entry.cursor is None:
            raise TypeError(
                f"{self._name} returned an entry without a cursor (key {safe_repr(entry.key, 80)}); a cursor says "
                f"where to go on after it, and None is the start"
            )
        if self._source._names_samples and (entry.key is None or isinstance(entry.key, list)):
            raise TypeError(
                f"{self._name} returned an entry with the key {safe_repr(entry.key, 80)}; a key names one sample: a "
                f"number, a string, a path, or a tuple of these"
            )

    def _check_cursor(self, cursor: object) -> None:
        for part in _parts_of(cursor):
            if not isinstance(part, str | int | float | None):
                way_out = "tuple(cursor)" if isinstance(part, list) else "for instance int(number)"
                raise TypeError(
                    f"{self._name} returned an entry with the cursor {safe_repr(cursor, 80)}; a cursor is made of "
                    f"integers, floats, strings, None and tuples of these, got {_what(part)}: pass {way_out}"
                )


def _parts_of(cursor: object) -> list[Any]:
    """What is in a cursor, and in the tuples in it."""
    parts, inner = [], [cursor]
    while inner:
        part = inner.pop()
        if isinstance(part, tuple):
            inner += part
        else:
            parts.append(part)
    return parts


def _name(value: object) -> str:
    return type(value).__qualname__.rpartition("<locals>.")[2]


def _what(value: object) -> str:
    return "None" if value is None else f"{safe_repr(value, 80)} of type {type(value).__name__}"
