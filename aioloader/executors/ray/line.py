"""A line to an actor on the same host: its chunks and their results go over a socket, and not through calls of Ray.

A call of Ray costs this process about a millisecond, whatever is in it: it goes through threads of Ray's that want the
GIL, and through the object store. Between two processes of one host nothing of that is needed. So an actor whose memory
can be mapped here (see `same_host`) is asked once to `serve`: it calls back on a Unix socket, and gets chunks over it
as a worker process does, with large results in segments. Ray has placed it, and tells how it has ended.

The name of the socket is in no file system (it is an abstract one), and the caller must be that very process: the
system says so. Where the actor cannot call, since it is in a network namespace of its own, `serve` returns, and
chunks are calls of Ray as on another host.

Hanging up is the end: an actor that finds its line closed leaves `serve` after the chunk that it is at. An actor that
dies closes the line, too, and what it had sent before is still there to be read. So it is known of each chunk whether
it was answered, which Ray does not tell.
"""

import secrets
import socket
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final

from aioloader.executors.processes.layout import Layout
from aioloader.executors.processes.segments import MappedSegments
from aioloader.executors.processes.wire import Connection, Message
from aioloader.executors.ray.thread import RayThread

__all__ = ["Line", "call_back", "result_bytes"]

_CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid


class Line:
    """The end of a line in the process that has the actor. Used in the thread of `RayThread`, which is where it calls.

    Args:
        thread: It.
        pid: Of the actor.
        up: Called once, when the actor has called.
        received: Called with each message.
        ended: Called once, when the actor has hung up after that, or has died; everything that it sent has been
            received.

    Raises:
        OSError: There are no more sockets.
    """

    def __init__(
        self,
        thread: RayThread,
        pid: int,
        *,
        up: Callable[[], object],
        received: Callable[[Message], object],
        ended: Callable[[], object],
    ) -> None:
        self._thread = thread
        self._pid = pid
        self._up, self._received, self._ended = up, received, ended
        self._segments = MappedSegments()
        self._connection: Connection | None = None
        self.name = b"\0aioloader-" + secrets.token_hex(16).encode()
        """What the actor calls."""
        self._listener: socket.socket | None = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._listener.bind(self.name)
            self._listener.listen()
            self._listener.setblocking(False)
            thread.watch(self._listener, self._accept)
        except OSError:
            self._listener.close()
            raise

    @property
    def is_up(self) -> bool:
        """Whether the actor is there."""
        return self._connection is not None

    def send_chunk(self, number: int, layout: Layout, pieces: Sequence[Any]) -> None:
        """Send a chunk, now or as soon as the actor takes it, and with it, which segments are free again.

        Does nothing when the actor has hung up.
        """
        self._send(("task", number, self._segments.freed(), layout), pieces)

    def forget(self, numbers: Sequence[int]) -> None:
        """The actor need not begin these chunks; it answers with those that it had not begun."""
        self._send(("forget", numbers))

    def read(self) -> None:
        """Receive what is there."""
        connection = self._connection
        if connection is None:
            return
        try:
            for message in connection.receive():
                self._received(message)
                if self._connection is not connection:  # it was hung up for what the message says
                    return
        except (EOFError, OSError):
            self.close()
            self._ended()

    def unpack(self, message: Message) -> Any:
        """See `MappedSegments.unpack`."""
        return self._segments.unpack(message)

    def close(self) -> None:
        """Hang up. Idempotent. What of the actor's memory is in use stays mapped."""
        listener, self._listener = self._listener, None
        if listener is not None:
            self._thread.unwatch(listener)
            listener.close()
        connection, self._connection = self._connection, None
        if connection is not None:
            self._thread.unwatch(connection)
            connection.hang_up()

    def _accept(self) -> None:
        """Somebody calls."""
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        pid, _, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        if pid != self._pid:  # somebody else on this machine
            sock.close()
            return
        self._thread.unwatch(self._listener)
        self._listener.close()
        self._listener = None
        sock.setblocking(False)
        self._connection = Connection(sock)
        self._thread.watch(self._connection, self._ready)
        self._up()

    def _ready(self) -> None:
        if self._connection is not None and self._connection.pending:
            self._flush(self._connection)
        self.read()

    def _send(self, head: tuple[Any, ...], pieces: Sequence[Any] = ()) -> None:
        if (connection := self._connection) is not None:
            with suppress(OSError):  # its end is read
                connection.send(head, pieces)
            self._thread.watch(connection, self._ready, writes=connection.pending)

    def _flush(self, connection: Connection) -> None:
        with suppress(OSError):
            connection.flush()
        self._thread.watch(connection, self._ready, writes=connection.pending)


def call_back(name: bytes) -> Connection:
    """In the actor: call the process that has asked for it.

    Raises:
        OSError: It cannot be reached.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(name)
    except OSError:
        sock.close()
        raise
    return Connection(sock)


def result_bytes(message: Message) -> int:
    """The size of a result."""
    *_, layout, _, _ = message.head
    in_segments = 0 if len(layout[0]) == 2 else sum(place[2] for place in layout)
    return len(message.body) + in_segments
