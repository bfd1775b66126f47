"""Samples that become a batch are stacked where they are made, before they travel.

    worker                              this process
    stacked([sample, ...], alloc)  ──▶  [StackedSample, ...], one in each entry  ──▶  stacked_batch(those) is the batch

Otherwise a batch of `map(fn, executor="process").batch(64)` would be written three times: by the function, into shared
memory, and by collate; and 64 samples would be pickled and unpickled. A sample that ends in another batch after all,
since one before it was left out, is found in the stack.
"""

from collections.abc import Callable, Sequence
from operator import attrgetter
from sys import modules
from typing import Any, Final, NamedTuple

import torch

from aioloader.core.memory import Alloc
from aioloader.core.sizes import rough_bytes
from aioloader.memory.mapping import mapping_of

__all__ = ["STACKED_FROM", "StackedSample", "plain_samples", "stacked", "stacked_batch"]

STACKED_FROM: Final = 1 << 20  # bytes of a batch; a copy of less costs nothing to speak of
MOST_KEPT: Final = 4  # times the size of a part of a batch: whoever keeps it keeps its segment
_DEPTH: Final = 4
_PARTS: Final = 64  # of a sample, that are looked into

_KIND: Final = attrgetter("dtype", "layout", "is_cpu", "is_quantized", "is_nested", "requires_grad")


class _Stack(NamedTuple):
    """A tensor or an array of each sample.

    Attributes:
        batch: They, stacked.
        arrays: They are arrays.
    """

    batch: torch.Tensor
    arrays: bool

    @property
    def nbytes(self) -> int:
        return self.batch.nbytes

    @property
    def objects(self) -> list[Sequence[Any]]:
        """The parts that are not stacked."""
        return []

    def of(self, index: int) -> Any:
        return self.batch[index].numpy() if self.arrays else self.batch[index]

    def collated(self, collate: Callable[[Sequence[Any]], Any]) -> Any:
        segment = mapping_of(self.batch)
        return (
            self.batch.clone() if segment is not None and segment.size > MOST_KEPT * self.batch.nbytes else self.batch
        )


class _Objects(NamedTuple):
    """A part of each sample that is not stacked."""

    values: Sequence[Any]

    @property
    def nbytes(self) -> int:
        return rough_bytes(self.values)

    @property
    def objects(self) -> list[Sequence[Any]]:
        return [self.values]

    def of(self, index: int) -> Any:
        return self.values[index]

    def collated(self, collate: Callable[[Sequence[Any]], Any]) -> Any:
        return collate(self.values)


class _Composed(NamedTuple):
    """Samples that are tuples, lists or dicts with the same keys, part by part.

    Attributes:
        kind: Which of these.
        keys: Of dicts.
        columns: One for each part.
    """

    kind: type
    keys: list[Any] | None
    columns: list[Any]

    @property
    def nbytes(self) -> int:
        return sum(column.nbytes for column in self.columns)

    @property
    def objects(self) -> list[Sequence[Any]]:
        return [values for column in self.columns for values in column.objects]

    def of(self, index: int) -> Any:
        parts = [column.of(index) for column in self.columns]
        return self.kind(parts if self.keys is None else zip(self.keys, parts, strict=True))

    def collated(self, collate: Callable[[Sequence[Any]], Any]) -> Any:
        """As torch does: tuples become lists."""
        parts = [column.collated(collate) for column in self.columns]
        return parts if self.keys is None else dict(zip(self.keys, parts, strict=True))


class _StackedChunk:
    """The samples of a chunk.

    Args:
        column: They.
        count: How many.

    Attributes:
        nbytes: Of a sample, roughly.
    """

    __slots__ = ("column", "count", "nbytes")

    def __init__(self, column: Any, count: int) -> None:
        self.column = column
        self.count = count
        self.nbytes: int = column.nbytes // count

    def __reduce__(self) -> Any:
        return _arrived, (self.column, self.count)


class StackedSample:
    """A sample of a chunk that was stacked."""

    __slots__ = ("chunk", "index")

    def __init__(self, chunk: _StackedChunk, index: int) -> None:
        self.chunk = chunk
        self.index = index

    def __sizeof__(self) -> int:
        return self.chunk.nbytes


