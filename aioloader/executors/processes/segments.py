"""Shared memory that is used again: how batches come back from a worker without being copied.

A segment belongs to the worker that made it. It has no name: its file is anonymous (`memfd_create`) or deleted at once,
so nothing is left of it when its processes have ended, however they ended. The worker writes the buffers of one result
into it. The main process maps it once, rebuilds tensors over it, and tells the worker when the last view of them has
died. Then the worker uses it again, and neither side pays for fresh pages.
"""

import ctypes
import mmap
import os
import tempfile
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from math import prod
from typing import Any, Final, NamedTuple, Protocol

import torch

from aioloader.core.memory import tensor_over
from aioloader.executors.processes.layout import aligned, open_buffers
from aioloader.executors.processes.wire import SMALL_BYTES, Message, decode
from aioloader.memory.mapping import Mapping
from aioloader.memory.pool import SMALLEST_BYTES

__all__ = [
    "SHARED_BYTES",
    "Arena",
    "BufferPlace",
    "MappedSegments",
    "SharedSegment",
    "create_file",
    "shared_memory",
    "use_arena",
]

SHARED_BYTES: Final = 1 << 15  # smaller results go with the message, which is cheaper than a segment
MAX_SEGMENTS: Final = 12  # of a result; a message takes sixteen descriptors
FEW_SEGMENTS: Final = 4  # of a result, from which on the next one is as large as those together
MAX_OUT: Final = 128  # batches, or large parts of them, that are being made; each has an open file
MAX_FREE: Final = 8  # results whose free segments a worker keeps; only a consumer that keeps its batches needs more


