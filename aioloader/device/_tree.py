"""Structures of tensors: rebuild one with other tensors, and find the tensors in an object.

The rules are those of torch (`torch.utils.data._utils.pin_memory`), with three additions: dataclasses are rebuilt,
containers without changes are not copied, and there is a warning for objects whose tensors cannot be moved.
"""

import copy
import dataclasses
import inspect
import warnings
from array import array
from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from typing import Any, Final
from weakref import WeakSet

import torch

__all__ = [
    "has_method",
    "is_dense",
    "memory_of",
    "names_non_blocking",
    "rebuild",
    "takes_non_blocking",
    "tensors_in",
    "warn_if_it_holds_tensors",
]

_NO_STRUCTURE: Final = (str, bytes, bytearray, memoryview, range, array, int, float, complex, type, type(None))
"""Types that cannot hold a tensor; some of them are sequences, which may be long."""

ATTRIBUTE_STEPS: Final = 4
"""How many attributes deep tensors are searched for: batch, storage, mapping, value, and one more."""


def rebuild(
    value: object,
    tensor: Callable[[torch.Tensor], torch.Tensor],
    is_leaf: Callable[[Any], bool],
    other: Callable[[Any], Any],
) -> Any:
    """`value` with its tensors replaced; containers in which nothing changed are returned themselves.

    Args:
        value: Tensors in tuples, lists, named tuples, mappings, sequences and dataclasses, in any depth.
        tensor: Returns the new tensor for a tensor.
        is_leaf: Whether a container is passed to `other` as a whole.
        other: Returns the new object for any object that is not a container.

    Containers keep their type where they can be rebuilt: mutable ones are shallow copies with the changed entries
    replaced (they may have further attributes), others are made again from their entries. Where that fails with
    TypeError, a mapping becomes a dict and a sequence a list, as in torch.
    """
    return _Rebuilding(tensor, is_leaf, other).new(value)


class _Rebuilding:
    # Not a recursive function within `rebuild`: that would be a reference cycle, and everything that `tensor` refers
    # to, for instance a batch in page-locked memory, would live until the garbage collector runs.
    def __init__(
        self,
        tensor: Callable[[torch.Tensor], torch.Tensor],
        is_leaf: Callable[[Any], bool],
        other: Callable[[Any], Any],
    ) -> None:
        self._tensor = tensor
        self._is_leaf = is_leaf
        self._other = other

    def new(self, value: object) -> Any:
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, _NO_STRUCTURE):
            return value
        if self._is_leaf(value):
            return self._other(value)
        if dataclasses.is_dataclass(value):
            return _rebuild_dataclass(value, self.new)
        if isinstance(value, Mapping):
            return _rebuild_mapping(value, self.new)
        if isinstance(value, Sequence):
            return _rebuild_sequence(value, self.new)
        return self._other(value)


def _rebuild_dataclass(value: Any, new: Callable[[Any], Any]) -> Any:
    # Checked before mappings: the outputs of Hugging Face models are both, and only `replace` keeps the two equal.
    changed = {}
    for field in dataclasses.fields(value):
        if hasattr(value, field.name):  # a field without `init` and default may never have been set
            old = getattr(value, field.name)
            now = new(old)
            if now is not old:
                changed[field.name] = now
    if not changed:
        return value
    by_init = {field.name for field in dataclasses.fields(value) if field.init}
    try:
        rebuilt = dataclasses.replace(value, **{name: now for name, now in changed.items() if name in by_init})
    except (TypeError, ValueError):  # an `InitVar` without a default, or an `__init__` of its own
        rebuilt, by_init = copy.copy(value), set()
    for name, now in changed.items():
        if name not in by_init:
            object.__setattr__(rebuilt, name, now)  # it may be frozen
    return rebuilt


def _rebuild_mapping(value: Mapping[Any, Any], new: Callable[[Any], Any]) -> Any:
    old = dict(value.items())
    entries = {key: new(entry) for key, entry in old.items()}
    changed = {key: entry for key, entry in entries.items() if entry is not old[key]}
    if not changed:
        return value
    try:
        if not isinstance(value, MutableMapping):
            return type(value)(entries)  # type: ignore[call-arg]  # a guess, as in torch
        clone = copy.copy(value)
        clone.update(changed)
    except (TypeError, NotImplementedError):
        return entries
    # A class that wraps a dict and has no `__copy__` shares the dict with its copy. Then the user's batch, which the
    # dataset may keep, has been changed: undo that.
    if any(value[key] is entry for key, entry in changed.items()):
        value.update({key: old[key] for key in changed})
        return entries
    return clone


