"""The index of a tar archive: where each sample is, and which archive it is of.

`python -m aioloader index` writes it beside the archive. The format, version 1: a line that names it; a line of JSON;
zlib-compressed, little-endian

    n times 8 bytes      the bytes from the beginning of a sample to that of the next one
    n times 4 bytes      the bytes of its key
    the keys             UTF-8; bytes that are none stay what they are

and the CRC-32 of all that, in four bytes.

A sample begins with the headers of its first member. What is left out (folders, links) belongs to the sample before it,
so the samples share out all of the archive up to its end mark.

It may come from strangers: it runs nothing, numbers are bounded before memory is taken for them, and what reads a
sample by it checks that there is exactly this sample.
"""

import json
import sys
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate
from typing import Any, Final, Protocol, TypeVar

from aioloader.core.safe_text import safe_repr
from aioloader.errors import BrokenDataError
from aioloader.sources.tar_blocks import BLOCK

__all__ = [
    "SUFFIX",
    "TarIndex",
    "decode_index",
    "encode_index",
    "mark_of",
    "name_of",
    "other_version",
    "without_indexes",
]


class _Stored(Protocol):
    @property
    def key(self) -> str: ...


F = TypeVar("F", bound=_Stored)

SUFFIX: Final = ".index"
"""What is added to the name of an archive for that of its index."""

FORMAT: Final = b"aioloader tar index "
VERSION: Final = b"1"
CRC_BYTES: Final = 4

MAX_BYTES: Final = 1 << 30
"""The most that an index may have once it is decompressed: that of 30 million samples."""


@dataclass(frozen=True, slots=True)
class TarIndex:
    """Where the samples of an archive are.

    Attributes:
        archive: The archive's name, without folders.
        size: Its bytes.
        mark: Its version, and the place where that counts: see `mark_of`; None if there is none.
        starts: Where each sample begins, and where the last one ends.
        key_ends: Where each key ends in `keys`, after a 0.
        keys: All keys.
        unique: No two samples have the same key.
    """

    archive: str
    size: int
    mark: str | None
    starts: "array[int]"
    key_ends: "array[int]"
    keys: bytes
    unique: bool

    def __len__(self) -> int:
        return len(self.starts) - 1

    def key(self, number: int) -> str:
        """The key of a sample."""
        return self.keys[self.key_ends[number] : self.key_ends[number + 1]].decode("utf-8", "surrogateescape")

    def repeats(self) -> dict[int, int]:
        """Samples whose key one before them has: the how manieth repetition each of them is, by its number."""
        if self.unique:
            return {}
        seen: Counter[str] = Counter()
        found = {}
        for number in range(len(self)):
            key = self.key(number)
            if seen[key]:
                found[number] = seen[key]
            seen[key] += 1
        return found

    @property
    def checksum(self) -> int:
        """Of which samples there are, and where."""
        return zlib.crc32(self.keys, zlib.crc32(_little(self.key_ends), zlib.crc32(_little(self.starts))))

    @classmethod
    def of(cls, archive: str, size: int, mark: str | None, starts: Iterable[int], keys: Iterable[str]) -> "TarIndex":
        """The index of samples that begin at `starts`, which has the end of the last one as well."""
        encoded = [key.encode("utf-8", "surrogateescape") for key in keys]
        ends = array("Q", [0, *accumulate(map(len, encoded))])
        unique = len(set(encoded)) == len(encoded)
        return cls(archive, size, mark, array("Q", starts), ends, b"".join(encoded), unique)


def without_indexes(archives: Iterable[F]) -> list[F]:
    """What a pattern found, without the indexes of archives that it found as well."""
    found = list(archives)
    keys = {archive.key for archive in found}
    return [each for each in found if not (each.key.endswith(SUFFIX) and each.key.removesuffix(SUFFIX) in keys)]


def name_of(path: str) -> str:
    """The name of an archive, without the folders of its path or key."""
    return path.replace("\\", "/").rpartition("/")[2]


def mark_of(place: str, version: str) -> str:
    """What says that an archive is another one now, as long as it is where it was.

    Args:
        place: Where it is.
        version: Which one is there: a time of change.
    """
    return f"{sha256(place.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}:{version}"


def other_version(expected: str | None, mark: str | None) -> bool:
    """Whether the marks are of two versions in one place. A copy elsewhere has other times, and other ETags."""
    place, _, version = (expected or "").partition(":")
    here, _, now = (mark or "").partition(":")
    return bool(place) and place == here and version != now


def encode_index(index: TarIndex) -> bytes:
    """What an index file holds."""
    lengths = array("Q", (stop - start for start, stop in zip(index.starts[:-1], index.starts[1:], strict=True)))
    key_lengths = array(
        "I", (stop - start for start, stop in zip(index.key_ends[:-1], index.key_ends[1:], strict=True))
    )
    body = zlib.compress(_little(lengths) + _little(key_lengths) + index.keys)
    header = {
        "archive": index.archive,
        "size": index.size,
        "mark": index.mark,
        "start": index.starts[0],
        "samples": len(index),
        "unique": index.unique,
    }
    content = b"\n".join((FORMAT + VERSION, json.dumps(header).encode(), body))
    return content + zlib.crc32(content).to_bytes(CRC_BYTES, "little")


