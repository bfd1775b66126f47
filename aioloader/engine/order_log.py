"""The order in which entries left an unordered window, in a file: recorded, and replayed.

One file per epoch (and repetition) in a folder of the user's. Entry number `i` that left is four bytes: how far its
number in the order of the input is from `i`, a little-endian signed integer. So a file is as small as it can be without
giving up that a resumed epoch finds its place, and cuts off what was recorded beyond it.
"""

import os
from pathlib import Path
from struct import Struct
from typing import BinaryIO, Final

from aioloader.errors import StateError

__all__ = ["Recorded", "Replayed"]

_DISPLACEMENT: Final = Struct("<i")
_BUFFER_BYTES: Final = 64 << 10


class Recorded:
    """Writes the order of one window. A write of 64 KiB into the page cache comes every 16,384 entries, on the loop."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._count = 0

    def check(self, count: int) -> None:
        """Refuse to go on after `count` entries.

        Raises:
            StateError: Fewer are in the file.
        """
        if count and not _holds(self._path, count):
            raise StateError(
                f"{self._path} should hold the order of the {count} samples before the resume, and does not; "
                f"record into the folder of the interrupted run, which must be closed or flushed with its state"
            )

    def begin(self, count: int) -> None:
        """Go on after the first `count` entries; what a run that was cut off wrote beyond them is forgotten.

        Raises:
            StateError: Fewer than `count` are in the file.
        """
        self.check(count)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        size = _DISPLACEMENT.size * count
        self._file = self._path.open("r+b" if count else "wb", buffering=_BUFFER_BYTES)
        self._file.truncate(size)
        self._file.seek(0, os.SEEK_END)
        self._count = count

    def add(self, number: int) -> None:
        """Entry `number`, from 1, leaves."""
        assert self._file is not None
        self._count += 1
        self._file.write(_DISPLACEMENT.pack(number - self._count))

    def flush(self) -> None:
        """Let the file hold all that has left."""
        if self._file is not None and not self._file.closed:
            self._file.flush()

    def close(self) -> None:
        """Nothing leaves any more. Idempotent."""
        if self._file is not None:
            self._file.close()


class Replayed:
    """Reads the order of one window.

    Attributes:
        following: The number of the entry that leaves next; None when the file does not say.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._count = 0
        self.following: int | None = None

    def check(self, count: int) -> None:
        """Refuse to go on after `count` entries.

        Raises:
            StateError: Fewer are in the file.
        """
        if self._path.is_file() and not _holds(self._path, count):
            raise StateError(f"{self._path} holds the order of fewer than the {count} samples before the resume")

    def begin(self, count: int) -> None:
        """Go on after the first `count` entries.

        Raises:
            StateError: There is no such file.
        """
        try:
            self._file = self._path.open("rb", buffering=_BUFFER_BYTES)
        except OSError as error:
            raise StateError(
                f"the order to replay is not there: {self._path} ({error.strerror}); record it with record_order="
            ) from error
        self._file.seek(_DISPLACEMENT.size * count)
        self._count = count
        self.advance()

    def advance(self) -> None:
        """The one whose turn it was has left."""
        assert self._file is not None
        record = self._file.read(_DISPLACEMENT.size)
        if len(record) < _DISPLACEMENT.size:
            self.following = None
            return
        self._count += 1
        self.following = self._count + _DISPLACEMENT.unpack(record)[0]

    def no_more(self) -> StateError:
        """Why the epoch cannot go on."""
        if self.following is None:
            return StateError(
                f"{self._path} holds the order of {self._count} samples, and there are more: the recorded run was cut "
                f"off there, or had another source"
            )
        return StateError(
            f"{self._path} says that sample {self.following} comes next, but the source has ended before it: "
            f"the order was recorded with another source"
        )

    def close(self) -> None:
        """Nothing leaves any more. Idempotent."""
        if self._file is not None:
            self._file.close()


def _holds(path: Path, count: int) -> bool:
    """Whether the order of so many samples is there."""
    return path.is_file() and path.stat().st_size >= _DISPLACEMENT.size * count
