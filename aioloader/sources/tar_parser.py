"""From the bytes of a tar archive to the samples in it, and to errors in the places of those that are broken."""

import re
from asyncio import Event
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Final

from aioloader.core.entry import Entry
from aioloader.core.source import SourceThreads
from aioloader.errors import BrokenDataError
from aioloader.sources.compressed import MAX_WINDOW_BYTES
from aioloader.sources.pace import Pace
from aioloader.sources.parsing import Parser, parsed, stored_chunks
from aioloader.sources.read_ahead import failed
from aioloader.sources.requests import Requests
from aioloader.sources.stored_files import StoredFile
from aioloader.sources.stores import Version
from aioloader.sources.tar_blocks import BLOCK
from aioloader.sources.tar_decode import DecodeSample
from aioloader.sources.tar_format import BrokenHeaderError, EndMark, Member, TarMembers

__all__ = ["BEGINNING", "MAX_MEMBER_BYTES", "MAX_SAMPLE_BYTES", "Start", "TarLimits", "TarParser"]

Start = tuple[int, int | None, str | None]  # byte offset, mark, version
BEGINNING: Final[Start] = (0, None, None)

MAX_MEMBER_BYTES: Final = 256 << 20
MAX_SAMPLE_BYTES: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class TarLimits:
    """The most that is accepted: see the arguments of `TarShards`."""

    member_bytes: int = MAX_MEMBER_BYTES
    sample_bytes: int = MAX_SAMPLE_BYTES
    window_bytes: int = MAX_WINDOW_BYTES


