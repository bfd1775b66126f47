"""What a worker process does: it gets a program, and serves it until the user's process has no more need of it."""

import contextlib
import os
import random
import select
import signal
import socket
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NoReturn, Protocol

import torch

from aioloader.executors.chunk import Call, Failed, apply_chunk
from aioloader.executors.current_sample import KeyOnly, SampleContext
from aioloader.executors.epochs import Copies, Epochs
from aioloader.executors.processes.cells import ProgressCells
from aioloader.executors.processes.failures import BY_VALUE, cannot_travel, portable
from aioloader.executors.processes.segments import ALIGNMENT, Arena, BufferPlace, Mapping, use_arena
from aioloader.executors.processes.wire import Connection, Message, can_pickle_by_value, decode, encode

__all__ = [
    "Program",
    "Work",
    "WorkerLink",
    "adopt_surroundings",
    "lay_out",
    "main",
    "open_buffers",
    "settings_of_this_process",
]

SHARED_BYTES: Final = 1 << 15  # results below this go through the socket: that is cheaper than a segment


class Program(Protocol):
    """What a worker is for. It is pickled once."""

    def serve(self, channel: "WorkerLink", slot: int) -> None:
        """Do the work until the channel says that it is over.

        Args:
            channel: To the user's process.
            slot: The worker's number.
        """


def settings_of_this_process() -> dict[str, Any]:
    """What a new worker is to have in common with the user's process, as it is now."""
    return {
        "path": list(sys.path),
        "argv": list(sys.argv),
        "directory": os.getcwd(),  # noqa: PTH109 - a string that travels
        "environment": dict(os.environ),
        "dtype": str(torch.get_default_dtype()).removeprefix("torch."),
    }


def main(sock: socket.socket, settings: dict[str, Any]) -> NoReturn:
    """The life of a worker, in a process that was just forked."""
    status = 1
    try:
        _adopt(settings)
        channel = WorkerLink(Connection(sock))
        program, slot = channel.get_program()
        if program is not None:
            program.serve(channel, slot)
        status = 0
    except (EOFError, BrokenPipeError, ConnectionResetError):
        status = 0  # the user's process is gone: nobody is left to tell
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def adopt_surroundings(settings: dict[str, Any]) -> None:
    """Be like the user's process in what modules find when they are imported, but for one thread for each operation."""
    sys.path[:] = settings["path"]
    sys.argv[:] = settings["argv"]
    with contextlib.suppress(OSError):  # it may have been deleted meanwhile
        os.chdir(settings["directory"])
    if dict(os.environ) != settings["environment"]:
        os.environ.clear()
        os.environ.update(settings["environment"])
    torch.set_num_threads(1)


def _adopt(settings: dict[str, Any]) -> None:
    """Be like the user's process, but with random numbers of one's own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    adopt_surroundings(settings)
    if torch.get_default_dtype() is not getattr(torch, settings["dtype"]):
        torch.set_default_dtype(getattr(torch, settings["dtype"]))
    seed = int.from_bytes(os.urandom(8), "little")
    torch.manual_seed(seed & (1 << 63) - 1)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed & (1 << 32) - 1)


class WorkerLink:
    """A worker's connection to the user's process.

    Attributes:
        arena: The memory that results come back in.
        progress: Where it is noted what the worker is at; there with the program.
    """

    progress: ProgressCells

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._messages = connection.receive()
        self._poll = select.poll()
        self._poll.register(connection.fileno(), select.POLLIN)
        self.arena = Arena()
        use_arena(self.arena)

    def fileno(self) -> int:
        return self._connection.fileno()

    def next(self) -> Message:
        """Wait for a message.

        Raises:
            EOFError: The user's process is gone.
        """
        for message in self._messages:
            return message
        raise EOFError

    def ready(self) -> bool:
        """Whether `next` need not wait."""
        return bool(self._poll.poll(0))

    def get_program(self) -> tuple[Program | None, int]:
        """The program and the slot's number; None when it cannot be loaded, which has been told."""
        message = self.next()
        if message.head[0] == "close":
            return None, 0
        _, slot, size, stream_at, layout, count = message.head
        fd, *progress_fds = message.fds
        for progress_fd in progress_fds:
            self.progress = ProgressCells(progress_fd, count)
            os.close(progress_fd)
        # Tensors and arrays of a dataset lie in this one file, whose pages all workers share until they write to them.
        memory = memoryview(Mapping(fd, size, private=True).memory()).cast("B")
        os.close(fd)
        try:
            program: Program = decode(memory[stream_at:], open_buffers(memory, layout))
        except BaseException as error:
            if not can_pickle_by_value():
                error.add_note(f"aioloader: {BY_VALUE}")
            self.send(("broken", 0), portable(error, f"worker process {slot}, which loads its functions"))
            return None, slot
        return program, slot

    def tell(self, head: tuple[Any, ...]) -> None:
        """Send a message without a value."""
        self._connection.send(head)

    def send(self, head: tuple[Any, ...], value: Any) -> None:
        """Send `value`; large tensors and arrays in it in shared memory.

        The message's head is `head` and: where the pickle begins in the body (-1: it is the last of the buffers), the
        places of its buffers in the body or in segments, the new segments, and those to forget.

        Raises:
            Exception: `value` cannot be pickled; nothing has been sent.
        """
        arena = self.arena
        try:
            stream, buffers = encode(value)
        except BaseException:
            arena.abandon()
            raise
        stream_is_buffer = len(stream) >= SHARED_BYTES
        if stream_is_buffer:  # the user's process need not read it from the socket, piece by piece
            buffers.append(memoryview(stream))
        fds: list[int] = []
        new: list[tuple[int, int]] = []
        places: list[BufferPlace] | None = None
        layout: Sequence[tuple[int, ...]]
        if sum(buffer.nbytes for buffer in buffers) >= SHARED_BYTES:
            with contextlib.suppress(OSError):
                places = arena.put(buffers)
        if places is None:
            arena.abandon()
            layout, parts = lay_out(buffers)
        else:
            made = arena.hand_over(places)
            new = [(number, size) for number, size, _ in made]
            fds = [fd for _, _, fd in made]
            layout, parts = places, []
        stream_at = -1 if stream_is_buffer else sum(map(len, parts))
        if not stream_is_buffer:
            parts = [*parts, stream]
        self._connection.send((*head, stream_at, layout, new, arena.trim()), parts, fds)


