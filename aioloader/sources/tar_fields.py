"""The fields of tar headers: numbers, which are digits and nothing else, and text.

Python's `int` takes more than a header may hold: signs, underscores, "0o17", spaces of every kind. A negative size
would send a reader back to where it has been.
"""

import re
from typing import Final

__all__ = ["digits", "number", "octal", "text"]

SHOWN_BYTES: Final = 40
"""Of a field that is wrong, in its error."""


def octal(field: bytes) -> int:
    """A number of octal digits, up to the first NUL; nothing at all is 0.

    Raises:
        ValueError: There is something else in it.
    """
    found = _OCTAL.match(field)
    if found is None:
        raise ValueError(f"{field!r}, which is no octal number")
    return int(found[1] or b"0", 8)


_OCTAL: Final = re.compile(rb" *([0-7]*) *(?:\0|$)")


def number(field: bytes) -> int:
    """The same, or what GNU tar writes where octal digits do not suffice: the first bit set, then a binary number.

    Raises:
        ValueError: It is neither, or negative.
    """
    if not field[0] & 0x80:
        return octal(field)
    if field[0] & 0x40:
        raise ValueError(f"{field!r}, which is a negative number")
    return int.from_bytes(field) - (0x80 << 8 * (len(field) - 1))


def digits(field: bytes) -> int:
    """A decimal number of at most 20 digits, which 64 bits take.

    Raises:
        ValueError: There is something else in it.
    """
    if not (field.isdigit() and len(field) <= 20):
        shown = repr(field) if len(field) <= SHOWN_BYTES else f"{field[:SHOWN_BYTES]!r}..."
        raise ValueError(f"{shown}, which is no decimal number")
    return int(field)


def text(field: bytes) -> str:
    """Up to the first NUL; bytes that are no UTF-8 are kept, as in Python's file names."""
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")
