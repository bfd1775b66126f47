"""The bytes of a tar archive that arrive in pieces, read in parts that are padded to blocks of 512 bytes."""

from collections import deque
from io import BytesIO
from typing import Any, Final

__all__ = ["BLOCK", "TarBlocks"]

BLOCK: Final = 512


class TarBlocks:
    """A buffer of bytes that were fed and not used. Each part begins with a block; its last block is padded.

    Args:
        offset: Where in the archive the first byte is.

    Attributes:
        missing: How many bytes to come are skipped; while there are any, nothing is buffered.
    """

    def __init__(self, offset: int) -> None:
        self._base = offset  # where `data` begins
        self._data = b""
        self._at = 0  # how much of `data` has been used
        self._pieces: deque[Any] = deque()  # those after `data`
        self._part = BytesIO()  # the beginning of an incomplete part; then `data` is used up
        self.missing = 0

    @property
    def offset(self) -> int:
        """Where in the archive the next part begins."""
        return self._base + self._at

    @property
    def total(self) -> int:
        """The length of the archive, once all that was fed has been used."""
        return self.offset - self.missing

    def feed(self, piece: Any) -> None:
        """Add a piece of the archive."""
        if self.missing:
            skipped = min(self.missing, len(piece))
            self.missing -= skipped
            piece = memoryview(piece)[skipped:]
        if len(piece):
            self._pieces.append(piece)

    def take(self, size: int) -> bytes | None:
        """The next part; None if it is not complete yet."""
        start = self._at
        stop = start + _padded(size)
        if stop <= len(self._data):
            self._at = stop
            return self._data[start : start + size]
        # It goes on in other pieces. Each is copied and dropped, because joining them would hold all of it twice.
        part = self._part
        while True:
            self._at += part.write(self._data[self._at : self._at + size - part.tell()])
            if part.tell() == size:
                break
            if not self._pieces:
                return None
            self._next_piece()
        self._part = BytesIO()
        self._skip(_padded(size) - size)
        return part.getvalue()

    def skip(self, size: int) -> None:
        """Skip the next part, also what has not come yet."""
        self._skip(_padded(size))

    def rest(self) -> bytes:
        """The beginning of an incomplete part."""
        return self._part.getvalue()

    def _skip(self, count: int) -> None:
        target = self.offset + count
        while (missing := target - self._base - len(self._data)) > 0 and self._pieces:
            self._next_piece()
        if missing > 0:
            self._base, self._data, self._at = target, b"", 0
            self.missing = missing
        else:
            self._at = target - self._base

    def _next_piece(self) -> None:
        """Replace `data`, which is used up."""
        self._base += len(self._data)
        piece = self._pieces.popleft()
        self._data = piece if type(piece) is bytes else bytes(piece)
        self._at = 0


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
