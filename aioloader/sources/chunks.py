"""The bytes of files and of objects in stores, in large reads, from any offset on."""

import asyncio
import errno
import os
from collections.abc import AsyncGenerator
from io import FileIO
from pathlib import Path
from typing import Any, Final

from aioloader.core.safe_text import add_note
from aioloader.core.source import SourceThreads
from aioloader.errors import BrokenDataError
from aioloader.masking import mask_message
from aioloader.sources.file_events import FileGrowth, folders_of_links
from aioloader.sources.marks import MARK_BYTES
from aioloader.sources.pace import Pace
from aioloader.sources.ranges import Range, RequestedRange, check_length, checked_size
from aioloader.sources.requests import Requests
from aioloader.sources.stores import Version

__all__ = ["RANGE_BYTES", "READ_BYTES", "file_chunks", "object_chunks"]

READ_BYTES: Final = 1 << 20
"""How much of a file is read at once: a thousand rows of a kilobyte share the cost of a hop."""

RANGE_BYTES: Final = 8 << 20
"""How much of an object one request reads: long compared with its latency, small enough to be retried."""


class _OpenFile:
    """A file, owned by the thread that opens it.

    A cancelled task does not get the file that its thread was just opening. So the file is opened into this object and
    closed through it, both in the same thread.

    A rename of another file over this one changes nothing: the open file stays what it was. But after a truncation or a
    write in place, samples would be of two versions, or missing. So each read checks size and time of change. A file
    that has grown may have been appended to, as logs are, or rewritten with more content: then the first and the last
    bytes that were read must still be there.
    """

    def __init__(self, path: str, follow: bool) -> None:
        self.path = path
        self.raw: FileIO | None = None
        self.growth: FileGrowth | None = None
        self._follow = follow
        self._seen: tuple[int, int] = (0, 0)  # size and time of change when the last bytes were read
        self._start = 0
        self._first = self._last = b""  # the first and the last bytes that were read

    def open(self, start: int, needed: int) -> None:
        """Open at `start`.

        Raises:
            OSError: It cannot be opened.
            BrokenDataError: It has fewer than `needed` bytes.
        """
        try:
            self.raw = raw = FileIO(self.path)
        except IsADirectoryError as error:
            add_note(error, f"aioloader: a file was expected; for those in a folder pass a glob: '{self.path}/*'")
            raise
        if self._follow:
            # Before the first read, so that nothing is missed in between. Pointing a link elsewhere only touches the
            # folder of the link.
            self.growth = FileGrowth([self.path, *folders_of_links(self.path)])
        self._seen = size, _ = self._now()
        if size < needed:
            raise BrokenDataError(f"{self.path}: the file has {size} bytes now, and reading resumes at byte {needed}")
        self._start = start
        raw.seek(start)

    def _now(self) -> tuple[int, int]:
        assert self.raw is not None
        status = os.fstat(self.raw.fileno())
        return status.st_size, status.st_mtime_ns

    def read(self, size: int) -> bytes:
        """The next bytes, `size` at most; none at the end.

        Raises:
            OSError: The system's own.
            BrokenDataError: What was read before has changed.
        """
        assert self.raw is not None
        data = self.raw.read(size) or b""
        now = self._now()
        if now != self._seen:  # checked after the read, so that it covers the read
            self._check_changed(now, len(data))
            self._seen = now
        if data:
            self._first = self._first or data[:MARK_BYTES]
            self._last = (self._last + data)[-MARK_BYTES:] if len(data) < MARK_BYTES else data[-MARK_BYTES:]
        return data

    def _check_changed(self, now: tuple[int, int], length: int) -> None:
        assert self.raw is not None
        size, _ = now
        at = self.raw.tell() - length
        if size < at:
            raise OSError(
                errno.EINVAL,
                f"the file shrank from {at} to {size} bytes while {'followed' if self._follow else 'read'}",
                self.path,
            )
        appended = size > self._seen[0] or self._follow  # the time alone may change in a file that is followed
        if not (appended and self._holds(self._start, self._first) and self._holds(at - len(self._last), self._last)):
            what = f"it has {size} bytes, and had {self._seen[0]}" if size != self._seen[0] else "its size is the same"
            raise BrokenDataError(
                f"{self.path} was rewritten while it was read, {at} bytes of it so far: {what}; samples before this "
                f"place have the old content. Write under another name and rename, or begin the epoch again"
            )

    def _holds(self, at: int, data: bytes) -> bool:
        """Whether `data` is at that place."""
        assert self.raw is not None
        place = self.raw.tell()
        try:
            self.raw.seek(at)
            return self.raw.read(len(data)) == data if data else True
        finally:
            self.raw.seek(place)

    def wait(self) -> None:
        """Wait until the file may have grown.

        Raises:
            OSError: The path no longer leads to the file that was opened.
        """
        assert self.raw is not None
        assert self.growth is not None
        # Check before waiting: if a line was written and the file replaced at the same moment, there was one
        # notification for both, and this has returned because of the line.
        # And look at the path first: what was written before that leads elsewhere is counted by the look at the file.
        while not self.growth.stopped:
            there = self._file_at_path()
            here, at = os.fstat(self.raw.fileno()), self.raw.tell()
            if here.st_size != at:
                return  # whatever else happened, what was written comes first
            if isinstance(there, OSError):
                raise there
            if (here.st_dev, here.st_ino) != there:
                raise OSError(errno.ESTALE, "another file took this one's place while it was followed", self.path)
            self.growth.wait()

    def _file_at_path(self) -> tuple[int, int] | OSError:
        """Which file the path leads to now, or why to none: `FileNotFoundError` when it was removed."""
        try:
            status = Path(self.path).stat()
        except OSError as error:
            return error
        return status.st_dev, status.st_ino

    def close(self) -> None:
        """Close it; may be called at any time."""
        if self.raw is not None:
            self.raw.close()
        if self.growth is not None:
            self.growth.close()


