"""Values in shared memory that several processes have at once: one lends, the others borrow.

    Lender     has a value in a segment, once; the segment is used again when all borrowers have given it back
    Borrower   maps it, and gives the value over that memory

The mappings of borrowers are private: a page that somebody writes to is copied by the system, for that process alone.
So everybody may change a batch in place, and pages that nobody changes are there once. A page that was copied does not
show what is written into the segment later; so when a borrower gives a segment back, it lets go of its copies.
"""

import contextlib
import ctypes
import mmap
import os
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import torch

from aioloader.core.memory import tensor_over
from aioloader.executors.processes.layout import aligned, lay_out, open_buffers
from aioloader.executors.processes.segments import BufferPlace, SharedSegment
from aioloader.executors.processes.wire import SMALL_BYTES, decode, encode
from aioloader.memory.mapping import Mapping

__all__ = ["Borrower", "Lender", "Loan"]

SEGMENT_BYTES: Final = 64 << 10  # less than that is copied when it is lent
MOST_FREE: Final = 8  # free segments that are kept


@dataclass(frozen=True)
class Loan:
    """A value that can be borrowed. What is not in segments travels with it, and is less than a few KiB.

    Attributes:
        layout: Where its buffers are: in segments, or, if there are no `numbers`, in `body`.
        body: What is not in segments.
        numbers: The segments that it lies in.
        new: Segments that nobody has seen yet: numbers and sizes.
        fds: Their descriptors, to be closed once they are sent.
        gone: Segments that are to be forgotten.
    """

    layout: Sequence[tuple[int, ...]]
    body: bytes
    numbers: tuple[int, ...]
    new: tuple[tuple[int, int], ...]
    fds: tuple[int, ...]
    gone: tuple[int, ...]

    @property
    def head(self) -> tuple[Any, ...]:
        """All but what goes along in other ways."""
        return self.layout, self.new, self.gone

    def close(self) -> None:
        """Close the descriptors."""
        for fd in self.fds:
            os.close(fd)


class _Segment(SharedSegment):
    """One that is lent.

    Attributes:
        holders: How many have it: what is written into it counts as one, and so does each borrower.
    """

    __slots__ = ("holders",)

    def __init__(self, number: int, size: int) -> None:
        super().__init__(number, size)
        self.holders = 0


