"""What a Parquet file says of itself: its columns, its row groups, and whether it is one."""

import errno
import io
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR
from typing import Any

from aioloader.errors import BrokenDataError

__all__ = ["Footer", "open_parquet", "row_bytes", "same_columns", "selected"]


@dataclass(frozen=True)
class Footer:
    """What a file says of itself.

    Attributes:
        index: The number of the file.
        metadata: Of pyarrow; saves reading it again.
        schema: Of the columns to read, in the order to give them in.
        starts: The number of the first row of each row group, and that of all rows.
        piece_rows: Rows to decode at once.
    """

    index: int
    path: str
    metadata: Any
    schema: Any
    starts: tuple[int, ...]
    piece_rows: int

    def cursor(self, row: int) -> tuple[int, int, int]:
        """Behind row number `row - 1` of the file."""
        group = bisect_right(self.starts, row - 1) - 1
        return self.index, group, row - self.starts[group]


def open_parquet(path: str, store: Any, metadata: Any = None) -> Any:
    """An open file of pyarrow.

    Raises:
        OSError: The system's, or the store's.
        BrokenDataError: It is no Parquet file, or not all of one.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if store is not None:
        source: Any = _StoredFile(store, path)
    else:
        if S_ISDIR(Path(path).stat().st_mode):  # FileNotFoundError where there is nothing, in Python's words
            error = IsADirectoryError(errno.EISDIR, "Is a directory", path)
            error.add_note(f"aioloader: a file was expected; for those in a folder pass a glob: '{path}/*.parquet'")
            raise error
        source = path
    try:
        # Of an object the ranges are put together before they are asked for.
        return pq.ParquetFile(source, metadata=metadata, pre_buffer=store is not None)
    except pa.ArrowException as error:
        raise BrokenDataError(
            f"{path}: it is no Parquet file, or only a part of one (the end, which says what is in it, cannot be "
            f"read): {error}"
        ) from error


class _StoredFile(io.RawIOBase):
    """An object of a store, as the file that pyarrow reads; each read is a request."""

    def __init__(self, store: Any, key: str) -> None:
        import obstore

        self._store = store
        self._key = key
        self._at = 0
        self._size: int = obstore.head(store, key)["size"]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin: int = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = origin + offset
        return self._at

    def read(self, size: int = -1) -> Any:
        import obstore

        end = self._size if size < 0 else min(self._size, self._at + size)
        if end <= self._at:
            return b""
        start, self._at = self._at, end
        return obstore.get_range(self._store, self._key, start=start, end=end)


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


def same_columns(path: str, schema: Any, first_path: str, first: Any) -> Any:
    """`first`, if `schema` has the same columns.

    Raises:
        BrokenDataError: It has not.
    """
    differ = [
        f"{name!r} is {schema.field(name).type} and not {first.field(name).type}"
        for name in first.names
        if name in schema.names and schema.field(name).type != first.field(name).type
    ]
    differ += [f"{name!r} is missing" for name in first.names if name not in schema.names]
    differ += [f"{name!r} is more" for name in schema.names if name not in first.names]
    if differ:
        raise BrokenDataError(
            f"{path} has other columns than {first_path}: {_listed(differ, str)}; columns= chooses those that all "
            f"files have, and other files need a source of their own"
        )
    return first


def _listed(names: Sequence[str], show: Any = repr) -> str:
    shown = ", ".join(show(name) for name in names[:20])
    return shown if len(names) <= 20 else f"{shown} and {len(names) - 20} more"


def row_bytes(metadata: Any, schema: Any) -> int:
    """What a row of the columns in `schema` takes when it is decoded, about."""
    if not metadata.num_row_groups or not metadata.row_group(0).num_rows:
        return 1
    group = metadata.row_group(0)
    names = set(schema.names)
    encoded = 0
    for at in range(group.num_columns):
        column = group.column(at)
        if column.path_in_schema.partition(".")[0] in names:
            encoded += column.total_uncompressed_size
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
