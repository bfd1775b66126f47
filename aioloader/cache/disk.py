"""Samples kept in a directory, safe against a kill at any moment, and shared by any number of processes."""

import threading
import uuid
import warnings
import zlib
from pathlib import Path
from typing import Any

from aioloader.cache.description import CacheDescription
from aioloader.cache.segment import Location, LostError, SegmentWriter, StoredSegment, pack_sample, unpack_sample
from aioloader.cache.store import END, MISSING, Store, StreamPlace
from aioloader.core.forks import tell_of_fork
from aioloader.core.keys import read_key, written_key

__all__ = ["DiskStore"]


class DiskStore(Store):
    """A directory of segments, each written by one process only, by appending.

    A sample is written first and its entry in the index after it, both with checksums. So a kill leaves, at worst,
    bytes at the ends of the two files that nothing refers to. Processes that share a directory write separate segments,
    and see at the beginning of an epoch what others have written by then: no lock is needed, not even across machines.
    What two of them fetch at the same time is kept twice. A power cut may lose what the system had not written yet;
    the checksums show that too, and the sample is fetched again.

    Any file may be damaged or deleted at any time, the description included: what is lost is made again, and kept
    again. The checksums in an index include the description, so no pipeline takes another's samples for its own.

    Samples are pickled: a directory must be trusted as code is.

    Args:
        folder: Made at the first epoch.
        version: The user's; must be the same as in the directory.
    """

    def __init__(self, folder: Path, version: str) -> None:
        self.folder = folder
        self.version = version
        self._begin()
        tell_of_fork(self)

    def _forked(self) -> None:
        """See `Forkable`: the child reads what the parent has written, and writes a segment of its own."""
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._epochs_open = 0
        self._segments: dict[str, StoredSegment] = {}
        self._index: dict[Any, Location] = {}
        self._place_of: dict[int, StreamPlace] = {}
        self._count: int | None = None  # the length of a stream that has ended
        self._nbytes = 0
        self._writer: SegmentWriter | None = None
        self._broken = False  # it cannot be written to
        self._description: CacheDescription

    # -- epochs ------------------------------------------------------------------------------------------------------

    def check(self, pipeline: str) -> None:
        """Refuse a directory that cannot be the cache of this pipeline.

        Raises:
            NotADirectoryError: It is a file.
            ValueError: It is the cache of another pipeline, or no cache.
        """
        CacheDescription(self.folder, pipeline, self.version).matches()

    def open(self, pipeline: str) -> None:
        with self._lock:
            self._description = CacheDescription(self.folder, pipeline, self.version)
            if not self._description.matches():
                self._description.write()
                self._description.matches()  # another process may have written its own first
            self._epochs_open += 1
            self._refresh()

    def close(self) -> None:
        with self._lock:
            self._epochs_open -= 1
            if self._epochs_open:
                return
            self._writer = None
            for segment in self._segments.values():
                segment.file = None

    def _refresh(self) -> None:
        """Forget samples that have been lost since the last time, and read what has been added to the indices."""
        for path in sorted(self.folder.glob("*.index")):
            if path.stem not in self._segments:
                self._segments[path.stem] = StoredSegment(self.folder, path.stem)
        for segment in self._segments.values():
            size = segment.size()
            if size < segment.end:
                self._forget_after(size, segment)
            if not segment.ours:
                for key, location in segment.new_entries(self._description.checksum):
                    if location.offset + location.length <= size:
                        self._add(key, location)

    def _forget_after(self, size: int, segment: StoredSegment) -> None:
        """Forget the samples of `segment` beyond its first `size` bytes, which are all that is there."""
        segment.end = size
        for location in list(self._index.values()):
            one: Location | None = location
            while one is not None and one.segment is segment and one.offset + one.length > size:
                one = self._forget(one)
        if self._writer is not None and self._writer.segment is segment:  # what it writes would not be found
            self._writer = None

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

    def find(self, key: object) -> Any:
        if key == END:
            return MISSING if self._count is None else self._count
        return self._index.get(key, MISSING)

    def load(self, location: Location) -> Any:
        """The sample at `location`; called in a thread.

        Raises:
            LostError: It is not what was written; it is missing from now on.
        """
        while True:
            try:
                data = location.segment.read(location)
            except (OSError, LostError) as error:
                with self._lock:
                    other = self._forget(location)
                if other is not None:
                    location = other
                    continue
                if isinstance(error, LostError):
                    raise
                raise LostError(f"{location.segment.samples} cannot be read: {error}") from error
            return unpack_sample(data)

    def _forget(self, location: Location) -> Location | None:
        """Remove a lost location; returns another one of the same sample."""
        key = location.key
        if self._index.get(key) is location:  # it may have been made again by another thread
            self._nbytes -= location.length
            if location.other is None:
                del self._index[key]
            else:
                self._index[key] = location.other
                self._nbytes += location.other.length
        return self._index.get(key)

    def put(self, key: object, sample: object, place: StreamPlace | None) -> None:
        """Keep `sample`; called in a thread. When the disk refuses, warns once and keeps nothing more.

        Raises:
            Exception: What pickling `sample` raises.
        """
        if self._broken or key in self._index:
            return
        parts = pack_sample(sample)
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

    def _append(self, key: list[Any], parts: list[Any]) -> None:
        checksum = 0
        for part in parts:
            checksum = zlib.crc32(part, checksum)
        length = sum(map(len, parts))
        with self._lock:
            if self._broken:
                return
            try:
                writer = self._writer or self._begin_segment()
                location = writer.append(key, parts, length, checksum, self._description.checksum)
            except OSError as error:
                self._broken = True
                self._writer = None
                warnings.warn(
                    f"aioloader: the cache in {str(self.folder)!r} cannot be written to, and keeps no more: {error}",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return
            self._add(key, location)

    def _begin_segment(self) -> SegmentWriter:
        if not self._description.path.exists():  # deleted since `open`
            self._description.write()
        name = uuid.uuid4().hex
        self._writer = SegmentWriter(self.folder, name)
        self._segments[name] = self._writer.segment
        return self._writer

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


def _as_tuples(cursor: object) -> Any:
    """Undo what JSON does to the tuples of a cursor."""
    return tuple(map(_as_tuples, cursor)) if isinstance(cursor, list) else cursor