class Lender:
    """Memory that batches may be collated into, and what lends them; safe in any thread.

    Called with a shape and a dtype, it gives a tensor in a segment (see `Alloc`): lent out, that is not copied again.
    Everything else is copied when it is lent. A segment is used again when nobody has it any more.

    Attributes:
        made: How many segments have been made.
    """

    from_bytes = SEGMENT_BYTES  # see `BatchMemory.alloc`

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._alive: dict[int, _Segment] = {}
        self._free: list[_Segment] = []
        self._written: deque[int] = deque()  # whose tensors have died here; told in any thread, without a lock
        self._gone: list[int] = []  # for those who borrow to forget
        self.made = 0

    def __call__(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised memory."""
        size = prod(shape) * dtype.itemsize
        if size >= SEGMENT_BYTES:
            with contextlib.suppress(OSError):  # else there is no memory to share, and it is copied in another way
                return tensor_over(self._writable(size), shape, dtype)
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")

    def _writable(self, size: int) -> memoryview:
        """A segment, until the view dies."""
        with self._lock:
            self._collect()
            segment = self._take(size)
            segment.holders = 1
        return segment.mapping.lend(self._written.append, segment.number)

    def _collect(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._less(self._written.popleft(), 1)

    def _less(self, number: int, count: int) -> None:
        segment = self._alive[number]
        segment.holders -= count
        if not segment.holders:
            self._free.append(segment)
            if len(self._free) > MOST_FREE:
                gone = min(self._free, key=lambda segment: segment.size)
                self._free.remove(gone)
                del self._alive[gone.number]
                gone.close()
                self._gone.append(gone.number)

    def _take(self, size: int) -> _Segment:
        """The smallest free one that fits, unless it is much too large, or a new one."""
        fitting = [segment for segment in self._free if size <= segment.size <= 2 * max(size, mmap.PAGESIZE)]
        if fitting:
            segment = min(fitting, key=lambda segment: segment.size)
            self._free.remove(segment)
            return segment
        self.made += 1
        segment = _Segment(self.made, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)
        self._alive[segment.number] = segment
        return segment

    def lend(self, value: Any, borrowers: int) -> Loan:
        """Lend `value` to so many; each of them gives back (`less`) what it has borrowed.

        Raises:
            Exception: It cannot be pickled.
        """
        return self.lend_encoded(*encode(value), borrowers)

    def lend_encoded(self, stream: bytes, buffers: list[memoryview], borrowers: int) -> Loan:
        """The same of what `encode` gives."""
        body = b""
        if len(stream) < SMALL_BYTES:
            body = stream
        else:
            buffers.append(memoryview(stream))
        if not buffers:
            return Loan((), body, (), (), (), ())
        try:
            places, copies = self._places(buffers)
        except OSError:  # no memory to share: it goes through the socket
            layout, pieces = lay_out([*buffers, memoryview(body)] if body else buffers)
            return Loan(layout, b"".join(pieces), (), (), (), ())
        numbers = tuple({place.segment: None for place in places})
        new: list[tuple[int, int]] = []
        fds: list[int] = []
        with self._lock:
            for number in numbers:
                segment = self._alive[number]
                segment.holders += borrowers
                if segment.fd >= 0:
                    new.append((number, segment.size))
                    fds.append(segment.fd)
                    segment.fd = -1
            gone, self._gone = tuple(self._gone), []
        del copies
        return Loan(places, body, numbers, tuple(new), tuple(fds), gone)

    def less(self, numbers: Iterable[int], borrowers: int = 1) -> None:
        """Somebody, or so many, have given these segments back."""
        with self._lock:
            for number in numbers:
                self._less(number, borrowers)

    def close(self) -> None:
        """Nothing is lent any more. What was lent stays as long as somebody has it."""
        with self._lock:
            for segment in self._alive.values():
                segment.close()

    def _places(self, buffers: Sequence[memoryview]) -> tuple[list[BufferPlace], Any]:
        """Where each buffer lies, those that were in no segment too; and what keeps these until they are lent."""
        found = [self._find(buffer) for buffer in buffers]
        left = sum(aligned(buffer.nbytes) for buffer, place in zip(buffers, found, strict=True) if place is None)
        if not left:
            return [place for place in found if place is not None], None
        copies = self._writable(left)
        start = self._find(copies)
        assert start is not None
        offset = 0
        for index, buffer in enumerate(buffers):
            if found[index] is None:
                copies[offset : offset + buffer.nbytes] = buffer
                found[index] = BufferPlace(start.segment, offset, buffer.nbytes)
                offset += aligned(buffer.nbytes)
        return [place for place in found if place is not None], copies

    def _find(self, buffer: memoryview) -> BufferPlace | None:
        """The place of a buffer that was written into a segment. One that is lent already is lent as a copy."""
        address = 0 if buffer.readonly else ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        with self._lock:
            for segment in self._alive.values():
                offset = address - segment.mapping.address
                if segment.holders == 1 and 0 <= offset <= segment.size - buffer.nbytes:
                    return BufferPlace(segment.number, offset, buffer.nbytes)
        return None


class Borrower:
    """Used by one thread at a time; values may die in any."""

    def __init__(self) -> None:
        self._mappings: dict[int, Mapping] = {}
        self._returned: deque[int] = deque()  # appended to by the thread that drops the last view

    def borrow(self, head: tuple[Any, ...], body: Any, fds: Sequence[int]) -> Any:
        """The value of a loan; tells by `given_back` when the last part of it has died.

        Args:
            head: Of the loan.
            body: Likewise.
            fds: Likewise; they stay open.

        Raises:
            OSError: Its memory cannot be mapped.
            Exception: It cannot be unpickled here. Nothing is borrowed then but what `given_back` tells.
        """
        layout, new, gone = head
        for number in gone:
            self._mappings.pop(number, None)
        for (number, size), fd in zip(new, fds, strict=True):
            self._mappings[number] = Mapping(fd, size, private=True)
        memory = memoryview(body)
        if not layout:
            return decode(memory)
        if len(layout[0]) == 2:
            buffers = open_buffers(memory, layout)
        else:
            places = [BufferPlace(*place) for place in layout]
            used = {place.segment: None for place in places}
            lent = {number: self._mappings[number].lend(self._returned.append, number) for number in used}
            buffers = [lent[number][offset : offset + size] for number, offset, size in places]
            del lent
            if memory:
                buffers.append(memory)
        stream = buffers.pop()
        return decode(stream, buffers)

    def given_back(self) -> list[int]:
        """Segments of which nothing is in use any more, each of which is told once."""
        numbers: list[int] = []
        with contextlib.suppress(IndexError):
            while True:
                numbers.append(self._returned.popleft())
        for number in numbers:
            if (mapping := self._mappings.get(number)) is not None:
                mapping.forget_changes()
        return numbers
