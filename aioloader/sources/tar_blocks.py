"""The bytes of a tar archive that arrives in pieces, given out in parts that begin with a block of 512 bytes."""

from collections import deque
from io import BytesIO
from typing import Any, Final

__all__ = ["BLOCK", "TarBlocks"]

BLOCK: Final = 512


class TarBlocks:
    """What was fed and not used, in blocks of 512 bytes: each part begins with one, zeros fill its last one up.

    Args:
        offset: Where in the archive the first byte is.
    """

    def __init__(self, offset: int) -> None:
        self._base = offset  # of `data`
        self._data = b""
        self._at = 0  # in `data`: what is before has been used
        self._pieces: deque[Any] = deque()  # what comes after `data`
        self._part = BytesIO()  # what is there of a part that was asked for; then `data` is used up
        self.missing = 0  # bytes to come which are to be passed over; while there are any, nothing is held

    @property
    def offset(self) -> int:
        """Where in the archive the next part begins."""
        return self._base + self._at

    @property
    def total(self) -> int:
        """How long the archive is, once all that was fed has been used."""
        return self.offset - self.missing

    def feed(self, piece: Any) -> None:
        """More of the archive."""
        if self.missing:
            passed = min(self.missing, len(piece))
            self.missing -= passed
            piece = memoryview(piece)[passed:]
        if len(piece):
            self._pieces.append(piece)

    def take(self, size: int) -> bytes | None:
        """The next part; None: not all of it is there."""
        start = self._at
        stop = start + _padded(size)
        if stop <= len(self._data):
            self._at = stop
            return self._data[start : start + size]
        # It goes on in other pieces, each of which is copied and let go of: joining them would hold all of it twice.
        part = self._part
        while True:
            self._at += part.write(self._data[self._at : self._at + size - part.tell()])
            if part.tell() == size:
                break
            if not self._pieces:
                return None
            self._next_piece()
        self._part = BytesIO()
        self._pass_over(_padded(size) - size)
        return part.getvalue()

    def skip(self, size: int) -> None:
        """Pass the next part over, also what has not come yet."""
        self._pass_over(_padded(size))

    def rest(self) -> bytes:
        """What is there of a part that was asked for and not given."""
        return self._part.getvalue()

    def _pass_over(self, count: int) -> None:
        target = self.offset + count
        while (missing := target - self._base - len(self._data)) > 0 and self._pieces:
            self._next_piece()
        if missing > 0:
            self._base, self._data, self._at = target, b"", 0
            self.missing = missing
        else:
            self._at = target - self._base

    def _next_piece(self) -> None:
        """Go on to it; `data` is used up."""
        self._base += len(self._data)
        piece = self._pieces.popleft()
        self._data = piece if type(piece) is bytes else bytes(piece)
        self._at = 0


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
