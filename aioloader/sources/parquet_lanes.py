"""Parquet files one after the other, in spans of row groups that are read ahead: what is read side by side."""

from asyncio import Event
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Final, Protocol

from aioloader.core.entry import Entry
from aioloader.core.source import SourceContext, SourceThreads
from aioloader.errors import BrokenDataError
from aioloader.sources.file_order import FileOrder
from aioloader.sources.in_order import InOrder
from aioloader.sources.pace import FIRST_RANGE_BYTES, Pace
from aioloader.sources.parquet_footer import Footer
from aioloader.sources.parquet_spans import SPAN_BYTES, Span, SpanReader, spans_of
from aioloader.sources.read_ahead import Ahead, ByteQuota, failed
from aioloader.sources.requests import Requests
from aioloader.sources.stored_files import StoredFile

__all__ = ["ParquetLane", "ParquetStart", "ends_within"]

SPANS_AHEAD: Final = 2
"""Spans that are open after the one being handed out; of each of several lanes one."""

STORED_SPANS_AHEAD: Final = 7
"""Those of objects, of each lane, at most: how many there are `Pace` says."""

GROUPS_BEFORE_NEXT: Final = 2
"""When so many row groups of an object are left, the footer of the next one is asked for."""

LEAST_SPAN_BYTES: Final = 64 << 10
"""Row groups of an object that are smaller are fetched together in any case."""

PIECES_AHEAD: Final = 4
"""Decoded pieces that wait per span."""

ROWS_AT_ONCE: Final = 1024
"""Entries that are handed on together, at most."""


@dataclass(frozen=True, slots=True)
class ParquetStart:
    """Where reading begins in a file: row group, row in it, and the footer's checksum if the file was begun."""

    group: int = 0
    row: int = 0
    checksum: int | None = None


_Part = tuple[int, Span | Entry]
"""The position of a file, and a span of it, or the error of a file that cannot be read."""


class Footers(Protocol):
    """The footers of the files of an order."""

    async def of_position(self, at: int) -> Footer:
        """Read and check the one of the file at that position.

        Raises:
            Exception: The file cannot be read, or is not as expected.
        """
        raise NotImplementedError

    def expect(self, at: int) -> None:
        """Begin to read that one, if there is such a file: it is asked for soon."""


