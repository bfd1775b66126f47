"""Collate: a list of samples becomes one batch, with the meaning of torch's `default_collate`."""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch.utils.data._utils import collate as torch_collate

from aioloader.core.memory import Alloc
from aioloader.core.safe_text import add_note, safe_repr, safe_repr_list
from aioloader.executors.processes.stacked import StackedSample, plain_samples, stacked_batch
from aioloader.stages.packed import Packed, collate_packed

__all__ = ["DEFAULT", "Collate", "are_plain", "collate_samples", "named", "torchs_alone"]

_DTYPE_AND_GRAD = operator.attrgetter("dtype", "requires_grad")

CollateFnMap = dict[type | tuple[type, ...], Callable[..., Any]]

_MAP: Final = dict(torch_collate.default_collate_fn_map)

_NUMBERS: Final = {np.dtype(code).type for code in "?" + np.typecodes["AllInteger"] + np.typecodes["AllFloat"]}
_PLAIN: Final = {torch.Tensor, np.ndarray, Packed, bool, bytes, float, int, str, type(None), *_NUMBERS}


class Collate:
    """Collates as torch's `default_collate` does, into memory of the caller's choice, and says which samples differ.

    Args:
        alloc: Where stacked tensors and arrays go; None is fresh memory, as `torch.stack` takes it. Numbers become
            tensors in fresh memory always: they are small. So do tensors for which `torch.stack(out=...)` would not
            give what `torch.stack` gives, see `_stack`.
        sole: Nobody else has the samples: they may have been stacked where they were made, see `stacked`. Not so where
            the user has added functions to torch's `default_collate_fn_map`: they get samples.

    The types that a user added to torch's `default_collate_fn_map` keep their functions.
    """

    def __init__(self, alloc: Alloc | None = None, *, sole: bool = False) -> None:
        self.alloc = alloc
        self.sole = sole
        self._from_bytes: int = getattr(alloc, "from_bytes", 0)  # below, its memory is as fresh as any

    def into(self, alloc: Alloc | None) -> "Collate":
        """The same, that puts batches there unless it was told where."""
        return self if alloc is None or self.alloc is not None else Collate(alloc, sole=self.sole)

    @property
    def stacks_tensors(self) -> bool:
        """Whether the user left torch's function for tensors in its place."""
        return torch_collate.default_collate_fn_map.get(torch.Tensor) is torch_collate.collate_tensor_fn

    @property
    def alloc_or_empty(self) -> Alloc:
        """Where a batch goes: `alloc`, or fresh memory."""
        return self.alloc or _fresh

    def __call__(self, samples: Sequence[Any], keys: Sequence[Any] | None = None) -> Any:
        """Collate `samples` into one batch, batch dimension first.

        Args:
            samples: What the dataset gave, in order: tensors, arrays, numbers, strings, and mappings, named tuples and
                sequences of these.
            keys: The key of each sample, in the same order; used in the note of an error only.

        Raises:
            Exception: What torch raises for these samples (RuntimeError for shapes and lengths, KeyError for missing
                mapping keys, TypeError for types, IndexError for no samples), with a note that names the samples.
        """
        if self.sole and samples:
            if torchs_alone():
                with suppress(Exception):  # of a small part: then all are samples, and the error says which differ
                    if (batch := stacked_batch(samples, self._by_torch)) is not None:
                        return batch
            samples = plain_samples(samples)
        try:
            return self._by_torch(samples)
        except Exception as error:
            add_note(error, f"aioloader: cannot collate: {_explain(samples, keys)}")
            raise

    def _by_torch(self, samples: Sequence[Any]) -> Any:
        return torch_collate.collate(samples, collate_fn_map=self._collate_fn_map())

    def _collate_fn_map(self) -> CollateFnMap:
        """The map of torch as it is now, with our function for tensors unless the user put another one there."""
        collate_fn_map: CollateFnMap = dict(torch_collate.default_collate_fn_map)
        if self.stacks_tensors:
            # torch's own function takes shared memory where `get_worker_info()` says that this is a worker process:
            # our batches never cross to another process as torch's do.
            collate_fn_map[torch.Tensor] = self._stack
        collate_fn_map.setdefault(Packed, collate_packed)
        return collate_fn_map

    def _stack(self, tensors: Sequence[torch.Tensor], *, collate_fn_map: object = None) -> torch.Tensor:
        """Stack `tensors`; numpy arrays come here too, as tensors over their own memory (no copy is made before)."""
        first = tensors[0]
        if first.is_nested or first.layout is not torch.strided:
            stacked: torch.Tensor = torch_collate.collate_tensor_fn(tensors)  # refused, with torch's words
            return stacked
        out = None
        if (
            self.alloc is not None
            and len(tensors) * first.numel() * first.itemsize >= self._from_bytes
            and _fits_out(tensors)
        ):
            out = self.alloc((len(tensors), *first.shape), first.dtype)
        return torch.stack(tensors, 0, out=out)  # type: ignore[arg-type]  # torch takes a list or a tuple


