"""The memory of tensors: where it comes from, and tensors over memory that somebody else owns, without a copy."""

import ctypes
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Self

import torch

__all__ = ["Alloc", "IntoMemory", "memory_at", "tensor_over", "tensor_over_bytes"]

Alloc = Callable[[Sequence[int], torch.dtype], torch.Tensor]
"""Gives uninitialised, contiguous host memory of this shape and dtype, for instance page-locked or used before."""


class IntoMemory:
    """A function that makes batches, in memory that an epoch has for them."""

    def into(self, alloc: Alloc | None) -> Self:
        """The same for one epoch.

        Args:
            alloc: Where the default collate puts batches, if nothing was said of that; None: into fresh memory.
        """
        raise NotImplementedError

    def __call__(self, samples: Any, /) -> Any:
        """A batch of them."""
        raise NotImplementedError


def tensor_over(
    memory: object, shape: Sequence[int], dtype: torch.dtype, *, offset: int = 0, strides: Sequence[int] | None = None
) -> torch.Tensor:
    """A tensor that shares `memory`: what is written to one is read from the other.

    Lifetime: the tensor keeps `memory`, the object, alive, and so do its views, arrays made by `.numpy()` and DLPack
    imports. The object must not move or free its memory before it dies.

    It is an ordinary tensor: its own base, not a view. Its storage is exactly as large as the tensor, so that
    `torch.save` writes nothing else, and cannot be resized, like the storage of batches from torch's worker processes.

    Args:
        memory: A writable buffer, at least as large as the tensor and `offset` together. Over a read-only one, torch
            warns.
        shape: Of at least one element.
        dtype: Any but the quantised ones.
        offset: Bytes to leave out at the start; a multiple of the dtype's size.
        strides: Where the elements lie in some other order than that of a contiguous tensor; without gaps.
    """
    tensor = torch.frombuffer(memory, dtype=dtype, count=prod(shape), offset=offset)
    storage = tensor.untyped_storage()
    # Not `.view(shape)`: the result would be a view, with a `_base` and the rules that autograd has for it.
    if strides is None:
        return tensor.set_(storage, 0, tuple(shape))  # type: ignore[call-overload, no-any-return]  # it is optional
    return tensor.set_(storage, 0, tuple(shape), strides)


def tensor_over_bytes(buffer: object) -> torch.Tensor:
    """A uint8 tensor [len(buffer)] that shares the memory of `buffer`, any object with contiguous bytes.

    Lifetime: as that of `tensor_over`.

    Mutability: `buffer` may be read-only; torch does not know that, and does not warn. So the tensor must not be
    written to: clone it first.

    Raises:
        BufferError: The bytes are not contiguous.
        TypeError: It is no buffer.
    """
    held = _PyBuffer()
    _get_buffer(buffer, ctypes.byref(held), _SIMPLE)
    try:
        if not held.len:  # it has no address, and `torch.frombuffer` refuses it
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        return tensor_over(memory_at(held.buf, held.len, buffer), (held.len,), torch.uint8)
    finally:
        _release_buffer(ctypes.byref(held))


def memory_at(address: int, nbytes: int, owner: object) -> memoryview:
    """The bytes at `address`, writable; the view keeps `owner` alive, whose memory they are."""
    memory: Any = _Memory.from_address(address)  # type: ignore[attr-defined]  # of the ctypes array
    memory.owner = owner
    return memoryview(memory).cast("B")[:nbytes]


# A ctypes array has its length in its type, and making a type for each length takes longer than to copy small tensors.
# So there is one type, longer than any memory, of which a view takes the beginning.
_Memory = type("_Memory", (ctypes.c_uint8 * (1 << 46 if ctypes.sizeof(ctypes.c_void_p) == 8 else 1 << 30),), {})


class _PyBuffer(ctypes.Structure):
    """`Py_buffer`, which has belonged to Python's stable ABI since 3.11."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_void_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_get_buffer = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(_PyBuffer), ctypes.c_int)(
    ("PyObject_GetBuffer", ctypes.pythonapi)
)
_release_buffer = ctypes.PYFUNCTYPE(None, ctypes.POINTER(_PyBuffer))(("PyBuffer_Release", ctypes.pythonapi))
_SIMPLE = 0  # PyBUF_SIMPLE: contiguous bytes, which may be read-only
