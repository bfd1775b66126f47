"""The file or object that Parquet is read from, held to one version: from its footer to its last page.

A span of row groups opens the file again, with the footer that was read before. If it were another file by then, rows
of both would come, or garbage. So what is opened is compared with what the footer was read from, and an open file is
checked again after each piece, because it may be written to in place. The alternative, one descriptor from the footer
to the last row, would survive a rename, but would not help when a file is written to in place, and an object has none.
"""

import errno
import io
import os
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from io import FileIO
from operator import itemgetter
from stat import S_ISDIR, S_ISREG
from time import perf_counter
from typing import Any, ClassVar, Final

from aioloader.errors import BrokenDataError
from aioloader.masking import mask_message
from aioloader.sources.requests import CutShortError, Requests
from aioloader.sources.stored_files import StoredFile
from aioloader.sources.stores import Version

__all__ = ["Input", "open_input", "rewritten"]

REPLACED: Final = "another file has taken its place"

HOLE_BYTES: Final = 64 << 10
"""Column chunks of an object that are no further apart are fetched together: two requests would take longer."""

RANGE_BYTES: Final = 32 << 20
"""The most that one such request asks for."""


def rewritten(path: str, change: str, row: int = 0) -> BrokenDataError:
    """The error of a file that was changed before row number `row` was read."""
    return BrokenDataError(
        f"{path} was rewritten while it was read: {change}. Its rows from {row} on would be of another version than "
        f"those before, and are left out; write new data under another name, or begin the epoch again"
    )


class Input(ABC):
    """An open file or object; used by one thread at a time.

    Attributes:
        version: Tells this version from others. It must not go into a state, because a copy has another one.
        size: In bytes.
        file: A file object for pyarrow.
    """

    version: Any
    size: int
    file: Any
    far: ClassVar[bool] = False  # each read costs a request

    @abstractmethod
    def range(self, start: int, stop: int) -> Any:
        """The bytes from `start` to `stop`; fewer where it ends before.

        Raises:
            OSError: The system's, or the store's.
            BrokenDataError: It is another version now.
        """

    def fetch(self, places: Sequence[tuple[int, int]]) -> None:  # noqa: B027 - a file is close enough
        """Get these bytes ready for pyarrow: starts and stops, in order.

        Raises:
            OSError, BrokenDataError: As `range`.
        """

    @abstractmethod
    def change(self, version: Any) -> str | None:
        """How it has changed since it had `version`, in words; None if it has not."""

    @abstractmethod
    def close(self) -> None:
        """Close it."""


def open_input(file: StoredFile, requests: Requests, version: Any = None) -> Input:
    """Open a file, or an object of a store of obstore.

    Args:
        file: Where it is.
        requests: What asks the store.
        version: Which version of an object to read; None means the one that is there.

    Raises:
        OSError: The system's, or the store's.
    """
    return _LocalFile(file.key) if file.store is None else _Object(file.store, file.key, version, requests)


class _LocalFile(Input):
    """A file that is opened twice: by Python, to check it, and by pyarrow, which reads it without the GIL."""

    def __init__(self, path: str) -> None:
        mode = os.stat(path).st_mode  # noqa: PTH116 - FileNotFoundError where there is nothing, in Python's words
        if S_ISDIR(mode):
            error = IsADirectoryError(errno.EISDIR, "Is a directory", path)
            error.add_note(f"aioloader: a file was expected; for those in a folder pass a glob: '{path}/*.parquet'")
            raise error
        if not S_ISREG(mode):  # opening a pipe would block until something is written to it
            raise OSError(errno.ESPIPE, "a Parquet file is read from its end, and this is not a regular file", path)
        self._path = path
        self._raw = FileIO(path)
        self._replaced = False
        self.version = _version(os.fstat(self._raw.fileno()))
        self.size = self.version[2]

    @cached_property
    def file(self) -> Any:
        import pyarrow as pa

        with suppress(FileNotFoundError):
            file = pa.OSFile(self._path)
            if _version(os.stat(self._path))[:2] == self.version[:2]:  # noqa: PTH116
                return file
        self._replaced = True
        raise rewritten(self._path, REPLACED)

    def range(self, start: int, stop: int) -> Any:
        self._raw.seek(start)
        return self._raw.read(stop - start)

    def change(self, version: Any) -> str | None:
        now = _version(os.fstat(self._raw.fileno()))
        if self._replaced or now[:2] != version[:2]:
            return REPLACED
        if now[2] != version[2]:
            return f"it had {version[2]} bytes, and has {now[2]} now"
        return None if now == version else "it was written to"

    def close(self) -> None:
        self._raw.close()
        if "file" in vars(self):
            self.file.close()