async def file_chunks(
    path: str,
    thread: SourceThreads,
    *,
    start: int = 0,
    needed: int = 0,
    size: int = READ_BYTES,
    follow: bool = False,
) -> AsyncGenerator[bytes]:
    """The bytes of a file from `start` on, in reads of `size`.

    Args:
        path: The file.
        thread: A single thread that no other file uses meanwhile, so that calls run one after the other.
        start: Where to begin.
        needed: How many bytes the file must have at least.
        size: The most that is read at once.
        follow: Wait at the end until the file has grown, and go on.

    Raises:
        OSError: The system's own.
        BrokenDataError: It was rewritten while it was read, or has fewer than `needed` bytes.
    """
    file = _OpenFile(path, follow)
    try:
        await thread.call(file.open, start, needed)
        while True:
            data = await thread.call(file.read, size)
            if data:
                yield data
            elif not follow:
                return
            else:
                await thread.call(file.wait)
    finally:
        if file.growth is not None:
            file.growth.stop()  # the thread may be in `wait`
        await thread.call(file.close)


class _OpenObject:
    """An object that is read range by range, with the next one already requested once it is its turn.

    Ranges, and not one long answer: a shard that waits for its turn holds no connection open, and a range that fails is
    retried alone, by the store itself or by `requests`.

    Attributes:
        at: Where the next range begins.
        end: The end of the object, once an answer has arrived.
        has_ranges: False once the server has answered that it does not support them.
    """

    def __init__(
        self,
        store: Any,
        key: str,
        version: Version,
        start: int,
        needed: int,
        size: int,
        pace: Pace | None,
        turn: asyncio.Event | None,
        requests: Requests | None,
    ) -> None:
        self._store = store
        self._key = key
        self._version = version
        self._needed = needed
        self._size = size
        self._pace = pace
        self._turn = turn
        self._requests = requests
        self._request: Range | RequestedRange | None = None
        self._ahead: Range | RequestedRange | None = None
        self._start = self._asked = start  # for all before the latter
        self.at = start
        self.end = start + 1  # not known yet: there may be something to read
        self.has_ranges = True

    async def read(self) -> Any:
        """The next range; `b""` at the end, or if the server does not support ranges.

        Raises:
            BrokenDataError: It is another version than it was, or the answer was cut short.
            Exception: The store's own.
        """
        from obstore.exceptions import NotSupportedError

        at = self.at
        if at >= self.end:
            return b""
        if self._turn is not None and at != self._start:
            await self._turn.wait()
        self._request, self._ahead = self._ahead or self._begin(), None
        if self._pace is not None and self._pace.hurries and at != self._start and self._asked < self.end:
            self._ahead = self._begin()

        def answered(meta: Any) -> int:
            self.end = end = self._check(meta, at)
            if self._asked < end and self._ahead is None and (self._turn is None or self._turn.is_set()):
                self._ahead = self._begin()
            return end

        try:
            data = await self._request.read(answered)
        except NotSupportedError:  # a plain HTTP server
            self.has_ranges = False
            return b""
        self.at += len(data)
        return data

    def _begin(self) -> Range | RequestedRange:
        """Request the next range."""
        start, size = self._asked, self._size
        first = start == self._start  # nothing is known of the object yet
        if self._pace is not None:
            size = self._pace.range_bytes(size, None if first else self.end)
        stop = self._asked = start + size if first else min(start + size, self.end)

        def begin() -> Range:
            told = None if self._pace is None else self._pace.answered
            return Range(self._store, self._key, start, stop, self._version.condition, told)

        if self._requests is None:
            return begin()
        return RequestedRange(self._requests, begin, lambda meta: self._check(meta, start))

    def _check(self, meta: Any, at: int) -> int:
        return checked_size(meta, self._version, self._key, at, self._needed)

    def cancel(self) -> None:
        """Cancel pending requests; may be called at any time."""
        for request in (self._request, self._ahead):
            if request is not None:
                request.cancel()