def _arrived(column: Any, count: int) -> list[StackedSample]:
    chunk = _StackedChunk(column, count)
    return [StackedSample(chunk, index) for index in range(count)]


def stacked(samples: list[Any], batch: int, alloc: Alloc) -> Any:
    """What is sent of `samples`; at the other end it is a list again, of `StackedSample`s if there is memory to stack.

    Args:
        samples: The outcomes of a chunk.
        batch: How many become a batch; 0: they may not.
        alloc: Gives the memory.
    """
    if len(samples) != batch:
        return samples
    column = _column(samples, alloc, _DEPTH)
    return samples if isinstance(column, _Objects) else _StackedChunk(column, batch)


def stacked_batch(samples: Sequence[Any], collate: Callable[[Sequence[Any]], Any]) -> Any:
    """The batch of `samples`, which nobody else has, if it has come as such; None: it has not.

    Args:
        samples: One or more.
        collate: torch's `default_collate`, for parts that are not stacked.

    Raises:
        Exception: What `collate` raises.
    """
    first = samples[0]
    if type(first) is not StackedSample or first.chunk.count != len(samples):
        return None
    for index, sample in enumerate(samples):
        if type(sample) is not StackedSample or sample.chunk is not first.chunk or sample.index != index:
            return None
    return first.chunk.column.collated(collate)


def plain_samples(samples: Sequence[Any]) -> Sequence[Any]:
    """The samples as they were; their tensors are parts of the stacks."""
    if StackedSample not in {*map(type, samples)}:  # as a rule
        return samples
    return [sample.chunk.column.of(sample.index) if type(sample) is StackedSample else sample for sample in samples]


def _column(values: Sequence[Any], alloc: Alloc, depth: int) -> _Stack | _Objects | _Composed:
    first = values[0]
    kind = type(first)
    if any(type(value) is not kind for value in values):
        return _Objects(values)
    numpy = modules.get("numpy")
    if kind is torch.Tensor:
        stack = _stack(values, alloc)
    elif numpy is not None and kind is numpy.ndarray:
        stack = _stack_arrays(values, alloc)
    elif kind in (tuple, list, dict) and 0 < len(first) <= _PARTS and depth:
        return _parts(values, alloc, depth)
    else:
        stack = None
    return _Objects(values) if stack is None else _Stack(stack, kind is not torch.Tensor)


def _parts(values: Sequence[Any], alloc: Alloc, depth: int) -> _Objects | _Composed:
    first, keys = values[0], None
    parts: list[Sequence[Any]]  # lists of parts of dicts, and tuples of others, as torch gives them to itself
    if type(first) is dict:
        keys = list(first)
        if any(type(key) is not str for key in keys) or any(list(value) != keys for value in values):
            return _Objects(values)  # torch takes keys, and their order, from the first sample of a batch
        parts = [[value[key] for value in values] for key in keys]
    elif any(len(value) != len(first) for value in values):
        return _Objects(values)
    else:
        parts = list(zip(*values, strict=True))
    columns = [_column(part, alloc, depth - 1) for part in parts]
    if all(isinstance(column, _Objects) for column in columns):
        return _Objects(values)
    return _Composed(type(first), keys, columns)


def _stack(tensors: Sequence[torch.Tensor], alloc: Alloc) -> torch.Tensor | None:
    """What `torch.stack` makes of them; None: it would not make the same in given memory, or they could not go back."""
    first = tensors[0]
    kind = (first.dtype, torch.strided, True, False, False, False)
    if first.dtype.is_complex or any(_KIND(tensor) != kind for tensor in tensors) or not first.numel():
        return None
    if any(tensor.shape != first.shape or not tensor.is_contiguous() for tensor in tensors):
        return None
    return torch.stack(tuple(tensors), out=alloc((len(tensors), *first.shape), first.dtype))


def _stack_arrays(arrays: Sequence[Any], alloc: Alloc) -> torch.Tensor | None:
    if not all(array.flags.writeable and array.flags.c_contiguous for array in arrays):
        return None
    try:
        return _stack([torch.from_numpy(array) for array in arrays], alloc)
    except (TypeError, ValueError):  # torch has no such dtype
        return None
