"""The footer of a Parquet file: its columns and row groups, and whether its numbers are plausible."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from typing import Any, Final

from aioloader.errors import BrokenDataError
from aioloader.sources.parquet_input import Input, rewritten
from aioloader.sources.stored_files import StoredFile
from aioloader.sources.thrift import Struct, read_struct

__all__ = ["Footer", "Numbers", "read_end", "row_bytes", "same_columns", "selected"]

LENGTH_BYTES: Final = 8
"""The length of the footer and the mark after it."""

END_SHARE: Final = 256
LEAST_END_BYTES: Final = 4 << 10
END_BYTES: Final = 64 << 10
"""How much of the end is read first; most footers are smaller."""

LARGE_FOOTER: Final = 16 << 20
"""If a footer claims to be larger, its first byte is checked before the rest is read."""

FIRST_BYTE: Final = b"\x15"
"""Thrift's compact protocol for: field 1, the version, is an integer."""

SHORTEST: Final = 12
"""The bytes of a mark, an empty footer, its length, and a mark."""

# The numbers of fields in parquet.thrift: those of the file, of a row group, of a chunk, of its column.
_ROWS, _ROW_GROUPS = 3, 4
_CHUNKS, _GROUP_BYTES, _GROUP_ROWS = 1, 2, 3
_OTHER_FILE, _COLUMN = 1, 3
_TYPE, _PATH, _VALUES, _UNCOMPRESSED, _COMPRESSED, _DATA_PAGE, _DICTIONARY_PAGE = 1, 3, 5, 6, 7, 9, 11
_TYPES: Final = ["BOOLEAN", "INT32", "INT64", "INT96", "FLOAT", "DOUBLE", "BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY"]


@dataclass(frozen=True)
class Footer:
    """The footer of a file.

    Attributes:
        index: The position of the file in the order of the epoch.
        after: That of the file which is read after it.
        file: Where it is.
        version: The version of the input that it was read from, see `Input`.
        checksum: For states: the same in all copies of the file, and most likely another one after a change.
        metadata: pyarrow's, to save parsing it again.
        schema: The columns to read, in order, with the types that they have in all files.
        starts: The number of the first row of each row group, and the number of rows.
        sizes: The bytes of each row group, before compression.
        chunks: Where each row group has the chunks of the columns to read: starts and stops.
        piece_rows: How many rows to decode at once.
    """

    index: int
    after: int
    file: StoredFile
    version: Any
    checksum: int
    metadata: Any
    schema: Any
    starts: list[int]
    sizes: list[int]
    chunks: list[list[tuple[int, int]]]
    piece_rows: int

    @property
    def path(self) -> str:
        """What the file is called, for keys and errors."""
        return self.file.name

    @cached_property
    def fetched_bytes(self) -> int:
        """Of the columns that are read, as they are in the file."""
        return sum(stop - start for places in self.chunks for start, stop in places)

    @property
    def fetched_row_bytes(self) -> float:
        """Of a row, on average."""
        return self.fetched_bytes / max(1, self.starts[-1])

    @property
    def end(self) -> tuple[int, int, int]:
        """The cursor after the file."""
        return self.after, 0, 0

    def group_of(self, row: int) -> int:
        """The row group that contains row number `row`."""
        return bisect_right(self.starts, row) - 1

    def cursor(self, row: int) -> tuple[int, ...]:
        """The cursor after row number `row - 1` of the file."""
        if row >= self.starts[-1]:
            return self.end
        group = self.group_of(row - 1)
        return self.index, group, row - self.starts[group], self.checksum


