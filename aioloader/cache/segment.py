"""The files of a cache on disk: samples that one process has appended, and an index of those that are complete."""

import json
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from aioloader.errors import BrokenDataError
from aioloader.executors.processes.layout import lay_out, layout_of, open_buffers
from aioloader.executors.processes.wire import decode, encode

__all__ = ["Location", "LostError", "SegmentWriter", "StoredSegment", "pack_sample", "unpack_sample"]

_RECORD: Final = struct.Struct("<IIQQI")
"""An entry of an index: the checksum of the rest of the entry and the length of the key after it; then where the sample
is in the file of samples, its length, and its checksum."""


class LostError(BrokenDataError):
    """A file does not hold the sample that was written to it."""


class _SharedFile:
    """An open file, closed when nothing refers to it any more: another thread may be reading."""

    def __init__(self, path: Path, flags: int) -> None:
        self.fd = os.open(path, flags | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0), 0o644)

    def __del__(self) -> None:
        with suppress(AttributeError, OSError):
            os.close(self.fd)


class Location:
    """Where a sample is stored.

    Attributes:
        key: Its key in the store; None until the store knows the location.
        other: Another location of the same sample: two processes kept it, or it was lost here and made again.
    """

    __slots__ = ("checksum", "key", "length", "offset", "other", "segment")

    def __init__(self, segment: "StoredSegment", offset: int, length: int, checksum: int) -> None:
        self.key: Any = None
        self.segment = segment
        self.offset = offset
        self.length = length
        self.checksum = checksum
        self.other: Location | None = None


class StoredSegment:
    """Two files that one process has written: samples one after the other, and an index of the complete ones."""

    def __init__(self, folder: Path, name: str) -> None:
        self.samples = folder / f"{name}.samples"
        self.index = folder / f"{name}.index"
        self.end = 0  # of the known samples
        self.ours = False  # whether this process writes it
        self.file: _SharedFile | None = None  # the samples, while it is open for reading
        self._index_read = 0  # bytes of the index

    def size(self) -> int:
        """The size of the file of samples; 0 when it is gone."""
        try:
            return self.samples.stat().st_size
        except OSError:
            return 0

    def read(self, location: Location) -> bytearray:
        """The bytes of a sample.

        Raises:
            OSError: The file cannot be read.
            LostError: They are not what was written.
        """
        # `file` is held during the read. Two threads may open the file at once, and only the later one is kept; without
        # this reference the other descriptor would be closed here, and might name another file when it is read.
        file = self.file
        if file is None:
            self.file = file = _SharedFile(self.samples, os.O_RDONLY)
        data = _read(file.fd, location.length, location.offset)
        if len(data) != location.length or zlib.crc32(data) != location.checksum:
            raise LostError(f"{self.samples}: what is at byte {location.offset} is not what was kept")
        return data

    def new_entries(self, seed: int) -> Iterator[tuple[list[Any], Location]]:
        """The keys and locations that have been added to the index; a truncated or broken entry ends them.

        Their checksums start from `seed`, the description's.
        """
        try:
            with self.index.open("rb") as file:
                file.seek(self._index_read)
                data = file.read()
        except OSError:  # gone or unreadable: the samples are made again
            return
        start = 0
        while start + _RECORD.size <= len(data):
            checksum, key_length, offset, length, sample_checksum = _RECORD.unpack_from(data, start)
            end = start + _RECORD.size + key_length
            if end > len(data) or zlib.crc32(data[start + 4 : end], seed) != checksum:
                return
            self._index_read += end - start
            yield json.loads(data[start + _RECORD.size : end]), Location(self, offset, length, sample_checksum)
            start = end


class SegmentWriter:
    """Appends to the two files of a new segment.

    Raises:
        OSError: The files cannot be made.
    """

    def __init__(self, folder: Path, name: str) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
        self.segment = StoredSegment(folder, name)
        self.segment.ours = True
        self._samples = _SharedFile(self.segment.samples, flags)
        self._index = _SharedFile(self.segment.index, flags)

    def append(self, key: list[Any], parts: list[Any], length: int, checksum: int, seed: int) -> Location:
        """Write a sample, in parts, and then its entry in the index.

        Raises:
            OSError: The disk is full, or the like.
        """
        text = json.dumps(key).encode()
        _write(self._samples.fd, parts)
        # The offset is read back and not counted, for the case that the file was truncated.
        offset = os.lseek(self._samples.fd, 0, os.SEEK_CUR) - length
        body = _RECORD.pack(0, len(text), offset, length, checksum)[4:] + text
        _write(self._index.fd, [struct.pack("<I", zlib.crc32(body, seed)) + body])
        return Location(self.segment, offset, length, checksum)


def pack_sample(sample: Any) -> list[Any]:
    """The bytes of a sample in parts: a head, then the pickle and its buffers, each at an aligned offset.

    The head has the number of buffers and the length of each. Tensors of a loaded sample use the memory that the file
    was read into.

    Raises:
        Exception: What pickling `sample` raises.
    """
    stream, buffers = encode(sample)
    parts = [stream, *buffers]
    head = struct.pack(f"<I{len(parts)}Q", len(parts), *map(len, parts))
    return [head, *lay_out(parts, len(head))[1]]


def unpack_sample(data: bytearray) -> Any:
    """The sample that `pack_sample` packed."""
    (count,) = struct.unpack_from("<I", data)
    _, *lengths = struct.unpack_from(f"<I{count}Q", data)
    stream, *buffers = open_buffers(memoryview(data), layout_of(lengths, 4 + 8 * count))
    return decode(stream, buffers)


def _write(fd: int, parts: list[Any]) -> None:
    for first in range(0, len(parts), 512):
        pending = [memoryview(part) for part in parts[first : first + 512] if len(part)]
        while pending:
            written = os.writev(fd, pending) if hasattr(os, "writev") else os.write(fd, pending[0])
            while pending and written >= len(pending[0]):
                written -= len(pending.pop(0))
            if written:
                pending[0] = pending[0][written:]


def _read(fd: int, length: int, offset: int) -> bytearray:
    """At most `length` bytes; fewer at the end of the file."""
    data = bytearray(length)
    view = memoryview(data)
    done = 0
    while done < length:
        count = os.preadv(fd, [view[done:]], offset + done)
        if not count:
            break
        done += count
    return data[:done] if done < length else data
