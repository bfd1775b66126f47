"""A worker that runs streams of entries, and sends as many of them as it has been granted."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

from aioloader.errors import LoaderClosedError
from aioloader.executors.processes.failures import cannot_travel
from aioloader.executors.processes.layout import lay_out
from aioloader.executors.processes.stored import StoredProgram
from aioloader.executors.processes.wire import Message, can_pickle_by_value, encode
from aioloader.executors.processes.worker import Program
from aioloader.executors.processes.worker_thread import Worker, WorkerThread

__all__ = ["Arrived", "Failure", "Heard", "Rested", "StreamEnded", "StreamWorker", "StreamWorkerDied"]


@dataclass(frozen=True)
class Arrived:
    """Entries of a stream.

    `places` is what is known of each entry besides its value, see `engine/travel.py`; `values` are the values,
    keys and meters, or None if they cannot be unpickled here for the reason `error`.
    """

    places: list[tuple[Any, ...]]
    values: Any
    error: BaseException | None = None


@dataclass(frozen=True)
class Rested:
    """The stream was told to begin nothing, in its pause number `pause`, and does so; `still`: nothing is under way."""

    pause: int
    still: bool


@dataclass(frozen=True)
class StreamEnded:
    """The stream has ended; `values` are its last meters."""

    values: Any


@dataclass(frozen=True)
class Failure:
    """The stream failed, or no stream can be started."""

    error: BaseException


@dataclass(frozen=True)
class StreamWorkerDied:
    """The worker has died; `reason` says how it ended, in words."""

    pid: int | None
    reason: str


Heard = Arrived | Rested | StreamEnded | Failure | StreamWorkerDied


class StreamWorker:
    """One worker. It is started by the first stream, and again by the next one after it has died.

    Its program is made in the worker thread, where it is pickled.
    """

    def __init__(self, worker_thread: WorkerThread, make_program: Callable[[], Program]) -> None:
        self._worker_thread = worker_thread
        self._make_program = make_program
        self._numbers = count(1)
        self._listeners: dict[int, Callable[[Heard], None]] = {}
        self._worker: Worker | None = None
        self._program: StoredProgram | None = None

    # -- in any thread -----------------------------------------------------------------------------------------------

    def open(self, request: Any, listener: Callable[[Heard], None]) -> int:
        """Begin a stream, and return its number. `listener` gets what arrives, in the worker thread, until `end`."""
        number = next(self._numbers)
        self._worker_thread.call(self._open, number, request, listener)
        return number

    def grant(self, number: int, entries: int, handed_out: int) -> None:
        """Allow the worker to send that many entries more, and tell it how many batches the consumer has got."""
        self._worker_thread.call(self._tell, "grant", number, entries, handed_out)

    def allow(self, number: int, samples: int, handed_out: int) -> None:
        """Allow so many samples to have been begun there, all in all, and tell it the same."""
        self._worker_thread.call(self._tell, "allow", number, samples, handed_out)

    def hold(self, number: int, pause: int) -> None:
        """Let the worker begin nothing in a stream; it answers with `Rested`."""
        self._worker_thread.call(self._tell, "hold", number, pause)

    def let_go(self, number: int) -> None:
        """Let it begin again."""
        self._worker_thread.call(self._tell, "let go", number)

    def end(self, number: int) -> None:
        """Stop a stream."""
        self._worker_thread.call(self._end, number)

    # -- in the worker thread ----------------------------------------------------------------------------------------

    def _open(self, number: int, request: Any, listener: Callable[[Heard], None]) -> None:
        if self._worker_thread.closed:
            listener(Failure(LoaderClosedError("the loader was closed while it began an epoch in another process")))
            return
        self._listeners[number] = listener
        try:
            if self._worker is None:
                self._worker_thread.begin()
                if self._program is None:
                    self._program = StoredProgram(self._make_program())
                self._worker = self._worker_thread.spawn(self, 0, self._program.modules)
                self._program.send_to(self._worker)
            stream, buffers = encode(request)
        except BaseException as error:  # the program cannot be pickled, or no process can be started
            del self._listeners[number]
            listener(Failure(error))
            return
        (*layout, (stream_at, _)), pieces = lay_out([*buffers, stream])
        self._worker.send(("open", number, stream_at, layout), pieces)

    def _tell(self, kind: str, number: int, *values: int) -> None:
        if self._worker is not None and number in self._listeners:
            self._worker.send((kind, number, *values, self._worker.freed()))

    def _end(self, number: int) -> None:
        self._tell("end", number)
        self._listeners.pop(number, None)

    def received(self, worker: Worker, message: Message) -> None:
        kind, number, *rest = message.head
        heard: Heard
        try:
            value = worker.unpack(message)  # even if nobody listens any more: it maps new segments
        except BaseException as error:
            lost = cannot_travel("a batch", error, by_value=can_pickle_by_value())
            heard = Arrived(rest[0], None, lost) if kind == "entries" else Failure(lost)
        else:
            match kind:
                case "entries":
                    heard = Arrived(rest[0], value)
                case "paused":
                    heard = Rested(*value)
                case "ended":
                    heard = StreamEnded(value)
                case _:
                    heard = Failure(value)
        if kind == "broken":
            worker.close()
            self._worker = None  # the next stream gets a new one
            self._tell_all(heard)
        elif (listener := self._listeners.get(number)) is not None:
            if kind not in ("entries", "paused"):
                del self._listeners[number]
            listener(heard)

    def died(self, worker: Worker, reason: str) -> None:
        if self._worker is worker:
            self._worker = None
            self._tell_all(StreamWorkerDied(worker.pid, reason))
        if self._worker_thread.closed and self._program is not None:
            self._program.close()
            self._program = None

    def _tell_all(self, heard: Heard) -> None:
        listeners, self._listeners = self._listeners, {}
        for listener in listeners.values():
            listener(heard)

    def close(self) -> None:
        """End the worker. Idempotent."""
        if self._worker is not None:
            self._worker.close()
        if self._program is not None:
            self._program.close()
            self._program = None