def read_end(path: str, file: Input, *, exact: bool = False) -> tuple[bytes, Any, Any]:
    """The end of a file from its footer on, and pyarrow's metadata and Arrow schema.

    The footer is not located by pyarrow, which would read any length that the file claims.

    Args:
        path: For errors.
        file: The open file.
        exact: Read no byte before the footer, for one request more.

    Raises:
        OSError: The system's, or the store's.
        BrokenDataError: It is not a Parquet file, or only a part of one, or it was rewritten while it was read.
    """
    try:
        end = _end(file, LENGTH_BYTES if exact or not file.far else max(file.size // END_SHARE, LEAST_END_BYTES))
        metadata, schema = _parsed(end)
    except BrokenDataError as error:
        broken: BrokenDataError | None = error
    else:
        broken = None
    change = file.change(file.version)
    if change is not None:
        raise rewritten(path, change)
    if broken is not None:
        raise BrokenDataError(
            f"{path}: it is not a Parquet file, or only a part of one (the end, which says what is in it, cannot be "
            f"read): {broken}"
        ) from broken.__cause__
    return end, metadata, schema


def _end(file: Input, guess: int) -> bytes:
    """The end of the file: the footer, its length, and the mark.

    Args:
        file: The open file.
        guess: How much of the end to read at first, so that a footer which is no longer costs no second read.
    """
    size = file.size
    if size < SHORTEST:
        raise BrokenDataError(f"it has {size} bytes")
    end = bytes(file.range(max(0, size - min(guess, END_BYTES)), size))
    mark = end[-4:]
    if mark not in (b"PAR1", b"PARE"):  # the latter is encrypted; pyarrow has a better error for it
        raise BrokenDataError("there is no Parquet mark at its end")
    length = int.from_bytes(end[-8:-4], "little")
    start = size - 8 - length
    if start < 4:
        raise BrokenDataError(f"the footer claims {length} bytes, and the file has {size}")
    if length > LARGE_FOOTER and mark == b"PAR1" and bytes(file.range(start, start + 1)) != FIRST_BYTE:
        raise BrokenDataError(f"the footer claims {length} bytes, and none begins there")
    if start < size - len(end):
        end = bytes(file.range(start, size - len(end))) + end
    return end[-8 - length :]


def _parsed(end: bytes) -> tuple[Any, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(pa.BufferReader(end))
        schema = file.schema_arrow
        schema.names  # noqa: B018 - which may be no UTF-8
    except Exception as error:
        raise BrokenDataError(str(error)) from error
    return file.metadata, schema


class Numbers:
    """The numbers in a footer: those of row groups, and of their chunks of the columns in `schema`.

    Pyarrow does not check them: if a chunk is said to begin where another one does, it returns that one's values. If
    one number is wrong, the others cannot be relied on either, so no row of the file is read.

    Args:
        path: For errors.
        end: The end of the file, from the footer on.
        metadata: pyarrow's.
        schema: The columns that are read.
        data_end: Where the footer begins.

    Attributes:
        starts: The number of the first row of each row group, and the number of rows.
        sizes: About how many bytes each row group has, before compression.
        chunks: Where each row group has the chunks of the columns that are read.
        row_bytes: The encoded size of a row in the first row group.

    Raises:
        BrokenDataError: They contradict each other, or the size of the file.
    """

    def __init__(self, path: str, end: bytes, metadata: Any, schema: Any, data_end: int) -> None:
        self.starts = [0]
        self.sizes: list[int] = []
        self.row_bytes = 1
        self._names = {name.encode() for name in schema.names}
        leaves = [metadata.schema.column(at) for at in range(metadata.num_columns)]
        self._leaves = [
            (leaf.path.encode(), _TYPES.index(leaf.physical_type), leaf.max_repetition_level > 0) for leaf in leaves
        ]
        self._data_end = data_end
        self.chunks: list[list[tuple[int, int]]] = []
        try:
            rows = read_struct(end, {_ROW_GROUPS: self._add})[_ROWS]
            if self.starts[-1] != rows:
                raise BrokenDataError(f"its row groups have {self.starts[-1]} rows, and the file has {rows}")
            for (start, stop), (following, _) in pairwise(sorted(chain.from_iterable(self.chunks))):
                if following < stop:
                    raise BrokenDataError(f"one chunk is at bytes {start} to {stop}, and another begins at {following}")
        except Exception as error:
            what = f"there is no field {error}" if isinstance(error, KeyError) else str(error)
            raise BrokenDataError(f"{path}: its footer is broken, so no row of it can be read: {what}") from error

    def _add(self, group: Struct) -> None:
        """Check and add the next row group."""
        number, rows, size, chunks = len(self.sizes), group[_GROUP_ROWS], group[_GROUP_BYTES], group[_CHUNKS]
        if rows < 0 or size < 0 or len(chunks) != len(self._leaves):
            raise BrokenDataError(
                f"row group {number} has {rows} rows of {len(chunks)} columns in {size} bytes, and the file has "
                f"{len(self._leaves)} columns"
            )
        self.chunks.append([])
        encoded = 0
        for chunk, (path, kind, repeated) in zip(chunks, self._leaves, strict=True):
            if _OTHER_FILE in chunk:
                raise BrokenDataError(f"its rows are in {chunk[_OTHER_FILE].decode()!r} and other files; read those")
            column = chunk[_COLUMN]
            if b".".join(column[_PATH]) != path or column[_TYPE] != kind:
                raise BrokenDataError(f"row group {number} has another column where the file has {path.decode()!r}")
            if rows and column[_PATH][0] in self._names:
                try:
                    encoded += self._add_chunk(column, rows, repeated)
                except BrokenDataError as error:
                    raise BrokenDataError(f"column {path.decode()!r} of row group {number} has {error}") from None
        self.starts.append(self.starts[-1] + rows)
        self.sizes.append(max(size, encoded))
        if not number and rows:
            self.row_bytes = max(1, encoded // rows)

    def _add_chunk(self, column: Struct, rows: int, repeated: bool) -> int:
        """Check and add the chunk of a column in a row group of `rows`; returns its encoded size."""
        start = column[_DATA_PAGE]
        if 0 < column.get(_DICTIONARY_PAGE, 0) < start:
            start = column[_DICTIONARY_PAGE]
        stop, encoded, values = start + column[_COMPRESSED], column[_UNCOMPRESSED], column[_VALUES]
        if not 4 <= start < stop <= self._data_end:
            raise BrokenDataError(f"bytes {start} to {stop}, and those of the file's data are 4 to {self._data_end}")
        if encoded < 0:
            raise BrokenDataError(f"{encoded} bytes when it is decompressed")
        if values < rows or (values > rows and not repeated):
            raise BrokenDataError(f"{values} values for {rows} rows")
        self.chunks[-1].append((start, stop))
        return int(encoded)


def selected(path: str, schema: Any, columns: Sequence[str] | None) -> Any:
    """The fields of `schema` for `columns`, in that order; all for None."""
    import pyarrow as pa

    names = schema.names
    missing = [name for name in columns or () if name not in names]
    if missing:
        raise BrokenDataError(
            f"{path} has no column {', '.join(map(repr, missing))}; the columns there are: {_listed(names)}"
        )
    chosen = names if columns is None else columns
    twice = sorted({name for name in chosen if names.count(name) > 1})
    if twice:
        raise BrokenDataError(
            f"{path} has more than one column named {', '.join(map(repr, twice))}; leave it out with columns="
        )
    return pa.schema([schema.field(name) for name in chosen])


def same_columns(path: str, schema: Any, known_path: str, known: Any, *, tensors: bool) -> Any:
    """`known`, if `schema` has the same columns; types that it did not know are filled in, see `joined`.

    Raises:
        BrokenDataError: It has other columns.
    """
    import pyarrow as pa

    from aioloader.sources.arrow_types import joined

    types = {
        name: joined(known.field(name).type, schema.field(name).type, tensors=tensors)
        for name in known.names
        if name in schema.names
    }
    differ = [
        f"{name!r} is {schema.field(name).type} and not {known.field(name).type}"
        for name, kind in types.items()
        if kind is None
    ]
    differ += [f"{name!r} is missing" for name in known.names if name not in types]
    differ += [f"{name!r} is new" for name in schema.names if name not in types]
    if differ:
        raise BrokenDataError(
            f"{path} has other columns than {known_path}: {_listed(differ, str)}; choose those that all files "
            f"have with columns=, or read the others by a source of their own"
        )
    found = pa.schema(list(types.items()))
    return known if found.types == known.types else found


def _listed(names: Sequence[str], show: Any = repr) -> str:
    shown = ", ".join(show(name) for name in names[:20])
    return shown if len(names) <= 20 else f"{shown} and {len(names) - 20} more"


def row_bytes(encoded: int, schema: Any) -> int:
    """About how many bytes a decoded row of the columns in `schema` has, if its encoded size is `encoded`."""
    return max(1, encoded, sum(_bits(field.type) for field in schema) // 8)


def _bits(kind: Any) -> int:
    import pyarrow as pa

    if isinstance(kind, pa.BaseExtensionType):
        return _bits(kind.storage_type)
    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size) * _bits(kind.value_type)
    try:
        return int(kind.bit_width)
    except ValueError:  # strings and others: their encoded size is a better guess
        return 0