class TarParser(Parser):
    """The samples of one archive.

    A sample is complete as soon as a header names a member of another one, or the archive has ended; faults after that
    do not affect it. The remaining members of a broken sample are not read.
    """

    def __init__(
        self,
        shard: StoredFile,
        index: int,
        start: Start,
        decode: DecodeSample,
        limits: TarLimits = TarLimits(),
        requests: Requests | None = None,
        *,
        lanes: int = 1,
    ) -> None:
        offset, mark, version = start
        super().__init__(shard.name, offset, mark, limits.window_bytes)
        self._shard = shard
        self._requests = requests
        self.version = Version(shard.store, shard.key, version)
        self._limits = limits
        self._index = index
        self._lanes = lanes
        self._decode = decode
        self._members = TarMembers(offset)
        self._sample: dict[str, Any] | None = None  # the current one, whose members are still coming
        self._sample_bytes = 0
        self._broken: str | None = None  # why the current sample is broken
        self._member: Member | None = None  # the current one, whose content is still coming
        self._extension = ""  # that of the current member

    @property
    def is_stored(self) -> bool:
        """Whether the archive is in a store."""
        return self._shard.store is not None

    def read(self, thread: SourceThreads, pace: Pace, turn: Event) -> AsyncGenerator[list[Entry]]:
        """The entries of the archive, read in `thread`."""
        chunks = stored_chunks(self._shard, self.version, self, thread, self._requests, pace, turn)
        return parsed(chunks, self, thread, after=(self._index + self._lanes, *BEGINNING))

    def _feed(self, piece: bytes) -> None:
        self._members.feed(piece)

    def _take(self, entries: list[Entry], deadline: float) -> bool:
        members = self._members
        while True:
            if self._member is None:
                try:
                    member = members.next()
                except BrokenHeaderError as error:
                    self._begin(entries, error.name, error.offset)
                    raise
                if member is None:
                    return False
                if isinstance(member, EndMark):
                    self._complete(entries, member.offset)
                    continue
                extension = self._begin(entries, member.name, member.offset)
                if extension is None or self._broken is not None or not self._expects(member, extension):
                    continue
                self._member, self._extension = member, extension
            if not self._add_content():
                return False
            if perf_counter() > deadline or self._has_enough(entries):
                return True

    def _begin(self, entries: list[Entry], name: str, offset: int) -> str | None:
        """Begin the member `name` at `offset`, and its sample if need be; its extension, or None if it is left out."""
        split = _split_name(name)
        if split is None:
            return None
        key, extension = split
        if self._sample is None or self._sample["__key__"] != key:
            self._complete(entries, offset)
            self._sample = {"__key__": key, "__url__": self.path}
            self._sample_bytes = 0
        return extension

    def _expects(self, member: Member, extension: str) -> bool:
        """Whether to read the content of `member`: not if it breaks the sample, or is a hard link."""
        assert self._sample is not None
        key = self._sample["__key__"]
        self._sample_bytes += BLOCK + len(member.name) + member.size
        if member.fault is not None:
            self._break(f"{member} cannot be read: {member.fault}")
        elif _UNSAFE.search(member.name):
            self._break(
                f"the name {member.name!r} at byte {member.offset} leads out of the archive, and names must be "
                f"relative and without '..'; nothing is extracted to disk, but pack it again"
            )
        elif extension in self._sample:
            self._break(
                f"the sample {key!r} has two members {extension!r}, the second one {member.name!r} at byte "
                f"{member.offset}; each extension may come once in a sample"
            )
        elif member.size > self._limits.member_bytes:
            self._break(
                f"{member} has {member.size} bytes, and at most {self._limits.member_bytes} are allowed; pass a larger "
                f"max_member_bytes"
            )
        elif self._sample_bytes > self._limits.sample_bytes:
            self._break(
                f"the sample {key!r} has {self._sample_bytes} bytes up to {member}, and at most "
                f"{self._limits.sample_bytes} are allowed; pass a larger max_sample_bytes, unless the names have a dot "
                f"too early: what is before the first one is the key"
            )
        elif member.link is not None:
            self._link(member, member.link, extension)
        else:
            return True
        return False

    def _link(self, member: Member, target: str, extension: str) -> None:
        """Copy the content of a hard link from the member that has it.

        Only within the same sample: a resume begins at a sample, and would not find members before it.
        """
        assert self._sample is not None
        key, other = _split_name(target) or (None, "")
        content = self._sample.get(other) if key == self._sample["__key__"] else None
        if isinstance(content, bytes):
            self._sample[extension] = content
        else:
            self._break(
                f"{member} is a hard link to {target!r}, which is not a member before it in the same sample; pack it "
                f"again with tar --hard-dereference"
            )

    def _add_content(self) -> bool:
        """Add the content of the current member; False if it is not complete yet."""
        assert self._sample is not None
        try:
            content = self._members.content()
        except BrokenDataError as error:
            self._break(f"{self._member} cannot be read: {error}")
        else:
            if content is None:
                return False
            self._sample[self._extension] = content
        self._member = None
        return True

    def _break(self, why: str) -> None:
        """Mark the sample as broken, and drop its members."""
        assert self._sample is not None
        self._broken = why
        self._sample = {"__key__": self._sample["__key__"]}

    def _complete(self, entries: list[Entry], offset: int) -> None:
        """Add the entry of the current sample: the next one, or the end, is at `offset`."""
        sample, self._sample = self._sample, None
        if sample is None:
            return
        cursor = (self._index, offset, self.trail.mark(offset), self.version.mark)
        key = f"{self.path}:{sample['__key__']}"
        broken, self._broken = self._broken, None
        if broken is None:
            try:
                entries.append(Entry(self._decode(sample), cursor, key, 0))
                return
            except BaseException as error:  # also SystemExit and the like: the consumer gets it, in this position
                raised: BaseException = error
        else:
            raised = BrokenDataError(f"{self.path}: {broken}")
        entries.append(failed(raised, cursor, key))

    def _finish(self) -> list[Entry]:
        self._members.finish()
        return []

    def _named(self, error: BrokenDataError) -> BrokenDataError:
        named = super()._named(error)
        if self._sample is None:
            return named
        why = "may lack members and is left out" if self._broken is None else f"is left out: {self._broken}"
        return BrokenDataError(f"{named}; the sample {self._sample['__key__']!r} {why}")


_UNSAFE: Final = re.compile(r"^/|^[A-Za-z]:[\\/]|(^|[\\/])\.\.([\\/]|$)")
_META: Final = re.compile(r"__[^/]*__($|/)")


def _split_name(name: str) -> tuple[str, str] | None:
    """Key and extension; None for names that WebDataset leaves out."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not dot or not stem or _META.match(name):
        return None
    return f"{folder}{slash}{stem}", extension.lower()
