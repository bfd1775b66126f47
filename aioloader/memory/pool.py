"""Blocks of host memory for batches, used again when the last view of the batch in them has died."""

import contextlib
import mmap
import threading
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Final
from weakref import WeakSet

import torch

from aioloader.core.forks import tell_of_fork
from aioloader.core.memory import tensor_over
from aioloader.memory.lease import lease

__all__ = ["IDLE_ALLOCATIONS", "SMALLEST_BYTES", "BatchMemory"]

SMALLEST_BYTES: Final = 1 << 20
"""Smaller tensors are torch's own: malloc mostly finds memory for them that is still mapped. Measured with two worker
threads and a consumer that holds two batches: both ways are even at 1 to 2 MiB (15 GB/s); at 4 MiB torch's memory is
collated into at 6 GB/s and ours at 16, at 16 MiB at 0.9 and 8."""

IDLE_ALLOCATIONS: Final = 64
"""A block that was free through so many allocations goes back to the system."""

HUGE_PAGES_FROM: Final = 4 << 20
"""From here on blocks ask for huge pages, which on x86 and most of ARM are of 2 MiB."""


class BatchMemory:
    """Host memory for batches. A block is lent out for each tensor, and lent again when nothing refers to it any more.

    The point is to save page faults: collating 38 MB into fresh memory runs at 1 to 3 GB/s, into memory that has been
    used before at 9 to 20. Nobody has to give anything back: a batch that is kept, in whole or as the smallest view of
    it, keeps its block; `lease` says how its end is known.

    How it stays bounded: a block is made only when no free one fits. Sizes are rounded up to four per power of two, so
    a fifth of a block is wasted at most, and a free block of up to twice the size is taken before one is made: the
    short batch at the end of an epoch often needs none. A block that was free through `IDLE_ALLOCATIONS` allocations
    is dropped, which undoes peaks and covers batches of many sizes. Simulated for sizes from 1 to 64 MiB drawn at
    random with 6 batches out: 2.3 times the memory of the batches themselves, and one allocation of 25 makes a block.

    Threads: `alloc` may be called by many at once, and takes a lock. A lease may die in any thread and between any two
    bytecodes, also in a thread that is inside `alloc` and holds the lock, when the garbage collector runs there. So its
    dying takes no lock: it appends the block to `_returned`, which is atomic, and the next `alloc` sorts it in. The
    lock is reentrant, since a finalizer of the user's, run by that same collection, may ask for a batch.

    Forks: blocks are private, so live batches of parent and child are apart from then on. The child's copy of this
    object starts with no free blocks.
    """

    def __init__(self) -> None:
        self._begin()
        tell_of_fork(self)

    def _begin(self) -> None:
        self._lock = threading.RLock()
        self._returned = _Returned()
        self._free: deque[tuple[mmap.mmap, int]] = deque()  # with the allocation after which it came back; oldest first
        self._alive: WeakSet[mmap.mmap] = WeakSet()
        self._allocations = 0
        self._made = 0

    def _forked(self) -> None:
        """See `Forkable`."""
        self._begin()

    def alloc(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised, contiguous CPU tensor; of any thread.

        Args:
            shape: Of the whole batch. Where it makes less than `SMALLEST_BYTES`, the memory is torch's own.
            dtype: Any but the quantised ones.

        It is an ordinary tensor, except that its storage cannot grow (`resize_` raises RuntimeError); that of batches
        from torch's worker processes cannot either.
        """
        nbytes = dtype.itemsize
        for size in shape:
            nbytes *= size
        taken = self._take(nbytes) if nbytes >= SMALLEST_BYTES else None
        if taken is None:
            return torch.empty(tuple(shape), dtype=dtype, device="cpu")
        block, returned = taken
        return tensor_over(lease(block, len(block), partial(returned.give, block)), shape, dtype)

    alloc.from_bytes = SMALLEST_BYTES  # type: ignore[attr-defined]  # who asks for less may as well not ask

    def close(self) -> None:
        """Give all free blocks back to the system, and each that is lent out as soon as its batch has died. Idempotent.

        `alloc` goes on, with torch's own memory: an epoch may still be under way.
        """
        with self._lock:
            self._returned.close()
            free, self._free = self._free, deque()
        del free  # outside the lock: unmapping takes its time

    def __del__(self) -> None:
        # A batch that is kept refers to `_returned`, in which blocks may lie that nobody will sort in any more.
        self._returned.close()

    @property
    def bytes_held(self) -> int:
        """Size of all blocks, lent out and free."""
        with self._lock:
            return sum(map(len, self._alive))

    @property
    def blocks_made(self) -> int:
        """How often a block had to be made."""
        return self._made

    @property
    def blocks_reused(self) -> int:
        """How often a block was lent out again."""
        return self._allocations - self._made

    def _take(self, nbytes: int) -> "tuple[mmap.mmap, _Returned] | None":
        """A block of at least `nbytes`, and where it is to come back to. None: there is none to be had."""
        with self._lock:
            returned = self._returned
            if returned.closed:
                return None
            self._sort_in()
            idle = self._take_idle()
            block = self._take_fitting(nbytes)
            if block is None:
                block = _map(_size_of_block(nbytes))
                if block is None:
                    idle.extend(self._free)
                    self._free.clear()
                else:
                    self._made += 1
                    self._alive.add(block)
            self._allocations += block is not None
        del idle  # outside the lock: unmapping takes its time
        return None if block is None else (block, returned)

    def _sort_in(self) -> None:
        """Take what has come back since the last time."""
        with contextlib.suppress(IndexError):
            while True:
                self._free.append((self._returned.popleft(), self._allocations))

    def _take_idle(self) -> list[tuple[mmap.mmap, int]]:
        """Blocks that were not needed for long. Since the one that came back last is used first, these are in front."""
        idle = []
        while self._free and self._allocations - self._free[0][1] > IDLE_ALLOCATIONS:
            idle.append(self._free.popleft())
        return idle

    def _take_fitting(self, nbytes: int) -> mmap.mmap | None:
        """The smallest free block that fits, if not over twice as large; of equal ones that which came back last."""
        best = None
        for index, (block, _) in enumerate(self._free):
            if nbytes <= len(block) <= 2 * nbytes and (best is None or len(block) <= len(self._free[best][0])):
                best = index
        if best is None:
            return None
        found = self._free[best][0]
        del self._free[best]
        return found


class _Returned(deque[mmap.mmap]):
    """Blocks whose leases have died, until they are sorted in; after `close` they are dropped.

    Leases refer to this and not to the `BatchMemory`: a batch that is kept keeps none of the loader's other memory.
    """

    closed = False

    def give(self, block: mmap.mmap) -> None:
        """Called by a dying lease: no lock here, see `BatchMemory`."""
        self.append(block)
        if self.closed:  # asked after the append: a `close` in between has not seen the block
            self.clear()

    def close(self) -> None:
        self.closed = True
        self.clear()


def _size_of_block(nbytes: int) -> int:
    """`nbytes` rounded up to one of four sizes between a power of two and the next."""
    step = 1 << (nbytes - 1).bit_length() - 3
    return -(-nbytes // step) * step


def _map(size: int) -> mmap.mmap | None:
    """Page-aligned memory from the system, of which nothing is really there before it is touched.

    None: the system refuses (no memory, or too many mappings); torch then finds some, or says so in its own words.
    """
    try:
        if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
            return mmap.mmap(-1, size)
        # Python's own choice is MAP_SHARED, with which a forked child would write into its parent's batches.
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        return None
    if size >= HUGE_PAGES_FROM and hasattr(mmap, "MADV_HUGEPAGE"):
        # Fewer page faults at the first use of a block: 7 GB/s instead of 1.7. Later uses are equally fast.
        with contextlib.suppress(OSError):  # a kernel that has none
            block.madvise(mmap.MADV_HUGEPAGE)
    return block
