"""The fork server: a small process that imports torch once and forks a server for each loader, which forks its workers.

    main process ──▶ fork server ──▶ loader server ──▶ workers
                     torch           user modules

The fork server has one thread, no CUDA state and no user code, so forking it is safe and takes milliseconds. It is
started with a program of ours: the user's `__main__` does not run again, as it does with multiprocessing's `spawn` and
`forkserver` in scripts without `if __name__ == "__main__"`.

The loader server imports the user's modules before its first worker needs them: once for all workers and epochs of a
loader. It never makes an object of the user, so that workers inherit nothing from the ones before them. Another loader
has its own server, which imports the files as they are then.

How they end: each loader has a connection to its server. When that is closed, for whatever reason (`close()`, garbage
collection, `kill -9` of the main process), the server kills the workers and exits. The fork server kills a loader
server that hangs in an import, and exits when all loaders have closed. When one of the two is killed itself, the
processes that it has forked die with it where there is `prctl` (Linux). Elsewhere the main process kills the workers,
and a worker whose main process has died finds its connection closed.
"""

import contextlib
import ctypes
import gc
import importlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from aioloader.executors.processes import worker
from aioloader.executors.processes.wire import Connection

__all__ = ["ForkServer", "check_processes", "forget_fork_server", "main"]

END_SECONDS = 5.0  # how long the fork server may take to exit before it is killed
EXIT_SECONDS = 0.5  # how long after a loader server, which dies with it, the fork server may be seen to have exited

# -- in the main process -----------------------------------------------------------------------------------------------


def check_processes(argument: str) -> None:
    """Refuse `argument` on systems without worker processes.

    Raises:
        ValueError: This system has no `os.fork` or cannot send descriptors.
    """
    if not (hasattr(os, "fork") and hasattr(socket, "send_fds")):
        raise ValueError(f"{argument} needs os.fork and socket.send_fds, got {sys.platform}; use threads: leave it out")


_lock = threading.Lock()
_fork_server: "ForkServer | None" = None


class ForkServer:
    """The fork server, as seen from the main process; all loaders share it, and it ends with the last of them.

    Attributes:
        born: Whether it has answered. Until then it imports torch, and there are no workers to wait for.
    """

    def __init__(self) -> None:
        self.born = False
        ours, theirs = socket.socketpair()
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; from aioloader.executors.processes.fork_server import main; "
            f"main({theirs.fileno()})"
        )
        flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # as multiprocessing does
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, *flags, "-c", code],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    process_group=0,  # Ctrl-C is for the main process
                )
        except BaseException:
            ours.close()
            raise
        self._connection = Connection(ours)
        self._loaders = 0  # that are connected
        self._last_number = 0

    @classmethod
    def join(cls) -> tuple["ForkServer", int, socket.socket]:
        """Connect one loader, after starting the fork server if there is none, which takes milliseconds.

        Returns:
            The fork server, the number of the loader server, and a connection to the latter.

        Raises:
            OSError: It cannot be started.
        """
        global _fork_server
        with _lock:
            if _fork_server is None or _fork_server._process.poll() is not None:
                _fork_server = cls()
            _fork_server._last_number += 1
            number = _fork_server._last_number
            ours, theirs = socket.socketpair()
            with theirs, contextlib.suppress(OSError):  # it has just died: the loader finds its connection closed
                _fork_server._connection.send(("loader", number), fds=[os.dup(theirs.fileno())])
            _fork_server._loaders += 1
            return _fork_server, number, ours

    def kill(self, number: int) -> None:
        """Kill a loader server that does not listen."""
        with _lock, contextlib.suppress(OSError):
            self._connection.send(("kill", number))

    def leave(self) -> None:
        """Disconnect one loader. The last one waits until the process has ended, and kills it if it imports torch."""
        global _fork_server
        with _lock:
            self._loaders -= 1
            if self._loaders:
                return
            if _fork_server is self:
                _fork_server = None
        self._connection.close()
        if not self.born:
            self._process.kill()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def exit_reason(self) -> str:
        """How the fork server, or else a loader server, has ended, in words."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self._process.wait(EXIT_SECONDS)
            return describe_exit(status if status >= 0 else 0, max(0, -status))
        return "ended, maybe while it imported modules of yours"

    def forget(self) -> None:
        """In a forked child: let go of the parent's fork server."""
        self._connection.close()
        self._process.returncode = 0  # it is not a child of this process, which must not wait for it


def forget_fork_server() -> None:
    """In a forked child: close its copy of the connection, which would keep the fork server alive."""
    global _fork_server, _lock
    _lock = threading.Lock()
    if _fork_server is not None:
        _fork_server.forget()
        _fork_server = None


