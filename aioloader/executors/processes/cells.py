"""Which sample each worker has begun, in shared memory that outlives the worker: it is known and not guessed.

And one word for all of them: that none is to begin.
"""

import os
from time import perf_counter_ns
from typing import Final, Self

from aioloader.executors.processes.segments import create_file
from aioloader.memory.mapping import Mapping

__all__ = ["ProgressCells"]

_SLOT_BYTES: Final = 64  # a cache line for each worker


class ProgressCells:
    """For each of `count` workers, the task that it runs, when it began it, the value in it, and the sample in that.

    The memory `fd` is mapped by the workers and the main process; the caller closes it.
    """

    def __init__(self, fd: int, count: int) -> None:
        self._fd = -1
        self._cells = memoryview(Mapping(fd, (count + 1) * _SLOT_BYTES).memory()).cast("B").cast("q")
        self._held = count * _SLOT_BYTES // 8

    @classmethod
    def create(cls, count: int) -> Self:
        """Make the cells, in the main process.

        Raises:
            OSError: There is no memory to share.
        """
        fd = create_file((count + 1) * _SLOT_BYTES)
        try:
            progress = cls(fd, count)
        except BaseException:
            os.close(fd)
            raise
        progress._fd = fd
        return progress

    def descriptor(self) -> int:
        """A new descriptor, to be sent to a worker."""
        return os.dup(self._fd)

    @property
    def held(self) -> bool:
        """Whether no sample is to begin; the main process sets it."""
        return bool(self._cells[self._held])

    @held.setter
    def held(self, held: bool) -> None:
        self._cells[self._held] = held

    def begin(self, slot: int, task: int) -> None:
        """In the worker: record that it begins this task, a number above 0."""
        cell = slot * _SLOT_BYTES // 8
        self._cells[cell + 1] = self._cells[cell + 3] = 0
        self._cells[cell + 2] = perf_counter_ns()  # which all processes of a machine share
        self._cells[cell] = task

    def at(self, slot: int, index: int) -> None:
        """In the worker: record that it begins this value of the task."""
        cell = slot * _SLOT_BYTES // 8
        self._cells[cell + 3] = 0
        self._cells[cell + 1] = index

    def at_sample(self, slot: int, number: int | None) -> None:
        """In the worker: record that it begins this sample of the value, a batch; None: it is past the last one."""
        self._cells[slot * _SLOT_BYTES // 8 + 3] = 0 if number is None else number + 1

    def read(self, slot: int) -> tuple[int, int]:
        """The task and the value that the worker began last; task 0 before the first one."""
        cell = slot * _SLOT_BYTES // 8
        return self._cells[cell], self._cells[cell + 1]

    def sample(self, slot: int) -> int | None:
        """The sample of a batch that the worker began last; None: it is at none, or did not say so."""
        number = self._cells[slot * _SLOT_BYTES // 8 + 3]
        return number - 1 if number else None

    def since(self, slot: int) -> float:
        """When the worker began its task; seconds of `perf_counter`."""
        return self._cells[slot * _SLOT_BYTES // 8 + 2] / 1e9

    def clear(self, slot: int) -> None:
        """Prepare the slot for a new worker."""
        self.begin(slot, 0)

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
