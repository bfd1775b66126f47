"""A program in memory that all its workers map: pickled once, and its large arrays are there once."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from aioloader.executors.processes.failures import cannot_travel
from aioloader.executors.processes.mapped_files import MappedFiles
from aioloader.executors.processes.segments import Mapping, create_file
from aioloader.executors.processes.wire import can_pickle_by_value, encode
from aioloader.executors.processes.worker import Program, lay_out

if TYPE_CHECKING:
    from aioloader.executors.processes.worker_thread import Worker

__all__ = ["StoredProgram"]


_OF_SCRIPTS = ("__main__", "__mp_main__")  # travel by value, or not at all


class StoredProgram:
    """A program on its way to workers.

    Args:
        program: It is pickled now.

    Attributes:
        modules: What workers import for it.

    Raises:
        PicklingError: It cannot be.
        OSError: No memory to share.
    """

    def __init__(self, program: Program) -> None:
        modules: dict[str, None] = {}
        try:
            stream, buffers = encode(program, MappedFiles(), modules)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            raise cannot_travel("the functions or the dataset", error, by_value=can_pickle_by_value()) from error
        self.modules = [name for name in modules if name not in _OF_SCRIPTS]
        self._layout, pieces = lay_out(buffers)
        self._stream_at = sum(map(len, pieces))
        self._size = self._stream_at + len(stream)
        self._fd = create_file(self._size)
        memory = memoryview(Mapping(self._fd, self._size).memory()).cast("B")
        offset = 0
        for piece in (*pieces, stream):
            memory[offset : offset + len(piece)] = piece
            offset += len(piece)

    def send_to(self, worker: "Worker", *more: int, slots: int = 1) -> None:
        """Send it, as the first message.

        Args:
            worker: The worker.
            more: Another descriptor for it, which is closed when it was sent.
            slots: How many workers there are.
        """
        head = ("program", worker.slot, self._size, self._stream_at, self._layout, slots)
        fds: Sequence[int] = [os.dup(self._fd), *more]
        worker.send(head, fds=fds)

    def close(self) -> None:
        """Let go of the memory; workers keep theirs. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
