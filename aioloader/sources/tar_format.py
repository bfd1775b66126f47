"""The members of a tar archive that arrives in pieces.

The standard library's `tarfile` in stream mode takes 50 µs per member, and stops silently at a header that is broken or
missing in the middle, so samples would be lost. Here each of these is an error, and a member takes 5 µs. Nothing is
written to disk, so names are harmless; the caller checks them.

Only what is asked for is buffered: a member's content after `content()`, and headers of up to a megabyte.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, Final
from zlib import adler32

from aioloader.errors import BrokenDataError
from aioloader.sources.tar_blocks import BLOCK, TarBlocks
from aioloader.sources.tar_fields import number, octal, text
from aioloader.sources.tar_pax import PaxHeaders
from aioloader.sources.tar_sparse import MAX_SPANS, SparseMap

__all__ = ["BrokenHeaderError", "EndMark", "Member", "TarMembers"]

_ZEROS: Final = bytes(BLOCK)
_FILES: Final = b"0\x007S1"
_HARD_LINK: Final = b"1"
_SPARSE: Final = b"S"
_EXTENSIONS: Final = b"xXgLK"  # headers about the next one: pax, GNU long names and link targets
_WITHOUT_DATA: Final = b"123456"  # links, devices, folders, pipes
_NO_PAX: Final = PaxHeaders()
_NAME_BYTES: Final = 100  # what fits into a header

MAX_HEADER_BYTES: Final = 1 << 20
"""The most that a pax header or a long name may have. Paths have up to a few kilobytes; extended attributes, which pax
headers hold too, up to 64 KiB each."""


@dataclass(slots=True)
class Member:
    """A file in an archive, or a hard link to one.

    Attributes:
        name: As the archive has it.
        offset: Where its headers begin.
        size: The size of its content.
        link: For a hard link, the member that has the content.
        fault: Why it cannot be read; the members after it can.
    """

    name: str
    offset: int
    size: int
    link: str | None = None
    fault: str | None = None

    def __str__(self) -> str:
        return f"the member {self.name!r} at byte {self.offset}"


@dataclass(frozen=True, slots=True)
class EndMark:
    """The end of an archive; another one may follow in the same file."""

    offset: int


class BrokenHeaderError(BrokenDataError):
    """A header without a size, so that the next one cannot be found.

    Attributes:
        name: The member's name, as far as it is known.
        offset: Where its headers begin.
    """

    def __init__(self, message: str, name: str, offset: int) -> None:
        super().__init__(message)
        self.name = name
        self.offset = offset


class TarMembers:
    """The members in the bytes that were fed, one after the other.

    Args:
        offset: Where in the archive the first byte is; a member must begin there.
    """

    def __init__(self, offset: int = 0) -> None:
        self._blocks = TarBlocks(offset)
        self._current = _CurrentMember(offset)
        self._members = _members(self._blocks, self._current)  # does not refer to `self`, which would be a cycle

    def feed(self, piece: Any) -> None:
        """Add a piece of the archive: bytes, or another buffer."""
        self._blocks.feed(piece)

    def next(self) -> Member | EndMark | None:
        """The next member, whose content may still be coming; None if its headers are not complete yet.

        The content of the member before is skipped if it was not asked for. Only files and hard links to files are
        returned. Archives that were written one after the other are read as one.

        Raises:
            BrokenDataError: This is not a tar archive, or the rest of it cannot be read.
        """
        return next(self._members)

    def content(self) -> bytes | None:
        """The content of the current member, once; None if it is not complete yet.

        Raises:
            BrokenDataError: It is broken; the members after it can be read.
        """
        current = self._current
        stored = self._blocks.take(current.stored)
        if stored is None:
            return None
        current.stored = 0
        if current.sparse is None:
            return stored
        try:
            return current.sparse.expand(stored)
        except ValueError as error:
            raise BrokenDataError(f"its sparse map has {error}") from None

    def finish(self) -> None:
        """Check that the archive is complete, after its last byte.

        Raises:
            BrokenDataError: It is not.
        """
        total, begin = self._blocks.total, self._current.begin
        if self._current.end is not None:
            if self._blocks.rest().strip(b"\0"):
                raise BrokenDataError(f"there is something after the end mark, at byte {begin}, that is not an archive")
            return
        if not total:
            raise BrokenDataError("the file is empty, and even an archive without members has an end mark")
        if total > begin:
            raise BrokenDataError(f"the archive is truncated: it ends at byte {total}, in the member at {begin}")
        raise BrokenDataError(
            f"the archive is truncated, or its writer was not closed: it ends at byte {total} without an end mark"
        )


@dataclass(slots=True)
class _CurrentMember:
    """The member that is being read.

    Attributes:
        begin: Where its headers begin.
        end: Where the end mark is, if only zeros came after it.
        stored: How many bytes of its content have not been used.
        sparse: Where these belong in a sparse file.
    """

    begin: int
    end: int | None = None
    stored: int = 0
    sparse: SparseMap | None = None


def _members(blocks: TarBlocks, current: _CurrentMember) -> Iterator[Member | EndMark | None]:
    """Read headers; None means that more bytes are needed."""
    while True:
        if current.stored:
            blocks.skip(current.stored)
            current.stored = 0
        while blocks.missing:
            yield None
        begin = current.begin = blocks.offset
        while (block := blocks.take(BLOCK)) is None:
            yield None
        if block == _ZEROS:
            if current.end is None:
                current.end = begin
                yield EndMark(begin)
            continue
        kind, name, size = _header(block, begin, begin, current.end is not None)
        current.end = None
        pax = _NO_PAX
        if kind in _EXTENSIONS:
            pax = PaxHeaders()
            block, kind, name, size = yield from _extensions(blocks, pax, begin, kind, size)
        current.stored = size = 0 if kind in _WITHOUT_DATA else size
        current.sparse = None
        if kind in _FILES:
            link = (pax.link or text(block[157:257])) if kind == _HARD_LINK else None
            member = Member(name, begin, size, link, pax.fault)
            if kind == _SPARSE or pax.sparse is not None or pax.fault is not None:
                yield from _complete(member, blocks, current, block, pax)
            yield member


def _extensions(
    blocks: TarBlocks, pax: PaxHeaders, begin: int, kind: bytes, size: int
) -> Generator[None, None, tuple[bytes, bytes, str, int]]:
    """Read the headers before a member's own into `pax`, then that one; each `yield` waits for bytes.

    Returns:
        The member's own header, and the member's kind, name and size.
    """
    while True:
        yield from _extension(blocks, pax, kind, size)
        at = blocks.offset
        while (block := blocks.take(BLOCK)) is None:
            yield
        kind, name, size = _header(block, at, begin, False, pax.name)
        if kind not in _EXTENSIONS:
            return block, kind, name, size if pax.size is None else pax.size


def _complete(
    member: Member, blocks: TarBlocks, current: _CurrentMember, header: bytes, pax: PaxHeaders
) -> Iterator[None]:
    """Find where the stored bytes of a sparse member belong, and whether its name is known.

    Each `yield` waits for bytes: GNU's own format has more of the map after `header`, the member's own.

    Raises:
        BrokenDataError: The name may be lost with headers that cannot be read.
    """
    current.sparse = pax.sparse
    try:
        if header[156:157] == _SPARSE:
            more = yield from _map_blocks(blocks, header)
            current.sparse = SparseMap.of_header(header, more)
        if current.sparse is not None:
            current.sparse.check(member.size)
            member.size = current.sparse.size
    except ValueError as error:
        member.fault = member.fault or f"its sparse map has {error}"
    if member.fault is not None and not pax.name and _may_be_cut(member.name):
        raise BrokenDataError(f"the member at byte {member.offset} has no name that can be read: {member.fault}")


def _map_blocks(blocks: TarBlocks, header: bytes) -> Generator[None, None, list[bytes]]:
    """The blocks that continue the map in `header`; each `yield` waits for bytes."""
    more: list[bytes] = []
    goes_on = header[482]
    while goes_on:
        while (block := blocks.take(BLOCK)) is None:
            yield
        goes_on = block[504]
        if len(more) <= MAX_SPANS // 21:  # 21 spans in each
            more.append(block)
    return more


def _extension(blocks: TarBlocks, pax: PaxHeaders, kind: bytes, size: int) -> Iterator[None]:
    """Read the content of a header before a member's own; each `yield` waits for bytes."""
    at = blocks.offset
    if kind == b"g":  # a comment for all members after it
        blocks.skip(size)
        return
    what = "pax header" if kind in b"xX" else "long name"
    if size > MAX_HEADER_BYTES:
        pax.fault = f"the {what} at byte {at} has {size} bytes, and at most {MAX_HEADER_BYTES} are allowed"
        blocks.skip(size)
        return
    while (content := blocks.take(size)) is None:
        yield
    if kind == b"L":
        pax.name = text(content)
    elif kind == b"K":
        pax.link = text(content)
    else:
        try:
            pax.read_pax(content)
        except ValueError as error:
            pax.fault = f"the {what} at byte {at} has {error}"


