"""What a worker process does: it loads a program and runs it until the main process closes it."""

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
from aioloader.executors.processes.layout import Layout, lay_out, open_buffers
from aioloader.executors.processes.segments import Arena, BufferPlace, Mapping, use_arena
from aioloader.executors.processes.wire import Connection, Message, can_pickle_by_value, decode, encode

__all__ = ["Program", "Work", "WorkerLink", "adopt_surroundings", "main", "settings_of_this_process"]

SHARED_BYTES: Final = 1 << 15  # smaller results go through the socket, which is cheaper than a segment


class Program(Protocol):
    """What a worker runs. It is pickled once."""

    def serve(self, channel: "WorkerLink", slot: int) -> None:
        """Do the work until the channel is told to close.

        Args:
            channel: The connection to the main process.
            slot: The worker's number.
        """


def settings_of_this_process() -> dict[str, Any]:
    """The settings of the main process that a new worker adopts."""
    return {
        "path": list(sys.path),
        "argv": list(sys.argv),
        "directory": os.getcwd(),  # noqa: PTH109 - a string that travels
        "environment": dict(os.environ),
        "dtype": str(torch.get_default_dtype()).removeprefix("torch."),
    }


def main(sock: socket.socket, settings: dict[str, Any]) -> NoReturn:
    """Run a worker, in a process that was just forked."""
    status = 1
    try:
        _adopt(settings)
        channel = WorkerLink(Connection(sock))
        program, slot = channel.get_program()
        if program is not None:
            program.serve(channel, slot)
        status = 0
    except (EOFError, BrokenPipeError, ConnectionResetError):
        status = 0  # the main process has ended
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def adopt_surroundings(settings: dict[str, Any]) -> None:
    """Give imported modules the surroundings of the main process, except that torch uses one thread per operation."""
    sys.path[:] = settings["path"]
    sys.argv[:] = settings["argv"]
    with contextlib.suppress(OSError):  # the directory may have been deleted
        os.chdir(settings["directory"])
    if dict(os.environ) != settings["environment"]:
        os.environ.clear()
        os.environ.update(settings["environment"])
    torch.set_num_threads(1)


def _adopt(settings: dict[str, Any]) -> None:
    """Adopt all settings of the main process; random numbers are the worker's own."""
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
    """A worker's connection to the main process.

    Attributes:
        arena: The shared memory in which results are sent.
        progress: Records which sample the worker has begun; set by `get_program`.
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
            EOFError: The main process has ended.
        """
        for message in self._messages:
            return message
        raise EOFError

    def ready(self) -> bool:
        """Whether `next` returns at once."""
        return bool(self._poll.poll(0))

    def get_program(self) -> tuple[Program | None, int]:
        """The program and the worker's slot; None when it cannot be loaded, which has been reported."""
        message = self.next()
        if message.head[0] == "close":
            return None, 0
        _, slot, size, layout, count = message.head
        fd, *progress_fds = message.fds
        for progress_fd in progress_fds:
            self.progress = ProgressCells(progress_fd, count)
            os.close(progress_fd)
        # Tensors and arrays of a dataset are in this one file, whose pages all workers share until they write to them.
        memory = memoryview(Mapping(fd, size, private=True).memory()).cast("B")
        os.close(fd)
        *buffers, stream = open_buffers(memory, layout)
        try:
            program: Program = decode(stream, buffers)
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
        """Send `value`, with large tensors and arrays in shared memory.

        To `head` are added: the places of the buffers, the new segments, and the segments to forget. Either all buffers
        are in the body, with the pickle as the last one, or all are in segments, with a small pickle alone in the body.

        Raises:
            Exception: `value` cannot be pickled; nothing has been sent.
        """
        arena = self.arena
        try:
            stream, buffers = encode(value)
        except BaseException:
            arena.abandon()
            raise
        body = [memoryview(stream)]
        if len(stream) >= SHARED_BYTES:  # then the main process need not read it from the socket, piece by piece
            buffers += body
            body = []
        new: list[tuple[int, int, int]] = []
        places: list[BufferPlace] | None = None
        layout: Sequence[tuple[int, ...]]
        if sum(buffer.nbytes for buffer in buffers) >= SHARED_BYTES:
            with contextlib.suppress(OSError):
                places = arena.put(buffers)
        if places is None:
            arena.abandon()
            layout, body = lay_out([*buffers, *body])
        else:
            layout = places
            new = arena.hand_over(places)
        segments = [(number, size) for number, size, _ in new]
        self._connection.send((*head, layout, segments, arena.trim()), body, [fd for _, _, fd in new])


@dataclass(frozen=True)
class Work:
    """The program of workers that get chunks of samples and return their outcomes.

    Args:
        calls: The functions of one journey.
        budget_seconds: After this time a chunk is returned, finished or not.
        prepare: Called once in each worker with its number.
        epochs: The epochs that the objects of the calls are in.
    """

    calls: tuple[Call, ...]
    budget_seconds: float
    prepare: Callable[[int], None] | None = None
    epochs: Epochs = ()

    def serve(self, channel: WorkerLink, slot: int) -> None:
        """Run chunks in the order in which they come."""
        tasks: deque[Message] = deque()
        where = f"worker process {slot} (pid {os.getpid()})"
        broken: BaseException | None = None
        copies = Copies([call.fn for call in self.calls], self.epochs)
        try:
            if self.prepare is not None:
                self.prepare(slot)
        except BaseException as error:  # raised for the first sample, as in torch
            broken = error
        while True:
            while not tasks or channel.ready():  # read first whether a task is still wanted
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
            _, number, _, layout = message.head
            channel.progress.begin(slot, number)
            self._run(channel, slot, number, message.body, layout, where, copies, broken)
            broken = None
            del message

    def _run(
        self,
        channel: WorkerLink,
        slot: int,
        number: int,
        body: bytearray,
        layout: Layout,
        where: str,
        copies: Copies,
        broken: BaseException | None,
    ) -> None:
        *buffers, stream = open_buffers(memoryview(body), layout)
        try:
            seeds, epochs, keys, values = decode(stream, buffers)
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
            recorded = self._recorded(values, values if keys is None else keys, sample, channel.progress, slot)
            result = apply_chunk(calls, recorded, self.budget_seconds, sample=sample)
            outcomes, busy_seconds, cpu_seconds = result.outcomes, result.busy_seconds, result.cpu_seconds
        else:
            outcomes = [Failed(broken, self.calls[0].label)]
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
    def _recorded(
        values: Sequence[Any], keys: Sequence[Any], sample: SampleContext, progress: ProgressCells, slot: int
    ) -> Iterator[Any]:
        """`values`; each is recorded in `progress` when it is begun, and named in `sample`."""
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
