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
from functools import partial
from typing import Any, NoReturn, Protocol

import torch

from aioloader.executors.chunk import Call, Failed, apply_chunk
from aioloader.executors.current_sample import KeyOnly, SampleContext
from aioloader.executors.epochs import Copies, Epochs
from aioloader.executors.processes.cells import ProgressCells
from aioloader.executors.processes.failures import BY_VALUE, cannot_travel, portable
from aioloader.executors.processes.freed_memory import keep_freed_memory
from aioloader.executors.processes.layout import Layout, lay_out, open_buffers
from aioloader.executors.processes.segments import SHARED_BYTES, Arena, use_arena
from aioloader.executors.processes.stacked import stacked
from aioloader.executors.processes.wire import Connection, Message, can_pickle_by_value, decode, encode
from aioloader.memory.mapping import Mapping

__all__ = ["Program", "Work", "WorkerLink", "adopt_surroundings", "main", "settings_of_this_process"]


class Program(Protocol):
    """What a worker runs. It is pickled once."""

    def serve(self, channel: "WorkerLink", slot: int) -> None:
        """Do the work until the main process closes `channel`."""


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
        keep_freed_memory()
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

        Raises:
            Exception: `value` cannot be pickled; nothing has been sent.
        """
        self.send_encoded(head, *encode(value))

    def send_encoded(self, head: tuple[Any, ...], stream: bytes, buffers: list[memoryview]) -> None:
        """Send what `encode` gives. If nobody else refers to what `Arena.lend` gave for it, it is not copied.

        To `head` are added: the places of the buffers, the new segments, and the segments to forget. Either all buffers
        are in the body, with the pickle as the last one, or all are in segments, with a small pickle alone in the body.
        """
        arena = self.arena
        body = [memoryview(stream)]
        if len(stream) >= SHARED_BYTES:  # then the main process need not read it from the socket, piece by piece
            buffers += body
            body = []
        new: list[tuple[int, int, int]] = []
        layout: Sequence[tuple[int, ...]]
        if (places := arena.place(buffers)) is None:
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
        _ChunkServer(self, channel, slot).serve()


class _ChunkServer:
    """Runs chunks in a worker, in the order in which they come."""

    def __init__(self, work: Work, channel: WorkerLink, slot: int) -> None:
        self._work = work
        self._channel = channel
        self._slot = slot
        self._where = f"worker process {slot} (pid {os.getpid()})"
        self._tasks: deque[Message] = deque()
        self._copies = Copies([call.fn for call in work.calls], work.epochs)
        self._broken: BaseException | None = None  # raised for the first sample, as in torch

    def serve(self) -> None:
        try:
            if self._work.prepare is not None:
                self._work.prepare(self._slot)
        except BaseException as error:
            self._broken = error
        while self._receive():
            message = self._tasks.popleft()
            _, number, _, layout = message.head
            self._channel.progress.begin(self._slot, number)
            if not self._run(number, message.body, layout):
                self._channel.progress.clear(self._slot)
                self._tasks.appendleft(message)
            del message

    def _receive(self) -> bool:
        """Read all messages that are there, and wait for the first task that may begin; returns False to close.

        What is forgotten before it was begun is not run.
        """
        while not self._tasks or self._channel.progress.held or self._channel.ready():
            message = self._channel.next()
            match message.head:
                case ("task", _, freed, *_):
                    self._channel.arena.take_back(freed)
                    self._tasks.append(message)
                case ("forget", numbers):
                    skipped = [task.head[1] for task in self._tasks if task.head[1] in numbers]
                    self._tasks = deque(task for task in self._tasks if task.head[1] not in numbers)
                    self._channel.tell(("skipped", skipped))
                case ("held", number):  # it is here, so no call is under way
                    self._channel.tell(("still", number))
                case ("let go",):
                    pass
                case ("close",):
                    return False
        return True

    def _run(self, number: int, body: bytearray, layout: Layout) -> bool:
        """Run a task; False: it has not begun, since none is to."""
        *buffers, stream = open_buffers(memoryview(body), layout)
        try:
            seeds, epochs, keys, values, batch = decode(stream, buffers)
        except BaseException as error:
            self._channel.send(("lost", number), portable(error, f"{self._where}, which unpickles samples"))
            return True
        if self._channel.progress.held:
            return False
        outcomes, *seconds = self._outcomes(seeds, epochs, values if keys is None else keys, values)
        for outcome in outcomes:
            if type(outcome) is Failed:
                outcome.error = portable(outcome.error, self._where)
        try:
            self._channel.send(("done", number), (stacked(outcomes, batch, self._channel.arena.alloc), *seconds))
        except (BrokenPipeError, ConnectionResetError):
            raise
        except BaseException:
            outcomes = [self._portable_outcome(outcome) for outcome in outcomes]
            self._channel.send(("done", number), (outcomes, *seconds))
        return True

    def _outcomes(
        self, seeds: Sequence[int | None], epochs: Epochs, keys: Sequence[Any], values: Sequence[Any]
    ) -> tuple[list[Any], float, float]:
        """The fields of a `ChunkResult`."""
        broken, self._broken = self._broken, None
        try:
            self._copies.tell(epochs)
        except BaseException as error:
            broken = broken or error
        if broken is not None:
            return [Failed(broken, self._work.calls[0].label)], 0.0, 0.0
        calls = [replace(call, seed=seed) for call, seed in zip(self._work.calls, seeds, strict=True)]
        sample = SampleContext()
        sample.begins = partial(self._channel.progress.at_sample, self._slot)
        result = apply_chunk(calls, self._recorded(keys, values, sample), self._work.budget_seconds, sample=sample)
        return result.outcomes, result.busy_seconds, result.cpu_seconds

    def _recorded(self, keys: Sequence[Any], values: Sequence[Any], sample: SampleContext) -> Iterator[Any]:
        """`values`; each is recorded as begun when it is taken, and named in `sample`. Held, the rest goes back."""
        progress, slot = self._channel.progress, self._slot
        for index, (key, value) in enumerate(zip(keys, values, strict=True)):
            if index and progress.held:
                return
            progress.at(slot, index)
            sample.name = KeyOnly(key)
            yield value

    def _portable_outcome(self, outcome: Any) -> Any:
        try:
            encode(outcome)
        except BaseException as error:
            label = self._work.calls[-1].label
            refused = cannot_travel(f"what {label} returned", error, by_value=can_pickle_by_value())
            return Failed(portable(refused, self._where), label)
        return outcome
