"""Which other types a column may have in later files, so that its values are of one kind in all of them."""

from typing import Any, Final

import pyarrow as pa
import pyarrow.types as kinds

__all__ = ["has_unknown_parts", "joined"]

_LISTS: Final = (pa.ListType, pa.LargeListType, pa.FixedSizeListType, pa.ListViewType, pa.LargeListViewType)


def joined(known: Any, kind: Any, *, tensors: bool) -> Any:
    """The type of a column that was `known` so far, after a file in which it is `kind`.

    To Python, text is text and an integer is an integer, however they are stored, and a null fits anywhere. So `known`
    stays the same, except for parts with only nulls so far: these get the type of the first other file. Arrow's own
    rules for joining types do not help: they let numbers lose digits, and do not handle dictionaries.

    Args:
        known: The type from the files before.
        kind: The type in this file.
        tensors: Whether the values go into tensors of type `known`, so that numbers must not be wider.

    Returns:
        The type, or None if values of `kind` would be something else, or lose something.
    """
    if kind == known or kinds.is_null(kind):
        return known
    if kinds.is_null(known):
        return kind
    if kinds.is_dictionary(known):
        return None if joined(known.value_type, kind, tensors=False) is None else known
    if kinds.is_dictionary(kind):
        return joined(known, kind.value_type, tensors=tensors)
    ours, theirs = _parts(known), _parts(kind)
    if not ours or not theirs:
        fits = _is_no_wider(kind, known) if tensors else True
        return known if fits and _value(kind) == _value(known) else None
    tensors = tensors and kinds.is_fixed_size_list(known)
    if _frame(known, tensors) != _frame(kind, tensors):
        return None
    parts = [joined(our, their, tensors=tensors) for our, their in zip(ours, theirs, strict=True)]
    if None in parts:
        return None
    return known if parts == ours else _rebuilt(known, parts)


def has_unknown_parts(kind: Any) -> bool:
    """Whether it, or a part of it, has only nulls."""
    return bool(kinds.is_null(kind)) or any(map(has_unknown_parts, _parts(kind)))


def _value(kind: Any) -> Any:
    """What kind of objects its values are in Python."""
    if kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind):
        return "text"
    if kinds.is_binary(kind) or kinds.is_large_binary(kind) or kinds.is_binary_view(kind):
        return "bytes"
    if kinds.is_fixed_size_binary(kind):
        return "bytes"
    if kinds.is_integer(kind):
        return "integer"
    if kinds.is_floating(kind):
        return "float"
    if kinds.is_decimal(kind):
        return "decimal", kind.scale
    if kinds.is_date(kind):
        return "date"
    if kinds.is_timestamp(kind) and kind.unit != "ns":  # nanoseconds are objects of pandas
        return "timestamp", kind.tz
    return kind


def _is_no_wider(kind: Any, known: Any) -> bool:
    """Whether a tensor of `known`, if it is a number, holds each value of `kind`."""
    if kinds.is_integer(known) and kinds.is_integer(kind):
        room = kinds.is_signed_integer(known) - kinds.is_signed_integer(kind)  # a bit for the sign
        return room >= 0 and bool(kind.bit_width + room <= known.bit_width)
    return not kinds.is_floating(known) or bool(kinds.is_floating(kind) and kind.bit_width <= known.bit_width)


def _parts(kind: Any) -> list[Any]:
    """The types of which it is composed."""
    if isinstance(kind, _LISTS):
        return [kind.value_type]
    if kinds.is_map(kind):
        return [kind.key_type, kind.item_type]
    return [field.type for field in kind] if kinds.is_struct(kind) else []


def _frame(kind: Any, tensors: bool) -> Any:
    """What must be equal beside its parts."""
    if kinds.is_struct(kind):
        return [field.name for field in kind]
    if kinds.is_map(kind):
        return "map"
    return kind.list_size if tensors and kinds.is_fixed_size_list(kind) else "list"


def _rebuilt(kind: Any, parts: list[Any]) -> Any:
    """The same kind of type, composed of other parts."""
    if kinds.is_struct(kind):
        return pa.struct([field.with_type(part) for field, part in zip(kind, parts, strict=True)])
    if kinds.is_map(kind):
        return pa.map_(*parts)
    return pa.list_(parts[0], kind.list_size if kinds.is_fixed_size_list(kind) else -1)