def lay_out(buffers: Sequence[memoryview]) -> tuple[list[tuple[int, int]], list[Any]]:
    """The buffers one after the other, aligned: offset and size of each, and the pieces with what fills the gaps."""
    layout, pieces = [], []
    offset = 0
    for buffer in buffers:
        layout.append((offset, buffer.nbytes))
        gap = -buffer.nbytes % ALIGNMENT
        pieces += [buffer, bytes(gap)]
        offset += buffer.nbytes + gap
    return layout, pieces


def open_buffers(memory: memoryview, layout: Sequence[tuple[int, int]]) -> list[memoryview]:
    """The buffers of `lay_out`, in what arrived."""
    return [memory[offset : offset + size] for offset, size in layout]


@dataclass(frozen=True)
class Work:
    """The program of workers that get chunks of samples and give them back.

    Args:
        calls: The functions of one journey.
        budget_seconds: After this time a chunk comes back as far as it got.
        prepare: Called once in each worker with its number.
        epochs: Those that the objects behind the calls are in.
    """

    calls: tuple[Call, ...]
    budget_seconds: float
    prepare: Callable[[int], None] | None = None
    epochs: Epochs = ()

    def serve(self, channel: WorkerLink, slot: int) -> None:
        """One chunk after the other, as they come."""
        tasks: deque[Message] = deque()
        where = f"worker process {slot} (pid {os.getpid()})"
        broken: BaseException | None = None
        copies = Copies([call.fn for call in self.calls], self.epochs)
        try:
            if self.prepare is not None:
                self.prepare(slot)
        except BaseException as error:  # it is raised for the first sample, as torch does
            broken = error
        while True:
            while not tasks or channel.ready():  # what was called off before it was begun is not begun
                message = channel.next()
                match message.head:
                    case ("task", _, freed, *_):
                        channel.arena.take_back(freed)
                        tasks.append(message)
                    case ("forget", numbers):
                        skipped = [task.head[1] for task in tasks if task.head[1] in numbers]
                        tasks = deque(task for task in tasks if task.head[1] not in numbers)
                        channel.tell(("skipped", skipped))
                    case ("close",):
                        return
            message = tasks.popleft()
            _, number, _, stream_at, layout = message.head
            channel.progress.begin(slot, number)
            self._run(channel, slot, number, message.body, stream_at, layout, where, copies, broken)
            broken = None
            del message

    def _run(
        self,
        channel: WorkerLink,
        slot: int,
        number: int,
        body: bytearray,
        stream_at: int,
        layout: Sequence[tuple[int, int]],
        where: str,
        copies: Copies,
        broken: BaseException | None,
    ) -> None:
        label = self.calls[0].label
        memory = memoryview(body)
        try:
            seeds, epochs, keys, values = decode(memory[stream_at:], open_buffers(memory, layout))
        except BaseException as error:
            channel.send(("lost", number), portable(error, f"{where}, which unpickles samples"))
            return
        busy_seconds = cpu_seconds = 0.0
        try:
            copies.tell(epochs)
        except BaseException as error:
            broken = broken or error
        if broken is None:
            calls = [replace(call, seed=seed) for call, seed in zip(self.calls, seeds, strict=True)]
            sample = SampleContext()
            noted = self._noted(values, values if keys is None else keys, sample, channel.progress, slot)
            result = apply_chunk(calls, noted, self.budget_seconds, sample=sample)
            outcomes, busy_seconds, cpu_seconds = result.outcomes, result.busy_seconds, result.cpu_seconds
        else:
            outcomes = [Failed(broken, label)]
        for outcome in outcomes:
            if type(outcome) is Failed:
                outcome.error = portable(outcome.error, where)
        try:
            channel.send(("done", number), (outcomes, busy_seconds, cpu_seconds))
        except (BrokenPipeError, ConnectionResetError):
            raise
        except BaseException:
            outcomes = [self._portable_outcome(outcome, where) for outcome in outcomes]
            channel.send(("done", number), (outcomes, busy_seconds, cpu_seconds))

    @staticmethod
    def _noted(
        values: Sequence[Any], keys: Sequence[Any], sample: SampleContext, progress: ProgressCells, slot: int
    ) -> Iterator[Any]:
        """`values`; the one that is begun is noted, and named in `sample`."""
        for index, (value, key) in enumerate(zip(values, keys, strict=True)):
            progress.at(slot, index)
            sample.name = KeyOnly(key)
            yield value

    def _portable_outcome(self, outcome: Any, where: str) -> Any:
        try:
            encode(outcome)
        except BaseException as error:
            label = self.calls[-1].label
            refused = cannot_travel(f"what {label} returned", error, by_value=can_pickle_by_value())
            return Failed(portable(refused, where), label)
        return outcome
