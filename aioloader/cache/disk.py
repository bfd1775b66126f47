"""Samples kept in a directory, safe against a kill at any moment, and shared by any number of processes."""

import json
import os
import struct
import threading
import uuid
import warnings
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from aioloader.cache.store import END, MISSING, Store, StreamPlace
from aioloader.core.forks import tell_of_fork
from aioloader.core.keys import read_key, written_key
from aioloader.errors import BrokenDataError
from aioloader.executors.processes.wire import decode, encode

__all__ = ["DiskStore", "Location", "LostError"]

FORMAT: Final = 3
DESCRIPTION: Final = "cache.json"
OURS: Final = {".index", ".samples", ".new"}
"""What else is in the directory, by suffix."""

_RECORD: Final = struct.Struct("<IIQQI")
"""An entry of an index: the checksum of what follows, the length of the key behind it; where the sample stands in the
file of samples, its length, and its checksum."""

_PARTS: Final = struct.Struct("<I")  # how many parts a sample has, before the length of each
_LENGTH: Final = struct.Struct("<Q")
_ALIGNED: Final = 64  # where each part begins: tensors lie in the memory that the file is read into


class LostError(BrokenDataError):
    """What is in the file is not what was written."""


class _SharedFile:
    """An open file, closed when nobody refers to it any more: another thread may be reading."""

    def __init__(self, path: Path, flags: int) -> None:
        self.fd = os.open(path, flags | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0), 0o644)

    def __del__(self) -> None:
        with suppress(AttributeError, OSError):
            os.close(self.fd)


class Location:
    """Where a sample stands.

    Attributes:
        other: Where it stands too: two processes kept it, or it was made again since what is here was lost.
    """

    __slots__ = ("checksum", "key", "length", "offset", "other", "segment")

    def __init__(self, key: Any, segment: "_StoredSegment", offset: int, length: int, checksum: int) -> None:
        self.key = key
        self.segment = segment
        self.offset = offset
        self.length = length
        self.checksum = checksum
        self.other: Location | None = None


class _StoredSegment:
    """Two files that one process wrote: samples one behind the other, and an index of those that are complete."""

    def __init__(self, folder: Path, name: str) -> None:
        self.samples = folder / f"{name}.samples"
        self.index = folder / f"{name}.index"
        self.read = 0  # bytes of the index
        self.end = 0  # of the samples that are known to be in it
        self.ours = False  # written by this object, which knows what is in it
        self.file: _SharedFile | None = None  # of the samples, open for reading

    def open(self) -> _SharedFile:
        file = self.file
        if file is None:
            self.file = file = _SharedFile(self.samples, os.O_RDONLY)
        return file

    def size(self) -> int:
        """Bytes of samples that are there; none when the file is gone."""
        try:
            return self.samples.stat().st_size
        except OSError:
            return 0


class _Writer:
    """The segment that this process writes."""

    def __init__(self, segment: _StoredSegment) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
        self.segment = segment
        self.samples = _SharedFile(segment.samples, flags)
        self.index = _SharedFile(segment.index, flags)


