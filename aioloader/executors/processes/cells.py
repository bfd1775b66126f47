"""Where each worker stands, in memory that is there when it has died: which sample it held is known, not guessed."""

import os
from typing import Final, Self

from aioloader.executors.processes.segments import Mapping, create_file

__all__ = ["ProgressCells"]

_SEAT_BYTES: Final = 64  # of its own cache line


class ProgressCells:
    """For each worker the number of the task that it is at, and which of the task's values.

    Args:
        fd: Memory that the workers and the user's process map; it stays the caller's.
        count: Workers.
    """

    def __init__(self, fd: int, count: int) -> None:
        self._fd = -1
        self._cells = memoryview(Mapping(fd, count * _SEAT_BYTES).memory()).cast("B").cast("q")

    @classmethod
    def create(cls, count: int) -> Self:
        """In the user's process.

        Raises:
            OSError: No memory to share.
        """
        fd = create_file(count * _SEAT_BYTES)
        try:
            progress = cls(fd, count)
        except BaseException:
            os.close(fd)
            raise
        progress._fd = fd
        return progress

    def descriptor(self) -> int:
        """A descriptor for a worker."""
        return os.dup(self._fd)

    def begin(self, slot: int, task: int) -> None:
        """In the worker: it begins this task (> 0)."""
        cell = slot * _SEAT_BYTES // 8
        self._cells[cell + 1] = 0
        self._cells[cell] = task

    def at(self, slot: int, index: int) -> None:
        """In the worker: it begins this value of the task."""
        self._cells[slot * _SEAT_BYTES // 8 + 1] = index

    def read(self, slot: int) -> tuple[int, int]:
        """The task and the value that the worker began last; task 0: none."""
        cell = slot * _SEAT_BYTES // 8
        return self._cells[cell], self._cells[cell + 1]

    def clear(self, slot: int) -> None:
        """A new worker takes this slot."""
        self.begin(slot, 0)

    def close(self) -> None:
        """Let go of the descriptor. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
