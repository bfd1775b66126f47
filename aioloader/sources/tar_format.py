"""The members of a tar archive that arrives in pieces.

The standard library's `tarfile` in stream mode takes 50 µs per member, and ends in silence at a header that is broken
or missing in the middle: samples would be lost without a word. Here each of these is an error, and a member takes 5 µs.
Nothing is ever written to disk, so names are no danger; they are judged by the caller.
"""

from dataclasses import dataclass
from typing import Any, Final

from aioloader.errors import BrokenDataError

__all__ = ["Member", "TarMembers"]

BLOCK: Final = 512
_ZEROS: Final = bytes(BLOCK)
_REGULAR: Final = b"0\x007"
_EXTENSIONS: Final = b"xXgLK"  # headers that belong to the next one: pax, GNU long names and link targets
_WITHOUT_DATA: Final = b"123456"  # links, devices, folders, pipes


@dataclass(slots=True)
class Member:
    """One file in an archive.

    Attributes:
        name: As it is written there.
        data: Its content; None for what is no regular file.
        offset: Where its headers begin.
    """

    name: str
    data: bytes | None
    offset: int


class TarMembers:
    """The members, one behind the other, as far as the bytes that were fed go.

    Args:
        offset: Where in the archive the first byte stands; the beginning of a member.
    """

    def __init__(self, offset: int = 0) -> None:
        self._begin = offset  # of what is kept
        self._pieces: list[Any] = []
        self._data = b""
        self._at = 0  # in `data`: what is before has been used
        self._held = 0  # bytes in `data` behind `at`, and in `pieces`
        self._needed = BLOCK  # bytes without which there is no use in looking
        self.end: int | None = None  # where the mark of the end stands, if nothing but zeros came after it

    @property
    def offset(self) -> int:
        """Where in the archive the next member begins."""
        return self._begin + self._at

    def feed(self, piece: Any) -> None:
        """More of the archive: bytes, or another buffer."""
        self._pieces.append(piece)
        self._held += len(piece)

    def next(self) -> Member | None:
        """The next member; None: its bytes are not all there.

        Archives that were written one behind the other are read as one.

        Raises:
            BrokenDataError: This is no tar archive, or a broken one.
        """
        if self._held < self._needed:
            return None
        if self._pieces:
            self._join()
        data, start = self._data, self._at
        at = start
        name: str | None = None
        size: int | None = None
        while True:
            body = at + BLOCK
            if body > len(data):
                return self._not_before(body)
            header = data[at:body]
            if header == _ZEROS and at == start:
                if self.end is None:
                    self.end = self._begin + at
                start = self._at = at = body
                self._held -= BLOCK
                continue
            kind, plain_name, plain_size = _header(header, self._begin + at)
            if kind not in _EXTENSIONS:
                break
            at = body + _padded(plain_size)
            if at > len(data):
                return self._not_before(at)
            content = data[body : body + plain_size]
            if kind == b"L":
                name = _text(content)
            elif kind in b"xX":
                pax = _pax(content, self._begin + body)
                name = pax.get("path", name)
                size = int(pax["size"]) if "size" in pax else size
        if size is None:
            size = plain_size
        end = body if kind in _WITHOUT_DATA else body + _padded(size)
        if end > len(data):
            return self._not_before(end)
        self.end = None
        self._held -= end - start
        self._at = end
        self._needed = BLOCK
        content_of = data[body : body + size] if kind in _REGULAR else None
        return Member(plain_name if name is None else name, content_of, self._begin + start)

    def _join(self) -> None:
        """Put what is left and what was fed into one."""
        self._begin += self._at
        rest = self._data[self._at :]
        if not rest and len(self._pieces) == 1 and type(self._pieces[0]) is bytes:
            self._data = self._pieces[0]
        else:
            self._data = b"".join([rest, *self._pieces])
        self._at = 0
        self._pieces.clear()

    def _not_before(self, end: int) -> Member | None:
        """Look again when `data` reaches up to `end`."""
        self._needed = end - self._at
        return None

    def finish(self) -> None:
        """There are no more bytes.

        Raises:
            BrokenDataError: The archive is not complete.
        """
        if self.end is not None and not self._held:
            return
        total = self.offset + self._held
        if not total:
            raise BrokenDataError("the file is empty, and even an archive without members has an end mark")
        if self._held:
            raise BrokenDataError(f"the archive is truncated: it ends at byte {total}, in the member at {self.offset}")
        raise BrokenDataError(
            f"the archive is truncated, or its writer was not closed: it ends at byte {total} without an end mark"
        )


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _header(block: bytes, offset: int) -> tuple[bytes, str, int]:
    """Kind, name and size in a header.

    Source: IEEE Std 1003.1, pax, "ustar Interchange Format"; GNU tar manual, "Basic Tar Format".
    """
    try:
        expected = _octal(block[148:156])
        # The checksum counts its own field as eight spaces. Some old writers summed signed bytes.
        if sum(block) - sum(block[148:156]) + 256 != expected and _signed_sum(block) != expected:
            raise ValueError("its checksum is wrong")
        kind = block[156:157]
        size = _number(block[124:136])
    except ValueError as error:
        what = "the file is no tar archive" if offset == 0 else "the archive is broken"
        raise BrokenDataError(f"{what}: there is no member header at byte {offset}: {error}") from None
    name = _text(block[:100])
    if block[257:263] == b"ustar\0" and block[345]:
        name = f"{_text(block[345:500])}/{name}"
    if kind == b"S":
        raise BrokenDataError(f"the member {name!r} at byte {offset} is sparse, which is not read; pack it without -S")
    if kind == b"\0" and name.endswith("/"):  # as written before POSIX
        kind = b"5"
    return kind, name, size


def _signed_sum(block: bytes) -> int:
    signed = [byte - 256 if byte > 127 else byte for byte in block[:148] + block[156:]]
    return sum(signed) + 256


def _octal(field: bytes) -> int:
    return int(field.partition(b"\0")[0].strip() or b"0", 8)


def _number(field: bytes) -> int:
    if not field[0] & 0x80:
        return _octal(field)
    if field[0] != 0x80:
        raise ValueError("its size is negative")
    return int.from_bytes(field[1:])


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _pax(content: bytes, offset: int) -> dict[str, str]:
    """The records of a pax header: `length key=value`, a line each."""
    records: dict[str, str] = {}
    at = 0
    while at < len(content) and content[at]:
        try:
            length = int(content[at : content.index(b" ", at)])
            line = content[content.index(b" ", at) + 1 : at + length]
            key, equals, value = line.partition(b"=")
            if length <= 0 or not equals or not line.endswith(b"\n"):
                raise ValueError
        except ValueError:
            raise BrokenDataError(f"the archive is broken: its pax header at byte {offset} makes no sense") from None
        records[_text(key)] = value[:-1].decode("utf-8", "surrogateescape")
        at += length
    if any(key.startswith("GNU.sparse.") for key in records):
        raise BrokenDataError(f"the member at byte {offset} is sparse, which is not read; pack it without -S")
    return records
