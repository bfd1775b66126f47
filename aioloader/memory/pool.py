"""Blocks of host memory for batches, each used again when the last view of its batch has died."""

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
"""Smaller tensors are allocated by torch, since malloc mostly finds memory for them that is still mapped. Measured with
two worker threads and a consumer that holds two batches: at 1 to 2 MiB both are equally fast (15 GB/s); at 4 MiB
batches are collated into torch's memory at 6 GB/s and into blocks at 16, at 16 MiB at 0.9 and 8."""

IDLE_ALLOCATIONS: Final = 64
"""A block that was free for this many allocations goes back to the system."""

HUGE_PAGES_FROM: Final = 4 << 20
"""Blocks of this size or more ask for huge pages, which have 2 MiB on x86 and most of ARM."""


class BatchMemory:
    """Host memory for batches. Each tensor gets a block, which is used again when nothing refers to it any more.

    The purpose is to save page faults: collating 38 MB into fresh memory runs at 1 to 3 GB/s, into memory that has been
    used before at 9 to 20. Batches need not be given back: one that is kept, as a whole or as its smallest view, keeps
    its block; see `lease` for how that works.

    How memory stays bounded: a block is made only when no free one fits. Sizes are rounded up to four per power of two,
    so at most a fifth of a block is wasted. A free block of up to twice the size is taken before a new one is made, so
    the short batch at the end of an epoch often needs none. A block that was free for `IDLE_ALLOCATIONS` allocations is
    dropped, which undoes peaks and covers batches of many sizes. Simulated with random sizes from 1 to 64 MiB and 6
    batches in use: 2.3 times the memory of the batches, and one allocation of 25 makes a block.

    Threads: many may call `alloc` at once; it takes a lock. A lease may die in any thread and between any two
    bytecodes, even in a thread that holds the lock inside `alloc`, when the garbage collector runs there. So its
    callback takes no lock: it appends the block to `_returned`, which is atomic, and the next `alloc` adds it to the
    free blocks. The lock is reentrant, since a user's finalizer, run by the same collection, may ask for a batch.

    Forks: blocks are private mappings, so parent and child do not see each other's changes. The child's copy of this
    object starts with no free blocks.
    """

    def __init__(self) -> None:
        self._begin()
        tell_of_fork(self)

    def _begin(self) -> None:
        self._lock = threading.RLock()
        self._returned = _Returned()
        self._free: deque[tuple[mmap.mmap, int]] = deque()  # with the allocation at which it came back; oldest first
        self._alive: WeakSet[mmap.mmap] = WeakSet()
        self._allocations = 0
        self._made = 0

    def _forked(self) -> None:
        self._begin()

    def alloc(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised, contiguous CPU tensor. Safe in any thread.

        Args:
            shape: Of the whole batch. If it takes less than `SMALLEST_BYTES`, torch allocates it.
            dtype: Any but the quantised ones.

        It is an ordinary tensor, except that its storage cannot grow (`resize_` raises RuntimeError), as with batches
        from torch's worker processes.
        """
        nbytes = dtype.itemsize
        for size in shape:
            nbytes *= size
        taken = self._take(nbytes) if nbytes >= SMALLEST_BYTES else None
        if taken is None:
            return torch.empty(tuple(shape), dtype=dtype, device="cpu")
        block, returned = taken
        return tensor_over(lease(block, len(block), partial(returned.give, block)), shape, dtype)

    alloc.from_bytes = SMALLEST_BYTES  # type: ignore[attr-defined]  # callers need not ask for less

    def close(self) -> None:
        """Release all free blocks now, and each block in use as soon as its batch has died. Idempotent.

        `alloc` still works, with memory from torch, since an epoch may still be running.
        """
        with self._lock:
            self._returned.close()
            free, self._free = self._free, deque()
        del free  # outside the lock, since unmapping is slow

    def __del__(self) -> None:
        # A batch that is kept refers to `_returned`, which may hold blocks that no `alloc` will take any more.
        self._returned.close()

    @property
    def bytes_held(self) -> int:
        """The size of all blocks, in use and free."""
        with self._lock:
            return sum(map(len, self._alive))

    @property
    def blocks_made(self) -> int:
        """How many blocks have been made."""
        return self._made

    @property
    def blocks_reused(self) -> int:
        """How many times a block has been used again."""
        return self._allocations - self._made

    def _take(self, nbytes: int) -> "tuple[mmap.mmap, _Returned] | None":
        """A block of at least `nbytes`, and where to return it; None: closed, or the system has no memory."""
        with self._lock:
            returned = self._returned
            if returned.closed:
                return None
            self._collect_returned()
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
        del idle  # outside the lock, since unmapping is slow
        return None if block is None else (block, returned)

    def _collect_returned(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._free.append((self._returned.popleft(), self._allocations))

    def _take_idle(self) -> list[tuple[mmap.mmap, int]]:
        """Remove the blocks that have long been free. They come first, since the last to come back is used first."""
        idle = []
        while self._free and self._allocations - self._free[0][1] > IDLE_ALLOCATIONS:
            idle.append(self._free.popleft())
        return idle

    def _take_fitting(self, nbytes: int) -> mmap.mmap | None:
        """The smallest free block of `nbytes` up to twice that; of several, the one that came back last."""
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
    """Blocks whose leases have died, until `alloc` collects them; after `close` they are dropped.

    Leases refer to this and not to the `BatchMemory`, so a batch that is kept does not keep the loader's other memory.
    """

    closed = False

    def give(self, block: mmap.mmap) -> None:
        """Called by a dying lease, so it must not take a lock, see `BatchMemory`."""
        self.append(block)
        if self.closed:  # checked after the append, since a `close` just before it has not seen the block
            self.clear()

    def close(self) -> None:
        self.closed = True
        self.clear()


def _size_of_block(nbytes: int) -> int:
    """`nbytes`, rounded up to one of four sizes per power of two."""
    step = 1 << (nbytes - 1).bit_length() - 3
    return -(-nbytes // step) * step


def _map(size: int) -> mmap.mmap | None:
    """Page-aligned memory from the system, which takes no pages before it is touched.

    None: the system refuses (no memory, or too many mappings). Then torch tries, and raises its own error.
    """
    try:
        if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
            return mmap.mmap(-1, size)
        # Python's default is MAP_SHARED, with which a forked child would write into its parent's batches.
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        return None
    if size >= HUGE_PAGES_FROM and hasattr(mmap, "MADV_HUGEPAGE"):
        # Fewer page faults at the first use of a block: 7 GB/s instead of 1.7. Later uses are as fast as without.
        with contextlib.suppress(OSError):  # a kernel without huge pages
            block.madvise(mmap.MADV_HUGEPAGE)
    return block
