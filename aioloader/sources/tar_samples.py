"""Where the samples of indexed archives are, and what is made of their bytes."""

import os
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from operator import index as as_index
from typing import Any, Final
from zlib import crc32

from aioloader.core.entry import Entry
from aioloader.core.keys import PartKey
from aioloader.errors import BrokenDataError
from aioloader.sources.joined import ArchiveRange
from aioloader.sources.stored_files import StoredFile
from aioloader.sources.tar_blocks import BLOCK
from aioloader.sources.tar_decode import DecodeSample
from aioloader.sources.tar_index import TarIndex
from aioloader.sources.tar_parser import BEGINNING, TarLimits, TarParser

__all__ = ["TarSamples", "changed"]

SMALL_BYTES: Final = 64 << 10

_END: Final = bytes(BLOCK)
"""An end mark: what comes before it is whole."""


class TarSamples:
    """The samples of archives, by number, in the order of the archives.

    Args:
        archives: Where they are.
        indexes: Of each of them, and for a file its size and its time of change when the index was compared with it.
        decode: Makes values of members.
        limits: The most that is accepted.
    """

    def __init__(
        self,
        archives: Sequence[StoredFile],
        indexes: Sequence[tuple[TarIndex, tuple[int, int] | None]],
        decode: DecodeSample,
        limits: TarLimits,
    ) -> None:
        self.archives = tuple(archives)
        self.indexes = tuple(index for index, _ in indexes)
        self._names = tuple(archive.name for archive in archives)
        self._seen = tuple(seen for _, seen in indexes)
        self._firsts = list(accumulate(map(len, self.indexes), initial=0))
        self._repeats = tuple(index.repeats() for index in self.indexes)
        self._decode = decode
        self._limits = limits

    @cached_property
    def checksum(self) -> int:
        """Of which samples there are, in which order."""
        return crc32(repr([index.checksum for index in self.indexes]).encode())

    def __len__(self) -> int:
        return self._firsts[-1]

    def number(self, key: Any) -> int:
        """`key` as an index of a sequence: from the end where it is negative.

        Raises:
            IndexError: There is no such sample.
        """
        number = as_index(key)
        if not -len(self) <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        return number % len(self)

    def _find(self, number: int) -> tuple[int, int]:
        """The archive of a sample, and its number there."""
        archive = bisect_right(self._firsts, number) - 1
        return archive, number - self._firsts[archive]

    def place(self, number: int) -> ArchiveRange:
        """Where a sample is."""
        archive, at = self._find(number)
        starts = self.indexes[archive].starts
        return ArchiveRange(archive, starts[at], starts[at + 1])

    def name(self, number: int) -> str | PartKey:
        """What a sample is called: its archive and its key.

        Where an archive has a key twice, the second one says so: by names, caches tell samples apart.
        """
        archive, at = self._find(number)
        name = self._name(archive, at)
        repeat = self._repeats[archive].get(at)
        return name if repeat is None else PartKey(name, repeat)

    def _name(self, archive: int, at: int) -> str:
        return f"{self._names[archive]}:{self.indexes[archive].key(at)}"

    def sample(self, number: int, pieces: Sequence[Any]) -> dict[str, Any]:
        """The sample that these bytes are.

        Raises:
            BrokenDataError: It is broken; or they are none, or another one, so that the index does not fit.
            Exception: That of the function that decodes a member.
        """
        archive, at = self._find(number)
        index = self.indexes[archive]
        start, stop = index.starts[at : at + 2]
        name = self._name(archive, at)
        try:
            entries = self._parsed(archive, start, pieces)
        except BrokenDataError as error:
            raise BrokenDataError(self._misfit(archive, name, start, str(error))) from error
        if len(entries) != 1 or entries[0].key != name or entries[0].cursor[1] != stop:
            there = ", ".join(str(entry.key) for entry in entries[:3]) or "none"
            raise BrokenDataError(self._misfit(archive, name, start, f"what is there: {there}"))
        if entries[0].error is not None:
            raise entries[0].error
        sample: dict[str, Any] = entries[0].value
        return sample

    def _parsed(self, archive: int, start: int, pieces: Sequence[Any]) -> list[Entry]:
        _, mark, version = BEGINNING
        parser = TarParser(self.archives[archive], archive, (start, mark, version), self._decode, self._limits)
        entries: list[Entry] = []
        for piece in _with_end(pieces):
            entries += parser.parse(piece)
            while parser.has_more:
                entries += parser.parse(b"")
        return entries

    def _misfit(self, archive: int, name: str, start: int, why: str) -> str:
        return f"{name} is not at byte {start}, where the index says: {why}; {_write_again(self._names[archive])}"

    def check_file(self, number: int, status: os.stat_result) -> None:
        """Refuse an archive in a file that was changed since its index was compared with it.

        Raises:
            BrokenDataError: It was.
        """
        archive, _ = self._find(number)
        if (status.st_size, status.st_mtime_ns) != self._seen[archive]:
            raise BrokenDataError(changed(self._names[archive], self.indexes[archive].size, status.st_size))


def _with_end(pieces: Sequence[Any]) -> Sequence[Any]:
    """The bytes of a sample and an end mark after it: as one where that is cheaper than another call of the parser."""
    pieces = (*pieces, _END)
    return (b"".join(pieces),) if sum(map(len, pieces)) <= SMALL_BYTES else pieces


def changed(name: str, before: int, now: int) -> str:
    """The error text of an archive that is not the one that was indexed."""
    what = f"it had {before} bytes, and has {now} now" if before != now else "its size is the same, its version is not"
    return f"{name} was changed since its index was written: {what}; {_write_again(name)}"


def _write_again(name: str) -> str:
    return f"restore it, or write its index again: python -m aioloader index {name}"