def decode_index(content: bytes, where: str) -> TarIndex:
    """What an index file says.

    Args:
        content: From anywhere.
        where: Its path or URL, for errors.

    Raises:
        BrokenDataError: It is no index, or one of another version, or broken.
    """
    first, _, rest = content.partition(b"\n")
    if not first.startswith(FORMAT):
        raise BrokenDataError(f"{where} is no index of a tar archive: it begins with {first[:40]!r}; {_again(where)}")
    version = first.removeprefix(FORMAT)
    if version != VERSION:
        raise BrokenDataError(
            f"{where} is an index of version {safe_repr(version[:20])}, and this release reads version {VERSION!r}; "
            f"{_again(where)}"
        )
    header, _, body = rest[:-CRC_BYTES].partition(b"\n")
    try:
        if zlib.crc32(content[:-CRC_BYTES]) != int.from_bytes(content[-CRC_BYTES:], "little"):
            raise ValueError("its checksum is wrong: it was cut off, or changed")
        return _decoded(_fields(header), body)
    except ValueError as error:
        raise BrokenDataError(f"{where} is broken: {error}; {_again(where)}") from None


def _again(where: str) -> str:
    return f"write it again: python -m aioloader index {where.removesuffix(SUFFIX)}"


def _fields(header: bytes) -> dict[str, Any]:
    """The line of JSON.

    Raises:
        ValueError: It is none, or something in it has the wrong type.
    """
    try:
        fields = json.loads(header)
    except (ValueError, RecursionError):
        raise ValueError(f"its header is no JSON: {header[:60]!r}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"its header is no object: {header[:60]!r}")
    for name in ("size", "start", "samples"):
        value = fields.get(name)
        if type(value) is not int or not 0 <= value < 1 << 63:
            raise ValueError(f"{name!r} must be an integer of at least 0, got {safe_repr(value, 60)}")
    if not isinstance(fields.get("archive"), str):
        raise ValueError(f"'archive' must be a name, got {safe_repr(fields.get('archive'), 60)}")
    if not isinstance(fields.get("unique"), bool):
        raise ValueError(f"'unique' must be true or false, got {safe_repr(fields.get('unique'), 60)}")
    if not isinstance(fields.setdefault("mark", None), str | None):
        raise ValueError(f"'mark' must be text, got {safe_repr(fields['mark'], 60)}")
    return fields


def _decoded(fields: dict[str, Any], body: bytes) -> TarIndex:
    """The index.

    Raises:
        ValueError: The body does not fit its header.
    """
    size, count = fields["size"], fields["samples"]
    if count > size // BLOCK:
        raise ValueError(f"{count} samples in an archive of {size} bytes")
    numbers = 12 * count
    data = _inflated(body)
    lengths, key_lengths = _array("Q", data[: 8 * count]), _array("I", data[8 * count : numbers])
    if len(lengths) != count or len(key_lengths) != count:
        raise ValueError(f"{count} samples were promised, and fewer are there")
    keys = data[numbers:]
    starts = list(accumulate(lengths, initial=fields["start"]))
    if count and (min(lengths) < BLOCK or any(start % BLOCK for start in starts)):
        raise ValueError(f"a sample that does not consist of blocks of {BLOCK} bytes")
    if starts[-1] > size:
        raise ValueError(f"samples up to byte {starts[-1]} of an archive of {size} bytes")
    ends = array("Q", accumulate(key_lengths, initial=0))
    if ends[-1] != len(keys):
        raise ValueError(f"keys of {ends[-1]} bytes were promised, and {len(keys)} are there")
    return TarIndex(fields["archive"], size, fields["mark"], array("Q", starts), ends, keys, fields["unique"])


def _inflated(body: bytes) -> bytes:
    """The decompressed body.

    Raises:
        ValueError: It is broken, or too large.
    """
    decompressor = zlib.decompressobj()
    try:
        data = decompressor.decompress(body, MAX_BYTES)
    except zlib.error as error:
        raise ValueError(f"it cannot be decompressed: {error}") from None
    if decompressor.unconsumed_tail:
        raise ValueError(f"it holds more than {MAX_BYTES} bytes")
    if not decompressor.eof:
        raise ValueError("it is cut off")
    return data


def _little(numbers: "array[int]") -> bytes:
    if sys.byteorder == "big":
        numbers = array(numbers.typecode, numbers)
        numbers.byteswap()
    return numbers.tobytes()


def _array(kind: str, data: bytes) -> "array[int]":
    numbers: array[int] = array(kind)
    numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers
