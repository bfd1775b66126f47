"""Sparse members: only the data between the holes of a file is stored, and a map says where it belongs.

`tar -S` writes them: in GNU's own format the map is in the header and in blocks after it; in pax archives it is in the
pax header (versions 0.0 and 0.1) or at the beginning of what is stored (1.0). The standard library and so WebDataset
read all of these.

Source: GNU tar manual, "Storing Sparse Files".
"""

from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from typing import Final, Self

from aioloader.sources.tar_fields import digits, number

__all__ = ["SparseMap"]

Span = tuple[int, int]  # where it begins in the file, and how long it is

MAX_SPANS: Final = 1 << 16
MAX_MAP_BYTES: Final = 1 << 20  # of a map that is stored as text

_BLOCK: Final = 512


@dataclass(slots=True)
class SparseMap:
    """Where the parts of a sparse file belong.

    Attributes:
        size: The size of the file, holes included.
        spans: In order; None if the map is at the beginning of the stored bytes.
    """

    size: int
    spans: list[Span] | None

    @classmethod
    def of_pax(cls, records: list[tuple[str, bytes]]) -> Self:
        """The map in those records of a pax header that begin with "GNU.sparse.".

        Raises:
            ValueError: They are broken.
        """
        ours = [(key.removeprefix("GNU.sparse."), value) for key, value in records]
        pax = dict(ours)
        version = pax.get("major", b"0") + b"." + pax.get("minor", b"1" if "map" in pax else b"0")
        spans: list[Span] | None
        if version == b"1.0":
            spans = None
        elif version == b"0.1":
            spans = _pairs(map(digits, pax.get("map", b"").split(b",")))
        elif version == b"0.0":
            spans = _pairs(digits(value) for key, value in ours if key in ("offset", "numbytes"))
        else:
            raise ValueError(f"the sparse version {version!r}, which is not supported; pack it again without -S")
        size = pax.get("realsize", pax.get("size"))
        if size is None:
            raise ValueError("no size of a sparse member")
        return cls(digits(size), spans)

    @classmethod
    def of_header(cls, header: bytes, more: list[bytes]) -> Self:
        """The map in a header of GNU's own format and in the blocks that continue it.

        Raises:
            ValueError: The map is broken.
        """
        fields = header[386:482] + b"".join(block[:504] for block in more)
        numbers = []
        for at in range(0, len(fields), 24):
            if not fields[at + 12]:  # neither this one nor those after it are used
                break
            numbers += [number(fields[at : at + 12]), number(fields[at + 12 : at + 24])]
        return cls(number(header[483:495]), _pairs(numbers))

    def check(self, stored_bytes: int) -> None:
        """Refuse a map that does not fit `stored_bytes` bytes, before these are read.

        Raises:
            ValueError: It does not.
        """
        if self.spans is None:
            if stored_bytes > self.size + MAX_MAP_BYTES:
                raise ValueError(f"{stored_bytes} stored bytes of a file of {self.size}")
            return
        end = total = 0
        for begin, length in self.spans:
            if begin < end:
                raise ValueError(f"a part at {begin}, where the one before ends at {end}")
            end = begin + length
            total += length
        if end > self.size:
            raise ValueError(f"a part that ends at {end} of a file of {self.size}")
        if total != stored_bytes:
            raise ValueError(f"parts of {total} bytes together, and {stored_bytes} are stored")

    def expand(self, stored: bytes) -> bytes:
        """The content of the file, with zeros in its holes.

        Raises:
            ValueError: The map does not fit `stored`.
        """
        at = 0
        if self.spans is None:
            self.spans, at = _stored_map(stored)
            self.check(len(stored) - at)
        file = BytesIO()
        for begin, length in self.spans:
            file.seek(begin)
            file.write(stored[at : at + length])
            at += length
        if self.size > file.seek(0, 2):
            file.seek(self.size - 1)
            file.write(b"\0")
        return file.getvalue()


def _stored_map(stored: bytes) -> tuple[list[Span], int]:
    """The map at the beginning of `stored`, one decimal number per line, and where its last block ends."""
    beginning = stored[:MAX_MAP_BYTES]
    count = digits(beginning.partition(b"\n")[0])
    if count > MAX_SPANS:
        raise ValueError(f"{count} parts, and at most {MAX_SPANS} are allowed")
    lines = beginning.split(b"\n", 2 * count + 1)
    if len(lines) < 2 * count + 2:
        raise ValueError(f"{count} parts, and fewer follow")
    length = len(beginning) - len(lines.pop())
    return _pairs(map(digits, lines[1:])), -(-length // _BLOCK) * _BLOCK


def _pairs(numbers: Iterable[int]) -> list[Span]:
    found = list(numbers)
    if len(found) % 2:
        raise ValueError("a part without a length")
    if len(found) > 2 * MAX_SPANS:
        raise ValueError(f"more than {MAX_SPANS} parts")
    return list(zip(found[::2], found[1::2], strict=True))
