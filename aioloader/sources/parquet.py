"""`ParquetRows`: the rows of Parquet files, one by one or as batches of columns."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final
from zlib import crc32

from aioloader.core.checks import check_count
from aioloader.core.cursors import as_count, cursor_sequence
from aioloader.core.entry import Entry
from aioloader.core.policies import Hedge, Rate, Retry
from aioloader.core.source import CursorSource, EntryReader, SourceContext, SourceThreads
from aioloader.errors import BrokenDataError
from aioloader.memory.pool import BatchMemory
from aioloader.sources.in_order import InOrder
from aioloader.sources.parquet_batches import BatchCutter
from aioloader.sources.parquet_footer import Footer, Numbers, read_end, row_bytes, same_columns, selected
from aioloader.sources.parquet_input import open_input
from aioloader.sources.parquet_spans import Span, SpanReader, spans_of
from aioloader.sources.paths import Paths, each_path, find_files, names_of
from aioloader.sources.read_ahead import Ahead, failed
from aioloader.sources.requests import RequestPolicies, Requests, store_policies
from aioloader.sources.stores import check_no_options, request_options, with_options

__all__ = ["ParquetRows"]

PIECE_BYTES: Final = 4 << 20
"""About how much is decoded in one hop into a thread: what fits into the caches of a processor."""

PIECE_ROWS: Final = 1024
"""The most rows that are made dictionaries in one hop: they cost Python objects, and hold the GIL. With twice as many,
a row took 4.4 µs instead of 2.6, because Python's garbage collector went through more objects."""

SPANS_AHEAD: Final = 2
"""Spans that are open after the one being handed out."""

PIECES_AHEAD: Final = 4
"""Decoded pieces that wait per span."""


