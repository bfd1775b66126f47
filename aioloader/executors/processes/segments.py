"""Shared memory that is used again: how batches come back from a worker without being copied.

A segment belongs to the worker that made it. It has no name: its file is anonymous (`memfd_create`) or deleted at once,
so nothing is left of it when its processes are gone, however they ended. The worker writes the buffers of one result
into it; the user's process maps it once, rebuilds tensors over it, and tells the worker when the last view of them has
died. Then the worker uses it again, and neither side pays for fresh pages.
"""

import ctypes
import mmap
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import cache, partial
from math import prod
from typing import Any, Final, NamedTuple

import torch

from aioloader.core.memory import memory_at
from aioloader.executors.processes.wire import SMALL_BYTES
from aioloader.memory.lease import lease

__all__ = ["Arena", "BufferPlace", "Mapping", "create_file", "shared_memory", "use_arena"]

ALIGNMENT: Final = 64  # bytes; a cache line, and more than any dtype needs
KEPT: Final = 8  # free segments that a worker keeps; more were needed by a consumer that kept its batches


def create_file(size: int) -> int:
    """A descriptor of `size` bytes of memory that other processes can map."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("aioloader", os.MFD_CLOEXEC)
    else:  # macOS
        fd, path = tempfile.mkstemp(prefix="aioloader-")
        os.unlink(path)  # noqa: PTH108
    os.ftruncate(fd, size)
    return fd


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *([ctypes.c_int] * 3), ctypes.c_longlong)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return libc


class Mapping:
    """A mapped segment, which stays mapped as long as this object or a lease of it lives.

    Not Python's `mmap`, which keeps a file descriptor for each: a consumer that keeps a thousand batches would run into
    the limit of open files, as it does with torch's workers.

    Args:
        fd: Of the segment; it stays the caller's.
        size: In bytes.
        private: Changes stay in this process.
    """

    def __init__(self, fd: int, size: int, *, private: bool = False) -> None:
        flags = mmap.MAP_PRIVATE if private else mmap.MAP_SHARED
        address = _libc().mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0)
        if address is None or address == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), f"cannot map {size} bytes of shared memory")
        self.address: int = address
        self.size = size
        self._unmap = _libc().munmap

    def __del__(self) -> None:
        if hasattr(self, "_unmap"):  # it has been mapped
            self._unmap(self.address, self.size)

    def memory(self) -> memoryview:
        """All of it; stays mapped as long as the view, or anything made over it, lives."""
        return memory_at(self.address, self.size, owner=self)

    def lend(self, on_return: Callable[..., object], *args: Any) -> memoryview:
        """All of it, once; `on_return(*args)` is called when the last view has died, in any thread, maybe inside gc."""
        return memoryview(lease(self.memory(), self.size, partial(on_return, *args))).cast("B")


class BufferPlace(NamedTuple):
    """Where a buffer lies in a segment."""

    segment: int
    offset: int
    size: int


class _SharedSegment:
    __slots__ = ("fd", "filled", "mapping", "number", "size", "view")

    def __init__(self, number: int, size: int) -> None:
        self.number = number
        self.size = size
        self.fd = create_file(size)
        try:
            self.mapping = Mapping(self.fd, size)
        except OSError:
            os.close(self.fd)
            raise
        self.view = self.mapping.memory()
        self.filled = 0


class Arena:
    """A worker's segments.

    One result is made at a time: `alloc` and `put` fill segments for it, `hand_over` says that it has been sent,
    `abandon` that it will not be.
    """

    def __init__(self) -> None:
        self._free: list[_SharedSegment] = []
        self._current: list[_SharedSegment] = []
        self._lent: dict[int, _SharedSegment] = {}
        self._made = 0
        self._expected = 0  # what the last result took

    def alloc(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised memory in a segment, for a part of the result that is being made: it will not be copied."""
        size = prod(shape) * dtype.itemsize
        if size < SMALL_BYTES:
            return torch.empty(shape, dtype=dtype)
        try:
            segment, offset = self._reserve(size)
        except OSError:  # no memory to share: it is copied through the socket
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(segment.view[offset : offset + size], dtype=dtype).view(tuple(shape))

    def put(self, buffers: Sequence[memoryview]) -> list[BufferPlace]:
        """Where each of `buffers` lies, after copying those that lay elsewhere.

        Raises:
            OSError: No memory to share.
        """
        places = [self._find(buffer) for buffer in buffers]
        wanted = sum(_aligned(b.nbytes) for b, place in zip(buffers, places, strict=True) if place is None)
        if wanted:
            segment, offset = self._reserve(wanted)
            for index, (buffer, place) in enumerate(zip(buffers, places, strict=True)):
                if place is None:
                    segment.view[offset : offset + buffer.nbytes] = buffer
                    places[index] = BufferPlace(segment.number, offset, buffer.nbytes)
                    offset += _aligned(buffer.nbytes)
        return [place for place in places if place is not None]

    def hand_over(self, places: Sequence[BufferPlace]) -> list[tuple[int, int, int]]:
        """The segments of `places` are the other side's until `take_back`.

        Returns:
            Those that it does not know yet: number, size, and descriptor, which is to be closed when it was sent.
        """
        used = {place.segment for place in places}
        new = []
        for segment in self._current:
            if segment.number in used:
                self._lent[segment.number] = segment
                if segment.fd >= 0:
                    new.append((segment.number, segment.size, segment.fd))
                    segment.fd = -1
            else:
                self._free.append(segment)
        self._expected = sum(segment.filled for segment in self._current if segment.number in used)
        self._current = []
        return new

    def abandon(self) -> None:
        """The result is not to be sent."""
        self._free.extend(self._current)
        self._current = []

    def take_back(self, numbers: Sequence[int]) -> None:
        """No view of these lives any more on the other side."""
        self._free.extend(self._lent.pop(number) for number in numbers)

    def trim(self) -> list[int]:
        """Let go of what is free beyond the bound; the numbers, which the other side is to forget."""
        self._free.sort(key=lambda segment: segment.size)
        gone = self._free[: max(0, len(self._free) - KEPT)]
        del self._free[: len(gone)]
        for segment in gone:
            if segment.fd >= 0:
                os.close(segment.fd)
                segment.fd = -1
        return [segment.number for segment in gone]

    def _find(self, buffer: memoryview) -> BufferPlace | None:
        if not self._current:
            return None
        address = ctypes.addressof(ctypes.c_char.from_buffer(buffer)) if not buffer.readonly else 0
        for segment in self._current:
            offset = address - segment.mapping.address
            if 0 <= offset <= segment.filled - buffer.nbytes:
                return BufferPlace(segment.number, offset, buffer.nbytes)
        return None

    def _reserve(self, size: int) -> tuple[_SharedSegment, int]:
        """`size` bytes in a current segment."""
        for segment in self._current:
            if segment.size - segment.filled >= size:
                break
        else:
            segment = self._open(size)
        offset = segment.filled
        segment.filled += _aligned(size)
        return segment, offset

    def _open(self, size: int) -> _SharedSegment:
        if not self._current:
            size = max(size, self._expected)  # all of a result in one segment, if it is like the last one
        fitting = [segment for segment in self._free if segment.size >= size]
        segment = min(fitting, key=lambda segment: segment.size, default=None)
        if segment is not None and segment.size <= 4 * max(size, mmap.PAGESIZE):  # else a small one would block it
            self._free.remove(segment)
        else:
            self._made += 1
            segment = _SharedSegment(self._made, _rounded(size))
        segment.filled = 0
        self._current.append(segment)
        return segment


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _rounded(size: int) -> int:
    """An eighth more at most, so that segments fit again where batches differ in size."""
    step = max(mmap.PAGESIZE, 1 << max(0, size.bit_length() - 3))
    return -(-size // step) * step


_arena: Arena | None = None


def use_arena(arena: Arena) -> None:
    """`shared_memory` allocates in `arena` from now on; in a worker, once."""
    global _arena
    _arena = arena


def shared_memory(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """In a worker: memory for a batch that goes to the user's process, so that collating is the only copy of it."""
    if _arena is None:
        return torch.empty(shape, dtype=dtype)
    return _arena.alloc(shape, dtype)