class DiskStore(Store):
    """A directory of segments, each written by one process only, by appending.

    A sample is written first and its entry in the index after it, both with checksums. So whatever is killed leaves,
    at worst, bytes at the end of the two files that nobody refers to. Processes that share a directory write segments
    of their own, and at the beginning of an epoch see what others have written by then: no lock, also across machines.
    What two of them fetch at the same time is kept twice. A power cut may lose what the system had not written yet;
    that too is found by its checksum, and fetched again.

    Every file may go bad or away at any time, the description too: what is lost is made again, and kept anew. The
    checksums in an index count the description in, so no pipeline takes another's samples for its own.

    Samples travel by pickle: a directory is to be trusted as code is.

    Args:
        folder: Made at the first epoch.
        version: The user's, part of what the directory must agree with.
    """

    def __init__(self, folder: Path, version: str) -> None:
        self.folder = folder
        self.version = version
        self._begin()
        tell_of_fork(self)

    def _forked(self) -> None:
        """See `Forkable`: what the parent has written is read from the directory, and a segment of our own written."""
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._opened = 0  # epochs under way
        self._segments: dict[str, _StoredSegment] = {}
        self._index: dict[Any, Location] = {}
        self._place_of: dict[int, StreamPlace] = {}
        self._count: int | None = None  # of a stream that has ended
        self._nbytes = 0
        self._writer: _Writer | None = None
        self._broken = False  # it cannot be written to
        self._description = ""

    # -- epochs ------------------------------------------------------------------------------------------------------

    def check(self, pipeline: str) -> None:
        """Refuse a directory that is another pipeline's, as far as that can be said already.

        Raises:
            NotADirectoryError: It is a file.
            ValueError: It holds something else.
        """
        self._is_described(pipeline)

    def _is_described(self, pipeline: str) -> bool:
        """Whether the directory says what it is of; see `check`."""
        path = self.folder / DESCRIPTION
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            text = None
        except NotADirectoryError:
            raise NotADirectoryError(
                f"disk must be a directory, got the file {str(self.folder)!r}; pass another path"
            ) from None
        theirs = None if text is None else _description_in(text)
        if theirs is None:
            others = [other for other in self.folder.iterdir() if other != path] if self.folder.is_dir() else []
            strangers = [other.name for other in others if other.suffix not in OURS]
            if strangers:
                raise ValueError(
                    f"the directory {str(self.folder)!r} holds {strangers[0]!r} and is no cache; pass one of its "
                    f"own, which may not be there yet"
                )
            if text is not None and not others:
                raise ValueError(f"{path} does not describe a cache; delete the directory")
            return False  # there is none, or it is broken
        if theirs["format"] != FORMAT:
            raise ValueError(
                f"{self.folder} is a cache of format {theirs['format']!r}, and this is {FORMAT}; delete it, or pass "
                f"another directory"
            )
        for what, our in (("pipeline", pipeline), ("version", self.version)):
            if theirs[what] != our:
                raise ValueError(
                    f"the directory {str(self.folder)!r} keeps the samples of another {what}, {theirs[what]!r}, and "
                    f"this one is {our!r}; pass a directory for each, or delete this one if it is out of date"
                )
        return True

    def open(self, pipeline: str) -> None:
        with self._lock:
            self._description = _description(pipeline, self.version)
            if not self._is_described(pipeline):
                self._describe()
                self._is_described(pipeline)  # another process may have been faster
            self._opened += 1
            self._refresh()

    def _describe(self) -> None:
        """Make the directory, and the file that says what it is of."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path, draft = self.folder / DESCRIPTION, self.folder / f"{uuid.uuid4().hex}.new"
        try:
            draft.write_text(self._description, encoding="utf-8")
            if path.exists():  # and is broken
                draft.replace(path)
                return
            try:
                os.link(draft, path)  # unlike a rename, it leaves what is there already
            except FileExistsError:
                pass
            except OSError:  # a file system without links
                draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)

    def close(self) -> None:
        with self._lock:
            self._opened -= 1
            if self._opened:
                return
            self._writer = None
            for segment in self._segments.values():
                segment.file = None

    def _refresh(self) -> None:
        """Forget what has been lost since the last time, and read what has been added to the indices."""
        for path in sorted(self.folder.glob("*.index")):
            if path.stem not in self._segments:
                self._segments[path.stem] = _StoredSegment(self.folder, path.stem)
        for segment in self._segments.values():
            size = segment.size()
            if size < segment.end:
                self._forget_after(size, segment)
            if not segment.ours:
                self._read_index(segment, size)

    def _forget_after(self, size: int, segment: _StoredSegment) -> None:
        """The samples of `segment` are gone, or end after `size` bytes."""
        segment.end = size
        for location in list(self._index.values()):
            one: Location | None = location
            while one is not None and one.segment is segment and one.offset + one.length > size:
                one = self._forget(one)
        if self._writer is not None and self._writer.segment is segment:  # nobody would find what it writes
            self._writer = None

    def _read_index(self, segment: _StoredSegment, size: int) -> None:
        """What has been added to it, as far as it is in the samples of `size` bytes."""
        try:
            with segment.index.open("rb") as file:
                file.seek(segment.read)
                data = file.read()
        except OSError:  # gone, or not to be read: its samples are made again
            return
        for key, location, end in _entries(data, segment, zlib.crc32(self._description.encode())):
            segment.read += end
            if location.offset + location.length <= size:
                self._add(key, location)

    def _add(self, key: Any, location: Location) -> None:
        kind, *rest = key
        if kind == END:
            self._count = rest[0]
            return
        if kind == "@":
            number, cursor, name, *positions = rest
            self._place_of.setdefault(number, StreamPlace(_as_tuples(cursor), read_key(name), *positions))
            name = ("@", number)
        elif kind == "":
            name = rest[0]
        else:
            name = (kind, rest[0])
        location.key = name
        location.segment.end = max(location.segment.end, location.offset + location.length)
        first = self._index.setdefault(name, location)
        if first is location:
            self._nbytes += location.length
        else:
            location.other, first.other = first.other, location

    # -- samples -----------------------------------------------------------------------------------------------------

    def find(self, key: Any) -> Any:
        if key == END:
            return MISSING if self._count is None else self._count
        return self._index.get(key, MISSING)

    def load(self, location: Location) -> Any:
        """The sample at `location`; in a thread.

        Raises:
            LostError: It is not what was written; it will be missing from now on.
        """
        while True:
            try:
                data = self._read(location)
            except (OSError, LostError) as error:
                with self._lock:
                    other = self._forget(location)
                if other is not None:
                    location = other
                    continue
                if isinstance(error, LostError):
                    raise
                raise LostError(f"{location.segment.samples} cannot be read: {error}") from error
            parts = _unpacked(memoryview(data))
            return decode(parts[0], parts[1:])

    def _read(self, location: Location) -> bytearray:
        # Held while it is read. Two threads may open a segment's file at once, and the one that is kept is the
        # later; without a holder the other would close its descriptor here, and read whatever file gets it next.
        file = location.segment.open()
        data = _read(file.fd, location.length, location.offset)
        if len(data) != location.length or zlib.crc32(data) != location.checksum:
            raise LostError(f"{location.segment.samples}: what is at byte {location.offset} is not what was kept")
        return data

    def _forget(self, location: Location) -> Location | None:
        """It turned out to be lost; returns where the sample stands now."""
        key = location.key
        if self._index.get(key) is location:  # and has not been made again meanwhile
            self._nbytes -= location.length
            if location.other is None:
                del self._index[key]
            else:
                self._index[key] = location.other
                self._nbytes += location.other.length
        return self._index.get(key)

    def put(self, key: Any, sample: Any, place: StreamPlace | None) -> None:
        """Keep `sample`; in a thread. Where the disk refuses, it warns once and keeps nothing more.

        Raises:
            Exception: What pickling `sample` raises.
        """
        if self._broken or key in self._index:
            return
        pickled, buffers = encode(sample)
        parts = _put_together([memoryview(pickled), *(memoryview(buffer).cast("B") for buffer in buffers)])
        if isinstance(key, tuple):
            kind, name = key
            written: list[Any] = [kind, name]
            if place is not None:
                written += [place.cursor, written_key(place.key), place.position, place.places]
        else:
            written = ["", key]
        self._append(written, parts)

    def put_end(self, count: int) -> None:
        if self._count is None and not self._broken:
            self._count = count
            self._append([END, count], [])

    def _append(self, key: list[Any], parts: list[memoryview]) -> None:
        checksum = 0
        for part in parts:
            checksum = zlib.crc32(part, checksum)
        length = sum(map(len, parts))
        text = json.dumps(key).encode()
        with self._lock:
            if self._broken:
                return
            try:
                writer = self._writer or self._begin_segment()
                _write(writer.samples.fd, parts)
                # Asked of the system, and not counted: somebody may have truncated the file.
                offset = os.lseek(writer.samples.fd, 0, os.SEEK_CUR) - length
                body = _RECORD.pack(0, len(text), offset, length, checksum)[4:] + text
                record = struct.pack("<I", zlib.crc32(body, zlib.crc32(self._description.encode()))) + body
                _write(writer.index.fd, [memoryview(record)])
            except OSError as error:
                self._broken = True
                self._writer = None
                warnings.warn(
                    f"aioloader: the cache in {str(self.folder)!r} cannot be written to, and keeps no more: {error}",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return
            self._add(key, Location(None, writer.segment, offset, length, checksum))

    def _begin_segment(self) -> _Writer:
        if not (self.folder / DESCRIPTION).exists():  # somebody deleted it meanwhile
            self._describe()
        name = uuid.uuid4().hex
        segment = _StoredSegment(self.folder, name)
        self._writer = writer = _Writer(segment)
        segment.ours = True
        self._segments[name] = segment
        return writer

    @property
    def _places(self) -> dict[int, StreamPlace]:
        return self._place_of

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "version": self.version}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"], state["version"])  # type: ignore[misc]


def _description(pipeline: str, version: str) -> str:
    """The text of the file that says what a directory is of."""
    content = {"format": FORMAT, "pipeline": pipeline, "version": version}
    return json.dumps({**content, "checksum": zlib.crc32(json.dumps(content).encode())}, indent=1)


def _description_in(text: str) -> dict[str, Any] | None:
    """What `text` says; None: it is broken, or none of ours."""
    try:
        found = json.loads(text)
        if found["format"] == FORMAT and text != _description(found["pipeline"], found["version"]):
            return None
    except (ValueError, KeyError, TypeError):
        return None
    return {"pipeline": None, "version": None, **found}


def _entries(data: bytes, segment: _StoredSegment, seed: int) -> Iterator[tuple[list[Any], Location, int]]:
    """The whole entries of an index, and how many bytes each is; what is cut off or broken ends them.

    Args:
        data: Of the index, from an entry on.
        segment: Whose index.
        seed: Of the checksums: the description's own.
    """
    at = 0
    while at + _RECORD.size <= len(data):
        checksum, key_length, offset, length, content = _RECORD.unpack_from(data, at)
        end = at + _RECORD.size + key_length
        if end > len(data) or zlib.crc32(data[at + 4 : end], seed) != checksum:
            return
        key = json.loads(data[at + _RECORD.size : end])
        yield key, Location(None, segment, offset, length, content), end - at
        at = end


def _put_together(parts: list[memoryview]) -> list[memoryview]:
    """`parts` behind their number and lengths, each at an aligned place."""
    head = _PARTS.pack(len(parts)) + b"".join(_LENGTH.pack(len(part)) for part in parts)
    found = [memoryview(head)]
    at = len(head)
    for part in parts:
        found += [memoryview(bytes(-at % _ALIGNED)), part]
        at += -at % _ALIGNED + len(part)
    return found


def _unpacked(data: memoryview) -> list[memoryview]:
    """The inverse."""
    (count,) = _PARTS.unpack_from(data)
    at = _PARTS.size + count * _LENGTH.size
    parts = []
    for number in range(count):
        (length,) = _LENGTH.unpack_from(data, _PARTS.size + number * _LENGTH.size)
        at += -at % _ALIGNED
        parts.append(data[at : at + length])
        at += length
    return parts


def _write(fd: int, parts: list[memoryview]) -> None:
    """All of `parts`."""
    for first in range(0, len(parts), 512):
        pending = [part for part in parts[first : first + 512] if len(part)]
        while pending:
            written = os.writev(fd, pending) if hasattr(os, "writev") else os.write(fd, pending[0])
            while pending and written >= len(pending[0]):
                written -= len(pending.pop(0))
            if written:
                pending[0] = pending[0][written:]


def _read(fd: int, length: int, offset: int) -> bytearray:
    data = bytearray(length)
    view = memoryview(data)
    done = 0
    while done < length:
        count = os.preadv(fd, [view[done:]], offset + done)
        if not count:
            break
        done += count
    return data[:done] if done < length else data


def _as_tuples(cursor: Any) -> Any:
    """JSON gives lists for what were tuples."""
    return tuple(map(_as_tuples, cursor)) if isinstance(cursor, list) else cursor
