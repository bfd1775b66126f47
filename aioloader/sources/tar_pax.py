"""What pax headers and GNU's long names say about the member of a tar archive that comes after them."""

import re
from dataclasses import dataclass
from typing import Final

from aioloader.sources.tar_fields import digits, text
from aioloader.sources.tar_sparse import SparseMap

__all__ = ["PaxHeaders"]


@dataclass(slots=True)
class PaxHeaders:
    """What extra headers say about the member after them.

    Attributes:
        name: The member's name.
        link: The name of the member that it is a link to.
        size: The size of its stored bytes.
        sparse: Where these bytes belong in a sparse file.
        fault: Why one of these headers cannot be read.
    """

    name: str | None = None
    link: str | None = None
    size: int | None = None
    sparse: SparseMap | None = None
    fault: str | None = None

    def read_pax(self, content: bytes) -> None:
        """Read a pax header.

        Raises:
            ValueError: Something in it is broken; the names are set nevertheless.
        """
        pax: dict[bytes, bytes] = {}
        sparse: list[tuple[str, bytes]] = []
        at = 0
        fault: str | None = None
        while at < len(content) and content[at]:
            record = _RECORD.match(content, at)
            end = at + int(record[1]) if record is not None else at
            if record is None or not record.end() < end <= len(content) or content[end - 1] != 10:
                fault = f"no record at its byte {at}"
                break
            key, value = record[2], content[record.end() : end - 1]
            pax[key] = value
            if key.startswith(b"GNU.sparse."):
                sparse.append((text(key), value))
            at = end
        name = pax.get(b"GNU.sparse.name") or pax.get(b"path")
        if name:
            self.name = name.decode("utf-8", "surrogateescape")
        if b"linkpath" in pax:
            self.link = pax[b"linkpath"].decode("utf-8", "surrogateescape")
        if fault is not None:
            raise ValueError(fault)
        if b"size" in pax:
            try:
                self.size = digits(pax[b"size"])
            except ValueError as error:
                raise ValueError(f"the size {error}") from None
        if sparse:
            self.sparse = SparseMap.of_pax(sparse)


_RECORD: Final = re.compile(rb"([0-9]{1,20}) ([^=]+)=")  # a line `length key=value`
