"""Thrift's compact protocol, read-only: what Parquet footers are written in.

Pyarrow exposes the numbers of a footer too. But when it is asked for those of a column with broken statistics, the
process is aborted (pyarrow 26: an uncaught C++ exception), while reading the same column only raises.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from io import BytesIO
from itertools import repeat
from typing import Any, Final

__all__ = ["Struct", "read_struct"]

Struct = dict[int, Any]
"""Values by field number: integers, bools, bytes, lists and structs."""

_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BYTES, _LIST, _SET, _STRUCT = 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12
_NOTHING: Final[Mapping[int, Any]] = {}


def read_struct(data: bytes, kept: Mapping[int, Callable[[Any], Any]] = _NOTHING) -> Struct:
    """The struct that `data` begins with.

    Args:
        data: May have more bytes after the struct.
        kept: By field number, what to keep of each item of a list. All items together would take many times the memory
            of `data`.

    Raises:
        IndexError, ValueError: It is not a struct, or not all of one.
    """
    return _struct(BytesIO(data), kept)


def _struct(file: BytesIO, kept: Mapping[int, Callable[[Any], Any]] = _NOTHING) -> Struct:
    read = file.read
    fields: Struct = {}
    number = 0
    while head := read(1)[0]:
        kind = head & 15
        number = number + (head >> 4) if head > 15 else _integer(file)
        if number in kept and kind == _LIST:
            fields[number] = list(map(kept[number], _items(file)))
        else:
            fields[number] = _READERS[kind](file) if kind > _FALSE else kind == _TRUE
    return fields


def _items(file: BytesIO) -> Iterator[Any]:
    head = file.read(1)[0]
    count = head >> 4
    if count == 15:
        count = _varint(file)
    return map(_READERS[head & 15], repeat(file, count))


def _integer(file: BytesIO) -> int:
    number = _varint(file)
    return (number >> 1) ^ -(number & 1)  # zigzag


def _varint(file: BytesIO) -> int:
    byte = file.read(1)[0]
    if byte < 128:
        return byte
    number = byte & 127
    for shift in range(7, 64, 7):
        byte = file.read(1)[0]
        number |= (byte & 127) << shift
        if byte < 128:
            return number
    raise ValueError(f"an integer has more than 64 bits at byte {file.tell()}")


def _bytes(file: BytesIO, count: int) -> bytes:
    data = file.read(count) if count <= sys.maxsize else file.read()
    if len(data) < count:
        end = file.tell()
        raise IndexError(f"it has {end} bytes, and {end - len(data) + count} are needed")
    return data


def _refuse(kind: int, file: BytesIO) -> None:
    raise ValueError(f"there is no type {kind}, at byte {file.tell()}")


_READERS: Final[list[Callable[[BytesIO], Any]]] = [partial(_refuse, kind) for kind in range(16)]
"""A reader of values for each type."""

_READERS[_TRUE] = _READERS[_FALSE] = lambda file: file.read(1)[0] == _TRUE  # in a list; of a field the type says it
_READERS[_BYTE] = lambda file: _bytes(file, 1)
_READERS[_I16] = _READERS[_I32] = _READERS[_I64] = _integer
_READERS[_DOUBLE] = lambda file: _bytes(file, 8)
_READERS[_BYTES] = lambda file: _bytes(file, _varint(file))
_READERS[_LIST] = _READERS[_SET] = lambda file: list(_items(file))
_READERS[_STRUCT] = _struct