def create_file(size: int) -> int:
    """A descriptor of `size` bytes of memory that other processes can map."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("aioloader", os.MFD_CLOEXEC)
    else:  # macOS
        fd, path = tempfile.mkstemp(prefix="aioloader-")
        os.unlink(path)  # noqa: PTH108
    os.ftruncate(fd, size)
    return fd


class BufferPlace(NamedTuple):
    """The place of a buffer in a segment."""

    segment: int
    offset: int
    size: int


class SharedSegment:
    """A piece of shared memory that this process made.

    Attributes:
        fd: Its descriptor, until it has been sent; then -1.
        filled: Bytes that are in use, from its start.
    """

    __slots__ = ("fd", "filled", "mapping", "number", "size", "view")

    def __init__(self, number: int, size: int) -> None:
        self.number = number
        self.size = size
        self.fd = create_file(size)
        try:
            self.mapping = Mapping(self.fd, size)
        except OSError:
            self.close()
            raise
        self.view = self.mapping.memory()
        self.filled = 0

    def close(self) -> None:
        """Close its descriptor."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Arena:
    """A worker's segments.

    Results are sent one at a time: `alloc` and `put` fill segments for the current one, then either `hand_over` lends
    them to the main process or `abandon` frees them.

    What if a result cannot be pickled? It goes once more, without the sample that is to blame, and the others lie where
    they were. So nothing is freed before something was sent, else they would be written over by each other.

    Batches may be made side by side, long before they are sent: `lend` gives each a segment of its own. What is sent
    of it goes without a copy if nothing here refers to it any more: *who keeps a batch here must not see what the main
    process writes to it*, nor the other way round. So `put` takes the last references of ours from it, and looks
    whether its lease has died then. If not, it is copied.

    Threads: `lend` is called in any, everything else in one of them. A lease may die in any thread, between any two
    bytecodes, and takes no lock, see `lease`: it appends a number to `_died`, which is read by the next one who has it.
    A segment whose lease dies while `put` looks at it is in neither of `_out` and `_free`, so nobody else gets it.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # of all that follows but `_current`; reentrant as that of `BatchMemory`
        self._free: list[SharedSegment] = []
        self._current: list[SharedSegment] = []
        self._out: dict[int, SharedSegment] = {}  # lent to tensors of this process
        self._claimed: dict[int, SharedSegment] = {}  # the same, and `put` is looking at them
        self._sole: list[SharedSegment] = []  # of these, the ones that nothing here refers to any more
        self._died: deque[int] = deque()
        self._lent: dict[int, SharedSegment] = {}
        self._made = 0
        self._most_free = MAX_FREE
        self._last_bytes = 0  # the size of the last result, without what was lent
        self._closed = False

    def alloc(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised memory in a segment for a part of the current result, which is then not copied."""
        size = prod(shape) * dtype.itemsize
        if size < SMALL_BYTES or len(self._current) >= MAX_SEGMENTS:
            return torch.empty(tuple(shape), dtype=dtype, device="cpu")
        try:
            segment, offset = self._reserve(size)
        except OSError:  # no memory to share: the tensor goes through the socket
            return torch.empty(tuple(shape), dtype=dtype, device="cpu")
        return torch.frombuffer(segment.view[offset : offset + size], dtype=dtype).view(tuple(shape))

    def lend(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised memory for a batch, in any thread. If it is small, torch allocates it: it will be copied."""
        size = prod(shape) * dtype.itemsize
        if size >= SMALLEST_BYTES:
            with suppress(OSError):  # no memory to share
                return tensor_over(self._lease(size), shape, dtype)
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")

    lend.from_bytes = SMALLEST_BYTES  # type: ignore[attr-defined]  # as `BatchMemory.alloc`

    def place(self, buffers: list[memoryview]) -> list[BufferPlace] | None:
        """`put`; None: they are too small for that, or there is no memory to share, and they go another way.

        They are no longer in segments then.
        """
        if sum(buffer.nbytes for buffer in buffers) >= SHARED_BYTES:
            with suppress(OSError):
                return self.put(buffers)
        if self._current or self._claimed or self._sole:
            buffers[:] = [memoryview(bytearray(buffer)) for buffer in buffers]
        self.abandon()
        return None

    def put(self, buffers: list[memoryview]) -> list[BufferPlace]:
        """The place of each buffer. Those that are not in a segment are copied into one.

        Args:
            buffers: Of the current result. There may be other views of the same bytes in their places afterwards.

        Raises:
            OSError: There is no memory to share.
        """
        places = [_place_in(self._current, buffer) for buffer in buffers]
        if self._out:
            for index, place in self._claim(buffers).items():
                places[index] = place
        loose = [index for index, place in enumerate(places) if place is None]
        if loose:
            segment, offset = self._reserve(sum(aligned(buffers[index].nbytes) for index in loose))
            for index in loose:
                size = buffers[index].nbytes
                segment.view[offset : offset + size] = buffers[index]
                places[index] = BufferPlace(segment.number, offset, size)
                offset += aligned(size)
        return [place for place in places if place is not None]

    def hand_over(self, places: Sequence[BufferPlace]) -> list[tuple[int, int, int]]:
        """Lend the segments of `places` to the main process, until `take_back`.

        Returns:
            The number, size and descriptor of each segment that it does not know yet; close the descriptor once sent.
        """
        used = {place.segment for place in places}
        new = []
        with self._lock:
            self._last_bytes = sum(segment.filled for segment in self._current if segment.number in used)
            self._most_free = max(self._most_free, MAX_FREE * len(self._sole))
            for segment in (*self._current, *self._sole):
                if segment.number in used:
                    self._lent[segment.number] = segment
                    if segment.fd >= 0:
                        new.append((segment.number, segment.size, segment.fd))
                        segment.fd = -1
                else:
                    self._free.append(segment)
            self._settle()
        return new

    def abandon(self) -> None:
        """Free the segments of the current result, which will not be sent."""
        with self._lock:
            self._free += self._current + self._sole
            self._settle()

    def take_back(self, numbers: Sequence[int]) -> None:
        """Free lent segments: the main process has no view of them any more."""
        with self._lock:
            self._free.extend(self._lent.pop(number) for number in numbers)

    def trim(self) -> list[int]:
        """Release all but some free segments; returns their numbers, which the main process must forget too."""
        with self._lock:
            self._collect()
            self._free.sort(key=lambda segment: segment.size)
            gone = self._free[: max(0, len(self._free) - self._most_free)]
            del self._free[: len(gone)]
        for segment in gone:
            segment.close()
        return [segment.number for segment in gone]

    def close(self) -> None:
        """Close what is still open: nothing is sent any more. What is mapped elsewhere stays there."""
        with self._lock:
            self._closed = True
            still = [*self._free, *self._current, *self._sole, *self._claimed.values(), *self._out.values()]
            for known in (self._free, self._current, self._sole, self._claimed, self._out, self._lent):
                known.clear()
        for segment in still:
            segment.close()

    def _lease(self, size: int) -> memoryview:
        with self._lock:
            if self._closed:
                raise OSError
            self._collect()
            if len(self._out) >= MAX_OUT:
                raise OSError
            segment = self._take(size)
            segment.filled = size
            self._out[segment.number] = segment
        return segment.mapping.lend(self._died.append, segment.number)

    def _collect(self) -> None:
        """Leases have died."""
        for _ in range(len(self._died)):
            number = self._died.popleft()
            if (segment := self._claimed.pop(number, None)) is not None:
                self._sole.append(segment)
            elif (segment := self._out.pop(number, None)) is not None:  # else all has been let go of, in `close`
                self._free.append(segment)

    def _claim(self, buffers: list[memoryview]) -> dict[int, BufferPlace]:
        """Which of `buffers` are in segments that nothing else here refers to; each then has one reference less."""
        with self._lock:
            lent = list(self._out.values())
            found = {index: place for index, buffer in enumerate(buffers) if (place := _place_in(lent, buffer))}
            sent = dict.fromkeys((place.segment for place in found.values()), 0)
            for place in found.values():
                sent[place.segment] += place.size
            large = [number for number, size in sent.items() if 2 * size >= self._out[number].filled]
            for number in large[: max(0, MAX_SEGMENTS - len(self._current))]:
                self._claimed[number] = self._out.pop(number)
            views = {number: segment.view for number, segment in self._claimed.items()}
        for index, (number, offset, size) in found.items():
            if number in views:
                buffers[index] = views[number][offset : offset + size]
        with self._lock:
            self._collect()
            sole = {segment.number for segment in self._sole}
        return {index: place for index, place in found.items() if place.segment in sole}

    def _settle(self) -> None:
        """There is no current result any more."""
        self._current = []
        self._sole = []
        self._out.update(self._claimed)
        self._claimed.clear()

    def _reserve(self, size: int) -> tuple[SharedSegment, int]:
        """Space for `size` bytes in a current segment, and its offset."""
        for segment in self._current:
            if segment.size - segment.filled >= size:
                break
        else:
            segment = self._open(size)
        offset = segment.filled
        segment.filled += aligned(size)
        return segment, offset

    def _open(self, size: int) -> SharedSegment:
        if not self._current:
            size = max(size, self._last_bytes)  # so that a result like the last one fits into one segment
        elif len(self._current) >= FEW_SEGMENTS:
            size = max(size, sum(segment.size for segment in self._current))  # and one of many parts into some
        with self._lock:
            segment = self._take(size)
        segment.filled = 0
        self._current.append(segment)
        return segment

    def _take(self, size: int) -> SharedSegment:
        """A free segment, or a new one."""
        fitting = [segment for segment in self._free if segment.size >= size]
        segment = min(fitting, key=lambda segment: segment.size, default=None)
        if segment is not None and segment.size <= 4 * max(size, mmap.PAGESIZE):  # a small result must not occupy it
            self._free.remove(segment)
            return segment
        self._made += 1
        return SharedSegment(self._made, _rounded(size))


def _place_in(segments: Sequence[SharedSegment], buffer: memoryview) -> BufferPlace | None:
    """Where a buffer is; None: in none of these."""
    if not segments or buffer.readonly:
        return None
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    for segment in segments:
        offset = address - segment.mapping.address
        if 0 <= offset <= segment.filled - buffer.nbytes:
            return BufferPlace(segment.number, offset, buffer.nbytes)
    return None


class MappedSegments:
    """The segments of a worker, as the process maps them that gets its results."""

    def __init__(self) -> None:
        self._mappings: dict[int, Mapping] = {}
        self._freed: deque[int] = deque()  # appended to by the thread that drops the last view, whichever it is

    def map(self, number: int, size: int, fd: int) -> None:
        """A segment is new; closes its descriptor.

        Raises:
            OSError: It cannot be mapped.
        """
        try:
            self._mappings[number] = Mapping(fd, size, lockable=True)
        finally:
            os.close(fd)

    def forget(self, numbers: Iterable[int]) -> None:
        """The worker has released these. What is in use stays mapped."""
        for number in numbers:
            self._mappings.pop(number, None)

    def buffers(self, places: Sequence[tuple[int, int, int]]) -> list[memoryview]:
        """What is at `places`. Its segments are in use while a view of it lives.

        Raises:
            KeyError: One of them is not mapped.
        """
        segments = {segment: self._mappings[segment] for segment, _, _ in places}
        lent = {number: mapping.lend(self._freed.append, number) for number, mapping in segments.items()}
        found = [lent[number][offset : offset + size] for number, offset, size in places]
        # Whoever keeps the labels of a batch must not keep its images.
        return [memoryview(bytearray(part)) if part.nbytes < SHARED_BYTES else part for part in found]

    def unpack(self, message: Message) -> Any:
        """The value of a message of `WorkerLink.send`. Its tensors share memory with the worker.

        Raises:
            OSError: A new segment cannot be mapped.
            Exception: The value cannot be unpickled here.
        """
        *_, layout, new, forgotten = message.head
        self.forget(forgotten)
        for (number, size), fd in zip(new, message.fds, strict=True):
            self.map(number, size, fd)
        body = memoryview(message.body)
        if len(layout[0]) == 2:
            buffers = open_buffers(body, layout)
        else:
            buffers = self.buffers(layout)
            if body:
                buffers.append(body)
        stream = buffers.pop()
        return decode(stream, buffers)

    def freed(self) -> list[int]:
        """Those that are free since the last call; the worker must be told of each once."""
        return [self._freed.popleft() for _ in range(len(self._freed))]


def _rounded(size: int) -> int:
    """`size`, rounded up by an eighth at most, so that segments fit again where batches differ in size."""
    step = max(mmap.PAGESIZE, 1 << max(0, size.bit_length() - 3))
    return -(-size // step) * step


class _Allocates(Protocol):
    def alloc(self, shape: Sequence[int], dtype: torch.dtype, /) -> torch.Tensor: ...


_arena: _Allocates | None = None


def use_arena(arena: _Allocates) -> None:
    """In a worker, once: let `shared_memory` allocate in `arena`."""
    global _arena
    _arena = arena


def shared_memory(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """In a worker: memory for a batch that goes to the main process, so that collating is its only copy."""
    if _arena is None:
        return torch.empty(shape, dtype=dtype)
    return _arena.alloc(shape, dtype)
