"""Messages between two processes arrive whole and in order, with their descriptors, wherever the socket cuts them."""

import os
import random
import socket
from collections.abc import Iterator

import pytest

from aioloader.executors.processes.wire import Connection


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The two ends of a line that takes little at once."""
    here, there = socket.socketpair()
    for end in (here, there):
        end.setblocking(False)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # as little as there is
    yield here, there
    here.close()
    there.close()


def file_of(content: bytes) -> int:
    """A descriptor."""
    fd = os.memfd_create("test")
    os.write(fd, content)
    return fd


@pytest.mark.parametrize("seed", range(20))
def test_messages_arrive_as_they_were_sent(ends: tuple[socket.socket, socket.socket], seed: int) -> None:
    order = random.Random(seed)
    sender, receiver = Connection(ends[0]), Connection(ends[1])
    sent, came = [], []

    def receive() -> None:
        for head, body, fds in receiver.receive():
            came.append((head, bytes(body), [os.pread(fd, 100, 0) for fd in fds]))
            for fd in fds:
                os.close(fd)

    for number in range(40):
        pieces = [order.randbytes(order.choice([0, 1, 500, 70_000])) for _ in range(order.randint(0, 3))]
        files = [b"%d of %d" % (at, number) for at in range(order.choice([0, 0, 1, 16]))]
        head = ("kind", number, "x" * order.choice([0, 10, 9_000]))
        sender.send(head, pieces, [file_of(content) for content in files])
        sent.append((head, b"".join(pieces), files))
        while sender.pending or order.random() < 0.5:
            sender.flush()
            receive()
    sender.close()
    with pytest.raises(EOFError):  # after all that was sent
        receive()
    assert came == sent
    receiver.close()


def test_what_has_come_in_part_is_closed_with_the_connection(ends: tuple[socket.socket, socket.socket]) -> None:
    """The fixture of all tests finds a descriptor that stays open."""
    sender, receiver = Connection(ends[0]), Connection(ends[1])
    sender.send(("half",), [bytes(1 << 20)], [file_of(b"")])
    assert sender.pending
    assert list(receiver.receive()) == []
    receiver.close()
    sender.close()
