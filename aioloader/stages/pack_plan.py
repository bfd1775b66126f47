"""Which part of which document goes into which row. Pure: only lengths are known here."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any, Final, Literal

from aioloader.core.cursors import as_count, cursor_sequence
from aioloader.core.safe_text import safe_repr

__all__ = ["PackPlan", "Row", "Strategy"]

Strategy = Literal["best_fit", "first_fit", "split"]
"""`best_fit`: into the open row that has the least room to spare. `first_fit`: into the oldest open row that has room.
`split`: one after the other, cut where a row is full."""

_BITS: Final = 48  # of the number of a row: integers are sorted in half the time of pairs
_NUMBERS: Final = (1 << _BITS) - 1

_OLDEST: Final = 4  # times the open rows: so many may be begun while one stays open


class Row:
    """A row that is being filled.

    Attributes:
        number: Of the rows that were begun in this epoch.
        room: Tokens that are free.
        code: Its number, and for each piece that is in it the number of the document, and where the piece begins and
            ends there.
    """

    __slots__ = ("code", "number", "room")

    def __init__(self, number: int, room: int) -> None:
        self.number = number
        self.room = room
        self.code: tuple[int, ...] = (number,)

    @property
    def documents(self) -> int:
        """How many pieces are in it."""
        return len(self.code) // 3

    @property
    def pieces(self) -> list[tuple[int, int, int]]:
        """Document, start and stop of each piece."""
        code = self.code
        return list(zip(code[1::3], code[2::3], code[3::3], strict=True))


class PackPlan:
    """Puts documents into open rows.

    A row is closed when it is full, when no more rows may be open (`best_fit`: the fullest one, `first_fit`: the
    oldest), or when `_OLDEST` times as many rows have been begun since as may be open: a resume reads again from the
    oldest document in an open row on, so none may wait for ever for one that fits.

    All that it will do depends on the open rows and on how many were begun.

    Args:
        seq_len: Tokens of a row.
        strategy: See `Strategy`.
        open_rows: How many may be open.
        max_documents: Pieces in a row; None: any number.
        pad_to: Each piece takes a multiple of so many tokens.
    """

    def __init__(
        self,
        seq_len: int,
        strategy: Strategy = "best_fit",
        open_rows: int = 64,
        max_documents: int | None = None,
        pad_to: int = 1,
    ) -> None:
        self._seq_len = seq_len
        self._best = strategy == "best_fit"
        self._cuts = strategy == "split"
        self._open_rows = 1 if self._cuts else open_rows
        self._max_documents = max_documents or (1 << 62)
        self._pad_to = pad_to
        self.begun = 0  # rows
        self.rows: dict[int, Row] = {}  # the open ones, by number, the oldest first
        self._by_room: list[int] = []  # `best_fit`: room and number of each as one integer, sorted
        self._looked = 0  # rows that were begun when none was open for too long

    def cut(self, start: int, length: int) -> int:
        """Where the piece ends that begins at `start` of a document of `length`."""
        room = self._seq_len
        if self._cuts and self.rows:
            room = next(iter(self.rows.values())).room
        return min(length, start + room)

    def due(self) -> Row | None:
        """Close a row that has been open for too long, before the next piece is put; None: there is none."""
        if self.begun == self._looked:
            return None
        oldest = next(iter(self.rows), self.begun)
        if self.begun - oldest > _OLDEST * self._open_rows and not self._cuts:
            return self._close(oldest)
        self._looked = self.begun
        return None

    def put(self, document: int, start: int, stop: int) -> Row | None:
        """Put a piece of at most `seq_len` tokens into a row; the row that is closed then, if there is one."""
        size = stop - start
        if self._pad_to > 1:
            size = -(-size // self._pad_to) * self._pad_to
        row = self._row_for(size)
        closed = None
        if row is None:
            row = Row(self.begun, self._seq_len)
            self.begun += 1
            if size < self._seq_len and self._max_documents > 1:
                if len(self.rows) >= self._open_rows:
                    closed = self._close(self._by_room[0] & _NUMBERS if self._best else next(iter(self.rows)))
                self.rows[row.number] = row
        row.room -= size
        row.code += (document, start, stop)
        if not row.room or row.documents >= self._max_documents:
            self.rows.pop(row.number, None)
            return row
        if self._best:
            insort(self._by_room, row.room << _BITS | row.number)
        return closed

    def _row_for(self, size: int) -> Row | None:
        """The open row for a piece; taken out of `_by_room`, since its room changes."""
        if self._best:
            at = bisect_left(self._by_room, size << _BITS)
            return self.rows[self._by_room.pop(at) & _NUMBERS] if at < len(self._by_room) else None
        for row in self.rows.values():
            if row.room >= size:
                return row
        return None

    def close_first(self) -> Row | None:
        """Close the oldest one; None: none is open."""
        return self._close(next(iter(self.rows))) if self.rows else None

    def _close(self, number: int) -> Row:
        row = self.rows.pop(number)
        if self._best:
            del self._by_room[bisect_left(self._by_room, row.room << _BITS | number)]
        return row

    # -- resume ------------------------------------------------------------------------------------------------------

    def restore(self, begun: int, codes: Sequence[Any], first: int, stop: int) -> None:
        """Open the rows of a cursor.

        Args:
            begun: Rows that were begun.
            codes: Of the open ones.
            first: The number of the first document that may be in one.
            stop: That of the first document that is in none.

        Raises:
            ValueError: These are no such rows.
        """
        self.begun = as_count(begun, _NUMBERS)
        if len(codes) > self._open_rows:
            raise ValueError(f"{self._open_rows} rows may be open, got {len(codes)}")
        newest = -1
        for code in codes:
            numbers = [as_count(part) for part in cursor_sequence(code)]
            row = Row(numbers[0] if numbers else begun, self._seq_len)
            row.code = tuple(numbers)
            good = len(numbers) % 3 == 1 and row.documents and newest < row.number < begun
            good = good and all(first <= at < stop and begin < end for at, begin, end in row.pieces)
            sizes = [-(-(end - begin) // self._pad_to) * self._pad_to for _, begin, end in row.pieces] if good else []
            row.room -= sum(sizes)
            if not good or row.room <= 0 or row.documents >= self._max_documents:
                raise ValueError(f"a row of up to {self._seq_len} tokens was expected, got {safe_repr(code)}")
            newest = row.number
            self.rows[row.number] = row
            if self._best:
                insort(self._by_room, row.room << _BITS | row.number)

    def forget(self, number: int, document: int) -> None:
        """A document of open row `number` is not there any more."""
        left = [piece for piece in self._close(number).pieces if piece[0] != document]
        if left:
            self.restore(self.begun, [(number, *(part for piece in left for part in piece))], 0, 1 << 62)
            self.rows = dict(sorted(self.rows.items()))
