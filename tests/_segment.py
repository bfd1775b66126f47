"""Shared memory of a worker process, in one process, for tests of what a device does with it."""

import mmap
import os
import weakref
from collections import deque

import torch

from aioloader.core.memory import tensor_over
from aioloader.executors.processes.segments import create_file
from aioloader.memory.mapping import Mapping

__all__ = ["LENGTH", "Segment"]

LENGTH = 300


class Segment:
    """Shared memory of a worker, and what the main process does with it, both in this process.

    Attributes:
        mapping: The main process's, until its worker has gone.
    """

    def __init__(self, free: "deque[Segment] | None" = None, length: int = LENGTH) -> None:
        self.length = length
        self.nbytes = aligned_to_pages(8 * length)
        fd = create_file(self.nbytes)
        self._workers = Mapping(fd, self.nbytes)
        self.mapping: Mapping | None = Mapping(fd, self.nbytes, lockable=True)
        os.close(fd)
        self._free = None if free is None else weakref.ref(free)
        self._returned = True

    def filled(self, number: int) -> torch.Tensor:
        """A batch: int64 [length], written by the worker and lent to the main process."""
        assert self._returned
        assert self.mapping is not None
        self._returned = False
        self._write(number)
        return tensor_over(self.mapping.lend(self._take_back), (self.length,), torch.int64)

    def returned(self) -> bool:
        """Whether the worker has it."""
        return self._returned

    def _write(self, number: int) -> None:
        tensor_over(self._workers.memory(), (self.length,), torch.int64).fill_(number)

    def _take_back(self) -> None:
        self._write(-1)  # a worker begins its next batch at once
        self._returned = True
        if self._free is not None and (free := self._free()) is not None:
            free.append(self)

    def forget(self) -> None:
        """The worker has died, or has trimmed it."""
        self.mapping = None


def aligned_to_pages(nbytes: int) -> int:
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
