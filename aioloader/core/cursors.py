"""Cursors, the tokens from which something goes on: how their parts are read, and one of entries in no fixed order."""

from typing import Any, Final

from aioloader.core.entry import LAST, Entry
from aioloader.core.safe_text import safe_repr

__all__ = ["MAX_COUNT", "CompletionCursor", "as_count", "cursor_parts", "cursor_sequence"]

MAX_COUNT: Final = (1 << 63) - 1
"""No count in a state is larger."""


def cursor_sequence(cursor: Any) -> list[Any]:
    """The parts of `cursor`, which JSON may have made a list.

    Raises:
        ValueError: It has none.
    """
    if not isinstance(cursor, list | tuple):
        raise ValueError(f"a list was expected, got {safe_repr(cursor)}")
    return list(cursor)


def cursor_parts(cursor: Any, count: int) -> list[Any]:
    """The `count` parts of `cursor`.

    Raises:
        ValueError: It has others.
    """
    parts = cursor_sequence(cursor)
    if len(parts) != count:
        raise ValueError(f"a list of {count} was expected, got {safe_repr(cursor)}")
    return parts


def as_count(value: Any, most: int = MAX_COUNT) -> int:
    """`value`, which counts something.

    Raises:
        ValueError: It is no integer from 0 to `most`.
    """
    if type(value) is not int or not 0 <= value <= most:
        upper = most if most < MAX_COUNT else "2**63 - 1"
        raise ValueError(f"an integer from 0 to {upper} was expected, got {safe_repr(value)}")
    return value


class CompletionCursor:
    """Who has left a window that gives entries as they are finished, for their cursors.

    Cursor: that of the last entry up to which all have left, that entry's number, and a number whose bit `i` says
    whether the entry `1 + i` places behind it has left too. So nothing is lost and nothing repeated, however long one
    entry takes.

    Attributes:
        came: The number of the newest entry.
        forgets: Who has left beyond the front is not told: a source has failed, which takes part again after a resume,
            so that the numbers would be those of other entries.
    """

    def __init__(self, *, unordered_input: bool = False) -> None:
        self._unordered_input = unordered_input
        self.came = 0
        self.forgets = False
        self._front = 0  # all up to this number have left
        self._front_cursor: Any = None
        self._beyond = 0  # bits
        self._cursors: dict[int, Any] = {}  # of those who left beyond the front

    def resume(self, cursor: Any) -> Any:
        """Go on behind those whom `cursor` tells of; returns the cursor that upstream goes on behind."""
        self._front_cursor, front, beyond = cursor_parts(cursor, 3)
        # Where one entry takes long, the bits of those beyond it are more than JSON's decimal digits can be.
        self._beyond = int(beyond, 16) if isinstance(beyond, str) else beyond
        if type(self._beyond) is not int or self._beyond < 0:
            raise ValueError(f"bits, as a number of at least 0, were expected, got {safe_repr(beyond)}")
        if self._unordered_input:
            self._beyond = 0
        self._front = self.came = as_count(front)
        return self._front_cursor

    @property
    def cursor(self) -> tuple[Any, int, int]:
        """Behind all who have left."""
        return self._front_cursor, self._front, 0 if self.forgets else self._beyond

    @property
    def count(self) -> int:
        """How many have left."""
        return self._front + self._beyond.bit_count()

    def comes(self, run: list[Entry]) -> list[Entry]:
        """Number the entries of `run`, and leave out those who had left before a resume."""
        fresh = []
        for entry in run:
            if entry.state == LAST:
                fresh.append(entry)
                continue
            self.came += 1
            if self._beyond >> (self.came - self._front - 1) & 1:
                self._cursors[self.came] = entry.cursor
                self._advance()
            else:
                entry.cursor = (self.came, entry.cursor)
                fresh.append(entry)
        return fresh

    def leaves(self, entry: Entry) -> int:
        """Give `entry` the cursor behind all who have left, itself included; returns its number, from 1."""
        number: int
        number, self._cursors[number] = entry.cursor
        self._beyond |= 1 << (number - self._front - 1)
        self._advance()
        entry.cursor = self.cursor
        return number

    def _advance(self) -> None:
        while self._front + 1 in self._cursors:
            self._front += 1
            self._front_cursor = self._cursors.pop(self._front)
            self._beyond >>= 1