class ParquetRows(CursorSource):
    """The rows of Parquet files, in order, as dictionaries; or batches of columns, most of them tensors.

    Row groups are read ahead in threads. A file that cannot be read, a broken row group, or a row with a value that
    Python cannot hold raises in its position, and what comes after it goes on. All files must have the columns of the
    first, with types that are the same in Python or that fit into its tensors. A file that is rewritten while it is
    read, or before a resume, is an error.

    With `batch_rows`, a sample is a dictionary of columns, made without Python objects per row. Numbers, bools,
    fixed-size lists of them and fixed-shape tensors become tensors, rows first; other columns become lists. A null is
    None in a list and NaN in a tensor of floats; in any other tensor it is an error, in the position of its batch.
    Batches cross the borders of row groups and files, so all have `batch_rows` rows, except the last one and one
    before something that cannot be read. A tensor may share arrow's memory, which it keeps alive: about 4 MB, however
    small the batch.

    Cursor: file, row group, the row in it, and the checksum of the file's footer.

    Args:
        paths: A path, a glob, or a sequence of these. Globs are looked up here, once, and sorted.
        columns: The names of the columns to read; None means all.
        batch_rows: Rows per batch, at least 1; None means one sample per row.
        store: A store of obstore; `paths` are keys in it, without globs.
        client_options, retry_config: With `store`: timeouts and retries in place of its own, as obstore names them. By
            its defaults, a request times out after 30 seconds and is retried for up to three minutes.
        retry, timeout, hedge, rate: With `store`: what is done about requests that fail, take long or are too many, as
            in `Pipeline.map`, for each request for itself. With `retry`, the store makes no retries of its own. What
            another attempt cannot change is not retried, unless `Retry.on` says so: see `docs/failures.md`.

    Raises:
        FileNotFoundError: A glob matches nothing.
        ImportError: Without pyarrow.
        TypeError, ValueError: An argument is invalid.

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
        retry: int | Retry | None = None,
        timeout: float | None = None,
        hedge: Hedge | None = None,
        rate: Rate | None = None,
    ) -> None:
        _require_pyarrow()
        self._requests = RequestPolicies(store_policies(retry, timeout, hedge, rate), "ParquetRows")
        options = request_options(client_options, retry_config, retry, source="ParquetRows")
        if store is None:
            policies = {"retry": retry, "timeout": timeout, "hedge": hedge, "rate": rate}
            given = {"client_options": client_options, "retry_config": retry_config, **policies}
            check_no_options(given, source="ParquetRows")
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

    @property
    def rate(self) -> Rate | None:
        """How many of its requests begin in a second, which others may share."""
        return self._requests.rate

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

    def open(self, context: SourceContext, cursor: Any) -> EntryReader:
        return _FilesReader(self, context, self._place(cursor), self._requests.begin_for_threads(context))


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
    """Where to resume: a cursor."""

    index: int
    group: int
    row: int
    checksum: int | None = None  # of a file that was begun


class _FilesReader(Ahead):
    """One epoch: spans of row groups are read ahead in order, and cut into batches if these are asked for."""

    def __init__(self, source: ParquetRows, context: SourceContext, place: _Start, requests: Requests) -> None:
        self._source = source
        self._context = context
        self._place = place
        self._requests = requests
        self._footer_thread = context.threads(1)
        self._known: tuple[str, Any] | None = None  # a file, and the columns that it and all others have
        self._first_open_file = 0  # those before it have ended, some of them with an error
        self._memory = BatchMemory()
        super().__init__(context, self._entries, lists=2)

    async def aclose(self) -> None:
        self._memory.close()
        self._requests.close()

    async def _entries(self) -> AsyncGenerator[list[Entry]]:
        reader = InOrder(
            self._context, self._spans(), self._read_span, open_ahead=SPANS_AHEAD, lists_ahead=PIECES_AHEAD
        )
        batches = None if self._source.batch_rows is None else BatchCutter(self._source.batch_rows, self._memory)
        async with aclosing(reader):
            while pieces := await reader.read(PIECES_AHEAD * PIECE_ROWS):
                index, _ = reader.part
                if index < self._first_open_file:  # an error has ended its file
                    continue
                if pieces[-1].error is not None:
                    self._first_open_file = pieces[-1].cursor[0]
                if batches is None:
                    yield pieces
                elif entries := await self._footer_thread.call(batches.feed, pieces):
                    yield entries
        if batches is not None and (entries := await self._footer_thread.call(batches.flush)):
            yield entries

    async def _spans(self) -> AsyncGenerator[tuple[int, Span | Entry]]:
        """What to read, in order: spans with the numbers of their files, or the error of a file that cannot be read."""
        place = self._place
        call = self._footer_thread.call
        for index in range(place.index):  # after a resume too, the columns must be those of the files before
            if self._knows_all():
                break
            try:
                await call(self._read_footer, index)
            except Exception:  # it was raised before the resume
                continue
        for index in range(place.index, len(self._source.paths)):
            try:
                footer: Footer = await call(self._read_footer, index)
                start = _start(footer, place)
            except Exception as error:
                yield index, failed(error, (index + 1, 0, 0), self._source.paths[index])
            else:
                for span in spans_of(footer, start):
                    if index < self._first_open_file:
                        break
                    yield index, span
            place = _Start(index + 1, 0, 0)

    async def _read_span(
        self, numbered: tuple[int, Span | Entry], thread: SourceThreads
    ) -> AsyncGenerator[list[Entry]]:
        _, span = numbered
        if isinstance(span, Entry):
            yield [span]
            return
        reading = SpanReader(span, self._source.store, self._requests, as_pieces=self._source.batch_rows is not None)
        try:
            while entries := await thread.call(reading.next):
                yield entries
        finally:
            await thread.call(reading.close)

    def _knows_all(self) -> bool:
        """Whether the types of all columns are known, so that later files cannot add to them."""
        if self._known is None:
            return False
        from aioloader.sources.arrow_types import has_unknown_parts

        return not any(map(has_unknown_parts, self._known[1].types))

    def _read_footer(self, index: int) -> Footer:
        """Read and check the footer of a file; runs in a thread.

        Raises:
            Exception: The file cannot be read, or does not have the expected columns.
        """
        source = self._source
        path = source.paths[index]
        file = open_input(path, source.store, self._requests)
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
        """How many rows of `size` bytes to decode at once: a multiple of `batch_rows` where that is small."""
        rows = max(1, PIECE_BYTES // size)
        batch_rows = self._source.batch_rows
        if batch_rows is None:
            return min(rows, PIECE_ROWS)
        return max(1, rows // batch_rows) * batch_rows if rows >= batch_rows else rows


def _start(footer: Footer, place: _Start) -> int:
    """The number of the first row to read.

    Raises:
        BrokenDataError: The file is not the one that the cursor was taken from.
    """
    starts = footer.starts
    if place.checksum is not None and place.checksum != footer.checksum:
        change = "its footer differs"
    elif place.group >= max(1, len(starts) - 1) or starts[place.group] + place.row > starts[-1]:
        change = f"it has {len(starts) - 1} row groups and {starts[-1]} rows"
    else:
        return starts[place.group] + place.row
    raise BrokenDataError(
        f"{footer.path}: reading resumes in row group {place.group} after row {place.row}, but {change}: it was "
        f"changed after the state was made, so the rest of its rows are left out; restore the old file, or begin the "
        f"epoch again without the state"
    )