def _header(
    block: bytes, at: int, begin: int, is_after_end: bool, pax_name: str | None = None
) -> tuple[bytes, str, int]:
    """Kind, name and size in the header at `at`.

    Args:
        block: The header.
        at: Its offset.
        begin: The offset of the member's first header.
        is_after_end: Whether an end mark comes before it.
        pax_name: The name that the headers before it give.

    Raises:
        BrokenDataError: It is not a header, or has no size.

    Source: IEEE Std 1003.1, pax, "ustar Interchange Format"; GNU tar manual, "Basic Tar Format".
    """
    try:
        expected = octal(block[148:156])
        # The checksum counts its own field as eight spaces. Some old programs sum signed bytes.
        if _sum(block) - sum(block[148:156]) + 256 != expected and _signed_sum(block) != expected:
            raise ValueError("wrong")
    except ValueError as error:
        if is_after_end:
            what = "there is something after the end mark that is not an archive"
        else:
            what = "the file is not a tar archive" if at == 0 else "the archive is broken"
        raise BrokenDataError(f"{what}: there is no member header at byte {at}: its checksum is {error}") from None
    kind = block[156:157]
    name = pax_name
    if not name:
        name = text(block[:100])
        if block[257:263] == b"ustar\0" and block[345]:
            name = f"{text(block[345:500])}/{name}"
    try:
        size = number(block[124:136])
    except ValueError as error:
        message = (
            f"the archive is broken: the size of the member at byte {begin}, in the field at {at + 124}, is {error}"
        )
        if kind in _EXTENSIONS and not pax_name:
            raise BrokenDataError(message) from None
        raise BrokenHeaderError(message, name, begin) from None
    if kind == b"\0" and name.endswith("/"):  # a folder as before POSIX
        kind = b"5"
    return kind, name, size


def _sum(block: bytes) -> int:
    """The sum of all bytes. `sum` takes 2 µs; half of an Adler-32 is the sum plus 1, exact for up to 256 bytes."""
    return (adler32(block[:256]) & 0xFFFF) + (adler32(block[256:]) & 0xFFFF) - 2


def _signed_sum(block: bytes) -> int:
    signed = [byte - 256 if byte > 127 else byte for byte in block[:148] + block[156:]]
    return sum(signed) + 256


def _may_be_cut(name: str) -> bool:
    """Whether `name` may be the beginning of a longer one that did not fit into the member's own header."""
    return len(name) >= _NAME_BYTES or not name.isascii() or "?" in name
