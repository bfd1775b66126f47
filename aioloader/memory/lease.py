"""A lease: memory that is lent out, and is told when the last tensor, view or array over it has died."""

import ctypes
import os
import sys
import weakref
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final, TypeAlias

import torch

__all__ = ["Lease", "lease", "writable"]

Lease: TypeAlias = "ctypes.Array[ctypes.c_char]"
"""Has the buffer protocol, and keeps the block that it was made of alive."""


def lease(block: Any, nbytes: int, on_free: Callable[[], object]) -> Lease:
    """Lend out the first `nbytes` of `block`, until nothing refers to them any more.

    Whatever is made of a lease keeps it alive: a tensor over it through its storage, and so all views of that tensor,
    arrays made by `.numpy()`, DLPack imports, and memory saved for a backward pass. Only bare addresses
    (`tensor.data_ptr()`) do not.

    Args:
        block: Any writable buffer: an `mmap.mmap`, the `buf` of a shared memory segment, a bytearray.
        nbytes: At least 1, at most the size of `block`.
        on_free: Called once, when the lease has died and nobody can read or write the memory any more. It may be
            called in any thread and between any two bytecodes, also by the garbage collector in the middle of the
            caller's own code: it must take no lock that this code may hold, so best it appends to a deque and does
            nothing else. What it raises is reported to `sys.unraisablehook`. The block still counts as exported while
            it runs, so it must not be closed there (`BufferError`), but may be lent out again. In a forked child, and
            while the interpreter shuts down, it is not called: what the parent lent is not the child's to take back.

    Raises:
        TypeError: `block` is read-only.
        ValueError: `block` is smaller than `nbytes`.

    Why a ctypes array: torch keeps the object behind `torch.frombuffer` alive as long as the storage, but neither a
    `memoryview` nor an `mmap` slice of its own per use would do: the one cannot be referenced weakly, the other is no
    buffer. Neither numpy nor a C extension is needed. A lease with a tensor over it costs about 10 µs.
    """
    lent = _array_type(nbytes).from_buffer(block)
    watch = _Watch(lent, _died)
    watch.on_free, watch.pid = on_free, os.getpid()
    _watches[id(watch)] = watch
    return lent


def writable(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, to be read into; it must not outlive the tensor, which it does not keep.

    Without numpy, which torch can do without; and not by a ctypes array, of which each size would be a type of its own.
    """
    view: memoryview = _view_of_memory(tensor.data_ptr(), tensor.numel() * tensor.itemsize, _WRITABLE)
    return view


_view_of_memory = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)(
    ("PyMemoryView_FromMemory", ctypes.pythonapi)
)
_WRITABLE: Final = 0x200  # PyBUF_WRITE


@lru_cache(maxsize=64)
def _array_type(nbytes: int) -> type[Lease]:
    """One type per size: making them anew would leave cyclic garbage behind each time."""
    return ctypes.c_char * nbytes


class _Watch(weakref.ref[Lease]):
    """Calls `on_free` when the lease has died.

    Not `weakref.finalize`: that one goes through its registry at exit, which fails when a thread that is still at work
    adds to it meanwhile; and it takes three times as long.
    """

    __slots__ = ("on_free", "pid")
    on_free: Callable[[], object]
    pid: int


_watches: dict[int, _Watch] = {}  # by id: a weak reference that nobody keeps does not call back


def _died(
    watch: weakref.ref[Lease],
    watches: dict[int, _Watch] = _watches,
    getpid: Callable[[], int] = os.getpid,
    is_finalizing: Callable[[], bool] = sys.is_finalizing,
) -> None:
    """The defaults are for the end of the process, when the globals of this module may be gone already."""
    found = watches.pop(id(watch), None)
    if found is not None and found.pid == getpid() and not is_finalizing():
        found.on_free()
