"""Thrift's compact protocol, read-only: what Parquet footers are written in.

Pyarrow shows the numbers of a footer too. But when it is asked for those of a column whose statistics are broken, the
process ends (pyarrow 26: an exception of C++ that nobody catches), while reading the same column only raises.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import repeat
from typing import Any, Final

__all__ = ["Struct", "read_struct"]

Struct = dict[int, Any]
"""Values by the numbers of their fields: integers, bools, bytes, lists and structs."""

_TRUE, _FALSE, _BYTE, _I16, _I64, _DOUBLE, _BYTES, _LIST, _SET, _STRUCT = 1, 2, 3, 4, 6, 7, 8, 9, 10, 12
_FIXED: Final = {_BYTE: 1, _DOUBLE: 8}
_NOTHING: Final[Mapping[int, Any]] = {}


def read_struct(data: bytes, kept: Mapping[int, Callable[[Any], Any]] = _NOTHING) -> Struct:
    """The struct that `data` begins with.

    It takes 15 to 20 µs for each column of a row group: a closure, since attributes would cost twice that.

    Args:
        data: May go on after the struct.
        kept: Of lists in it, by the number of their field, what to keep of each item. Many items take many times the
            memory of `data`.

    Raises:
        IndexError, ValueError: It is none, or not all of one.
    """
    at = 0

    def varint() -> int:
        nonlocal at
        byte = data[at]
        at += 1
        if byte < 128:
            return byte
        number, shift = byte & 127, 7
        while shift < 64:
            byte = data[at]
            at += 1
            number |= (byte & 127) << shift
            if byte < 128:
                return number
            shift += 7
        raise ValueError(f"an integer has more than 64 bits at byte {at}")

    def value(kind: int) -> Any:
        nonlocal at
        if _I16 <= kind <= _I64:
            number = varint()
            return (number >> 1) ^ -(number & 1)  # zigzag
        if kind == _STRUCT:
            return struct(_NOTHING)
        if kind in (_LIST, _SET):
            return list(items())
        if kind == _BYTES:
            count = varint()
        elif kind in _FIXED:
            count = _FIXED[kind]
        elif kind in (_TRUE, _FALSE):  # in a list; in a struct it is told by the kind
            at += 1
            return data[at - 1] == _TRUE
        else:
            raise ValueError(f"there is no type {kind}, at byte {at}")
        at += count
        if at > len(data):
            raise IndexError(f"it has {len(data)} bytes, and {at} are needed")
        return data[at - count : at]

    def items() -> Iterator[Any]:
        nonlocal at
        head = data[at]
        at += 1
        count, kind = head >> 4, head & 15
        if count == 15:
            count = varint()
        return map(value, repeat(kind, count))

    def struct(kept: Mapping[int, Callable[[Any], Any]]) -> Struct:
        nonlocal at
        fields: Struct = {}
        number = 0
        while head := data[at]:
            at += 1
            kind = head & 15
            number = number + (head >> 4) if head > 15 else value(_I16)
            if number in kept and kind == _LIST:
                fields[number] = list(map(kept[number], items()))
            else:
                fields[number] = value(kind) if kind > _FALSE else kind == _TRUE
        at += 1
        return fields

    return struct(kept)
