"""What a Parquet file says of itself: its columns, its row groups, and whether that can be true."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final
from zlib import crc32

from aioloader.errors import BrokenDataError
from aioloader.sources.parquet_input import Input, rewritten

__all__ = ["Footer", "check_numbers", "read_end", "row_bytes", "same_columns", "selected"]

END_BYTES: Final = 64 << 10
"""Read at first, from the end; most footers are smaller."""

LARGE_FOOTER: Final = 16 << 20
"""Where a footer claims more than this, its first byte is looked at before the rest is read."""

FIRST_BYTE: Final = b"\x15"
"""In Thrift's compact protocol: field 1, the version, is an integer."""

SHORTEST: Final = 12
"""Bytes: the mark, no footer, its length, the mark."""


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
        piece_rows: Rows to decode at once.
    """

    index: int
    path: str
    version: Any
    checksum: int
    metadata: Any
    schema: Any
    starts: tuple[int, ...]
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


def read_end(path: str, file: Input) -> tuple[Any, Any, int, int]:
    """Pyarrow's metadata and Arrow schema of a file, the checksum of its footer, and where its data ends.

    The footer is found here and not by pyarrow, which would read whatever length is claimed.

    Raises:
        OSError: The system's, or the store's.
        BrokenDataError: It is no Parquet file, or not all of one; or it was rewritten meanwhile.
    """
    try:
        footer = _footer(file)
        metadata, schema = _parsed(footer)
    except BrokenDataError as error:
        broken: BrokenDataError | None = error
    else:
        broken = None
    change = file.change(file.version)
    if change is not None:
        raise rewritten(path, change)
    if broken is not None:
        raise BrokenDataError(
            f"{path}: it is no Parquet file, or only a part of one (the end, which says what is in it, cannot be "
            f"read): {broken}"
        ) from broken.__cause__
    return metadata, schema, crc32(footer, file.size & 0xFFFFFFFF), file.size - len(footer)


def _footer(file: Input) -> bytes:
    """The footer, its length, and the mark after it."""
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


def _parsed(footer: bytes) -> tuple[Any, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(pa.BufferReader(footer))
        schema = file.schema_arrow
        schema.names  # noqa: B018 - which may be no UTF-8
    except Exception as error:
        raise BrokenDataError(str(error)) from error
    return file.metadata, schema


def check_numbers(path: str, metadata: Any, schema: Any, data_end: int) -> tuple[int, ...]:
    """The number of the first row of each row group, and that of all rows, from a footer that can be true.

    Pyarrow believes the numbers: of a column chunk that begins where another one does, it gives that one's values. So
    those of row groups are looked at, and those of the columns in `schema`: a microsecond for each chunk. Where one
    is wrong nothing else can be relied on, so no row is read.

    Raises:
        BrokenDataError: It cannot.
    """
    try:
        starts, places = _numbers(metadata, set(schema.names), data_end)
        places.sort()
        for (start, stop), (following, _) in pairwise(places):
            if following < stop:
                raise BrokenDataError(f"bytes {start} to {stop} are one column chunk, and another begins at {following}")
    except Exception as error:
        raise BrokenDataError(f"{path}: its footer is broken, so that no row can be read: {error}") from error
    return starts


def _numbers(metadata: Any, names: set[str], data_end: int) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
    """The same, and where the column chunks begin and end."""
    count = metadata.num_columns
    leaves = [metadata.schema.column(at) for at in range(count)]
    wanted = [(at, leaf.path, leaf.max_repetition_level > 0) for at, leaf in enumerate(leaves) if _is_in(leaf.path, names)]
    starts = [0]
    places = []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        rows = group.num_rows
        if rows < 0 or group.total_byte_size < 0 or group.num_columns != count:
            raise BrokenDataError(
                f"row group {number} has {rows} rows of {group.num_columns} columns in {group.total_byte_size} bytes, "
                f"and the file has {count} columns"
            )
        starts.append(starts[-1] + rows)
        for at, name, repeated in wanted if rows else ():
            chunk = group.column(at)
            start = chunk.data_page_offset
            dictionary = chunk.dictionary_page_offset
            if dictionary is not None and 0 < dictionary < start:
                start = dictionary
            stop = start + chunk.total_compressed_size
            if not 4 <= start < stop <= data_end or chunk.total_uncompressed_size < 0:
                raise BrokenDataError(
                    f"column {name!r} of row group {number} is at bytes {start} to {stop}"
                    f"{f' of {chunk.file_path}' if chunk.file_path else ''}, {chunk.total_uncompressed_size} bytes when "
                    f"decompressed, and the file has data up to byte {data_end}"
                )
            values = chunk.num_values
            if values < rows or (values > rows and not repeated):
                raise BrokenDataError(
                    f"column {name!r} of row group {number} has {values} values, and the row group {rows} rows"
                )
            places.append((start, stop))
    if starts[-1] != metadata.num_rows:
        raise BrokenDataError(f"its row groups have {starts[-1]} rows, and the file {metadata.num_rows}")
    return tuple(starts), places


def _is_in(path: str, names: set[str]) -> bool:
    """Whether what a footer calls `path` is a column of `names`, or a part of one. Names may have dots."""
    return path in names or any(path[:at] in names for at, letter in enumerate(path) if letter == ".")


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


def row_bytes(metadata: Any, schema: Any) -> int:
    """What a row of the columns in `schema` takes when it is decoded, about."""
    if not metadata.num_row_groups or not metadata.row_group(0).num_rows:
        return 1
    group = metadata.row_group(0)
    names = set(schema.names)
    chunks = map(group.column, range(group.num_columns))
    encoded = sum(chunk.total_uncompressed_size for chunk in chunks if _is_in(chunk.path_in_schema, names))
    fixed = sum(_bits(field.type) for field in schema) // 8
    return max(1, fixed, int(encoded // group.num_rows))


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
