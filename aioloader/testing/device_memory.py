"""The memory of the fake device: blocks that are used again as soon as torch's allocators would use them again."""

import ctypes
import weakref
import zlib
from collections import deque
from typing import Final, TypeAlias

import torch

from aioloader.core.memory import memory_at
from aioloader.device._tree import memory_of
from aioloader.testing.device_streams import FakeStream

__all__ = ["FakeMemory", "MemoryBlock", "MemoryPool", "address_of", "checksum"]

POISON: Final = 0xA5
"""Every byte of a block is set to this before the block is used again."""

_SMALLEST_BLOCK_BYTES: Final = 512


class MemoryBlock:
    """A piece of memory that is handed out again and again."""

    def __init__(self, pool: "MemoryPool", stream: FakeStream | None, size_bytes: int) -> None:
        self.pool = pool
        self.stream = stream
        self.size_bytes = size_bytes
        self._memory = (ctypes.c_uint8 * size_bytes)()
        self.address = ctypes.addressof(self._memory)
        self.uses: set[FakeStream] = set()
        self.handed_out = False

    def hand_out(self, like: torch.Tensor, dropped: "deque[MemoryBlock]") -> torch.Tensor:
        """A tensor with the shape, dtype and strides of `like`; the block is appended to `dropped` when it has died."""
        # torch keeps this object, a new one over the same memory, as long as any tensor uses the storage.
        owner = (ctypes.c_uint8 * self.size_bytes).from_buffer(self._memory)
        weakref.finalize(owner, dropped.append, self).atexit = False
        self.handed_out = True
        stride = torch.empty_like(like, device="meta").stride()
        return torch.frombuffer(owner, dtype=torch.uint8).view(like.dtype).as_strided(like.shape, stride)

    def alias(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor over the same memory as `tensor`, a part of this block, that does not count as a reference to it."""
        flat = torch.frombuffer(self._memory, dtype=torch.uint8).view(tensor.dtype)
        return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def poison(self) -> None:
        """Overwrite the block."""
        ctypes.memset(self.address, POISON, self.size_bytes)


MemoryPool: TypeAlias = dict[int, MemoryBlock]
"""The blocks of one kind of memory, by address."""


class FakeMemory:
    """Device memory and page-locked memory.

    Args:
        registered: See `FakeBackend`.

    Attributes:
        device: The blocks of device memory.
        pinned: The blocks of page-locked memory.
        shared: The sizes of what is page-locked where it is, by address.
        reused: How many times a block of device memory was used again.
    """

    def __init__(self, *, registered: bool) -> None:
        self.device: MemoryPool = {}
        self.pinned: MemoryPool = {}
        self.shared: dict[int, int] = {}
        self.reused = 0
        self._registered = registered
        # Finalizers may run anywhere, even inside code that holds the lock, so they only append to this.
        self._dropped: deque[MemoryBlock] = deque()
        self._returning: list[tuple[MemoryBlock, dict[FakeStream, int]]] = []
        self._free: list[MemoryBlock] = []

    def find(self, pool: MemoryPool, tensor: torch.Tensor) -> MemoryBlock | None:
        """The block of `pool` that `tensor` is in."""
        return pool.get(address_of(tensor))

    def holds(self, pool: MemoryPool, tensor: torch.Tensor) -> bool:
        """Whether all memory of `tensor` is in `pool`."""
        return all(address_of(part) in pool for part in memory_of(tensor))

    def in_shared(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is in memory that is page-locked where it is."""
        address = tensor.data_ptr()
        return any(start <= address < start + nbytes for start, nbytes in tuple(self.shared.items()))

    def alias_of_shared(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """A dense tensor over the same memory, if that is page-locked where it is, which keeps nothing alive."""
        if tensor.layout is not torch.strided or tensor.is_nested or not self.in_shared(tensor):
            return None
        memory = memory_at(tensor.data_ptr(), tensor.numel() * tensor.element_size(), owner=None)
        flat = torch.frombuffer(memory, dtype=torch.uint8).view(tensor.dtype)
        return flat.as_strided(tensor.shape, tensor.stride())

    def take(self, pool: MemoryPool, like: torch.Tensor, stream: FakeStream | None) -> tuple[MemoryBlock, bool]:
        """A block for a tensor like `like`, and whether it has been used before."""
        size_bytes = 1 << (max(like.numel() * like.element_size(), _SMALLEST_BLOCK_BYTES) - 1).bit_length()
        for index in reversed(range(len(self._free))):  # the last one dropped is the most likely to be still in use
            block = self._free[index]
            if block.pool is pool and block.stream is stream and block.size_bytes == size_bytes:
                del self._free[index]
                self.reused += pool is self.device
                return block, True
        block = MemoryBlock(pool, stream, size_bytes)
        pool[block.address] = block
        return block, False

    def hand_out(self, block: MemoryBlock, like: torch.Tensor) -> torch.Tensor:
        """A tensor like `like` in `block`."""
        return block.hand_out(like, self._dropped)

    def collect(self) -> None:
        """Free dropped blocks: at once, or when the streams that used them have done what was queued by then."""
        while self._dropped:
            block = self._dropped.popleft()
            block.handed_out = False
            if self._registered and block.pool is self.pinned:
                block.poison()  # its owner writes to it again
            self._returning.append((block, {stream: stream.enqueued for stream in block.uses}))
            block.uses = set()
        waiting = []
        for block, until in self._returning:
            if all(stream.completed >= count for stream, count in until.items()):
                self._free.append(block)
            else:
                waiting.append((block, until))
        self._returning = waiting

    def handed_out(self, pool: MemoryPool) -> int:
        """How many blocks of `pool` are referenced by tensors."""
        self.collect()
        return sum(block.handed_out for block in pool.values())

    def clear(self) -> None:
        """Release the free blocks."""
        self._free.clear()
        self._returning.clear()


def address_of(tensor: torch.Tensor) -> int:
    """The address of the storage of `tensor`."""
    return tensor.untyped_storage().data_ptr()


def checksum(tensor: torch.Tensor) -> int:
    """Of the bytes of `tensor`."""
    dense = tensor.contiguous()
    return zlib.crc32((ctypes.c_uint8 * (dense.numel() * dense.element_size())).from_address(dense.data_ptr()))