def are_plain(samples: Iterable[Any], depth: int = 4) -> bool:
    """Whether all of `samples` are of classes whose methods are known, so that collating them runs nothing else.

    A mapping of the user's may read a file in its `__getitem__`, and a subclass of `Tensor` do anything.

    Args:
        samples: Of a batch.
        depth: So many containers in each other are looked into.
    """
    samples = list(samples)
    rest = {*map(type, samples)} - _PLAIN
    if not rest:
        return True
    if StackedSample in rest:
        chunks = {sample.chunk for sample in samples if type(sample) is StackedSample}
        if not all(are_plain(values, depth) for chunk in chunks for values in chunk.column.objects):
            return False
        rest.discard(StackedSample)
    if not rest <= {dict, list, tuple} or not depth:
        return False
    inner = (sample.values() if type(sample) is dict else sample for sample in samples if type(sample) in rest)
    return are_plain(chain.from_iterable(inner), depth - 1)


def torchs_alone() -> bool:
    """Whether torch's `default_collate_fn_map` is as torch made it: collating runs no function of the user's."""
    now = torch_collate.default_collate_fn_map
    return now == _MAP and all(fn.__module__ == torch_collate.__name__ for fn in now.values())


def _fresh(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device="cpu")


def _fits_out(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether `torch.stack` gives the same with `out=` of the first tensor's shape and dtype as without.

    It does not where dtypes differ: `torch.stack` promotes, `out=` casts in silence (float64 into float32) or refuses.
    Gradients do not flow through `out=`, subclasses lose their type, quantised tensors their scale, and samples of 4
    dimensions in channels-last layout the odd strides that `torch.stack` gives them. Other devices and empty tensors
    have no use for host memory.
    """
    first = tensors[0]
    return (
        first.device.type == "cpu"
        and not first.is_quantized
        and first.numel() > 0
        and (first.dim() < 4 or first.is_contiguous())
        and set(map(type, tensors)) == {torch.Tensor}
        and set(map(_DTYPE_AND_GRAD, tensors)) == {(first.dtype, False)}
    )


DEFAULT: Final = Collate()
"""Into fresh memory."""


def collate_samples(
    samples: object,
    keys: Sequence[Any] | None,
    collate_fn: Callable[[Any], Any] | None,
    default: Callable[[Any, Any], Any],
) -> Any:
    """One batch of `samples`, by the user's function or else the default.

    Raises:
        Exception: What either raises, with a note that names the samples.
    """
    if collate_fn is None:
        return default(samples, keys)
    try:
        return collate_fn(samples)
    except Exception as error:
        add_note(error, f"aioloader: cannot collate: {named(keys)}")
        raise


def named(keys: Sequence[Any] | None) -> str:
    """The samples of a batch, for a note."""
    return "these samples" if keys is None else f"samples with keys {safe_repr_list(keys)}"


def _explain(samples: Sequence[Any], keys: Sequence[Any] | None) -> str:
    """Which samples do not fit, and where in them: each is tried with sample 0, then the pair is followed inwards.

    This calls methods of user classes (`len`, `[]`, registered functions) on values that just failed: whatever they
    raise must not hide the error that is being explained, so the note then only says which samples they were.
    """
    try:
        return _Misfit(samples, keys).sentence()
    except Exception:
        return named(keys)


class _MisfitPart(NamedTuple):
    """The innermost part of some samples that does not fit: where it is, what each has there, the key one lacks."""

    path: str
    values: Sequence[Any]
    missing_key: Any


_NOTHING = object()
_Words = Callable[[Any], str]


@dataclass(frozen=True)
class _Misfit:
    """The first sample that cannot be batched with sample 0."""

    samples: Sequence[Any]
    keys: Sequence[Any] | None

    def sentence(self) -> str:
        """What differs and the way out, in words.

        Raises:
            LookupError: Each sample fits sample 0; the error has another cause.
        """
        if len(self.samples) == 0:
            return "the batch has no samples; a batch_sampler must not give empty lists"
        first = self.samples[0]
        empty = next((index for index, sample in enumerate(self.samples) if sample is None), None)
        if empty is not None and not self._fits([None]):
            which = f"sample {empty}" if self.keys is None else f"key {safe_repr(self.keys[empty], 60)}"
            return (
                f"the dataset, or a function after it, returned None for {which}; return a sample, or pass "
                f"collate_fn= that drops None"
            )
        if not self._fits([first]):
            return self._refused(self._descend([first]))
        for index in range(1, len(self.samples)):
            if not self._fits([first, self.samples[index]]):
                return self._differ(index, self._descend([first, self.samples[index]]))
        raise LookupError("every sample fits sample 0")

    def _fits(self, values: Sequence[Any]) -> bool:
        try:
            torch_collate.default_collate(values)
        except Exception:
            return False
        return True

    def _descend(self, values: Sequence[Any], path: str = "") -> _MisfitPart:
        """Go down into mappings and sequences as torch's `collate` does, towards the part that does not fit."""
        first = values[0]
        children: list[tuple[str, Sequence[Any]]] = []
        if any(isinstance(first, kind) for kind in torch_collate.default_collate_fn_map):
            return _MisfitPart(path, values, _NOTHING)
        if isinstance(first, Mapping):
            for key in first:
                if any(isinstance(value, Mapping) and key not in value for value in values):
                    return _MisfitPart(path, values, key)
                if not all(isinstance(value, Mapping) for value in values):
                    return _MisfitPart(path, values, _NOTHING)
                children.append((f"{path}[{key!r}]", [value[key] for value in values]))
        elif isinstance(first, Sequence) and _lengths(values) == [len(first)] * len(values):
            names: Sequence[str] | None = getattr(first, "_fields", None)
            parts: Sequence[Any]
            for index, parts in enumerate(zip(*values, strict=True)):
                children.append((f"{path}[{index}]" if names is None else f"{path}.{names[index]}", parts))
        for child_path, parts in children:
            if not self._fits(parts):
                return self._descend(parts, child_path)
        return _MisfitPart(path, values, _NOTHING)

    def _refused(self, place: _MisfitPart) -> str:
        value = place.values[0]
        has: _Words = _value if isinstance(value, int | float) else _kind
        return (
            f"{self._name(0)} {has(value)}{_at(place)}, which cannot be batched; "
            "pass collate_fn=, or add the type to torch's default_collate_fn_map"
        )

    def _differ(self, index: int, place: _MisfitPart) -> str:
        if place.missing_key is not _NOTHING:
            return (
                f"{self._name(index)} has no {place.missing_key!r}{_at(place)}, which {self._name(0)} has; "
                "pass collate_fn=, or give every sample the same keys"
            )
        left, right = place.values
        has: _Words
        arrays = hasattr(left, "shape") and hasattr(right, "shape")
        tensors = isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor)
        if arrays and tuple(left.shape) != tuple(right.shape):
            has, advice = _shape, "pass collate_fn= that pads, or make the samples equal"
        elif isinstance(left, Sequence) and isinstance(right, Sequence) and len(left) != len(right):
            has, advice = _length, "pass collate_fn= that pads, or make the samples equal"
        elif tensors and left.device != right.device:
            has, advice = _device, "move the samples to one device"
        elif tensors and left.dtype != right.dtype:
            has, advice = _dtype, "give every sample the same dtype"
        elif type(left) is not type(right):
            has, advice = _kind, "pass collate_fn=, or give every sample the same type"
        else:
            has, advice = _value, "pass collate_fn=, or make the samples equal"
        return f"{self._name(0)} {has(left)}{_at(place)}, {self._name(index)} {has(right)}; {advice}"

    def _name(self, index: int) -> str:
        return f"sample {index}" if self.keys is None else f"sample {index} (key {safe_repr(self.keys[index], 60)})"


def _lengths(values: Sequence[Any]) -> list[int | None]:
    return [len(value) if hasattr(value, "__len__") else None for value in values]


def _at(place: _MisfitPart) -> str:
    return f" at {place.path}" if place.path else ""


def _shape(array: Any) -> str:
    return f"has shape {list(array.shape)}"


def _length(sequence: Any) -> str:
    return f"has length {len(sequence)}"


def _device(tensor: torch.Tensor) -> str:
    return f"is on {tensor.device}"


def _dtype(tensor: torch.Tensor) -> str:
    return f"has {tensor.dtype}"


def _value(value: object) -> str:
    return f"is {safe_repr(value, 30)}"


def _kind(value: object) -> str:
    if value is None:
        return "is None"
    if isinstance(value, torch.Tensor) and value.is_nested:
        return "is a nested tensor"
    if isinstance(value, torch.Tensor) and value.layout is not torch.strided:
        return f"has layout {value.layout}"
    if type(value).__module__ == "numpy" and hasattr(value, "dtype"):
        return f"is an array of dtype {value.dtype}"
    return f"has type {type(value).__qualname__}"