def _rebuild_sequence(value: Sequence[Any], new: Callable[[Any], Any]) -> Any:
    old = list(value)
    entries = [new(entry) for entry in old]
    if all(entry is before for entry, before in zip(entries, old, strict=True)):
        return value
    if type(value) is list:
        return entries
    try:
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*entries)
        if not isinstance(value, MutableSequence):
            return type(value)(entries)  # type: ignore[call-arg]  # a guess, as in torch
        clone = copy.copy(value)
        for index, entry in enumerate(entries):
            clone[index] = entry
    except (TypeError, NotImplementedError):
        return entries
    if any(value[index] is not entry for index, entry in enumerate(old)):  # see _rebuild_mapping
        for index, entry in enumerate(old):
            value[index] = entry
        return entries
    return clone


def has_method(value: object, name: str) -> bool:
    """Whether the class of `value` has this method. Mappings with attribute access may have an entry of that name."""
    return callable(getattr(type(value), name, None))


def names_non_blocking(to: Callable[..., Any]) -> bool:
    """Whether `to` has a parameter `non_blocking`, as methods have that move data to a device."""
    return "non_blocking" in _parameters(to)


def takes_non_blocking(to: Callable[..., Any]) -> bool:
    """Whether `to` can be called with `non_blocking`."""
    parameters = _parameters(to)
    return "non_blocking" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # a C function without a signature
        return {}


def tensors_in(value: object, attribute_steps: int = ATTRIBUTE_STEPS) -> Iterator[torch.Tensor]:
    """The tensors in `value`, each once, found through containers and the attributes of objects."""
    yield from _search(value, attribute_steps, {})


def _search(value: object, steps: int, seen: dict[int, Any]) -> Iterator[torch.Tensor]:
    if isinstance(value, _NO_STRUCTURE) or id(value) in seen:
        return
    seen[id(value)] = value  # kept alive, since another object could get its id
    if isinstance(value, torch.Tensor):
        yield value
        return
    if isinstance(value, Mapping):
        for entry in value.values():
            yield from _search(entry, steps, seen)
    elif isinstance(value, Sequence):
        for entry in value:
            yield from _search(entry, steps, seen)
    if steps > 0 and not callable(value):
        for entry in _attributes(value):
            yield from _search(entry, steps - 1, seen)


def _attributes(value: object) -> Iterator[Any]:
    """The attributes of the instance. Properties are left out: they may compute anything."""
    yield from getattr(value, "__dict__", {}).values()
    for cls in type(value).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            member = cls.__dict__.get(name)
            if member is not None and hasattr(type(member), "__get__"):
                try:
                    yield member.__get__(value, cls)
                except AttributeError:  # not set
                    continue


def memory_of(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors whose memory `tensor` uses: itself, or the parts of a sparse, nested or wrapper tensor."""
    if hasattr(type(tensor), "__tensor_flatten__"):  # nested (jagged) tensors, DTensor, quantised wrappers
        names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        for name in names:
            yield from memory_of(getattr(tensor, name))
    elif tensor.layout is torch.sparse_coo:
        yield tensor._indices()  # not `indices()`, which raises for uncoalesced tensors
        yield tensor._values()
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    elif tensor.is_nested:
        yield tensor.values()
    else:
        yield tensor


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether a strided tensor has no gaps and no overlap in memory, in any order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


_warned: WeakSet[type] = WeakSet()


def warn_if_it_holds_tensors(value: object, needs: str) -> None:
    """Warn once per class that its tensors are not moved, since it `needs` for instance "pin_memory()".

    torch's DataLoader says nothing about such objects. Only the first instance of a class is searched, so that a list
    of objects costs almost nothing.
    """
    cls = type(value)
    if cls in _warned:
        return
    try:
        _warned.add(cls)
    except TypeError:  # a class that cannot be referenced weakly
        return
    if next(tensors_in(value, attribute_steps=1), None) is not None:
        warnings.warn(
            f"aioloader: a {cls.__module__}.{cls.__qualname__} in the batch holds tensors that stay where they are, as "
            f"its class has no {needs}; give it one, or let collate_fn return a dict, tuple or dataclass",
            UserWarning,
            stacklevel=2,
        )
