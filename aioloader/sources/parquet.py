"""`ParquetRows`: the rows of Parquet files, one by one or as batches of columns."""

from asyncio import Future, Lock, gather
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from typing import Any, Final
from zlib import crc32

from aioloader.core.checks import check_count
from aioloader.core.cursors import as_count, cursor_sequence
from aioloader.core.entry import Entry
from aioloader.core.policies import Hedge, Rate, Retry
from aioloader.core.source import EntryReader, SourceContext
from aioloader.errors import BrokenDataError
from aioloader.memory.pool import BatchMemory
from aioloader.sources.file_order import FileOrder
from aioloader.sources.file_source import FileSource
from aioloader.sources.interleave import Lane
from aioloader.sources.pace import Pace
from aioloader.sources.parquet_batches import BatchCutter
from aioloader.sources.parquet_footer import Footer, Numbers, read_end, row_bytes, same_columns, selected
from aioloader.sources.parquet_input import open_input
from aioloader.sources.parquet_lanes import ParquetLane, ParquetStart, ends_within
from aioloader.sources.paths import Paths
from aioloader.sources.read_ahead import Ahead, ByteQuota
from aioloader.sources.requests import Requests
from aioloader.sources.stored_files import StoredFile, find_stored_files

__all__ = ["ParquetRows"]

PIECE_BYTES: Final = 4 << 20
"""About how much is decoded in one hop into a thread: what fits into the caches of a processor."""

PIECE_ROWS: Final = 1024
"""The most rows that are made dictionaries in one hop: they cost Python objects, and hold the GIL. With twice as many,
a row took 4.4 µs instead of 2.6, because Python's garbage collector went through more objects."""

PIECES_AT_ONCE: Final = 64
"""The most pieces that are cut in one hop."""

COUNTING_THREADS: Final = 32
"""How many footers are asked for at once when rows are counted."""


