"""`ParquetRows`: the rows of Parquet files, one by one or as batches of columns."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from typing import TYPE_CHECKING, Any, Final
from zlib import crc32

from aioloader.core.checks import check_count
from aioloader.core.cursors import as_count, cursor_sequence
from aioloader.core.entry import Entry
from aioloader.core.source import CursorSource, EntryReader, SourceContext, SourceThreads
from aioloader.errors import BrokenDataError
from aioloader.memory.pool import BatchMemory
from aioloader.sources.in_order import InOrder
from aioloader.sources.parquet_footer import Footer, Numbers, read_end, row_bytes, same_columns, selected
from aioloader.sources.parquet_input import Input, open_input, rewritten
from aioloader.sources.paths import Paths, each_path, find_files, names_of
from aioloader.sources.read_ahead import Ahead, failed
from aioloader.sources.stores import check_no_options, with_options

if TYPE_CHECKING:
    from aioloader.sources.arrow_columns import Columns

__all__ = ["ParquetRows"]

PIECE_BYTES: Final = 4 << 20
"""Decoded in one hop into a thread, about: what stays in the caches of a processor."""

PIECE_ROWS: Final = 1024
"""The same for rows as dictionaries, at most: they cost Python objects, and the GIL meanwhile. With twice as many a row
took 4.4 µs instead of 2.6, as Python's garbage collector went through all it has."""

SPAN_BYTES: Final = 32 << 20
"""Row groups that are smaller are read several at a time."""

SPANS_AHEAD: Final = 2
"""Spans that are open after the one whose rows are handed out."""

PIECES_AHEAD: Final = 4
"""Decoded pieces that wait, per span."""


class ParquetRows(CursorSource):
    """The rows of Parquet files, in order, as dictionaries; or batches of columns, most of them tensors.

    Row groups are read ahead in threads. A file that cannot be read raises at its place, a broken row group at its
    place, a row with a value that Python cannot hold at its place, and what comes after it goes on. All files must have
    the columns of the first, of types that are the same in Python, or that fit into its tensors. A file that is
    rewritten while it is read, or before a resume, is an error.

    With `batch_rows`, a sample is a dictionary of columns, made without Python objects per row. Numbers, bools,
    fixed-size lists of them and fixed-shape tensors become tensors, rows first; other columns become lists. A null is
    None in a list and NaN in a tensor of floats; in any other tensor it is an error, at the place of its batch.
    Batches run over the borders of row groups and files, so that all have `batch_rows` rows, except the last one and
    one before something that cannot be read. A tensor may lie in memory of arrow, which it keeps: about 4 MB, however
    small the batch.

    Cursor: file, row group, the row in it, and the checksum of the file's footer.

    Args:
        paths: A path, a glob, or a sequence of these. Globs are looked up here, once, and sorted.
        columns: Names of those to read; None: all.
        batch_rows: None: one sample per row. Else at least 1.
        store: A store of obstore; `paths` are keys in it, without globs.
        client_options, retry_config: With `store`: timeouts and retries in place of its own, as obstore names them. By
            its defaults a request ends after 30 seconds and is tried again until three minutes are over.

    Raises:
        FileNotFoundError: A glob matches nothing.
        ImportError: Without pyarrow.
        TypeError, ValueError: An argument does not fit.

    ```python
    loader = Pipeline(ParquetRows("data/*.parquet", columns=["x", "label"], batch_rows=1024)).to("cuda")
    ```
    """

    def __init__(
        self,
        paths: Paths,
        *,
        columns: Sequence[str] | None = None,
        batch_rows: int | None = None,
        store: Any = None,
        client_options: Any = None,
        retry_config: Any = None,
    ) -> None:
        _require_pyarrow()
        options = {"client_options": client_options, "retry_config": retry_config}
        if store is None:
            check_no_options(options, source="ParquetRows")
            self.paths = find_files(paths, source="ParquetRows")
        else:
            self.paths = tuple(each_path(paths, source="ParquetRows"))
            store = with_options(store, options, source="ParquetRows")
        self.store = store
        self.columns = None if columns is None else _check_columns(columns)
        self.batch_rows = (
            None
            if batch_rows is None
            else check_count("batch_rows", batch_rows, least=1, hint="leave it out for one sample per row")
        )

    @cached_property
    def _names(self) -> dict[str, Any]:
        return names_of(self.paths)

    def identity(self) -> dict[str, Any]:
        return {**self._names, "batch_rows": self.batch_rows}

    def check_cursor(self, cursor: Any) -> None:
        self._place(cursor)

    def _place(self, cursor: Any) -> "_Start":
        parts = [0, 0, 0] if cursor is None else list(map(as_count, cursor_sequence(cursor)))
        if not 3 <= len(parts) <= 4:
            raise ValueError(f"a list of 3 or 4 was expected, got {cursor!r}"[:200])
        place = _Start(*parts)
        if place.index > len(self.paths):
            raise ValueError(
                f"the cursor is in file {place.index}, but there are {len(self.paths)}: the files have changed"
            )
        return place

    def open(self, access: SourceContext, cursor: Any) -> EntryReader:
        return _FilesReader(self, access, self._place(cursor))


