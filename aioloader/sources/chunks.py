"""The bytes of files and of objects in stores, in large reads, from any offset on."""

import errno
import os
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from io import FileIO
from pathlib import Path
from typing import Any, Final

from aioloader.core.safe_text import add_note
from aioloader.core.source import SourceThreads
from aioloader.errors import BrokenDataError
from aioloader.masking import mask_message
from aioloader.sources.file_events import Growth, folders_of_links
from aioloader.sources.marks import MARK_BYTES
from aioloader.sources.stores import Version

__all__ = ["READ_BYTES", "file_chunks", "object_chunks"]

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
        self.growth: Growth | None = None
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
            self.growth = Growth([self.path, *folders_of_links(self.path)])
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


class _Range:
    """A request for a range of an object: the answer, and then its body.

    obstore's awaitables are futures, so both make progress without a task that awaits them.
    """

    def __init__(self, store: Any, key: str, start: int, stop: int, condition: dict[str, Any]) -> None:
        import obstore

        options: Any = {"range": (start, stop), **condition}
        answer: Any = obstore.get_async(store, key, options=options)
        self._answer = answer
        self._body: Any = None
        self._answer.add_done_callback(self._read_body)

    def _read_body(self, answer: Any) -> None:
        if self._body is None and not answer.cancelled() and answer.exception() is None:
            self._body = answer.result().bytes_async()
            self._body.add_done_callback(lambda body: body.cancelled() or body.exception())  # it may never be awaited

    async def answer(self) -> Any:
        """What the store says of the object."""
        return (await self._answer).meta

    async def body(self) -> Any:
        """The bytes; after the answer."""
        self._read_body(self._answer)  # the callback may not have run yet
        return await self._body

    def cancel(self) -> None:
        """Cancel what is pending; may be called at any time."""
        self._answer.cancel()
        if self._body is not None:
            self._body.cancel()


class _OpenObject:
    """An object that is read range by range, with the next one already requested.

    Ranges, and not one long answer: a shard that waits for its turn holds no connection open, and the store itself
    retries a range that fails.

    Attributes:
        at: Where the next range begins.
        end: The end of the object, once an answer has arrived.
        has_ranges: False once the server has answered that it does not support them.
    """

    def __init__(self, store: Any, key: str, version: Version, start: int, needed: int, size: int) -> None:
        self._store = store
        self._key = key
        self._version = version
        self._needed = needed
        self._size = size
        self._request: _Range | None = None
        self._ahead: _Range | None = None
        self.at = start
        self.end = start + 1  # not known yet: there may be something to read
        self.has_ranges = True

    async def read(self) -> Any:
        """The next range; `b""` at the end, or if the server does not support ranges.

        Raises:
            BrokenDataError: It is another version than it was, or the answer was cut short.
            Exception: The store's own.
        """
        from obstore.exceptions import GenericError, NotSupportedError, PreconditionError

        at, stop = self.at, self.at + self._size
        if at >= self.end:
            return b""
        self._request, self._ahead = self._ahead or _Range(self._store, self._key, at, stop, {}), None
        try:
            self._check(await self._request.answer())
            if stop < self.end:
                following = min(stop + self._size, self.end)
                self._ahead = _Range(self._store, self._key, stop, following, self._version.condition)
            data = await self._request.body()
        except NotSupportedError:  # a plain HTTP server
            self.has_ranges = False
            return b""
        except PreconditionError as error:
            raise BrokenDataError(_changed_meanwhile(self._key, at)) from error
        except GenericError as error:
            self._check(await _head_if_beyond(self._store, self._key, error))
            if at < self.end:
                raise
            return b""
        _check_length(self._key, at, len(data), min(stop, self.end))
        self.at += len(data)
        return data

    def _check(self, meta: Any) -> None:
        self.end = _checked_size(meta, self._version, self._key, self.at, self._needed)

    def cancel(self) -> None:
        """Cancel pending requests; may be called at any time."""
        for request in (self._request, self._ahead):
            if request is not None:
                request.cancel()


async def object_chunks(
    store: Any, key: str, version: Version, *, start: int = 0, needed: int = 0, size: int = RANGE_BYTES
) -> AsyncGenerator[Any]:
    """The bytes of an object of an obstore `store`, as buffers, in ranges of `size`, with the next one requested ahead.

    A server without support for ranges is asked for all of the object. All answers must be of one version of it,
    otherwise samples would be of two versions, or missing: if it was rewritten meanwhile, the next range is an error.

    Args:
        store: A store of obstore.
        key: The object's key.
        version: The object's version; known with the first bytes.
        start: Where to begin.
        needed: How many bytes the object must have at least.
        size: The size of a range.

    Raises:
        BrokenDataError: It is another version than it was, or an answer was cut short.
        Exception: obstore's own, for instance `FileNotFoundError`; without the secrets of its URL.
    """
    file = _OpenObject(store, key, version, start, needed, size)
    try:
        while len(data := await file.read()):
            yield data
        if not file.has_ranges:
            async with aclosing(_object_at_once(store, key, version, file.at, needed)) as pieces:
                async for data in pieces:
                    yield data
    except Exception as error:
        mask_message(error)
        if not isinstance(error, BrokenDataError):
            add_note(error, f"aioloader: object {key!r}, from byte {file.at} on, of {store!r}")
        raise
    finally:
        file.cancel()


async def _head_if_beyond(store: Any, key: str, error: Exception) -> Any:
    """The metadata of an object after a request for a range past its end (416), which stores word differently.

    Raises:
        Exception: `error`, if it is another one.
    """
    import obstore

    if not re.search(r"\b416\b|range", str(error), re.IGNORECASE):
        raise error
    try:
        return await obstore.head_async(store, key)
    except Exception:
        raise error from None


async def _object_at_once(store: Any, key: str, version: Version, start: int, needed: int) -> AsyncGenerator[Any]:
    """The bytes from `start` on, from a single request."""
    import obstore

    answer = await obstore.get_async(store, key)
    end = _checked_size(answer.meta, version, key, start, needed)
    at = 0
    async for data in answer.stream(min_chunk_size=READ_BYTES):
        if start < at + len(data):
            yield memoryview(data)[max(0, start - at) :]
        at += len(data)
    _check_length(key, 0, at, end)


def _checked_size(meta: Any, version: Version, key: str, at: int, needed: int) -> int:
    """The size of the object, from an answer.

    Raises:
        BrokenDataError: It is another version, or has fewer than `needed` bytes.
    """
    begins = not version.known
    if not version.is_same(meta):
        raise BrokenDataError(_another_version(key) if begins else _changed_meanwhile(key, at))
    size: int = meta["size"]
    if size < needed:
        raise BrokenDataError(f"the object {key!r} has {size} bytes now, and reading resumes at byte {needed}")
    return size


def _another_version(key: str) -> str:
    return (
        f"the object {key!r} was rewritten since the state was made: its ETag differs; restore the old "
        f"version, or begin the epoch again without the state"
    )


def _changed_meanwhile(key: str, at: int) -> str:
    return (
        f"the object {key!r} was rewritten while it was read: what comes from byte {at} on is of another version; "
        f"samples before it have the old one. Write new data under a new key, or begin the epoch again (if it was not "
        f"rewritten, the servers behind its URL disagree about the ETag)"
    )


def _check_length(key: str, start: int, length: int, stop: int) -> None:
    if length != stop - start:
        raise BrokenDataError(
            f"the object {key!r}: {stop - start} bytes from byte {start} on were promised, and {length} came; the "
            f"answer was cut short"
        )
