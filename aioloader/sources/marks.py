"""Whether a file is still what it was when a cursor was taken from it.

A cursor says that reading resumes at byte 5,000. If the file was rewritten meanwhile, that is the middle of a line, or
of another file. So a cursor also has a *mark*: the CRC-32 of up to a kilobyte that was read shortly before that place.
It is checked when reading resumes, which costs no more than a longer first read.

It is a mark of the content, not of the file's size and time of change: a copy on another machine is the same file, and
a file that has grown is the same up to where it was. And it depends only on the place in the file, so that a state does
not depend on how it was reached: after a resume, with other pieces, at another speed.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Any, Final
from zlib import crc32

from aioloader.core.cursors import as_count
from aioloader.errors import BrokenDataError

__all__ = ["MARK_BYTES", "Trail", "changed_since", "read_mark"]

MARK_BYTES: Final = 1024

BLOCK: Final = 64 << 10
"""Marks are made before each multiple of this, and before each smaller power of two: 16 marks per megabyte cost nothing
that can be measured, one per line does."""


def read_mark(value: object) -> int | None:
    """Check a mark in a cursor; None if it has no mark, and what is before it is not checked.

    Raises:
        ValueError: It is not a mark.
    """
    return None if value is None else as_count(value, 0xFFFFFFFF)


def _marked(offset: int) -> int:
    """The last place up to `offset` that has a mark."""
    return offset - offset % BLOCK if offset > BLOCK else 1 << offset.bit_length() - 1 if offset else 0


def _following(place: int) -> int:
    return place + BLOCK if place >= BLOCK else max(1, 2 * place)


class Trail:
    """Follows the content of a file on its way to the parser: checks the mark to resume at, and makes those after it.

    Args:
        offset: Where reading resumes.
        mark: The mark of that place; None if it is not checked.
        least: How many bytes before it are read again in any case.

    Attributes:
        start: The first byte to read.
        missing: How many bytes before `offset` are still to come.
        before: The last byte before `offset`, if one was read.
    """

    def __init__(self, offset: int, mark: int | None, *, least: int = 0) -> None:
        place = _marked(offset)
        checked = mark is not None and place > 0
        self.start = max(0, min(place - MARK_BYTES if checked else offset, offset - least))
        self.missing = offset - self.start
        self.before = b""
        self._offset = offset
        self._expected = mark if checked else None
        self._read = self.start
        self._tail = b""  # what was read last
        self._next = _following(_marked(self.start))
        self._marks: deque[tuple[int, int]] = deque([(0, 0)])  # places and marks; the first is that of the last cursor

    def feed(self, piece: Any) -> Any:
        """The part of `piece`, the next content, that comes after `offset`.

        Raises:
            BrokenDataError: What comes before `offset` has changed.
        """
        begin, end = self._read, self._read + len(piece)
        while self._next <= end:
            self._add_mark(self._next, piece, begin)
            self._next = _following(self._next)
        self._tail = (self._tail + bytes(piece[-MARK_BYTES:]))[-MARK_BYTES:]
        self._read = end
        if not self.missing:
            return piece
        if end >= self._offset and self._expected not in (None, self.mark(self._offset)):
            raise BrokenDataError(changed_since(self._offset))
        before, piece = bytes(piece[: self.missing]), bytes(piece[self.missing :])
        self.missing -= len(before)
        self.before = before[-1:]
        return piece

    def _add_mark(self, place: int, piece: Any, begin: int) -> None:
        inside = place - begin
        marked = bytes(piece[max(0, inside - MARK_BYTES) : inside])
        if inside < MARK_BYTES:
            marked = (self._tail + marked)[-MARK_BYTES:]
        self._marks.append((place, crc32(marked)))

    def mark(self, offset: int) -> int | None:
        """The mark of a cursor at `offset`, which must not be smaller than at the last call."""
        marks = self._marks
        while len(marks) > 1 and marks[1][0] <= offset:
            marks.popleft()
        return marks[0][1] if marks[0][0] else None

    def marks(self, offsets: Sequence[int]) -> Iterable[int | None]:
        """The marks of cursors at `offsets`, in order."""
        mark = self.mark(offsets[0])
        if len(self._marks) == 1 or self._marks[1][0] > offsets[-1]:
            return repeat(mark)
        return map(self.mark, offsets)


def changed_since(offset: int) -> str:
    """The error text of a file that does not match the mark of a cursor."""
    return (
        f"reading resumes at byte {offset}, but what is before it is not what was read there: it was rewritten "
        f"since the state was made; restore the old content, or begin the epoch again without the state"
    )
