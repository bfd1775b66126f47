"""Cuts batches with a given number of rows from pieces of Parquet files."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from aioloader.core.entry import Entry
from aioloader.errors import BrokenDataError
from aioloader.memory.pool import BatchMemory
from aioloader.sources.parquet_spans import RowPiece, unreadable
from aioloader.sources.read_ahead import failed

if TYPE_CHECKING:
    from aioloader.sources.arrow_columns import Columns

__all__ = ["BatchCutter"]


class BatchCutter:
    """Cuts pieces into batches of `batch_rows` rows. Not thread-safe.

    Args:
        batch_rows: Of each batch, but for the last one and those before an error.
        memory: Where batches go.
        in_turn: The pieces are of files that are read side by side, and their entries have the cursors.
    """

    def __init__(self, batch_rows: int, memory: BatchMemory, *, in_turn: bool = False) -> None:
        self._in_turn = in_turn
        self._batch_rows = batch_rows
        self._memory = memory
        self._pending: list[RowPiece] = []
        self._rows = 0
        self._schema: Any = None
        self._columns: Columns

    def feed(self, pieces: list[Entry]) -> list[Entry]:
        """The batches that `pieces` complete."""
        entries: list[Entry] = []
        for piece in pieces:
            if piece.error is not None:
                entries += self.flush()
                entries.append(piece)
                continue
            rest: RowPiece = replace(piece.value, turn=piece.cursor) if self._in_turn else piece.value
            while self._rows + rest.rows.num_rows >= self._batch_rows:
                head, rest = rest.take(self._batch_rows - self._rows)
                self._pending.append(head)
                entries.append(self._batch())
            if rest.rows.num_rows:
                self._pending.append(rest)
                self._rows += rest.rows.num_rows
        return entries

    def flush(self) -> list[Entry]:
        """The last batch, which may be short."""
        return [self._batch()] if self._pending else []

    def _batch(self) -> Entry:
        from aioloader.sources.arrow_columns import Columns, NullsError

        pieces, self._pending, self._rows = self._pending, [], 0
        first, last = pieces[0], pieces[-1]
        if self._schema is not last.footer.schema:
            self._schema = last.footer.schema
            self._columns = Columns(self._schema, self._memory.alloc)
        cursor = last.cursor
        key = f"{first.footer.path}:{first.start}"
        begins = f"aioloader: in a batch that begins with row {first.start} of {first.footer.path}"
        try:
            return Entry(self._columns.batch([piece.rows for piece in pieces]), cursor, key, 0)
        except NullsError as error:
            error.add_note(begins)
            return failed(error, cursor, key)
        except Exception as error:
            broken = _first_unreadable(pieces) or _broken_batch(pieces, error)
            broken.add_note(begins)
            return failed(broken, cursor, key)


def _first_unreadable(pieces: list[RowPiece]) -> BrokenDataError | None:
    """The error of the first row with a value that Python cannot hold, if there is one."""
    from aioloader.sources.arrow_columns import rows_and_failures

    for piece in pieces:
        _, failures = rows_and_failures(piece.rows)
        if failures:
            at = min(failures)
            return unreadable(piece.footer, piece.start + at, *failures[at])
    return None


def _broken_batch(pieces: list[RowPiece], error: Exception) -> BrokenDataError:
    """The error of rows that can be read one by one, but not together."""
    paths = ", ".join(dict.fromkeys(piece.footer.path for piece in pieces))
    broken = BrokenDataError(f"{paths}: their rows cannot be put together into a batch of columns: {error}")
    broken.__cause__ = error
    return broken
