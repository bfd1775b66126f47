"""Tensors over memory that is not ours, without a copy."""

import ctypes
from typing import Any

import torch

__all__ = ["tensor_over"]


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

# A ctypes array has its length in its type, and a type for each length of an object would cost more than the copy that
# is saved. So there is one type, longer than any memory, of which a tensor takes the beginning.
_Memory = type("_Memory", (ctypes.c_uint8 * (1 << 46 if ctypes.sizeof(ctypes.c_void_p) == 8 else 1 << 30),), {})


def tensor_over(buffer: Any) -> torch.Tensor:
    """A uint8 tensor [len(buffer)] that shares the memory of `buffer`, any object with contiguous bytes.

    `torch.frombuffer` does that too, but warns of a read-only buffer, once per process, since writing to the tensor
    would write to it. Ours are read by collate; whoever wants to write clones.

    Args:
        buffer: It must not move its memory while it is referred to: the tensor keeps it alive and no more than that.
    """
    held = _PyBuffer()
    _get_buffer(buffer, ctypes.byref(held), _SIMPLE)
    try:
        if not held.len:  # which has no address, and which `torch.frombuffer` refuses
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        memory: Any = _Memory.from_address(held.buf)  # type: ignore[attr-defined]  # of the ctypes array
        memory.owner = buffer
        return torch.frombuffer(memory, dtype=torch.uint8, count=held.len)
    finally:
        _release_buffer(ctypes.byref(held))
