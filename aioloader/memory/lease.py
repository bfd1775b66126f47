"""A lease: memory that is lent out, with a callback when the last tensor, view or array over it has died."""

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
"""Has the buffer protocol, and keeps its block alive."""


def lease(block: Any, nbytes: int, on_free: Callable[[], object]) -> Lease:
    """Lend out the first `nbytes` of `block` until nothing refers to them any more.

    Everything made from a lease keeps it alive: a tensor over it through its storage, and so all views of that tensor,
    arrays made by `.numpy()`, DLPack imports, and memory saved for a backward pass. Only bare addresses
    (`tensor.data_ptr()`) do not.

    Args:
        block: Any writable buffer: an `mmap.mmap`, the `buf` of a shared memory segment, a bytearray.
        nbytes: At least 1, at most the size of `block`.
        on_free: Called once, when the lease has died and nothing can read or write the memory any more. It may be
            called in any thread and between any two bytecodes, even by the garbage collector in the middle of the
            caller's own code. So it must not take a lock that this code may hold; appending to a deque is safe. What it
            raises is reported to `sys.unraisablehook`. The block still counts as exported while it runs: it must not be
            closed there (`BufferError`), but may be lent out again. It is not called in a forked child, which must not
            take back what the parent has lent, nor while the interpreter shuts down.

    Raises:
        TypeError: `block` is read-only.
        ValueError: `block` is smaller than `nbytes`.

    Why a ctypes array: torch keeps the object passed to `torch.frombuffer` alive as long as the storage. A `memoryview`
    cannot be referenced weakly, and an `mmap` slice is not a buffer. This needs neither numpy nor a C extension. A
    lease with a tensor over it costs about 10 µs.
    """
    lent = _array_type(nbytes).from_buffer(block)
    watch = _Watch(lent, _died)
    watch.on_free, watch.pid = on_free, os.getpid()
    _watches[id(watch)] = watch
    return lent


def writable(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, to read into. The view does not keep the tensor alive, so keep that.

    It needs no numpy, which is optional for torch, and no ctypes array, whose type would be made anew for each size.
    """
    view: memoryview = _view_of_memory(tensor.data_ptr(), tensor.numel() * tensor.itemsize, _WRITABLE)
    return view


_view_of_memory = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)(
    ("PyMemoryView_FromMemory", ctypes.pythonapi)
)
_WRITABLE: Final = 0x200  # PyBUF_WRITE


@lru_cache(maxsize=64)
def _array_type(nbytes: int) -> type[Lease]:
    """One type per size, cached since each new type leaves cyclic garbage behind."""
    return ctypes.c_char * nbytes


class _Watch(weakref.ref[Lease]):
    """Calls `on_free` when the lease has died.

    `weakref.finalize` would take three times as long, and walks its registry at exit, which fails when a thread adds to
    it at the same time.
    """

    __slots__ = ("on_free", "pid")
    on_free: Callable[[], object]
    pid: int


_watches: dict[int, _Watch] = {}  # by id: a weak reference calls back only while it is referenced itself


def _died(
    watch: weakref.ref[Lease],
    watches: dict[int, _Watch] = _watches,
    getpid: Callable[[], int] = os.getpid,
    is_finalizing: Callable[[], bool] = sys.is_finalizing,
) -> None:
    """Call `on_free`. The defaults are for interpreter exit, when the globals of this module may be cleared already."""
    found = watches.pop(id(watch), None)
    if found is not None and found.pid == getpid() and not is_finalizing():
        found.on_free()
