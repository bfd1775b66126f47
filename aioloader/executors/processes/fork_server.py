"""The fork server: a small process that imports torch once and forks a server for each loader, which forks its workers.

    the user's process ──▶ fork server ──▶ loader's server ──▶ workers
                           torch           the user's modules

It has one thread, no CUDA state, and nothing of the user's in it, so forking it is safe and takes milliseconds; and
since it is started with a program of ours, nothing of the user's `__main__` runs again, as it does with
multiprocessing's `spawn` and `forkserver` in scripts without `if __name__ == "__main__"`.

Modules of the user's are imported by the server, before its first worker needs them: once for all workers and epochs
of a loader, which are forked with them in milliseconds. No object of the user's is ever made there, so that a worker
has nothing of the one before it; and another loader has a server of its own, which imports what the files say then.

The story of the end. Each loader has a connection to its server; when it closes, in whatever way (`close()`, garbage
collection, `kill -9` of the user's process), the server kills the workers and exits. One that hangs in an import is
killed by the fork server. That exits when all loaders are gone. Either of them, killed itself, takes what it has forked
with it where there is `prctl` (Linux); elsewhere the user's process kills workers, and a worker whose user's process is
gone finds its own connection closed.
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

END_SECONDS = 5.0  # how long the end of the fork server is waited for before it is killed
EXIT_SECONDS = 0.5  # between the end of a server, which the fork server's brings about, and that of the fork server

# -- in the user's process ---------------------------------------------------------------------------------------------


def check_processes(argument: str) -> None:
    """Raise where there are no worker processes.

    Raises:
        ValueError: `argument` asks for what this system does not have.
    """
    if not (hasattr(os, "fork") and hasattr(socket, "send_fds")):
        raise ValueError(f"{argument} needs os.fork and socket.send_fds, got {sys.platform}; use threads: leave it out")


_lock = threading.Lock()
_fork_server: "ForkServer | None" = None


class ForkServer:
    """The process, as seen from outside; all loaders of this process share it, and it ends with the last of them.

    Attributes:
        born: It has answered somebody. Until then it imports torch, and there are no workers to wait for.
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
                    process_group=0,  # Ctrl-C is for the user's process
                )
        except BaseException:
            ours.close()
            raise
        self._connection = Connection(ours)
        self._clients = 0
        self._numbers = 0

    @classmethod
    def join(cls) -> tuple["ForkServer", int, socket.socket]:
        """The process, started if need be, and for one loader the number of its server and a connection to that.

        May take milliseconds.

        Raises:
            OSError: It cannot be started.
        """
        global _fork_server
        with _lock:
            if _fork_server is None or _fork_server._process.poll() is not None:
                _fork_server = cls()
            _fork_server._numbers += 1
            number = _fork_server._numbers
            ours, theirs = socket.socketpair()
            with theirs, contextlib.suppress(OSError):  # it has just died: so has the connection, which will say so
                _fork_server._connection.send(("client", number), fds=[os.dup(theirs.fileno())])
            _fork_server._clients += 1
            return _fork_server, number, ours

    def kill(self, number: int) -> None:
        """End a server that does not listen."""
        with _lock, contextlib.suppress(OSError):
            self._connection.send(("kill", number))

    def leave(self) -> None:
        """One loader less; the last one waits for the end of the process, which it kills while that imports torch."""
        global _fork_server
        with _lock:
            self._clients -= 1
            if self._clients:
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
        """In words, once it is gone, or the server of a loader."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self._process.wait(EXIT_SECONDS)
            return describe_exit(status if status >= 0 else 0, max(0, -status))
        return "ended, maybe while it imported modules of yours"

    def forget(self) -> None:
        """In a forked child, whose fork server this is not."""
        self._connection.close()
        self._process.returncode = 0  # nobody here is to wait for it


def forget_fork_server() -> None:
    """In a forked child: only the parent's copy of the connection may keep the fork server alive."""
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
    """Fork a server for each loader until the user's process is gone.

    Args:
        fd: Our end of the connection to it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how a server ended: the system reaps them
    warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12 and later, where numpy has threads of its own
    gc.collect()
    gc.freeze()  # what is here by now is shared by all workers, and not looked through by their collectors
    user = Connection(socket.socket(fileno=fd))
    servers: dict[int, int] = {}
    with contextlib.suppress(EOFError):
        for message in user.receive():
            match message.head:
                case ("client", number):
                    with contextlib.suppress(OSError):  # no more processes: the loader finds its connection closed
                        servers[number] = _fork_loader_server(user, message.fds[0])
                    os.close(message.fds[0])
                case ("kill", number) if number in servers:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(servers[number], signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):  # each of them finds its own connection closed
        while True:
            os.waitpid(-1, 0)
    os._exit(0)


def _fork_loader_server(user: Connection, fd: int) -> int:
    parent = os.getpid()
    if pid := os.fork():
        return pid
    try:
        _die_with(parent)
        user.close()
        _LoaderServer(socket.socket(fileno=fd)).serve()
    finally:
        os._exit(0)


def _die_with(parent: int) -> None:
    """In a fresh process: end when the one that it was forked from ends."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
        libc.prctl(15, b"aioloader", 0, 0, 0)  # PR_SET_NAME, for `top`
    if os.getppid() != parent:
        os._exit(0)


def _ignore(number: int, frame: object) -> None:
    """The handler of a signal that has done its work by waking `select`."""


# -- in the loader's server --------------------------------------------------------------------------------------------


class _LoaderServer:
    """Imports what a loader's workers need, once, forks them, and tells how they ended.

    Args:
        sock: Our end of the connection to the loader.
    """

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
        """Until the loader closes its connection."""
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
        """Send a message; what a busy user's process does not take now goes when it does."""
        with contextlib.suppress(OSError):  # it is gone: `_receive` hears of it
            self._loader.send(head)
        self._watch()

    def _watch(self) -> None:
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._loader.pending else 0)
        key = self._selector.get_key(self._loader)
        if key.events != events:
            self._selector.modify(self._loader, events, key.data)

    def _import(self, settings: dict[str, Any], modules: Sequence[str]) -> None:
        """Import what a worker will look for. An error is that worker's, which tries again and tells the user."""
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
                stream.flush()  # or each worker would say it once more
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
        """In a fresh worker: hold nothing that others wait to see closed."""
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