async def object_chunks(
    store: Any,
    key: str,
    version: Version,
    requests: Requests | None = None,
    *,
    start: int = 0,
    needed: int = 0,
    size: int = RANGE_BYTES,
    pace: Pace | None = None,
    turn: asyncio.Event | None = None,
) -> AsyncGenerator[Any]:
    """The bytes of an object of an obstore `store`, as buffers, in ranges of `size`, with the next one requested ahead.

    A server without support for ranges is asked for all of the object. All answers must be of one version of it,
    otherwise samples would be of two versions, or missing: if it was rewritten meanwhile, the next range is an error.

    Args:
        store: A store of obstore.
        key: The object's key.
        version: The object's version; known with the first bytes.
        requests: What makes them; None: each is made as it is.
        start: Where to begin.
        needed: How many bytes the object must have at least.
        size: The size of a range, at most.
        pace: Says how long ranges are; None: all are of that size.
        turn: Until it is set, only the first range is asked for; None: it is.

    Raises:
        BrokenDataError: It is another version than it was, or an answer was cut short.
        Exception: obstore's own, for instance `FileNotFoundError`; without the secrets of its URL.
    """
    file = _OpenObject(store, key, version, start, needed, size, pace, turn, requests)
    try:
        while len(data := await file.read()):
            yield data
        if not file.has_ranges:
            whole = _WholeObject(store, key, version, file.at, needed, requests)
            while data := await whole.read():
                yield data
    except Exception as error:
        mask_message(error)
        if not isinstance(error, BrokenDataError):
            add_note(error, f"aioloader: object {key!r}, from byte {file.at} on, of {store!r}")
        raise
    finally:
        file.cancel()


class _WholeObject:
    """The bytes of an object from `at` on, from a single request, or from another one where that breaks off.

    Attributes:
        at: Where the next piece begins.
    """

    def __init__(
        self, store: Any, key: str, version: Version, start: int, needed: int, requests: Requests | None
    ) -> None:
        self._store = store
        self._key = key
        self._version = version
        self._needed = needed
        self._requests = requests
        self._stream: Any = None
        self._streamed = 0  # bytes that have come from it
        self._end = 0
        self.at = start

    async def read(self) -> Any:
        """The next piece; `b""` at the end.

        Raises:
            BrokenDataError: It is another version than it was, or the answer was cut short.
            Exception: The store's own.
        """
        if self._requests is None:
            return await self._next_piece()
        return await self._requests.run(self._next_piece, hedged=False, rated=False)

    async def _next_piece(self) -> Any:
        stream, self._stream = self._stream, None  # unless all goes well, the next attempt begins a stream
        if stream is None:
            stream = await self._begin()
        async for data in stream:
            piece = memoryview(data)[max(0, self.at - self._streamed) :]
            self._streamed += len(data)
            if len(piece):
                self.at = self._streamed
                self._stream = stream
                return piece
        check_length(self._key, 0, self._streamed, self._end)
        return b""

    async def _begin(self) -> Any:
        import obstore

        if self._requests is not None:
            await self._requests.turn()
        answer = await obstore.get_async(self._store, self._key)
        self._end = checked_size(answer.meta, self._version, self._key, self.at, self._needed)
        self._streamed = 0
        return aiter(answer.stream(min_chunk_size=READ_BYTES))
