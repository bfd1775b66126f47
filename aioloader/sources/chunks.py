"""The bytes of files and of stored objects, in large reads, from any offset on."""

import errno
import os
from collections.abc import AsyncGenerator
from io import FileIO
from pathlib import Path
from typing import Any, Final

from aiofiles.threadpool import wrap

from aioloader.engine.located import AccessThreads
from aioloader.notes import add_note
from aioloader.sources.watching import Growth, folders_of_links

__all__ = ["READ_BYTES", "file_chunks", "object_chunks"]

READ_BYTES: Final = 1 << 20
"""Of a file, at once: a thousand rows of a kilobyte share the price of a crossing."""

RANGE_BYTES: Final = 8 << 20
"""Of an object, per request: long against the latency of a request, small enough to be tried again."""


class _OpenFile:
    """A file, owned by the thread that opens it.

    A cancelled task does not get what its thread was just opening, so the file does not travel: it is opened into this
    object and closed from it, one after the other in the same thread.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.raw: FileIO | None = None
        self.growth: Growth | None = None

    def open(self, offset: int, follow: bool) -> FileIO:
        """Open at `offset`.

        Raises:
            OSError: It cannot be opened, or ends before `offset`.
        """
        try:
            self.raw = raw = FileIO(self.path)
        except IsADirectoryError as error:
            add_note(error, f"aioloader: a file was expected; for those in a folder pass a glob: '{self.path}/*'")
            raise
        if follow:
            # Before the first read, so that nothing is missed in between. A link that is pointed elsewhere touches only
            # the folder that it lies in.
            self.growth = Growth([self.path, *folders_of_links(self.path)])
        if offset:
            size = os.fstat(raw.fileno()).st_size
            if size < offset:
                raise OSError(
                    errno.EINVAL, f"the file has {size} bytes now, and reading shall go on at byte {offset}", self.path
                )
            raw.seek(offset)
        return raw

    def wait(self) -> None:
        """Until the file may have grown.

        Raises:
            OSError: It is not the file any more that was opened.
        """
        assert self.raw is not None
        assert self.growth is not None
        # It looks before it waits. When a line was written and the file replaced in one moment, that was told once,
        # and the line made this return.
        while not self.growth.stopped:
            here, at = os.fstat(self.raw.fileno()), self.raw.tell()
            if here.st_size > at:
                return  # whatever else happened, first comes what was written
            if here.st_size < at:
                raise OSError(
                    errno.EINVAL, f"the file shrank from {at} to {here.st_size} bytes while followed", self.path
                )
            there = Path(self.path).stat()  # FileNotFoundError: it was removed
            if (here.st_dev, here.st_ino) != (there.st_dev, there.st_ino):
                raise OSError(errno.ESTALE, "another file took this one's place while it was followed", self.path)
            self.growth.wait()

    def close(self) -> None:
        """Let go of it; may be called at any time."""
        if self.raw is not None:
            self.raw.close()
        if self.growth is not None:
            self.growth.close()


async def file_chunks(
    path: str, thread: AccessThreads, *, offset: int = 0, size: int = READ_BYTES, follow: bool = False
) -> AsyncGenerator[bytes]:
    """The bytes of a file behind `offset`, in reads of `size`.

    Args:
        path: The file.
        thread: One thread, which no other file uses meanwhile: jobs run one after the other.
        offset: Where to begin.
        size: How much at once, at most.
        follow: Wait at the end until the file has grown, and go on.

    Raises:
        OSError: The system's own.
    """
    file = _OpenFile(path)
    try:
        reader = wrap(await thread.call(file.open, offset, follow), executor=thread)
        while True:
            data = await reader.read(size)
            if data:
                yield data
            elif not follow:
                return
            else:
                await thread.call(file.wait)
    finally:
        if file.growth is not None:
            file.growth.stop()  # the thread may be waiting
        await thread.call(file.close)


async def object_chunks(store: Any, key: str, *, offset: int = 0, size: int = RANGE_BYTES) -> AsyncGenerator[Any]:
    """The bytes of an object of an obstore `store`, as buffers, in ranges of `size`, the next one under way.

    Ranges, and not one long answer: a shard that waits for its turn holds no connection open, and a range that fails
    is tried again by the store itself. A server that knows no ranges is asked for the whole.

    Raises:
        Exception: Of obstore, for instance `FileNotFoundError`.
    """
    import obstore
    from obstore.exceptions import NotSupportedError

    end = (await obstore.head_async(store, key))["size"]
    if offset > end:
        raise OSError(errno.EINVAL, f"the object {key!r} has {end} bytes now, and reading shall go on at byte {offset}")
    # obstore's awaitables are futures: the request is on its way from here on.
    ahead: Any = None
    try:
        while offset < end:
            pending: Any = ahead or obstore.get_range_async(store, key, start=offset, end=min(offset + size, end))
            ahead = None
            following = min(offset + size, end)
            if following < end:
                ahead = obstore.get_range_async(store, key, start=following, end=min(following + size, end))
            try:
                data = await pending
            except NotSupportedError:  # a plain HTTP server
                break
            offset = following
            yield data
    finally:
        if ahead is not None:
            ahead.cancel()
    if offset < end:
        async for data in (await obstore.get_async(store, key)).stream(min_chunk_size=READ_BYTES):
            if offset < len(data):
                yield memoryview(data)[offset:] if offset else data
            offset = max(0, offset - len(data))
