"""A program in memory that all its workers map: it is pickled once, and its large arrays are shared."""

import os
from typing import TYPE_CHECKING

from aioloader.executors.processes.failures import cannot_travel
from aioloader.executors.processes.layout import layout_of
from aioloader.executors.processes.mapped_files import MappedFiles
from aioloader.executors.processes.segments import create_file
from aioloader.executors.processes.wire import can_pickle_by_value, encode
from aioloader.executors.processes.worker import Program
from aioloader.memory.mapping import Mapping

if TYPE_CHECKING:
    from aioloader.executors.processes.worker_thread import Worker

__all__ = ["StoredProgram"]

_SCRIPT_MODULES = ("__main__", "__mp_main__")  # what they define travels by value, or not at all


class StoredProgram:
    """A pickled program in shared memory, and the `modules` that workers import for it.

    Raises:
        PicklingError: The program cannot be pickled.
        OSError: There is no memory to share.
    """

    def __init__(self, program: Program) -> None:
        modules: dict[str, None] = {}
        try:
            stream, buffers = encode(program, MappedFiles(), modules)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            raise cannot_travel("the functions or the dataset", error, by_value=can_pickle_by_value()) from error
        self.modules = [name for name in modules if name not in _SCRIPT_MODULES]
        parts = [*buffers, memoryview(stream)]
        self._layout = layout_of(map(len, parts))
        self._size = sum(self._layout[-1])
        self._fd = create_file(self._size)
        memory = memoryview(Mapping(self._fd, self._size).memory()).cast("B")
        for part, (offset, size) in zip(parts, self._layout, strict=True):
            memory[offset : offset + size] = part

    def send_to(self, worker: "Worker", *more: int, slots: int = 1) -> None:
        """Send the program, as the first message to `worker`; `more` is the descriptor of progress cells, if any."""
        head = ("program", worker.slot, self._size, self._layout, slots)
        worker.send(head, fds=[os.dup(self._fd), *more])

    def close(self) -> None:
        """Release the memory; workers keep their mappings. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