def describe_exit(code: int, signal_number: int) -> str:
    """How a process ended, in words."""
    if not signal_number:
        return f"exited with status {code}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(signal_number).name}"
    return f"was killed by signal {signal_number}"


# -- in the fork server ------------------------------------------------------------------------------------------------


def main(fd: int) -> NoReturn:
    """Fork a server for each loader until the main process, at the other end of the socket `fd`, has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system reaps the servers: nobody asks how they ended
    warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks where numpy has started threads
    gc.collect()
    gc.freeze()  # all workers share the objects that exist now, and their collectors skip them
    main_process = Connection(socket.socket(fileno=fd))
    servers: dict[int, int] = {}
    with contextlib.suppress(EOFError):
        for message in main_process.receive():
            match message.head:
                case ("loader", number):
                    with contextlib.suppress(OSError):  # no more processes: the loader finds its connection closed
                        servers[number] = _fork_loader_server(main_process, message.fds[0])
                    os.close(message.fds[0])
                case ("kill", number) if number in servers:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(servers[number], signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):  # each server finds its own connection closed, and exits
        while True:
            os.waitpid(-1, 0)
    os._exit(0)


def _fork_loader_server(main_process: Connection, fd: int) -> int:
    parent = os.getpid()
    if pid := os.fork():
        return pid
    try:
        _die_with(parent)
        main_process.close()
        _LoaderServer(socket.socket(fileno=fd)).serve()
    finally:
        os._exit(0)


def _die_with(parent: int) -> None:
    """In a process that was just forked: let it die when its parent does."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
        libc.prctl(15, b"aioloader", 0, 0, 0)  # PR_SET_NAME, for `top`
    if os.getppid() != parent:
        os._exit(0)


def _ignore(number: int, frame: object) -> None:
    """The handler of a signal that only has to wake up `select`."""


# -- in the loader server ----------------------------------------------------------------------------------------------


class _LoaderServer:
    """Imports the modules of a loader's workers once, forks the workers, and reports how they ended."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._loader = Connection(sock)
        self._workers: set[int] = set()
        self._modules: set[str] = set()
        self._woken, self._wake = socket.socketpair()
        self._woken.setblocking(False)
        self._wake.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._pid = os.getpid()

    def serve(self) -> None:
        """Serve the loader until it closes its connection."""
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _ignore)
        self._selector.register(self._loader, selectors.EVENT_READ, self._receive)
        self._selector.register(self._woken, selectors.EVENT_READ, self._reap)
        with contextlib.suppress(EOFError, OSError):
            while True:
                for key, _ in self._selector.select():
                    key.data()
        for pid in self._workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)

    def _receive(self) -> None:
        self._loader.flush()
        for message in self._loader.receive():
            match message.head:
                case ("fork", ticket, settings, modules):
                    self._import(settings, modules)
                    self._fork(ticket, settings, message.fds[0])
                case ("kill", pid) if pid in self._workers:
                    os.kill(pid, signal.SIGKILL)
        self._watch()

    def _tell(self, head: tuple[Any, ...]) -> None:
        """Send a message; what a busy main process does not take now is sent later."""
        with contextlib.suppress(OSError):  # the main process has ended, which `_receive` notices
            self._loader.send(head)
        self._watch()

    def _watch(self) -> None:
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._loader.pending else 0)
        key = self._selector.get_key(self._loader)
        if key.events != events:
            self._selector.modify(self._loader, events, key.data)

    def _import(self, settings: dict[str, Any], modules: Sequence[str]) -> None:
        """Import the modules of a program. Errors are left to the worker, which imports again and reports them."""
        new = [name for name in modules if name not in self._modules]
        if not new:
            return
        worker.adopt_surroundings(settings)
        for name in new:
            self._modules.add(name)
            with contextlib.suppress(BaseException):
                importlib.import_module(name)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()  # or each worker would print it once more
        gc.collect()
        gc.freeze()

    def _fork(self, ticket: int, settings: dict[str, Any], fd: int) -> None:
        try:
            pid = os.fork()
        except OSError as error:  # no more processes, or no memory
            os.close(fd)
            self._tell(("unborn", ticket, f"could not be started: {error}"))
            return
        if pid:
            os.close(fd)
            self._workers.add(pid)
            self._tell(("forked", ticket, pid))
            return
        try:
            self._become_worker()
            worker.main(socket.socket(fileno=fd), settings)
        finally:
            os._exit(1)

    def _become_worker(self) -> None:
        """In a new worker: close the copies of sockets whose other end must see them closed."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _die_with(self._pid)
        self._selector.close()
        self._woken.close()
        self._wake.close()
        self._loader.close()

    def _reap(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._woken.recv(4096):
                pass
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            if pid in self._workers:
                code = os.waitstatus_to_exitcode(status)
                self._workers.discard(pid)
                self._tell(("died", pid, max(0, code), max(0, -code)))
