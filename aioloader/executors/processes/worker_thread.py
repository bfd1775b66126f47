"""The main process's side: one thread that starts worker processes, writes to them, and reads what they send."""

import contextlib
import os
import selectors
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any, Final, Protocol
from weakref import WeakSet

from aioloader.executors.processes.fork_server import ForkServer, describe_exit, forget_fork_server
from aioloader.executors.processes.segments import MappedSegments
from aioloader.executors.processes.wire import Connection, Message
from aioloader.executors.processes.worker import settings_of_this_process

__all__ = ["Worker", "WorkerOwner", "WorkerThread", "end_all_processes", "forget_all_processes"]

GRACE_SECONDS: Final = 1.0  # for user code that still runs in a worker, before the worker is killed


class WorkerOwner(Protocol):
    """What a worker works for; called in the thread of `WorkerThread`."""

    def received(self, worker: "Worker", message: Message) -> None:
        """The worker has sent a message."""

    def died(self, worker: "Worker", reason: str) -> None:
        """The worker has ended, and everything that it sent has been received."""

    def close(self) -> None:
        """End the workers; busy ones after a grace period."""


class Beside(Protocol):
    """What has a thread of its own, and ends with the worker processes of a loader."""

    def close(self) -> None:
        """End, without waiting."""

    def join(self, seconds: float) -> bool:
        """Wait for that; returns whether it came in time."""


class Worker:
    """One worker process, as seen from the worker thread. If it dies, its replacement gets the same `slot`."""

    def __init__(self, worker_thread: "WorkerThread", owner: WorkerOwner, slot: int, connection: Connection) -> None:
        self.slot = slot
        self.owner = owner
        self.pid: int | None = None  # until it has been forked
        self._closing = False
        self._deadline: float | None = None  # when it is killed
        self._worker_thread = worker_thread
        self._connection = connection
        self._open = True
        self._segments = MappedSegments()

    def send(self, head: tuple[Any, ...], pieces: Sequence[Any] = (), fds: Sequence[int] = ()) -> None:
        """Send a message, now or as soon as the worker's socket takes it. Does nothing when the worker has died."""
        if self._open:
            with contextlib.suppress(OSError):  # its death is reported separately
                self._connection.send(head, pieces, fds)
            self._worker_thread._watch(self)
        else:
            for fd in fds:
                os.close(fd)

    def freed(self) -> list[int]:
        """The segments that have become free since the last call; the worker must be told of each once."""
        return self._segments.freed()

    def unpack(self, message: Message) -> Any:
        """See `MappedSegments.unpack`."""
        return self._segments.unpack(message)

    @property
    def given_up(self) -> bool:
        """Whether it was told to end, and its grace period is over."""
        return self._closing and self._deadline is None

    def close(self) -> None:
        """Let the worker end after its current task; kill it if that takes longer than the grace period."""
        if not self._closing:
            self._closing = True
            self._deadline = monotonic() + GRACE_SECONDS
            self.send(("close",))


