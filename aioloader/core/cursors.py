"""Cursors say where to go on: how their parts are read, and the cursor of a window without a fixed order."""

from typing import Any, Final

from aioloader.core.entry import LAST, Entry
from aioloader.core.safe_text import safe_repr
from aioloader.errors import StateError

__all__ = ["MAX_COUNT", "CompletionCursor", "as_count", "cursor_parts", "cursor_sequence", "plain"]

MAX_COUNT: Final = (1 << 63) - 1
"""The largest count that a state may have."""


def cursor_sequence(cursor: object) -> list[Any]:
    """The parts of `cursor`, a tuple that JSON may have made a list.

    Raises:
        ValueError: It is neither.
    """
    if not isinstance(cursor, list | tuple):
        raise ValueError(f"a list was expected, got {safe_repr(cursor)}")
    return list(cursor)


def cursor_parts(cursor: object, count: int) -> list[Any]:
    """The `count` parts of `cursor`.

    Raises:
        ValueError: It has another number of parts, or none.
    """
    parts = cursor_sequence(cursor)
    if len(parts) != count:
        raise ValueError(f"a list of {count} was expected, got {safe_repr(cursor)}")
    return parts


def plain(value: Any) -> Any:
    """A copy as JSON gives it back. An integer too long for decimal digits becomes a string of hexadecimal ones."""
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, bool | str | float | None):
        return value
    if isinstance(value, int):
        return hex(value) if value.bit_length() > 4096 else int(value)
    raise StateError(f"a cursor is made of numbers, strings and lists, got {value!r} of {type(value).__name__}"[:300])


def as_count(value: object, most: int = MAX_COUNT) -> int:
    """`value`, a count.

    Raises:
        ValueError: It is not an integer from 0 to `most`.
    """
    if type(value) is not int or not 0 <= value <= most:
        upper = most if most < MAX_COUNT else "2**63 - 1"
        raise ValueError(f"an integer from 0 to {upper} was expected, got {safe_repr(value)}")
    return value


class CompletionCursor:
    """Makes the cursors of a window that delivers entries as they finish.

    Entries are numbered as they come. The front is the last entry up to which all have been delivered. A cursor has the
    cursor of the front, its number, and a number whose bit `i` says whether the entry `1 + i` places after the front
    has been delivered too. So no entry is lost or repeated, however long one takes.

    Attributes:
        came: The number of the newest entry.
        forgets: Whether entries beyond the front are left out of cursors. That is so after a source has failed: it
            takes part again after a resume, and then the numbers would be those of other entries.
    """

    def __init__(self, *, unordered_input: bool = False) -> None:
        self._unordered_input = unordered_input
        self.came = 0
        self.forgets = False
        self._front = 0  # all up to this number have been delivered
        self._front_cursor: Any = None
        self._beyond = 0  # one bit for each entry after the front
        self._cursors: dict[int, Any] = {}  # of those delivered beyond the front

    def resume(self, cursor: object) -> Any:
        """Go on after the entries in `cursor`; returns the cursor for the nodes before."""
        self._front_cursor, front, beyond = cursor_parts(cursor, 3)
        # A string where one entry takes long: then the bits after it are too many for a decimal number in JSON.
        self._beyond = int(beyond, 16) if isinstance(beyond, str) else beyond
        if type(self._beyond) is not int or self._beyond < 0:
            raise ValueError(f"bits, as a number of at least 0, were expected, got {safe_repr(beyond)}")
        if self._unordered_input:
            self._beyond = 0
        self._front = self.came = as_count(front)
        return self._front_cursor

    @property
    def cursor(self) -> tuple[Any, int, int]:
        """The cursor after all entries that have been delivered."""
        return self._front_cursor, self._front, 0 if self.forgets else self._beyond

    @property
    def delivered(self) -> tuple[int, int]:
        """The number of the front, and the bits of those after it that have been delivered."""
        return self._front, self._beyond

    @property
    def count(self) -> int:
        """How many entries have been delivered."""
        return self._front + self._beyond.bit_count()

    def comes(self, run: list[Entry]) -> list[Entry]:
        """Number the entries of `run`; returns those that were not delivered before a resume."""
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
        """Give `entry` the cursor after all delivered entries including itself; returns its number, from 1."""
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
