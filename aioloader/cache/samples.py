"""The size of samples in memory, and copies that the user may change."""

import copy
import pickle
import sys
from typing import Any, Final

import torch

__all__ = ["copied", "kept", "size_of"]

_IMMUTABLE: Final = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.Size)


def copied(sample: Any) -> Any:
    """A copy of `sample` that shares no writable memory with it.

    Tensors, arrays and the usual containers are copied directly, anything else by `copy.deepcopy`.
    """
    kind = type(sample)
    if kind is torch.Tensor and not sample.requires_grad:
        return sample.clone()
    if kind in _IMMUTABLE:
        return sample
    if kind is tuple or kind is list:
        return kind(map(copied, sample))
    if kind is dict:
        return {key: copied(value) for key, value in sample.items()}
    if isinstance(sample, tuple) and hasattr(sample, "_fields"):
        return kind(*map(copied, sample))
    return copy.deepcopy(sample)


def kept(sample: Any) -> Any:
    """`sample`, with copies of tensors and arrays that are small views of larger memory.

    A row of a batch would keep the whole batch alive, which is not counted in the budget.
    """
    kind = type(sample)
    if kind is torch.Tensor:
        if sample.layout is torch.strided and 2 * sample.nbytes < sample.untyped_storage().nbytes():
            return sample.clone()
    elif kind is tuple or kind is list:
        return kind(map(kept, sample))
    elif kind is dict:
        return {key: kept(value) for key, value in sample.items()}
    elif isinstance(sample, tuple) and hasattr(sample, "_fields"):
        return kind(*map(kept, sample))
    elif kind.__module__ == "numpy" and hasattr(sample, "base"):
        base = sample.base
        if base is not None and 2 * sample.nbytes < getattr(base, "nbytes", 0):
            return sample.copy()
    return sample


def size_of(sample: Any) -> int:
    """The bytes that `sample` takes.

    Tensors, arrays, strings and bytes count with their content, the usual containers with their elements. An element
    that is contained twice counts twice. Any other object counts as its pickle, or if it has none, as `sys.getsizeof`.
    """
    kind = type(sample)
    if kind is torch.Tensor:
        memory = sample.untyped_storage().nbytes() if sample.layout is torch.strided else sample.nbytes
        return int(memory) + _TENSOR_BYTES
    if kind in _IMMUTABLE:
        return sys.getsizeof(sample)
    if kind is dict:
        return sys.getsizeof(sample) + sum(size_of(key) + size_of(value) for key, value in sample.items())
    if kind is tuple or kind is list or (isinstance(sample, tuple) and hasattr(sample, "_fields")):
        return sys.getsizeof(sample) + sum(map(size_of, sample))
    if kind.__module__ == "numpy" and hasattr(sample, "nbytes") and kind.__name__ == "ndarray":
        return int(sample.nbytes) + _TENSOR_BYTES if not sample.dtype.hasobject else _pickled(sample)
    return _pickled(sample)


_TENSOR_BYTES: Final = 400  # of a tensor without its elements: the Python object, the C++ object, and the storage


def _pickled(sample: object) -> int:
    try:
        return len(pickle.dumps(sample, 5))
    except Exception:  # a user's object may raise anything
        return sys.getsizeof(sample)
