"""The actor's end of a line: it runs the chunks that come, in their order, until it is hung up."""

from collections import deque
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

from aioloader.core.memory import Alloc
from aioloader.executors.chunk import ChunkResult
from aioloader.executors.processes.layout import open_buffers
from aioloader.executors.processes.wire import Connection, Message, decode
from aioloader.executors.processes.worker import WorkerLink

__all__ = ["RunsChunks", "is_end", "serve_line"]


class RunsChunks(Protocol):
    """What runs them."""

    def made(self, payload: Any) -> ChunkResult:
        """The result of a chunk."""

    def refused(self, error: BaseException) -> BaseException:
        """What is sent of an error for which a chunk could not be unpickled."""

    def sent(self, send: Any, outcomes: list[Any], batch: int, alloc: Alloc) -> Any:
        """Call `send` with outcomes that can be pickled; for `batch` and `alloc` see `stacked`."""


def is_end(error: BaseException) -> bool:
    """Whether Ray ends this process by raising `error` wherever it is: it was told SIGTERM, or `exit_actor()`.

    It does so when its program has ended, too. Taken for an error of a sample it would be raised in a training
    loop; and a message that it interrupts must be the last one.
    """
    return isinstance(error, SystemExit) and hasattr(error, "ray_terminate_msg")


def serve_line(connection: Connection, runner: RunsChunks) -> None:
    """Until the other process hangs up, or has ended."""
    link = WorkerLink(connection)  # results are made in its segments from now on
    try:
        with suppress(EOFError, BrokenPipeError, ConnectionResetError):
            _Server(link, runner).serve()
    finally:
        connection.close()


class _Server:
    def __init__(self, link: WorkerLink, runner: RunsChunks) -> None:
        self._link = link
        self._runner = runner
        self._tasks: deque[Message] = deque()

    def serve(self) -> None:
        while True:
            while not self._tasks or self._link.ready():
                self._receive(self._link.next())
            self._run(self._tasks.popleft())

    def _receive(self, message: Message) -> None:
        match message.head:
            case ("task", _, freed, _):
                self._link.arena.take_back(freed)
                self._tasks.append(message)
            case ("forget", numbers):
                skipped = [task.head[1] for task in self._tasks if task.head[1] in numbers]
                self._tasks = deque(task for task in self._tasks if task.head[1] not in numbers)
                self._link.tell(("skipped", skipped))

    def _run(self, message: Message) -> None:
        _, number, _, layout = message.head
        *buffers, stream = open_buffers(memoryview(message.body), layout)
        try:
            payload = decode(stream, buffers)
        except BaseException as error:
            if is_end(error):
                raise
            self._link.send(("lost", number), self._runner.refused(error))
            return
        result = self._runner.made(payload)
        head = "done", number, result.busy_seconds, result.cpu_seconds
        *_, batch = payload
        self._runner.sent(partial(self._link.send, head), result.outcomes, batch, self._link.arena.alloc)
