"""Whether a file is still what it was when a cursor was taken from it.

A cursor says that reading goes on at byte 5,000. If the file was written anew meanwhile, that is the middle of a line,
or of another file. So a cursor also has a *mark*: a few bytes that had been read before that place, as their offset,
length and checksum. They are read again when reading goes on, which costs no more than a longer first read.

It is a mark of the content, and not the file's size and time of change: a file that was copied to another machine is
the same file, and one that has grown is the same up to where it was.
"""

from collections.abc import Sequence
from typing import Any, Final
from zlib import crc32

from aioloader.engine.progress import cursor_parts, whole
from aioloader.errors import BrokenDataError

__all__ = ["MARK_BYTES", "Approach", "Mark", "mark_of", "offset_of", "read_mark"]

MARK_BYTES: Final = 1024

Mark = tuple[int, int, int, str | None]
"""Where the bytes begin, how many there are, their CRC-32; and of an object in a store, which version it was."""


def mark_of(at: int, data: Any, version: str | None = None) -> Mark:
    """The mark of `data`, which begins at byte `at`; at most `MARK_BYTES` of it."""
    return at, len(data), crc32(data), version


def offset_of(value: Any) -> int:
    """A part of a cursor that is a byte offset.

    Raises:
        ValueError: It is none.
    """
    return whole(value, (1 << 63) - 1)


def read_mark(value: Any, offset: int) -> Mark | None:
    """The mark in a cursor whose offset is `offset`.

    Raises:
        ValueError: It is none.
    """
    if value is None:
        return None
    at, length, checksum, version = cursor_parts(value, 4)
    if version is not None and not isinstance(version, str):
        raise ValueError(f"a version is a string, got {version!r}"[:200])
    whole(at, offset - whole(length, min(offset, MARK_BYTES)))
    return at, length, whole(checksum, 0xFFFFFFFF), version


class Approach:
    """Reads what is before the place where reading goes on, and holds it against the mark.

    Attributes:
        start: The first byte to read.
        missing: Bytes that are still to come before that place.
        last: The last of those that came.
    """

    def __init__(self, offset: int, mark: Mark | None, *, least: int = 0) -> None:
        at = offset if mark is None else mark[0]
        self.start = max(0, min(at, offset - least))
        self.missing = offset - self.start
        self.last = b""
        self._offset = offset
        self._mark = mark
        self._checksum = 0

    def feed(self, piece: Any) -> Any:
        """What of `piece` is after that place.

        Raises:
            BrokenDataError: The bytes before it are others.
        """
        if not self.missing:
            return piece
        piece = bytes(piece)
        before = piece[: self.missing]
        if self._mark is not None:
            at, length, checksum, _ = self._mark
            begin = self._offset - self.missing
            self._checksum = crc32(before[max(0, at - begin) : max(0, at + length - begin)], self._checksum)
            if begin < at + length <= begin + len(before) and self._checksum != checksum:
                raise BrokenDataError(changed_since(self._offset))
        self.missing -= len(before)
        self.last = before[-1:] or self.last
        return piece[len(before) :]


def changed_since(offset: int) -> str:
    """What happened to a file that does not fit its mark, and the way out."""
    return (
        f"reading shall go on at byte {offset}, but what is before it is not what was read there: it was written anew "
        f"since the state was made; put the old content back, or begin the epoch again without the state"
    )
