"""Spans of row groups of a Parquet file: how a file is divided into them, and how one is read."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from typing import Any, Final

from aioloader.core.entry import Entry
from aioloader.errors import BrokenDataError
from aioloader.sources.interleave import TurnCursor, within_turn
from aioloader.sources.parquet_footer import Footer
from aioloader.sources.parquet_input import Input, open_input, rewritten
from aioloader.sources.read_ahead import failed
from aioloader.sources.requests import Requests

__all__ = ["SPAN_BYTES", "RowPiece", "Span", "SpanReader", "fetched_bytes", "spans_of", "unreadable"]

SPAN_BYTES: Final = 32 << 20
"""Row groups that are smaller are read several at a time."""


@dataclass(frozen=True)
class Span:
    """The rows of a file from number `start`, in row group `first`, to the end of row group `last`."""

    footer: Footer
    first: int
    last: int
    start: int

    @cached_property
    def fetched_bytes(self) -> int:
        """Of its row groups: see the function of this name."""
        return sum(fetched_bytes(self.footer, group) for group in range(self.first, self.last + 1))


def spans_of(footer: Footer, start: int, fetched_at_once: Callable[[], float]) -> Iterator[Span]:
    """The rows of a file from number `start` on, in spans of one large row group, or of several small ones.

    Args:
        footer: Of the file.
        start: The first row.
        fetched_at_once: Gives how many bytes several row groups have that are fetched together, at most.
    """
    starts = footer.starts
    first, last, size, fetched = None, 0, 0, 0
    for group in range(len(starts) - 1):
        if starts[group + 1] <= start:
            continue
        more = fetched_bytes(footer, group)
        if first is not None and (size >= SPAN_BYTES or fetched + more > fetched_at_once()):
            yield Span(footer, first, last, max(start, starts[first]))
            first, size, fetched = None, 0, 0
        first = group if first is None else first
        size += footer.sizes[group]
        fetched += more
        last = group
    if first is not None:
        yield Span(footer, first, last, max(start, starts[first]))


def fetched_bytes(footer: Footer, group: int) -> int:
    """Of the columns of a row group that are read, as they are in the file."""
    return sum(stop - start for start, stop in footer.chunks[group])


class SpanReader:
    """Reads a span, in the one thread that opens and closes it.

    One row group after the other: asked for several, pyarrow fills a column that is short of values with those of the
    next row group, and pairs them with the wrong rows.
    """

    def __init__(self, span: Span, requests: Requests, *, as_pieces: bool) -> None:
        self._requests = requests
        self._as_pieces = as_pieces
        self._footer = span.footer
        self._row = span.start
        self._group = span.first
        self._last = span.last
        self._input: Input | None = None
        self._file: Any = None
        self._batches: Any = None

    def close(self) -> None:
        """Close the file; may be called at any time."""
        self._batches = self._file = None
        if self._input is not None:
            self._input.close()

    def next(self) -> list[Entry]:
        """The next rows or record batches, those of several small row groups at once; `[]` at the end.

        What cannot be read is an entry with an error.
        """
        entries: list[Entry] = []
        until = self._row + self._footer.piece_rows
        while self._group <= self._last and self._row < until:
            piece, failure = None, None
            try:
                if self._input is None:
                    footer = self._footer
                    self._input = open_input(footer.file, self._requests, footer.version)
                piece = self._next_piece()
            except Exception as error:
                if self._input is None:
                    return [*entries, self._end_file(error)]
                failure = error
            # Only now, because what was just read may be of another version.
            change = self._input.change(self._footer.version)
            if change is not None:
                return [*entries, self._end_file(rewritten(self._footer.path, change, self._row))]
            if failure is not None:
                return [*entries, self._end_group(failure)]
            if piece is not None:
                entries += self._entries_of(piece)
        return entries

    def _next_piece(self) -> Any:
        """The next wanted rows of the row group, as a record batch; None means to call it again."""
        footer, group = self._footer, self._group
        if self._row == footer.starts[group + 1]:
            self._next_group()
            return None
        if self._file is None:
            self._file = self._open()
        if self._batches is None:
            self._at = footer.starts[group]
            self._batches = self._file.iter_batches(footer.piece_rows, row_groups=[group], columns=footer.schema.names)
        piece = next(self._batches, None)
        if piece is None:
            raise BrokenDataError(f"{footer.starts[group + 1] - self._at} rows fewer came than the footer promises")
        skipped = max(0, self._row - self._at)  # rows before the one that reading resumes at, within the row group
        self._at += piece.num_rows
        if skipped >= piece.num_rows:
            return None
        return (piece.slice(skipped) if skipped else piece).select(footer.schema.names)

    def _open(self) -> Any:
        import pyarrow.parquet as pq

        assert self._input is not None
        chunks = self._footer.chunks[self._group : self._last + 1]
        self._input.fetch([place for places in chunks for place in places])
        return pq.ParquetFile(self._input.file, metadata=self._footer.metadata, page_checksum_verification=True)

    def _next_group(self) -> None:
        self._batches = None
        self._group += 1
        self._row = self._footer.starts[self._group]

    def _entries_of(self, piece: Any) -> list[Entry]:
        footer, start = self._footer, self._row
        self._row = stop = start + piece.num_rows
        if self._as_pieces:
            return [Entry(RowPiece(piece, footer, start, stop), footer.cursor(stop), None, 0)]
        from aioloader.sources.arrow_columns import rows_and_failures, rows_of

        failures: dict[int, tuple[str, Exception]] = {}
        try:
            rows = rows_of(piece)
        except Exception:
            rows, failures = rows_and_failures(piece)
        path = footer.path
        first = footer.starts[self._group]
        numbers = range(start + 1 - first, stop + 1 - first)
        cursors = zip(repeat(footer.index), repeat(self._group), numbers, repeat(footer.checksum))
        keys = [f"{path}:{number}" for number in range(start, stop)]
        entries = list(map(Entry, rows, cursors, keys, repeat(0)))
        entries[-1].cursor = footer.cursor(stop)
        for at, (column, error) in failures.items():
            broken = unreadable(footer, start + at, column, error)
            entries[at] = failed(broken, entries[at].cursor, entries[at].key)
        return entries

    def _end_group(self, error: Exception) -> Entry:
        """The error entry of the rest of the row group, which cannot be decoded."""
        path, group, start = self._footer.path, self._group, self._row
        self._next_group()
        broken = BrokenDataError(
            f"{path}, row group {group}: its rows from {start} to {self._row - 1} cannot be read: {error}"
        )
        broken.__cause__ = error
        return failed(broken, self._footer.cursor(self._row), f"{path}:{start}")

    def _end_file(self, error: Exception) -> Entry:
        """The error entry after which nothing more of the file is read, here and in later spans."""
        self._group = self._last + 1
        return failed(error, self._footer.end, f"{self._footer.path}:{self._row}")


def unreadable(footer: Footer, row: int, column: str, error: Exception) -> BrokenDataError:
    """The error of a row with a value that Python cannot hold."""
    kind = footer.schema.field(column).type
    broken = BrokenDataError(
        f"{footer.path}, row {row}: column {column!r} of type {kind} has a value there that Python cannot hold: "
        f"{error}; leave the column out with columns=, or write it with another type"
    )
    broken.__cause__ = error
    return broken


@dataclass(frozen=True, slots=True)
class RowPiece:
    """Rows of a record batch that are not used yet.

    Attributes:
        rows: The rows.
        footer: Of their file.
        start: The number of the first of them in the file.
        end: The number after the last row that was read with them.
        turn: Where files are read side by side: the cursor after `end`.
    """

    rows: Any
    footer: Footer
    start: int
    end: int
    turn: TurnCursor | None = None

    @property
    def stop(self) -> int:
        """The number after the last of them."""
        return self.start + int(self.rows.num_rows)

    @property
    def cursor(self) -> Any:
        """The cursor after the last of them."""
        if self.turn is None:
            return self.footer.cursor(self.stop)
        if self.stop == self.end:
            return self.turn
        _, lanes = self.turn
        return within_turn(self.turn, self.footer.index % len(lanes), self.footer.cursor(self.stop))

    def take(self, count: int) -> "tuple[RowPiece, RowPiece]":
        """The first `count` rows, and the rest."""
        rows, start = self.rows, self.start
        head = RowPiece(rows.slice(0, count), self.footer, start, self.end, self.turn)
        return head, RowPiece(rows.slice(count), self.footer, start + count, self.end, self.turn)

    def cut(self, multiple: int) -> "Iterator[RowPiece]":
        """Pieces that end where the number of rows of the file is a multiple of that."""
        start = self.start
        while start < self.stop:
            end = min(self.stop, start - start % multiple + multiple)
            yield RowPiece(self.rows.slice(start - self.start, end - start), self.footer, start, end)
            start = end
