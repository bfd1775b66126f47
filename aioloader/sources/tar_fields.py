"""The fields of tar headers: numbers, which are digits and nothing else, and text.

Python's `int` accepts more than a header may hold: signs, underscores, "0o17", spaces of every kind. A negative size
would send a reader back to where it has been.
"""

import re
from typing import Final

__all__ = ["digits", "number", "octal", "text"]

SHOWN_BYTES: Final = 40
"""How much of a broken field its error shows."""


def octal(field: bytes) -> int:
    """A number in octal digits, up to the first NUL; an empty field is 0.

    Raises:
        ValueError: There is something else in it.
    """
    found = _OCTAL.match(field)
    if found is None:
        raise ValueError(f"{field!r}, which is not an octal number")
    return int(found[1] or b"0", 8)


_OCTAL: Final = re.compile(rb" *([0-7]*) *(?:\0|$)")


def number(field: bytes) -> int:
    """A number in octal digits, or as GNU tar writes one that does not fit: the first bit set, then a binary number.

    Raises:
        ValueError: It is neither, or is negative.
    """
    if not field[0] & 0x80:
        return octal(field)
    if field[0] & 0x40:
        raise ValueError(f"{field!r}, which is a negative number")
    return int.from_bytes(field) - (0x80 << 8 * (len(field) - 1))


def digits(field: bytes) -> int:
    """A decimal number of at most 20 digits, as 64 bits need.

    Raises:
        ValueError: There is something else in it.
    """
    if not (field.isdigit() and len(field) <= 20):
        shown = repr(field) if len(field) <= SHOWN_BYTES else f"{field[:SHOWN_BYTES]!r}..."
        raise ValueError(f"{shown}, which is not a decimal number")
    return int(field)


def text(field: bytes) -> str:
    """Text up to the first NUL; bytes that are not UTF-8 are kept, as in Python's file names."""
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")