class ParquetLane(Ahead):
    """Every `order.lanes`-th file of an order. After an error that ended a file, its rest is left out.

    Args:
        context: The source's.
        order: The files.
        at: The position of the first one.
        start: Where to begin in that.
        footers: Those of the files.
        files: All of the source.
        requests: Make those for objects.
        pace: How far ahead objects are read; None: nothing is in a store.
        batch_rows: Entries are pieces of rows for batches of so many; None: rows.
    """

    def __init__(
        self,
        context: SourceContext,
        order: FileOrder,
        at: int,
        start: ParquetStart,
        footers: Footers,
        files: tuple[StoredFile, ...],
        requests: Requests,
        pace: Pace | None,
        batch_rows: int | None,
    ) -> None:
        self._order = order
        self._footers = footers
        self._files = files
        self._requests = requests
        self._batch_rows = batch_rows
        self._pace = pace
        self._first_open = 0  # files before this position have ended, some of them with an error
        several = order.lanes > 1
        self._cuts = batch_rows if several else None
        self._span: Span | None = None  # that the newest entries are of
        self._fetched = None if pace is None else ByteQuota(self._may_wait)
        self._given = False
        self._reader: InOrder[_Part] = InOrder(
            context,
            self._spans(at, start),
            self._read_span,
            open_ahead=STORED_SPANS_AHEAD if pace is not None else 1 if several else SPANS_AHEAD,
            lists_ahead=PIECES_AHEAD,
            may_open=None if pace is None else self._may_open,
        )
        super().__init__(
            context, self._entries, lists=1 if several else 2, quota=self._fetched, starved=self._has_waited
        )

    def _may_open(self, parts: Sequence[_Part]) -> bool:
        """Whether one more span is fetched while these are open: it is taken to be as large as the last of them."""
        spans = [span for _, span in parts if isinstance(span, Span)]
        if self._pace is None or not spans or len(spans) < len(parts):
            return False
        footer = spans[-1].footer
        if footer.file.store is None:
            return len(spans) <= 1
        nbytes = sum(span.fetched_bytes for span in (*spans, spans[-1]))
        return self._pace.may_open(nbytes, footer.fetched_bytes)

    def _may_wait(self) -> int:
        """How many bytes of rows may be ready while more are fetched. Pieces are batches ahead already, see there."""
        if self._pace is None or self._batch_rows is not None or self._reader.open_parts > 1:
            return 0
        return FIRST_RANGE_BYTES if self._span is None else self._pace.ahead_bytes

    def _has_waited(self, seconds: float) -> None:
        if self._given and self._pace is not None and self._batch_rows is None:
            self._pace.starved(seconds)

    async def aclose(self) -> None:
        self._requests.close()  # those of all lanes: threads that wait for an answer wait no longer

    async def _entries(self) -> AsyncGenerator[list[Entry]]:
        async with aclosing(self._reader):
            while entries := await self._reader.read(ROWS_AT_ONCE):
                if self._goes_on(entries):
                    self._count(entries[0])
                    yield entries
                    self._given = True

    def _count(self, entry: Entry) -> None:
        """How much was fetched for one of these entries."""
        _, span = self._reader.part
        if self._fetched is not None and isinstance(span, Span):
            self._span = span
            rows = 1 if self._batch_rows is None or entry.error is not None else entry.value.rows.num_rows
            self._fetched.entry_bytes = rows * span.footer.fetched_row_bytes

    def _goes_on(self, entries: list[Entry]) -> bool:
        """Whether the file that these are of had not ended before them."""
        at, _ = self._reader.part
        if at < self._first_open:
            return False
        if entries[-1].error is not None:
            self._first_open = entries[-1].cursor[0]
        return True

    async def _spans(self, first: int, start: ParquetStart) -> AsyncGenerator[_Part]:
        """What to read, in order."""
        for at, number in self._order.places(first):
            try:
                footer = await self._footers.of_position(at)
                row = _first_row(footer, start)
            except Exception as error:
                yield at, failed(error, (at + self._order.lanes, 0, 0), self._files[number].name)
            else:
                for span in spans_of(footer, row, self._fetched_at_once(footer)):
                    if at < self._first_open:
                        break
                    if footer.file.store is not None and span.last >= len(footer.sizes) - GROUPS_BEFORE_NEXT:
                        self._footers.expect(footer.after)
                    yield at, span
            start = ParquetStart()

    def _fetched_at_once(self, footer: Footer) -> Callable[[], float]:
        """Of objects, what a resume would ask for again; files have no bound of their own."""
        if footer.file.store is None or self._pace is None:
            return lambda: inf
        return partial(self._span_bytes, self._pace, footer)

    def _span_bytes(self, pace: Pace, footer: Footer) -> int:
        return max(LEAST_SPAN_BYTES, pace.share_bytes(SPAN_BYTES, footer.fetched_bytes))

    async def _read_span(self, part: _Part, thread: SourceThreads, _turn: Event) -> AsyncGenerator[list[Entry]]:
        _, span = part
        if isinstance(span, Entry):
            yield [span]
            return
        reading = SpanReader(span, self._requests, as_pieces=self._batch_rows is not None)
        try:
            while entries := await thread.call(reading.next):
                yield entries if self._cuts is None else _cut(entries, self._cuts)
        finally:
            await thread.call(reading.close)


def _cut(entries: list[Entry], batch_rows: int) -> list[Entry]:
    """The same in pieces that end where others may have their turn, see `ends_within`."""
    pieces: list[Entry] = []
    for entry in entries:
        if entry.error is not None:
            pieces.append(entry)
        else:
            pieces += [Entry(piece, piece.footer.cursor(piece.stop), None, 0) for piece in entry.value.cut(batch_rows)]
    return pieces


def ends_within(batch_rows: int, entry: Entry) -> bool:
    """Whether a piece ends in the middle of `batch_rows` rows of its file, which are given in one turn.

    Where that is depends on the number of the row alone, so it is the same after a resume.
    """
    if entry.error is not None:
        return False
    piece = entry.value
    return bool(piece.stop % batch_rows and piece.stop < piece.footer.starts[-1])


def _first_row(footer: Footer, start: ParquetStart) -> int:
    """The number of the first row to read.

    Raises:
        BrokenDataError: The file is not the one that the cursor was taken from.
    """
    starts = footer.starts
    if start.checksum is not None and start.checksum != footer.checksum:
        change = "its footer differs"
    elif start.group >= max(1, len(starts) - 1) or starts[start.group] + start.row > starts[-1]:
        change = f"it has {len(starts) - 1} row groups and {starts[-1]} rows"
    else:
        return starts[start.group] + start.row
    raise BrokenDataError(
        f"{footer.path}: reading resumes in row group {start.group} after row {start.row}, but {change}: it was "
        f"changed after the state was made, so the rest of its rows are left out; restore the old file, or begin the "
        f"epoch again without the state"
    )
