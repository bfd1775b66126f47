"""What a Parquet file says of itself: its columns, its row groups, and whether that can be true."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, Final

from aioloader.errors import BrokenDataError
from aioloader.sources.parquet_input import Input, rewritten
from aioloader.sources.thrift import Struct, read_struct

__all__ = ["Footer", "Numbers", "read_end", "row_bytes", "same_columns", "selected"]

END_BYTES: Final = 64 << 10
"""Read at first, from the end; most footers are smaller."""

LARGE_FOOTER: Final = 16 << 20
"""Where a footer claims more than this, its first byte is looked at before the rest is read."""

FIRST_BYTE: Final = b"\x15"
"""In Thrift's compact protocol: field 1, the version, is an integer."""

SHORTEST: Final = 12
"""Bytes: the mark, no footer, its length, the mark."""

# The fields of a footer, as parquet.thrift numbers them: of the file, of a row group, of a chunk, of its column.
_ROWS, _ROW_GROUPS = 3, 4
_CHUNKS, _GROUP_BYTES, _GROUP_ROWS = 1, 2, 3
_OTHER_FILE, _COLUMN = 1, 3
_TYPE, _PATH, _VALUES, _UNCOMPRESSED, _COMPRESSED, _DATA_PAGE, _DICTIONARY_PAGE = 1, 3, 5, 6, 7, 9, 11
_TYPES: Final = ["BOOLEAN", "INT32", "INT64", "INT96", "FLOAT", "DOUBLE", "BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY"]


@dataclass(frozen=True)
class Footer:
    """What a file says of itself.

    Attributes:
        index: The number of the file.
        version: Of the input that it was read from, see `Input`.
        checksum: For states: the same in all copies of the file, and another one after it was changed, most likely.
        metadata: Of pyarrow; saves reading it again.
        schema: Of the columns to read, in the order to give them in, with the types that they have in all files.
        starts: The number of the first row of each row group, and that of all rows.
        sizes: Bytes of each row group, before compression.
        chunks: Where each row group has the chunks of the columns to read: starts and stops.
        piece_rows: Rows to decode at once.
    """

    index: int
    path: str
    version: Any
    checksum: int
    metadata: Any
    schema: Any
    starts: list[int]
    sizes: list[int]
    chunks: list[list[tuple[int, int]]]
    piece_rows: int

    @property
    def end(self) -> tuple[int, int, int]:
        """The cursor after the file."""
        return self.index + 1, 0, 0

    def group_of(self, row: int) -> int:
        """The row group of row number `row`."""
        return bisect_right(self.starts, row) - 1

    def cursor(self, row: int) -> tuple[int, ...]:
        """After row number `row - 1` of the file."""
        if row >= self.starts[-1]:
            return self.end
        group = self.group_of(row - 1)
        return self.index, group, row - self.starts[group], self.checksum


def read_end(path: str, file: Input) -> tuple[bytes, Any, Any]:
    """The end of a file from its footer on, and pyarrow's metadata and Arrow schema.

    The footer is found here and not by pyarrow, which would read whatever length is claimed.

    Raises:
        OSError: The system's, or the store's.
        BrokenDataError: It is no Parquet file, or not all of one; or it was rewritten meanwhile.
    """
    try:
        end = _end(file)
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


def _end(file: Input) -> bytes:
    """The footer, its length, and the mark."""
    size = file.size
    if size < SHORTEST:
        raise BrokenDataError(f"it has {size} bytes")
    end = bytes(file.range(max(0, size - END_BYTES), size))
    mark = end[-4:]
    if mark not in (b"PAR1", b"PARE"):  # the latter is encrypted, which pyarrow says better
        raise BrokenDataError("there is no mark of Parquet at its end")
    length = int.from_bytes(end[-8:-4], "little")
    start = size - 8 - length
    if start < 4:
        raise BrokenDataError(f"the footer is said to have {length} bytes, and the file has {size}")
    if length > LARGE_FOOTER and mark == b"PAR1" and bytes(file.range(start, start + 1)) != FIRST_BYTE:
        raise BrokenDataError(f"the footer is said to have {length} bytes, and none begins there")
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

    Pyarrow believes them: of a chunk that begins where another one does, it gives that one's values. Where one of them
    is wrong nothing else can be relied on, so no row of the file is read.

    Args:
        path: For errors.
        end: The end of the file, from the footer on.
        metadata: Of pyarrow.
        schema: Of the columns that are read.
        data_end: Where the footer begins.

    Attributes:
        starts: The number of the first row of each row group, and that of all rows.
        sizes: Bytes of each row group, before compression, about.
        chunks: Where each row group has the chunks of the columns that are read.
        row_bytes: Of a row of the first row group, as it is encoded.

    Raises:
        BrokenDataError: They cannot be true.
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
        """The next row group."""
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
        """The values of a column in a row group of `rows`; how many bytes they are, as they are encoded."""
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
    """The part of `schema` that is asked for, in that order."""
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
    """`known`, if `schema` has the same columns; with what it did not know of them: see `joined`.

    Raises:
        BrokenDataError: It has other ones.
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
    differ += [f"{name!r} is more" for name in schema.names if name not in types]
    if differ:
        raise BrokenDataError(
            f"{path} has other columns than {known_path}: {_listed(differ, str)}; columns= chooses those that all "
            f"files have, and other files need a source of their own"
        )
    found = pa.schema(list(types.items()))
    return known if found.types == known.types else found


def _listed(names: Sequence[str], show: Any = repr) -> str:
    shown = ", ".join(show(name) for name in names[:20])
    return shown if len(names) <= 20 else f"{shown} and {len(names) - 20} more"


def row_bytes(encoded: int, schema: Any) -> int:
    """What a row of the columns in `schema` takes when it is decoded, about, if it is encoded in so many bytes."""
    return max(1, encoded, sum(_bits(field.type) for field in schema) // 8)


def _bits(kind: Any) -> int:
    import pyarrow as pa

    if isinstance(kind, pa.BaseExtensionType):
        return _bits(kind.storage_type)
    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size) * _bits(kind.value_type)
    try:
        return int(kind.bit_width)
    except ValueError:  # strings and others, whose encoded size tells more
        return 0
