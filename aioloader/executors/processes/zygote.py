"""The zygote: a small process that imports torch once and forks workers from itself.

It has one thread, no CUDA state, and nothing of the user's in it, so forking it is safe and takes milliseconds; and
since it is started with a program of ours, nothing of the user's `__main__` runs again, as it does with
multiprocessing's `spawn` and `forkserver` in scripts without `if __name__ == "__main__"`.

The story of the end. Each loader has a connection to the zygote; when it closes, in whatever way (`close()`, garbage
collection, `kill -9` of the user's process), the zygote kills the workers of that loader. When all are closed it exits.
A zygote that is killed itself takes its workers with it where there is `prctl` (Linux); elsewhere the user's process
kills them, and a worker whose user's process is gone finds its own connection closed.
"""

import contextlib
import ctypes
import gc
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import warnings
from typing import Any, NoReturn

from aioloader.executors.processes import worker
from aioloader.executors.processes.wire import Connection

__all__ = ["Zygote", "check_processes", "forget_zygote", "main"]

END_SECONDS = 5.0  # how long the end of the zygote is waited for before it is killed

# -- in the user's process ---------------------------------------------------------------------------------------------


def check_processes(argument: str) -> None:
    """Raise where there are no worker processes.

    Raises:
        ValueError: `argument` asks for what this system does not have.
    """
    if not (hasattr(os, "fork") and hasattr(socket, "send_fds")):
        raise ValueError(f"{argument} needs os.fork and socket.send_fds, got {sys.platform}; use threads: leave it out")


_lock = threading.Lock()
_zygote: "Zygote | None" = None


class Zygote:
    """The process, as seen from outside; all loaders of this process share it, and it ends with the last of them.

    Attributes:
        born: It has answered somebody. Until then it imports torch, and there are no workers to wait for.
    """

    def __init__(self) -> None:
        self.born = False
        ours, theirs = socket.socketpair()
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; from aioloader.executors.processes.zygote import main; "
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

    @classmethod
    def join(cls) -> tuple["Zygote", socket.socket]:
        """The process, started if need be, and a connection to it for one loader. May take milliseconds.

        Raises:
            OSError: It cannot be started.
        """
        global _zygote
        with _lock:
            if _zygote is None or _zygote._process.poll() is not None:
                _zygote = cls()
            ours, theirs = socket.socketpair()
            with theirs, contextlib.suppress(OSError):  # it has just died: so has the connection, which will say so
                _zygote._connection.send(("client",), fds=[os.dup(theirs.fileno())])
            _zygote._clients += 1
            return _zygote, ours

    def leave(self) -> None:
        """One loader less; the last one waits for the end of the process, which it kills while that imports torch."""
        global _zygote
        with _lock:
            self._clients -= 1
            if self._clients:
                return
            if _zygote is self:
                _zygote = None
        self._connection.close()
        if not self.born:
            self._process.kill()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def exit_reason(self) -> str:
        """In words, once it is gone."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self._process.wait(END_SECONDS)
            return describe_exit(status if status >= 0 else 0, max(0, -status))
        return "was lost"

    def forget(self) -> None:
        """In a forked child, whose zygote this is not."""
        self._connection.close()
        self._process.returncode = 0  # nobody here is to wait for it


def forget_zygote() -> None:
    """In a forked child: only the parent's copy of the connection may keep the zygote alive."""
    global _zygote, _lock
    _lock = threading.Lock()
    if _zygote is not None:
        _zygote.forget()
        _zygote = None


def describe_exit(code: int, signal_number: int) -> str:
    """How a process ended, in words."""
    if not signal_number:
        return f"exited with status {code}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(signal_number).name}"
    return f"was killed by signal {signal_number}"


# -- in the zygote -----------------------------------------------------------------------------------------------------