def _require_pyarrow() -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ImportError("ParquetRows needs the package pyarrow: pip install 'aioloader[parquet]'") from error


def _check_columns(columns: Any) -> tuple[str, ...]:
    if isinstance(columns, str) or not isinstance(columns, Sequence):
        raise TypeError(f"columns must be a list of names, got {columns!r}; pass [{columns!r}] for one column")
    names = tuple(columns)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"columns must be a list of names, got {name!r} of type {type(name).__name__} in it")
    if not names:
        raise ValueError("columns must name at least one column, got none; leave it out for all of them")
    if len(set(names)) != len(names):
        raise ValueError(f"columns must name each column once, got {list(names)!r}")
    return names


@dataclass(frozen=True, slots=True)
class _Start:
    """Where to go on: a cursor."""

    index: int
    group: int
    row: int
    checksum: int | None = None  # of a file that was begun


class _FilesReader(Ahead):
    """One epoch: spans of row groups are read by tasks and threads of their own, in turn, and put in order here."""

    def __init__(self, source: ParquetRows, access: SourceContext, place: _Start) -> None:
        self._source = source
        self._access = access
        self._place = place
        self._footer_thread = access.threads(1)
        self._known: tuple[str, Any] | None = None  # the columns that all files must have, and the file that says so
        self._over = 0  # files before this one are done with
        self._memory = BatchMemory()
        super().__init__(access, self._entries, lists=2)

    async def aclose(self) -> None:
        self._memory.close()

    async def _entries(self) -> AsyncGenerator[list[Entry]]:
        reader = InOrder(self._access, self._spans(), self._read_span, open_ahead=SPANS_AHEAD, lists_ahead=PIECES_AHEAD)
        batches = None if self._source.batch_rows is None else _BatchCutter(self._source.batch_rows, self._memory)
        async with aclosing(reader):
            while pieces := await reader.read(PIECES_AHEAD * PIECE_ROWS):
                index, _ = reader.part
                if index < self._over:  # an error has ended its file
                    continue
                if pieces[-1].error is not None:
                    self._over = pieces[-1].cursor[0]
                if batches is None:
                    yield pieces
                elif entries := await self._footer_thread.call(batches.feed, pieces):
                    yield entries
        if batches is not None and (entries := await self._footer_thread.call(batches.flush)):
            yield entries

    async def _spans(self) -> AsyncGenerator[tuple[int, "_Span | Entry"]]:
        """The number of a file and what is to be read of it, in order; an entry for a file that cannot be."""
        place = self._place
        call = self._footer_thread.call
        for index in range(place.index):  # on going on, the files must still be as those before are
            if self._knows_all():
                break
            try:
                await call(self._read_footer, index)
            except Exception:  # it was raised at its place, before
                continue
        for index in range(place.index, len(self._source.paths)):
            try:
                footer: Footer = await call(self._read_footer, index)
                start = _start(footer, place)
            except Exception as error:
                yield index, failed(error, (index + 1, 0, 0), self._source.paths[index])
            else:
                for span in _spans_of(footer, start):
                    if index < self._over:
                        break
                    yield index, span
            place = _Start(index + 1, 0, 0)

    async def _read_span(
        self, numbered: tuple[int, "_Span | Entry"], thread: SourceThreads
    ) -> AsyncGenerator[list[Entry]]:
        _, span = numbered
        if isinstance(span, Entry):
            yield [span]
            return
        reading = _Reading(self._source, span)
        try:
            while entries := await thread.call(reading.next):
                yield entries
        finally:
            await thread.call(reading.close)

    def _knows_all(self) -> bool:
        """Whether no later file can tell more of the columns."""
        if self._known is None:
            return False
        from aioloader.sources.arrow_types import has_unknown_parts

        return not any(map(has_unknown_parts, self._known[1].types))

    def _read_footer(self, index: int) -> Footer:
        """In a thread.

        Raises:
            Exception: The file cannot be read, or has not the columns it should have.
        """
        source = self._source
        path = source.paths[index]
        file = open_input(path, source.store)
        try:
            end, metadata, schema = read_end(path, file)
        finally:
            file.close()
        schema = selected(path, schema, source.columns)
        numbers = Numbers(path, end, metadata, schema, file.size - len(end))
        if self._known is None:
            self._known = path, schema
        else:
            schema = same_columns(path, schema, *self._known, tensors=source.batch_rows is not None)
            if schema is not self._known[1]:
                self._known = path, schema
        return Footer(
            index,
            path,
            file.version,
            crc32(end, file.size & 0xFFFFFFFF),
            metadata,
            schema,
            numbers.starts,
            numbers.sizes,
            numbers.chunks,
            self._piece_rows(row_bytes(numbers.row_bytes, schema)),
        )

    def _piece_rows(self, size: int) -> int:
        """How many rows of `size` bytes to decode at once: whole batches, where these are small."""
        rows = max(1, PIECE_BYTES // size)
        batch_rows = self._source.batch_rows
        if batch_rows is None:
            return min(rows, PIECE_ROWS)
        return max(1, rows // batch_rows) * batch_rows if rows >= batch_rows else rows


def _start(footer: Footer, place: _Start) -> int:
    """The number of the row to begin with.

    Raises:
        BrokenDataError: The file is not the one that the cursor is of.
    """
    starts = footer.starts
    if place.checksum is not None and place.checksum != footer.checksum:
        change = "its footer is another one"
    elif place.group >= max(1, len(starts) - 1) or starts[place.group] + place.row > starts[-1]:
        change = f"it has {len(starts) - 1} row groups and {starts[-1]} rows"
    else:
        return starts[place.group] + place.row
    raise BrokenDataError(
        f"{footer.path}: reading shall go on in row group {place.group} after row {place.row}, but {change}: it was "
        f"changed after the state was made, so its rows from there on are left out; begin the epoch anew, or bring "
        f"the old file back"
    )


@dataclass(frozen=True)
class _Span:
    """Rows `start` to the end of row group `last` of a file; `start` lies in row group `first`."""

    footer: Footer
    first: int
    last: int
    start: int


def _spans_of(footer: Footer, start: int) -> list[_Span]:
    """The rows of a file from number `start` on, in spans of one large row group, or of several small ones."""
    spans = []
    starts = footer.starts
    first, last, size = None, 0, 0
    for group in range(len(starts) - 1):
        if starts[group + 1] <= start:
            continue
        first = group if first is None else first
        size += footer.sizes[group]
        last = group
        if size >= SPAN_BYTES:
            spans.append(_Span(footer, first, last, max(start, starts[first])))
            first, size = None, 0
    if first is not None:
        spans.append(_Span(footer, first, last, max(start, starts[first])))
    return spans


class _Reading:
    """Reads a span, in the one thread that opens and closes it.

    One row group after the other: asked for several, pyarrow fills a column that is short of values with those of the
    next row group, and pairs them with what they do not belong to.
    """

    def __init__(self, source: ParquetRows, span: _Span) -> None:
        self._source = source
        self._footer = span.footer
        self._row = span.start
        self._group = span.first
        self._last = span.last
        self._input: Input | None = None
        self._file: Any = None
        self._batches: Any = None

    def close(self) -> None:
        """Let go of the file; may be called at any time."""
        self._batches = self._file = None
        if self._input is not None:
            self._input.close()

    def next(self) -> list[Entry]:
        """The next rows, or record batches, of small row groups several; an error at its place; `[]` at the end."""
        entries: list[Entry] = []
        until = self._row + self._footer.piece_rows
        while self._group <= self._last and self._row < until:
            piece, failure = None, None
            try:
                if self._input is None:
                    self._input = open_input(self._footer.path, self._source.store, self._footer.version)
                piece = self._next_piece()
            except Exception as error:
                if self._input is None:
                    return [*entries, self._end_file(error)]
                failure = error
            # Only now, for what was just read may be of another version.
            change = self._input.change(self._footer.version)
            if change is not None:
                return [*entries, self._end_file(rewritten(self._footer.path, change, self._row))]
            if failure is not None:
                return [*entries, self._end_group(failure)]
            if piece is not None:
                entries += self._entries_of(piece)
        return entries

    def _next_piece(self) -> Any:
        """Of the row group, a record batch of rows that are wanted; None: there may be more."""
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
        behind = max(0, self._row - self._at)  # rows that are not wanted: reading goes on in the middle of a row group
        self._at += piece.num_rows
        if behind >= piece.num_rows:
            return None
        return (piece.slice(behind) if behind else piece).select(footer.schema.names)

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
        if self._source.batch_rows is not None:
            return [Entry(_Piece(piece, footer, start), None, None, 0)]
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
            broken = _unreadable(footer, start + at, column, error)
            entries[at] = failed(broken, entries[at].cursor, entries[at].key)
        return entries

    def _end_group(self, error: Exception) -> Entry:
        """The rest of the row group cannot be decoded."""
        path, group, start = self._footer.path, self._group, self._row
        self._next_group()
        broken = BrokenDataError(
            f"{path}, row group {group}: its rows from {start} to {self._row - 1} cannot be read: {error}"
        )
        broken.__cause__ = error
        return failed(broken, self._footer.cursor(self._row), f"{path}:{start}")

    def _end_file(self, error: Exception) -> Entry:
        """Nothing more of the file can be read, here and in the spans after this one."""
        self._group = self._last + 1
        return failed(error, self._footer.end, f"{self._footer.path}:{self._row}")


def _unreadable(footer: Footer, row: int, column: str, error: Exception) -> BrokenDataError:
    kind = footer.schema.field(column).type
    broken = BrokenDataError(
        f"{footer.path}, row {row}: column {column!r} of type {kind} has a value there that Python cannot hold: "
        f"{error}; leave the column out with columns=, or write it with another type"
    )
    broken.__cause__ = error
    return broken


@dataclass(frozen=True, slots=True)
class _Piece:
    """A record batch, where it stands, and what is left of it."""

    rows: Any
    footer: Footer
    start: int

    def take(self, count: int) -> "tuple[_Piece, _Piece]":
        """The first `count` rows, and the rest."""
        head = _Piece(self.rows.slice(0, count), self.footer, self.start)
        return head, _Piece(self.rows.slice(count), self.footer, self.start + count)


class _BatchCutter:
    """Cuts pieces into batches of so many rows. In one thread at a time."""

    def __init__(self, batch_rows: int, memory: BatchMemory) -> None:
        self._batch_rows = batch_rows
        self._memory = memory
        self._pending: list[_Piece] = []
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
            rest: _Piece = piece.value
            while self._rows + rest.rows.num_rows >= self._batch_rows:
                head, rest = rest.take(self._batch_rows - self._rows)
                self._pending.append(head)
                entries.append(self._batch())
            if rest.rows.num_rows:
                self._pending.append(rest)
                self._rows += rest.rows.num_rows
        return entries

    def flush(self) -> list[Entry]:
        """What is left: a short batch."""
        return [self._batch()] if self._pending else []

    def _batch(self) -> Entry:
        from aioloader.sources.arrow_columns import Columns, NullsError

        pieces, self._pending, self._rows = self._pending, [], 0
        first, last = pieces[0], pieces[-1]
        if self._schema is not last.footer.schema:
            self._schema = last.footer.schema
            self._columns = Columns(self._schema, self._memory.alloc)
        cursor = last.footer.cursor(last.start + last.rows.num_rows)
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


def _first_unreadable(pieces: list[_Piece]) -> BrokenDataError | None:
    """What is wrong with the first row that Python cannot hold, if there is one."""
    from aioloader.sources.arrow_columns import rows_and_failures

    for piece in pieces:
        _, failures = rows_and_failures(piece.rows)
        if failures:
            at = min(failures)
            return _unreadable(piece.footer, piece.start + at, *failures[at])
    return None


def _broken_batch(pieces: list[_Piece], error: Exception) -> BrokenDataError:
    """Each row can be read alone, but not all together."""
    paths = ", ".join(dict.fromkeys(piece.footer.path for piece in pieces))
    broken = BrokenDataError(f"{paths}: a batch of columns cannot be made of rows from there: {error}")
    broken.__cause__ = error
    return broken
