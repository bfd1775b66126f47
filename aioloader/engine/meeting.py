"""How processes of one host find each other: without a word through the process group of the trainer, and no polling.

They have a name in common, and sockets in Linux's abstract namespace, which vanish with their process. Whoever comes
first waits. The story: the host listens, then rings at each guest's bell; a guest listens at its bell, then tries the
host's door. Each listens before it looks for the other: so either the guest finds the door open, or, if it came too
early, the host comes later and finds the bell. If both find each other, the ring is of no account.

A host that gives up and comes again under the same name, for instance after a `break` and `set_epoch`, opens another
door: a guest that was not let in yet waits for it.
"""

import contextlib
import hashlib
import os
import socket
import struct
from asyncio import AbstractEventLoop
from collections.abc import Callable, Sequence
from typing import Any, Final

from aioloader.executors.processes.wire import Connection, Message

__all__ = ["Bell", "Door", "Peer", "job_name", "try_door"]

_CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid
_PENDING: Final = 128  # who may stand before a door
LINGER_SECONDS: Final = 1.0  # at a close, for what the socket does not take at once; most often it does


def job_name() -> tuple[Any, ...]:
    """What the processes of one job on this host have in common, and others have not."""
    environ = os.environ
    started = environ.get("TORCHELASTIC_RUN_ID", ""), environ.get("TORCHELASTIC_RESTART_COUNT", "")
    if "MASTER_PORT" in environ:  # one job at a time has it
        return environ.get("MASTER_ADDR", ""), environ["MASTER_PORT"], *started
    return os.getppid(), *started


def _address(name: tuple[Any, ...], who: object) -> bytes:
    digest = hashlib.blake2b(repr((os.getuid(), name, who)).encode(), digest_size=16).hexdigest()
    return b"\0aioloader-" + digest.encode()


def _listen(address: bytes) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.bind(address)
        sock.listen(_PENDING)
    except BaseException:
        sock.close()
        raise
    return sock


def _connect(address: bytes) -> socket.socket | None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.connect(address)
    except OSError:  # nobody listens
        sock.close()
        return None
    return sock


def _other(sock: socket.socket) -> tuple[int, int]:
    """The pid and the user of the process at the other end."""
    pid, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, uid


class _Listener:
    def __init__(self, loop: AbstractEventLoop, address: bytes, came: Callable[[socket.socket], None]) -> None:
        self._loop = loop
        self._came = came
        self._socket = _listen(address)
        loop.add_reader(self._socket.fileno(), self._knocked)

    def _knocked(self) -> None:
        while self._socket.fileno() >= 0:
            try:
                sock, _ = self._socket.accept()
            except OSError:  # there is nobody any more
                return
            if _other(sock)[1] != os.getuid():  # what comes is unpickled
                sock.close()
                continue
            sock.setblocking(False)
            self._came(sock)

    def close(self) -> None:
        """Listen no more; who knocks already comes in first, to be told why nobody else does. Idempotent.

        A socket that is closed with somebody before it looks to them like a process that has died.
        """
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket.fileno())
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RD)  # from now on nobody can knock
            self._knocked()
            self._socket.close()


class Bell(_Listener):
    """What a guest hears.

    Args:
        loop: Calls `rang`.
        name: What all have in common.
        guest: Which one this is.
        rang: The door is open.

    Raises:
        OSError: There is one already.
    """

    def __init__(self, loop: AbstractEventLoop, name: tuple[Any, ...], guest: int, rang: Callable[[], None]) -> None:
        def came(sock: socket.socket) -> None:
            sock.close()
            rang()

        super().__init__(loop, _address(name, guest), came)


class Door(_Listener):
    """What a host opens.

    Args:
        loop: Calls `came`, with each that comes.
        name: What all have in common.
        guests: Who is to hear of it.
        came: Called with a socket.

    Raises:
        OSError: There is one already.
    """

    def __init__(
        self,
        loop: AbstractEventLoop,
        name: tuple[Any, ...],
        guests: Sequence[int],
        came: Callable[[socket.socket], None],
    ) -> None:
        super().__init__(loop, _address(name, "host"), came)
        for guest in guests:
            if (ring := _connect(_address(name, guest))) is not None:
                ring.close()


def try_door(name: tuple[Any, ...]) -> socket.socket | None:
    """A socket to the host; None: its door is not open."""
    sock = _connect(_address(name, "host"))
    if sock is not None and _other(sock)[1] != os.getuid():
        sock.close()
        return None
    return sock


class Peer:
    """A process at the other end of a socket.

    It is gone when it has closed the connection, or when it has ended: a child that it has forked may hold the socket
    still. What it sent before is received first.

    Args:
        loop: Calls the others.
        sock: Does not block.
        received: Called with each message.
        gone: Called once, unless this is closed before.

    Attributes:
        pid: Of the process.
    """

    def __init__(
        self,
        loop: AbstractEventLoop,
        sock: socket.socket,
        received: Callable[[Message], None],
        gone: Callable[[], None],
    ) -> None:
        self.pid = _other(sock)[0]
        self._loop = loop
        self._received = received
        self._gone = gone
        self._socket = sock
        self._connection = Connection(sock)
        self._messages = self._connection.receive()
        self._open = True
        self._writing = False
        self._pidfd = -1
        with contextlib.suppress(OSError, AttributeError):  # an old kernel, or it is in another namespace of pids
            self._pidfd = os.pidfd_open(self.pid)
            loop.add_reader(self._pidfd, self._ended)
        loop.add_reader(sock.fileno(), self._readable)

    def send(self, head: tuple[Any, ...], body: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send a message, now or as soon as the socket takes it; nothing if it is gone. Copies of `fds` go along."""
        if not self._open:
            return
        try:
            self._connection.send(head, (body,), [os.dup(fd) for fd in fds])
        except OSError:
            return  # which is heard otherwise
        self._watch()

    def _watch(self) -> None:
        if self._connection.pending is not self._writing:
            self._writing = not self._writing
            if self._writing:
                self._loop.add_writer(self._socket.fileno(), self._writable)
            else:
                self._loop.remove_writer(self._socket.fileno())

    def _writable(self) -> None:
        try:
            self._connection.flush()
        except OSError:
            self._loop.remove_writer(self._socket.fileno())
            return
        self._watch()

    def _readable(self) -> None:
        try:
            self._receive()
        except (EOFError, OSError):
            self._lost()

    def _ended(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            self._receive()
        self._lost()

    def _receive(self) -> None:
        while self._open:
            messages = self._messages
            try:
                message = next(messages)
            except StopIteration:  # there is no more, for now
                self._messages = self._connection.receive()
                return
            self._received(message)

    def _lost(self) -> None:
        if self._open:
            self.close()
            self._gone()

    def close(self) -> None:
        """Close the connection, after what is to be sent. Idempotent."""
        if not self._open:
            return
        self._open = False
        fd = self._socket.fileno()
        self._loop.remove_reader(fd)
        self._loop.remove_writer(fd)
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
        if self._connection.pending:
            with contextlib.suppress(OSError):
                self._socket.settimeout(LINGER_SECONDS)
                self._connection.flush()
        self._connection.close()
