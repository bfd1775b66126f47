"""From the bytes of a file to entries: what runs in a thread, and the task that feeds it."""

from abc import ABC, abstractmethod
from asyncio import Event
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from time import perf_counter
from typing import Any, Final

from aioloader.core.entry import Entry
from aioloader.core.source import SourceThreads
from aioloader.errors import BrokenDataError
from aioloader.sources.chunks import RANGE_BYTES, READ_BYTES, file_chunks, object_chunks
from aioloader.sources.compressed import decompressor_for, is_compressed
from aioloader.sources.marks import Trail
from aioloader.sources.pace import Pace
from aioloader.sources.read_ahead import ByteQuota, Quota, failed
from aioloader.sources.requests import Requests
from aioloader.sources.stored_files import StoredFile
from aioloader.sources.stores import Version

__all__ = ["OffsetQuota", "Parser", "parsed", "stored_chunks"]

PARSE_SECONDS: Final = 0.001
"""How long one hop into the thread may parse: some hundred rows of JSON, or one slow sample. With five times that, a
row cost a microsecond more: entries that live longer make Python's garbage collector go through all objects."""

LEAST_READ_BYTES: Final = 64 << 10
LEAST_RANGE_BYTES: Final = 1 << 20
"""However many files are read side by side: a request has to be long compared with its latency."""


class Parser(ABC):
    """Finds the samples of one file in its bytes, which come in pieces that end anywhere.

    Args:
        path: The file, for its extension and for errors.
        offset: Where to begin in the content.
        mark: The mark of that place, if the cursor has one.
        max_window_bytes: See `decompressor_for`.
        least: How many bytes before that place are read again in any case.

    Attributes:
        start: The first byte of the file to feed: a little before `offset`, for the mark; 0 for a compressed file,
            whose content is dropped up to `offset`.
        trail: Makes the marks of cursors.
        needed: How many bytes the file must have at least.
        quota: How many entries may be made at once; None: as many as there is time for.
    """

    quota: Quota | None = None

    def __init__(self, path: str, offset: int, mark: int | None, max_window_bytes: int, *, least: int = 0) -> None:
        self.path = path
        self.has_more = False  # `parse` stopped because its time was up; call it again
        self._decompressor = decompressor_for(path, max_window_bytes)
        self.trail = Trail(offset, mark, least=least)
        self._dropped = self.trail.start if is_compressed(path) else 0  # bytes still to be dropped
        self.start, self.needed = (0, 0) if is_compressed(path) else (self.trail.start, offset)
        self._pieces: Iterator[bytes] = iter(())
        self._error: BrokenDataError | None = None

    def parse(self, data: bytes) -> list[Entry]:
        """The entries that `data` completes; pass empty `data` while `has_more`.

        Raises:
            BrokenDataError: The rest of the file cannot be read; after the entries before that.
        """
        if data:
            self._pieces = self._decompressor.feed(data)
        self.has_more = False
        entries: list[Entry] = []
        deadline = perf_counter() + PARSE_SECONDS
        try:
            if self._error is not None:
                raise self._error
            while True:
                if self._take(entries, deadline):
                    self.has_more = True
                    break
                piece = next(self._pieces, None)
                if piece is None:
                    break
                if self._dropped:
                    dropped = min(self._dropped, len(piece))
                    self._dropped -= dropped
                    piece = piece[dropped:]
                piece = self.trail.feed(piece)
                if len(piece):
                    self._feed(piece)
        except BrokenDataError as error:
            if not entries:
                raise self._named(error) from error.__cause__
            self._error = error
            self.has_more = True
        return entries

    def _has_enough(self, entries: list[Entry]) -> bool:
        return self.quota is not None and len(entries) >= self.quota.left

    def finish(self) -> list[Entry]:
        """The entries that the end of the file completes.

        Raises:
            BrokenDataError: The file is not complete.
        """
        try:
            self._decompressor.finish()
            missing = self._dropped + self.trail.missing
            if missing:
                raise BrokenDataError(f"it ends {missing} bytes before the place to resume at: it was changed")
            return self._finish()
        except BrokenDataError as error:
            raise self._named(error) from error.__cause__

    def _named(self, error: BrokenDataError) -> BrokenDataError:
        return BrokenDataError(f"{self.path}: {error}")

    @abstractmethod
    def _feed(self, piece: bytes) -> None:
        """Take more of the content, after `_take` has returned False."""

    @abstractmethod
    def _take(self, entries: list[Entry], deadline: float) -> bool:
        """Append entries that are complete; True if `deadline` came before the last of them."""

    @abstractmethod
    def _finish(self) -> list[Entry]:
        """The entries that the end of the content completes."""


class OffsetQuota(ByteQuota):
    """The same of entries whose cursors have the offset after them as their second part."""

    _at: int | None = None

    def saw(self, entries: list[Entry]) -> None:
        offset: int = entries[-1].cursor[1]
        if self._at is not None and offset > self._at:  # else the last one leads to the next file
            self.entry_bytes = (offset - self._at) / len(entries)
        self._at = offset


def stored_chunks(
    file: StoredFile,
    version: Version,
    parser: Parser,
    thread: SourceThreads,
    requests: Requests | None,
    pace: Pace,
    turn: Event,
    *,
    follow: bool = False,
) -> AsyncGenerator[Any]:
    """The bytes of a file that `parser` has to be fed, in reads that are smaller where several files are read at once.

    Args:
        file: Here, or in a store.
        version: Of an object: known with the first bytes.
        parser: Says where to begin.
        thread: Reads a local file.
        requests: Make those for an object; None: each is made as it is.
        pace: How far ahead of its consumer an object is read.
        turn: Of an object: see `object_chunks`.
        follow: See `file_chunks`.
    """
    place: dict[str, int] = {"start": parser.start, "needed": parser.needed}
    local = file.store is None
    if (lanes := pace.lanes) > 1:
        most, least = (READ_BYTES, LEAST_READ_BYTES) if local else (RANGE_BYTES, LEAST_RANGE_BYTES)
        place["size"] = max(most // lanes, least)
    if local:
        return file_chunks(file.key, thread, follow=follow, **place)
    return object_chunks(file.store, file.key, version, requests, pace=pace, turn=turn, **place)


async def parsed(
    chunks: AsyncGenerator[Any], parser: Parser, thread: SourceThreads, *, after: object
) -> AsyncGenerator[list[Entry]]:
    """Feed `chunks` to `parser`, in `thread`; a failure is the last entry. Lists may be empty.

    Args:
        chunks: The bytes of the file; closed at the end.
        parser: The file's parser.
        thread: Where it runs.
        after: The cursor after the file, for the entry of a failure.
    """
    try:
        async with aclosing(chunks):
            async for data in chunks:
                yield await thread.call(parser.parse, data)
                while parser.has_more:
                    yield await thread.call(parser.parse, b"")
        entries = await thread.call(parser.finish)
    except Exception as error:
        entries = [failed(error, after, parser.path)]
    yield entries