def main(fd: int) -> NoReturn:
    """Serve until the user's process is gone.

    Args:
        fd: Our end of the connection to it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12 and later, where numpy has threads of its own
    _Server(socket.socket(fileno=fd)).serve()
    os._exit(0)


def _ignore(number: int, frame: object) -> None:
    """The handler of a signal that has done its work by waking `select`."""


class _Client:
    """One loader's connection, and its workers by process id."""

    def __init__(self, sock: socket.socket) -> None:
        self.connection = Connection(sock)
        self.workers: set[int] = set()


class _Server:
    def __init__(self, sock: socket.socket) -> None:
        self._user = Connection(sock)
        sock.setblocking(False)
        self._clients: set[_Client] = set()
        self._woken, self._wake = socket.socketpair()
        self._woken.setblocking(False)
        self._wake.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._pid = os.getpid()

    def serve(self) -> None:
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _ignore)
        self._selector.register(self._user, selectors.EVENT_READ, self._accept)
        self._selector.register(self._woken, selectors.EVENT_READ, self._reap)
        gc.collect()
        gc.freeze()  # what is here by now is shared by all workers, and not looked through by their collectors
        with contextlib.suppress(EOFError):
            while True:
                for key, _ in self._selector.select():
                    key.data()
        for client in self._clients:
            self._kill(client)
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)

    def _accept(self) -> None:
        for message in self._user.receive():
            sock = socket.socket(fileno=message.fds[0])
            sock.setblocking(False)
            client = _Client(sock)
            self._clients.add(client)
            self._selector.register(client.connection, selectors.EVENT_READ, lambda client=client: self._serve(client))

    def _serve(self, client: _Client) -> None:
        try:
            client.connection.flush()
            for message in client.connection.receive():
                match message.head:
                    case ("fork", ticket, settings):
                        self._fork(client, ticket, settings, message.fds[0])
                    case ("kill", pid) if pid in client.workers:
                        os.kill(pid, signal.SIGKILL)
            self._watch(client)
        except (EOFError, OSError):
            self._selector.unregister(client.connection)
            client.connection.close()
            self._clients.discard(client)
            self._kill(client)

    def _tell(self, client: _Client, head: tuple[Any, ...]) -> None:
        """Send a message; what a busy user's process does not take now goes when it does."""
        with contextlib.suppress(OSError):  # it is gone: `_serve` hears of it
            client.connection.send(head)
        self._watch(client)

    def _watch(self, client: _Client) -> None:
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.connection.pending else 0)
        key = self._selector.get_key(client.connection)
        if key.events != events:
            self._selector.modify(client.connection, events, key.data)

    def _fork(self, client: _Client, ticket: int, settings: dict[str, Any], fd: int) -> None:
        try:
            pid = os.fork()
        except OSError as error:  # no more processes, or no memory
            os.close(fd)
            self._tell(client, ("unborn", ticket, f"could not be started: {error}"))
            return
        if pid:
            os.close(fd)
            client.workers.add(pid)
            self._tell(client, ("forked", ticket, pid))
            return
        try:
            self._become_worker()
            worker.main(socket.socket(fileno=fd), settings)
        finally:
            os._exit(1)

    def _become_worker(self) -> None:
        """In a fresh worker: die with the zygote, and hold nothing that others wait to see closed."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if sys.platform == "linux":
            libc = ctypes.CDLL(None)
            libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
            libc.prctl(15, b"aioloader", 0, 0, 0)  # PR_SET_NAME, for `top`
        if os.getppid() != self._pid:
            os._exit(0)
        self._selector.close()
        self._woken.close()
        self._wake.close()
        self._user.close()
        for client in self._clients:
            client.connection.close()

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
            code = os.waitstatus_to_exitcode(status)
            for client in self._clients:
                if pid in client.workers:
                    client.workers.discard(pid)
                    self._tell(client, ("died", pid, max(0, code), max(0, -code)))

    @staticmethod
    def _kill(client: _Client) -> None:
        for pid in client.workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