def _version(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@contextmanager
def _masking() -> Iterator[None]:
    """Hide the secrets of URLs in the errors of stores."""
    try:
        yield
    except Exception as error:
        mask_message(error)
        raise


class _Object(Input):
    far = True

    def __init__(self, store: Any, key: str, version: Version | None, requests: Requests) -> None:
        self._store = store
        self._requests = requests
        self._key = key
        self._change: str | None = None
        if version is None:
            version = Version(store, key)
            with _masking():
                version.is_same(self._head())  # the first answer decides
        self.version: Version = version
        self.size = version.size
        self.file: _Ranges = _Ranges(self)

    def fetch(self, places: Sequence[tuple[int, int]]) -> None:
        self.file.ready = [(start, memoryview(self.range(start, stop))) for start, stop in _together(places)]

    def range(self, start: int, stop: int) -> Any:
        from obstore.exceptions import PreconditionError

        options: Any = {"range": (start, stop), **self.version.condition}
        try:
            with _masking():
                meta, data = self._requests.call(lambda: self._get(options, stop - start))
        except PreconditionError:
            self._change = "the store has another version of it now"
        except FileNotFoundError:
            self._change = "the store does not have it any more"
        else:  # maybe of a server that ignores conditions
            self._change = self.version.difference(meta)
            if self._change is None:
                return data
        raise rewritten(self._key, self._change)

    def _head(self) -> Any:
        """What the store says of the object."""
        import obstore

        return self._requests.call(lambda: obstore.head_async(self._store, self._key))

    async def _get(self, options: Any, length: int) -> tuple[Any, Any]:
        """What the store says of the object, and a range of it; none if it is of another version.

        Raises:
            CutShortError: It is not `length` bytes.
        """
        import obstore

        began = perf_counter()
        answer = await obstore.get_async(self._store, self._key, options=options)
        if self._requests.told is not None:
            self._requests.told(perf_counter() - began)
        if self.version.difference(answer.meta) is not None:
            return answer.meta, None
        return answer.meta, _of_length(await answer.bytes_async(), length, options["range"][0])

    def change(self, version: Any) -> str | None:
        return self._change

    def close(self) -> None:
        self.file.close()


def _of_length(data: Any, length: int, start: int) -> Any:
    if len(data) != length:
        raise CutShortError(f"{length} bytes from byte {start} on were promised, and {len(data)} came")
    return data


def _together(places: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Fewer places: those that are near each other are joined."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(places):
        if joined and start - joined[-1][1] <= HOLE_BYTES and stop - joined[-1][0] <= RANGE_BYTES:
            joined[-1] = joined[-1][0], stop
        else:
            joined.append((start, stop))
    return joined


class _Ranges(io.RawIOBase):
    """An object as a file. What is not ready is requested.

    Attributes:
        ready: Parts that were fetched, each with its offset.
    """

    def __init__(self, source: _Object) -> None:
        self._source = source
        self._at = 0
        self.ready: list[tuple[int, memoryview]] = []

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin: int = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._source.size}[whence]
        self._at = origin + offset
        return self._at

    def read(self, size: int = -1) -> Any:
        file_size = self._source.size
        end = file_size if size < 0 else min(file_size, self._at + size)
        if end <= self._at:
            return b""
        start, self._at = self._at, end
        at = bisect_right(self.ready, start, key=itemgetter(0)) - 1
        if at >= 0:
            first, data = self.ready[at]
            if end <= first + len(data):
                return data[start - first : end - first]
        return self._source.range(start, end)