class ParquetRows(FileSource[ParquetStart, dict[str, Any]]):
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

    Cursor: file, row group, the row in it, and the checksum of the file's footer; with `interleave` those of each open
    file.

    Args:
        paths: Paths, globs, or URLs of what obstore opens (`s3://`, `gs://`, `az://`, `https://`), one or a sequence;
            `{000..099}` and `{a,b}` are expanded. Globs are looked up here, once, and sorted. With `store`: keys in it.
        columns: The names of the columns to read; None means all.
        batch_rows: Rows per batch, at least 1; None means one sample per row.
        shuffle: The files come in another order in each epoch, and in each round of a `repeat`: a permutation that
            depends on these and `seed` alone, so all ranks have the same. Rows stay in the order of their file.
        seed: See `shuffle`.
        interleave: How many files are read side by side, at least 1: a row of each in turn, or `batch_rows` rows, with
            which the next batch is completed where a file has fewer left. The first reader has the files at 0,
            `interleave`, 2 `interleave`, ... of the order, the second 1, `interleave` + 1, ..., however long they are.
        store: A store of obstore (`aioloader[objects]`).
        client_options, retry_config: For URLs and `store`: timeouts and retries in place of its own, as obstore names
            them. By its defaults, a request times out after 30 seconds and is retried for up to three minutes.
        retry, timeout, hedge, rate: For URLs and `store`: what is done about requests that fail, take long or are too
            many, as in `Pipeline.map`, for each request for itself. With `retry`, the store makes no retries of its
            own. What another attempt cannot change is not retried, unless `Retry.on` says so: see `docs/failures.md`.

    Raises:
        FileNotFoundError: A glob matches nothing.
        ImportError: Without pyarrow, or a URL without obstore.
        TypeError, ValueError: An argument is invalid.

    ```python
    loader = Pipeline(ParquetRows("data/*.parquet", columns=["x", "label"], batch_rows=1024)).to("cuda")
    ```
    """

    counts_samples = True

    def __init__(
        self,
        paths: Paths,
        *,
        columns: Sequence[str] | None = None,
        batch_rows: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
        interleave: int = 1,
        store: Any = None,
        client_options: Any = None,
        retry_config: Any = None,
        retry: int | Retry | None = None,
        timeout: float | None = None,
        hedge: Hedge | None = None,
        rate: Rate | None = None,
    ) -> None:
        _require_pyarrow()
        options = {"client_options": client_options, "retry_config": retry_config}
        policies = {"retry": retry, "timeout": timeout, "hedge": hedge, "rate": rate}
        self._files, self._requests = find_stored_files(paths, store, options, policies, source="ParquetRows")
        self._set_order(shuffle, seed, interleave)
        self.columns = None if columns is None else _check_columns(columns)
        self.batch_rows = (
            None
            if batch_rows is None
            else check_count("batch_rows", batch_rows, least=1, hint="leave it out for one sample per row")
        )

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths, URLs or keys of the files, in order."""
        return tuple(file.url for file in self._files)

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "batch_rows": self.batch_rows}

    def _parse(self, cursor: object) -> tuple[Any, ParquetStart]:
        if cursor is None:
            return 0, ParquetStart()
        parts = list(map(as_count, cursor_sequence(cursor)))
        if not 3 <= len(parts) <= 4:
            raise ValueError(f"a list of 3 or 4 was expected, got {cursor!r}"[:200])
        return parts[0], ParquetStart(*parts[1:])

    def open_files(self, context: SourceContext, cursor: object) -> EntryReader:
        if self.batch_rows is None:
            return super().open_files(context, cursor)
        order = self.order_of(context)
        pace = self._pace(context, order)
        pieces = self.side_by_side(self._lanes_of(context, order, pace), cursor, partial(ends_within, self.batch_rows))
        return _Batches(context, pieces, self.batch_rows, pace, in_turn=order.lanes > 1)

    def _opener(self, context: SourceContext, order: FileOrder) -> Callable[[int, ParquetStart], Lane]:
        return self._lanes_of(context, order, self._pace(context, order))

    def _pace(self, context: SourceContext, order: FileOrder) -> Pace | None:
        stored = any(file.store is not None for file in self._files)
        return Pace(order.lanes, len(order.numbers), lambda: context.consumer_starves) if stored else None

    def _lanes_of(
        self, context: SourceContext, order: FileOrder, pace: Pace | None
    ) -> Callable[[int, ParquetStart], Lane]:
        requests = self._requests.begin_for_threads(context)
        requests.told = None if pace is None else pace.answered
        footers = _Footers(self, order, requests, context)

        def open_lane(at: int, start: ParquetStart) -> ParquetLane:
            return ParquetLane(context, order, at, start, footers, self.files, requests, pace, self.batch_rows)

        return open_lane

    async def count_samples(self, context: SourceContext) -> list[int]:
        """The rows of all files, by their footers. A file that cannot be read counts for its error."""
        requests = self._requests.begin_for_threads(context)
        threads = context.threads(min(COUNTING_THREADS, len(self._files)))
        try:
            return list(await gather(*(threads.call(_rows_of, file, requests) for file in self._files)))
        finally:
            requests.close()

    def samples_of(self, counts: Sequence[int]) -> int:
        rows = sum(counts)
        return rows if self.batch_rows is None else -(-rows // self.batch_rows)


def _require_pyarrow() -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ImportError("ParquetRows needs the package pyarrow: pip install 'aioloader[parquet]'") from error


def _check_columns(columns: object) -> tuple[str, ...]:
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


class _Batches(Ahead):
    """Batches of rows, cut from pieces in a thread."""

    def __init__(
        self, context: SourceContext, pieces: EntryReader, batch_rows: int, pace: Pace | None, *, in_turn: bool
    ) -> None:
        self._pieces = pieces
        self._batch_rows = batch_rows
        self._pace = pace
        self._fetched = None if pace is None else ByteQuota(self._may_wait)
        self._given = False
        self._thread = context.threads(1)
        self._memory = BatchMemory()
        self._cutter = BatchCutter(batch_rows, self._memory, in_turn=in_turn)
        super().__init__(context, self._entries, lists=2, quota=self._fetched, starved=self._has_waited)

    def _may_wait(self) -> int:
        """How many bytes of batches may be ready while more are fetched."""
        return 0 if self._pace is None else self._pace.ahead_bytes

    def _has_waited(self, seconds: float) -> None:
        if self._given and self._pace is not None:
            self._pace.starved(seconds)

    def _count(self, piece: Entry) -> None:
        """How much was fetched for a batch of such pieces."""
        if self._fetched is not None and piece.error is None:
            self._fetched.entry_bytes = self._batch_rows * piece.value.footer.fetched_row_bytes

    @property
    def _pieces_at_once(self) -> int:
        return PIECES_AT_ONCE if self._fetched is None else min(PIECES_AT_ONCE, self._fetched.left)

    async def aclose(self) -> None:
        self._memory.close()
        await self._pieces.aclose()

    async def _entries(self) -> AsyncGenerator[list[Entry]]:
        while pieces := await self._pieces.read(self._pieces_at_once):
            self._count(pieces[-1])
            if entries := await self._thread.call(self._cutter.feed, pieces):
                yield entries
                self._given = True
        if entries := await self._thread.call(self._cutter.flush):
            yield entries


_Known = tuple[str, Any] | None  # a file, and the columns that it and all before it have

_Loaded = tuple[bytes, Any, Any, Any, int]  # the end, metadata, columns, version and size of a file


class _Footers:
    """The footers of the files of one rank, each checked against those before it in the order of the epoch.

    All files must have the columns of the first; where its types say little (nulls), those of the next ones count. So
    footers are read at once, but compared in order, whichever lane asks first, and after a resume too. As soon as all
    types are known, later files cannot add to them, and no file is looked at before its turn, or shortly before that.
    """

    def __init__(self, source: ParquetRows, order: FileOrder, requests: Requests, context: SourceContext) -> None:
        self._source = source
        self._order = order
        self._requests = requests
        self._threads = context.threads(order.lanes)
        self._known: list[_Known] = [None]  # before the first file, after it, after the second one, ...
        self._lock = Lock()
        self._loading: dict[int, Future[_Loaded]] = {}

    async def of_position(self, at: int) -> Footer:
        """The footer of the file at that position.

        Raises:
            Exception: The file cannot be read, or does not have the expected columns.
        """
        try:
            loaded = await self._load(at)
        finally:
            self._loading.pop(at, None)
        async with self._lock:
            while len(self._known) <= at and not self._knows_all():
                try:
                    await self._learn(await self._load(len(self._known) - 1), len(self._known) - 1)
                except Exception:  # it is raised in its place, or was before the resume
                    self._known.append(self._known[-1])
            try:
                return await self._learn(loaded, at)
            except Exception:
                if len(self._known) == at + 1:
                    self._known.append(self._known[-1])
                raise

    def expect(self, at: int) -> None:
        """See `Footers`: two answers of a store later it is there."""
        if at < len(self._order.numbers):
            self._load(at).add_done_callback(lambda loaded: loaded.cancelled() or loaded.exception())  # or nobody asks

    def _load(self, at: int) -> "Future[_Loaded]":
        if at not in self._loading:
            self._loading[at] = self._threads.call(_load, self._file(at), self._requests)
        return self._loading[at]

    def _file(self, at: int) -> StoredFile:
        return self._source.files[self._order.numbers[at]]

    def _knows_all(self) -> bool:
        """Whether the types of all columns are known, so that later files cannot add to them."""
        known = self._known[-1]
        if known is None:
            return False
        from aioloader.sources.arrow_types import has_unknown_parts

        return not any(map(has_unknown_parts, known[1].types))

    async def _learn(self, loaded: _Loaded, at: int) -> Footer:
        return await self._threads.call(self._checked, loaded, at)

    def _checked(self, loaded: _Loaded, at: int) -> Footer:
        """Compare the columns of the file at `at`; runs in a thread, one at a time."""
        end, metadata, schema, version, size = loaded
        source, file = self._source, self._file(at)
        path = file.name
        schema = selected(path, schema, source.columns)
        numbers = Numbers(path, end, metadata, schema, size - len(end))
        known = self._known[min(at, len(self._known) - 1)]
        if known is not None:
            found = same_columns(path, schema, *known, tensors=source.batch_rows is not None)
            known, schema = (known if found is known[1] else (path, found)), found
        else:
            known = path, schema
        if len(self._known) == at + 1:
            self._known.append(known)
        return Footer(
            at,
            at + self._order.lanes,
            file,
            version,
            crc32(end, size & 0xFFFFFFFF),
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


def _load(stored: StoredFile, requests: Requests) -> _Loaded:
    """Read a footer; runs in a thread.

    Raises:
        Exception: The file cannot be read.
    """
    file = open_input(stored, requests)
    try:
        return *read_end(stored.name, file), file.version, file.size
    finally:
        file.close()


def _rows_of(stored: StoredFile, requests: Requests) -> int:
    """The rows of a file; 1 for what is broken or not there, since its error comes in place of them. In a thread.

    Raises:
        Exception: It may be there, but nobody answers: another rank may have an answer, and count otherwise.
    """
    try:
        file = open_input(stored, requests)
        try:
            _, metadata, _ = read_end(stored.name, file, exact=True)
        finally:
            file.close()
    except (BrokenDataError, FileNotFoundError, IsADirectoryError, PermissionError):
        return 1
    return int(metadata.num_rows)
