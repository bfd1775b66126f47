"""Reads an archive from front to back to make its index: with the reader of `TarShards`, and so with its checks."""

from collections.abc import Iterable
from typing import Any

from aioloader.core.entry import Entry
from aioloader.sources.stored_files import StoredFile
from aioloader.sources.tar_decode import DecodeSample
from aioloader.sources.tar_index import TarIndex, name_of
from aioloader.sources.tar_parser import BEGINNING, TarParser

__all__ = ["Scan"]


class Scan:
    """The samples of one archive, in its bytes, which come in pieces that end anywhere.

    Args:
        archive: Whose bytes they are.

    Attributes:
        broken: What is wrong with samples that cannot be read, though those after them can.
        read: The bytes so far.
    """

    def __init__(self, archive: StoredFile) -> None:
        self._archive = archive
        self._parser = TarParser(archive, 0, BEGINNING, DecodeSample(False))
        self._starts = [0]
        self._keys: list[str] = []
        self.broken: list[str] = []
        self.read = 0

    def feed(self, piece: Any) -> None:
        """Take the next piece.

        Raises:
            BrokenDataError: The rest of the archive cannot be read.
        """
        self.read += len(piece)
        self._add(self._parser.parse(piece))
        while self._parser.has_more:
            self._add(self._parser.parse(b""))

    def finish(self, mark: str | None) -> TarIndex:
        """The index, after the last piece.

        Args:
            mark: Of the archive's version.

        Raises:
            BrokenDataError: The archive is not complete.
        """
        self._add(self._parser.finish())
        return TarIndex.of(name_of(self._archive.key), self.read, mark, self._starts, self._keys)

    def _add(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self._starts.append(entry.cursor[1])
            self._keys.append(str(entry.key).removeprefix(f"{self._parser.path}:"))
            if entry.error is not None:
                self.broken.append(str(entry.error))