class WorkerThread:
    """The worker processes of one loader, and the thread `aioloader-processes` that serves them.

    The thread does everything that may wait or take long: starting, pickling, writing and reading. It never polls: it
    sleeps until a socket or another thread has something for it. The first `call` starts it, and `close` ends it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._commands: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._thread: threading.Thread | None = None
        self._wake: socket.socket | None = None
        self._closing = False
        self._ended = False  # the thread takes no more commands: callers run their own
        self._forgotten = False  # this is a forked child
        self._owners: dict[Any, WorkerOwner] = {}
        self._beside: dict[str, Beside] = {}
        self._fork_server: ForkServer | None = None
        self._loader_number = 0  # by which the fork server knows our loader server
        self._control: Connection | None = None  # to our loader server
        self._workers: set[Worker] = set()
        self._tickets: dict[int, Worker] = {}  # workers that were asked for and are not forked yet
        self._last_ticket = 0

    # -- in any thread -----------------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether `close` has been called."""
        return self._closing

    def get_or_create(self, key: Any, make: Callable[[], Any]) -> Any:
        """The owner of workers that is kept under `key` until `close`; made if there is none."""
        with self._lock:
            if key not in self._owners:
                self._owners[key] = make()
            return self._owners[key]

    def beside(self, key: str, make: Callable[[], Any]) -> Any:
        """What ends with this, and has nothing to do with processes; made if there is none under `key`."""
        with self._lock:
            if key not in self._beside:
                self._beside[key] = make()
                if self._closing:
                    self._beside[key].close()
            return self._beside[key]

    def call(self, fn: Callable[..., object], *args: Any) -> None:
        """Call `fn` in the thread, soon. Safe in any thread, and in the middle of a garbage collection."""
        self._commands.append((fn, args))
        if self._thread is None:
            self._start()
        if self._ended or self._thread is None:
            self._run_commands()
        else:
            self._wake_up()

    def close(self) -> None:
        """End all workers and then the thread, without waiting. Idempotent; the garbage collector may call it.

        Busy workers get a grace period, then they are killed.
        """
        self._closing = True
        for other in list(self._beside.values()):
            other.close()
        self._wake_up()

    def join(self, seconds: float) -> bool:
        """Wait until the workers and the thread have ended; returns whether they did in time."""
        deadline = monotonic() + seconds
        late = [other for other in list(self._beside.values()) if not other.join(deadline - monotonic())]
        if self._thread is None or self._thread is threading.current_thread():
            return not late
        self._thread.join(max(0.0, deadline - monotonic()))
        return not late and not self._thread.is_alive()

    def forget(self) -> None:
        """In a forked child: close its copies of the parent's sockets, and never do anything again."""
        self._forgotten = self._closing = True
        if self._wake is not None:
            self._wake.close()
            self._woken.close()
            self._selector.close()
        if self._control is not None:
            self._control.close()
        for worker in self._workers:
            worker._connection.close()

    def _wake_up(self) -> None:
        wake = self._wake
        if wake is not None:
            with contextlib.suppress(OSError):  # full: it is awake; closed: it has ended
                wake.send(b"\0")

    def _start(self) -> None:
        with self._lock:
            if self._thread is not None or self._closing:
                return
            self._woken, wake = socket.socketpair()
            self._woken.setblocking(False)
            wake.setblocking(False)
            self._selector = selectors.DefaultSelector()
            self._selector.register(self._woken, selectors.EVENT_READ)
            self._wake = wake  # last, for `forget`
            thread = threading.Thread(target=self._main, name="aioloader-processes", daemon=True)
            _alive.add(self)
            thread.start()
            self._thread = thread
        self._wake_up()

    # -- in the worker thread ----------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Connect to the fork server. It is started if there is none, which takes seconds.

        Raises:
            OSError: It cannot be started.
        """
        if self._control is None:
            self._fork_server, self._loader_number, sock = ForkServer.join()
            sock.setblocking(False)
            self._control = Connection(sock)
            self._selector.register(self._control, selectors.EVENT_READ)

    def spawn(self, owner: WorkerOwner, slot: int, modules: Sequence[str]) -> Worker:
        """Start a worker, to which messages can be sent at once. `modules` are imported before, once for all workers.

        Raises:
            OSError: It cannot be started.
        """
        self.begin()
        assert self._control is not None
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        worker = Worker(self, owner, slot, Connection(ours))
        self._last_ticket += 1
        self._tickets[self._last_ticket] = worker
        with theirs, contextlib.suppress(OSError):  # the loader server is gone, which `_control_ready` notices
            self._control.send(
                ("fork", self._last_ticket, settings_of_this_process(), modules), fds=[os.dup(theirs.fileno())]
            )
        self._watch_control()
        self._workers.add(worker)
        self._selector.register(worker._connection, selectors.EVENT_READ, worker)
        return worker

    def _main(self) -> None:
        try:
            while not self._closing or self._waits_for_workers():
                if self._closing:
                    for worker in list(self._workers):
                        worker.close()
                self._run_once()
        finally:
            self._end()

    def _waits_for_workers(self) -> bool:
        """Whether there are workers, or will be soon. There will be none while an import of user code hangs."""
        born = self._fork_server is not None and self._fork_server.born
        return born and any(not (worker.pid is None and worker.given_up) for worker in self._workers)

    def _run_once(self) -> None:
        deadlines = [worker._deadline for worker in self._workers if worker._deadline is not None]
        timeout = max(0.0, min(deadlines) - monotonic()) if deadlines else None
        for key, events in self._selector.select(timeout):
            if key.fileobj is self._woken:
                with contextlib.suppress(BlockingIOError):
                    while self._woken.recv(4096):
                        pass
            elif key.fileobj is self._control:
                self._control_ready(events)
            elif key.data in self._workers:  # one may have been removed earlier in this loop
                self._worker_ready(key.data, events)
        if deadlines:
            now = monotonic()
            for worker in list(self._workers):
                if worker._deadline is not None and worker._deadline <= now:
                    self._kill(worker)
        self._run_commands()

    def _run_commands(self) -> None:
        while self._commands:
            try:
                fn, args = self._commands.popleft()
            except IndexError:
                return
            fn(*args)

    def _watch(self, worker: Worker) -> None:
        """Wake up when the worker's socket takes what is pending, if anything is."""
        if worker._open:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker._connection.pending else 0)
            if self._selector.get_key(worker._connection).events != events:
                self._selector.modify(worker._connection, events, worker)

    def _watch_control(self) -> None:
        if self._control is not None:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._control.pending else 0)
            self._selector.modify(self._control, events)

    def _worker_ready(self, worker: Worker, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            with contextlib.suppress(OSError):
                worker._connection.flush()
            self._watch(worker)
        if events & selectors.EVENT_READ:
            self._read(worker)

    def _read(self, worker: Worker) -> None:
        try:
            for message in worker._connection.receive():
                worker.owner.received(worker, message)
        except EOFError:
            # It has died, or user code in it has closed the socket and it is killed now. The loader server tells how it
            # ended.
            self._disconnect(worker)
            self._kill(worker)

    def _disconnect(self, worker: Worker) -> None:
        if worker._open:
            worker._open = False
            self._selector.unregister(worker._connection)
            worker._connection.close()

    def _kill(self, worker: Worker) -> None:
        """Make sure that a worker ends; one that is not forked yet is killed once it is."""
        worker._deadline = None
        if worker.pid is None:
            self._disconnect(worker)
        elif self._control is not None:
            with contextlib.suppress(OSError):
                self._control.send(("kill", worker.pid))

    def _worker_ended(self, worker: Worker, reason: str) -> None:
        """Read what a worker sent before it died, then tell its owner."""
        if worker._open:
            self._read(worker)
        self._disconnect(worker)
        self._workers.discard(worker)
        worker.owner.died(worker, reason)

    def _control_ready(self, events: int) -> None:
        control = self._control
        assert control is not None
        assert self._fork_server is not None
        try:
            if events & selectors.EVENT_WRITE:
                control.flush()
                self._watch_control()
            for message in control.receive():
                self._fork_server.born = True
                match message.head:
                    case ("forked", ticket, pid):
                        worker = self._tickets.pop(ticket)
                        worker.pid = pid
                        if not worker._open:
                            self._kill(worker)
                    case ("unborn", ticket, reason):
                        self._worker_ended(self._tickets.pop(ticket), reason)
                    case ("died", pid, code, number):
                        for worker in [worker for worker in self._workers if worker.pid == pid]:
                            self._worker_ended(worker, describe_exit(code, number))
        except (EOFError, OSError):
            self._loader_server_ended()

    def _loader_server_ended(self) -> None:
        """It was killed, or could not start. Its workers are dead, or nobody can replace and reap them any more."""
        assert self._control is not None
        assert self._fork_server is not None
        self._selector.unregister(self._control)
        self._control.close()
        self._control = None
        server, self._fork_server = self._fork_server, None
        reason = f"was lost, because the process that starts workers {server.exit_reason()}"
        server.leave()
        self._tickets.clear()
        for worker in list(self._workers):
            if worker.pid is not None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(worker.pid, signal.SIGKILL)  # where there is no prctl
            self._worker_ended(worker, reason)

    def _end(self) -> None:
        if self._forgotten:
            return
        self._closing = True
        if self._control is not None:
            self._selector.unregister(self._control)
            self._control.close()
            self._control = None
            if self._tickets and self._fork_server is not None:
                self._fork_server.kill(self._loader_number)  # it is importing, and does not see its connection closed
        try:
            for worker in list(self._workers):
                self._worker_ended(worker, "was not needed any more")
            if self._fork_server is not None:
                self._fork_server.leave()
            for owner in self._owners.values():
                owner.close()
        finally:  # even if something above fails, nobody must wait for ever
            self._ended = True
            self._run_commands()
        self._selector.close()
        wake, self._wake = self._wake, None
        if wake is not None:
            wake.close()
        self._woken.close()


_alive: WeakSet[WorkerThread] = WeakSet()


def end_all_processes(deadline: float) -> None:
    """At interpreter exit: end all workers, and wait for them until `deadline` (`time.monotonic`)."""
    alive = list(_alive)
    for worker_thread in alive:
        worker_thread.close()
    for worker_thread in alive:
        worker_thread.join(deadline - monotonic())


def forget_all_processes() -> None:
    """In a forked child: let go of the workers, which are the parent's."""
    for worker_thread in list(_alive):
        worker_thread.forget()
    _alive.clear()
    forget_fork_server()
