"""Thrift's compact protocol, as far as Parquet footers and page headers need it: to change single numbers in them.

A struct is a dictionary from field number to (type, value); a list is (type of elements, elements).
"""

import io
from collections.abc import Iterator
from typing import Any, Final

__all__ = ["Place", "dump", "integers", "load"]

TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)
INTEGERS: Final = (I16, I32, I64)

Place = tuple[int, ...]
"""Where a number stands: field numbers, and positions in lists."""


def load(data: bytes) -> dict[int, tuple[int, Any]]:
    """The struct that `data` begins with."""
    return _read(io.BytesIO(data), STRUCT)  # type: ignore[no-any-return]


def dump(struct: dict[int, tuple[int, Any]]) -> bytes:
    """The opposite of `load`."""
    out = bytearray()
    _write(out, STRUCT, struct)
    return bytes(out)


def integers(value: Any, kind: int = STRUCT, place: Place = ()) -> Iterator[tuple[Place, int]]:
    """All integers in a struct, with their places."""
    if kind == STRUCT:
        for number, (field, content) in value.items():
            yield from integers(content, field, (*place, number))
    elif kind == LIST:
        element, items = value
        for at, item in enumerate(items):
            yield from integers(item, element, (*place, at))
    elif kind in INTEGERS:
        yield place, value


def put(struct: Any, place: Place, number: int) -> None:
    """Change the integer at a place."""
    kind, value = STRUCT, struct
    for step in place[:-1]:
        kind, value = value[step] if kind == STRUCT else (value[0], value[1][step])
    if kind == STRUCT:
        value[place[-1]] = (value[place[-1]][0], number)
    else:
        value[1][place[-1]] = number


def _varint(source: io.BytesIO) -> int:
    number = shift = 0
    while True:
        byte = source.read(1)[0]
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number
        shift += 7


def _zigzag(source: io.BytesIO) -> int:
    number = _varint(source)
    return (number >> 1) ^ -(number & 1)


def _read(source: io.BytesIO, kind: int) -> Any:
    if kind in (TRUE, FALSE):
        return source.read(1)[0] == TRUE
    if kind == BYTE:
        return source.read(1)[0]
    if kind in INTEGERS:
        return _zigzag(source)
    if kind == DOUBLE:
        return source.read(8)
    if kind == BINARY:
        return source.read(_varint(source))
    if kind in (LIST, SET):
        head = source.read(1)[0]
        count = head >> 4
        if count == 15:
            count = _varint(source)
        return head & 15, [_read(source, head & 15) for _ in range(count)]
    assert kind == STRUCT, kind
    fields: dict[int, tuple[int, Any]] = {}
    number = 0
    while head := source.read(1)[0]:
        number = number + (head >> 4) if head >> 4 else _zigzag(source)
        field = head & 15
        fields[number] = (field, field == TRUE if field in (TRUE, FALSE) else _read(source, field))
    return fields


def _put_varint(out: bytearray, number: int) -> None:
    number &= (1 << 64) - 1
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)


def _put_zigzag(out: bytearray, number: int) -> None:
    _put_varint(out, (number << 1) ^ (number >> 63))


def _write(out: bytearray, kind: int, value: Any) -> None:
    if kind in (TRUE, FALSE):
        out.append(TRUE if value else FALSE)
    elif kind == BYTE:
        out.append(value)
    elif kind in INTEGERS:
        _put_zigzag(out, value)
    elif kind == DOUBLE:
        out += value
    elif kind == BINARY:
        _put_varint(out, len(value))
        out += value
    elif kind in (LIST, SET):
        element, items = value
        out.append((min(len(items), 15) << 4) | element)
        if len(items) >= 15:
            _put_varint(out, len(items))
        for item in items:
            _write(out, element, item)
    else:
        assert kind == STRUCT, kind
        last = 0
        for number, (field, content) in value.items():
            if field in (TRUE, FALSE):
                field = TRUE if content else FALSE
            if 0 < number - last <= 15:
                out.append((number - last) << 4 | field)
            else:
                out.append(field)
                _put_zigzag(out, number)
            if field not in (TRUE, FALSE):
                _write(out, field, content)
            last = number
        out.append(0)
