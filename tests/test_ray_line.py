"""Lines to actors on this host: what goes over them, who may call, and what is known when one ends."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from aioloader import Pipeline
from aioloader.executors.chunk import Call, ChunkResult
from aioloader.executors.processes import segments
from aioloader.executors.processes.layout import lay_out
from aioloader.executors.processes.wire import Message, encode
from aioloader.executors.ray import chunk_runner, hiring
from aioloader.executors.ray.actors import Place
from aioloader.executors.ray.chunk_actor import ChunkActor
from aioloader.executors.ray.chunk_runner import ChunkRunner
from aioloader.executors.ray.line import Line, call_back, result_bytes
from aioloader.executors.ray.line_server import serve_line
from aioloader.executors.ray.program import RayProgram
from aioloader.executors.ray.thread import RayThread
from aioloader.executors.ray.values import pack
from tests._support import DEADLINE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets, and who calls, are Linux")

SERVER = "aioloader.executors.ray.line_server"
SIZE = 1 << 15  # elements; a result of this size goes in segments


@pytest.fixture(autouse=True)
def arena_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """An actor has its results made in segments; here it is a thread of the test."""
    monkeypatch.setattr(segments, "_arena", None)


class Runner:
    """Runs chunks in a thread that stands for an actor.

    Attributes:
        begun: What it is at.
        go: It waits for that with the payload "wait".
    """

    def __init__(self) -> None:
        self.begun: SimpleQueue[Any] = SimpleQueue()
        self.go = threading.Event()

    def made(self, payload: Any) -> ChunkResult:
        self.begun.put(payload)
        if payload == "wait":
            assert self.go.wait(DEADLINE)
        return ChunkResult([payload], 1.0, 0.5)

    def refused(self, error: BaseException) -> BaseException:
        return error

    def sent(self, send: Callable[[list[Any]], Any], outcomes: list[Any], batch: Any, alloc: Any) -> Any:
        return send(outcomes)


class Both:
    """A line of a `RayThread`, and an actor at its other end.

    Attributes:
        told: What the line has said: "up", "ended", or a message.
    """

    def __init__(self) -> None:
        self.thread = RayThread()
        self.told: SimpleQueue[Any] = SimpleQueue()
        self.runner = Runner()
        self.numbers = 0
        made: SimpleQueue[Line] = SimpleQueue()
        self.thread.call(lambda: made.put(self._line()))
        self.line = made.get(timeout=DEADLINE)
        self.actor: threading.Thread | None = None

    def _line(self) -> Line:
        return Line(
            self.thread,
            os.getpid(),
            up=lambda: self.told.put("up"),
            received=self.told.put,
            ended=lambda: self.told.put("ended"),
        )

    def call(self) -> None:
        """The actor calls."""
        connection = call_back(self.line.name)
        self.actor = threading.Thread(target=serve_line, args=(connection, self.runner), daemon=True)
        self.actor.start()
        assert self.next() == "up"

    def next(self) -> Any:
        return self.told.get(timeout=DEADLINE)

    def send(self, *payloads: Any) -> None:
        """Send chunks, in one go."""
        chunks = []
        for payload in payloads:
            self.numbers += 1
            stream, buffers = encode(payload)
            chunks.append((self.numbers, *lay_out([*buffers, memoryview(stream)])))

        def send() -> None:
            for chunk in chunks:
                self.line.send_chunk(*chunk)

        self.thread.call(send)

    def value(self, message: Message) -> Any:
        """Of an answer."""
        found: SimpleQueue[Any] = SimpleQueue()
        self.thread.call(lambda: found.put(self.line.unpack(message)))
        return found.get(timeout=DEADLINE)

    def close(self) -> None:
        self.runner.go.set()
        self.thread.call(self.line.close)
        if self.actor is not None:
            self.actor.join(DEADLINE)
            assert not self.actor.is_alive()
        self.thread.close()
        assert self.thread.join(DEADLINE)


@pytest.fixture
def both() -> Iterator[Both]:
    """They."""
    made = Both()
    yield made
    made.close()


# -- one process -------------------------------------------------------------------------------------------------------


def test_chunks_are_answered_in_their_order(both: Both) -> None:
    """With what they cost."""
    both.call()
    both.send("a", [b"b" * 1_000_000], "c")  # more than a socket takes at once
    answers = [both.next() for _ in range(3)]
    assert [answer.head[:4] for answer in answers] == [("done", number, 1.0, 0.5) for number in (1, 2, 3)]
    assert [both.value(answer) for answer in answers] == [["a"], [[b"b" * 1_000_000]], ["c"]]
    assert result_bytes(answers[1]) > 1_000_000 > result_bytes(answers[0])


def test_large_results_are_in_segments_that_are_used_again(both: Both) -> None:
    """When the next chunk is sent after the last view has died, and not before."""
    both.call()
    kept = []
    for number in range(4):
        both.send(torch.full((SIZE,), float(number)))
        answer = both.next()
        assert not answer.body or len(answer.body) < 1000
        assert result_bytes(answer) >= 4 * SIZE
        kept += both.value(answer)
        del answer
    assert [float(value.sum()) for value in kept] == [number * SIZE for number in range(4)]
    kept.clear()
    both.send("so")
    assert both.value(both.next()) == ["so"]  # the actor has heard by now
    both.send(torch.full((SIZE,), 5.0))
    answer = both.next()
    assert answer.head[-2] == [], "no new segment"
    assert float(both.value(answer)[0].sum()) == 5 * SIZE


def test_what_cannot_be_unpickled_is_lost_alone(both: Both) -> None:
    both.call()
    both.send(Sealed(), "next")
    lost, done = both.next(), both.next()
    assert lost.head[:2] == ("lost", 1)
    assert "stays here" in str(both.value(lost))
    assert both.value(done) == ["next"]


class Sealed:
    def __reduce__(self) -> Any:
        return _refuse, ()


def _refuse() -> None:
    raise ValueError("it stays here")


def test_chunks_that_are_forgotten_before_they_begin_are_not_run(both: Both) -> None:
    """Those that have begun are answered as usual."""
    both.call()
    both.send("wait", "second", "third")
    assert both.runner.begun.get(timeout=DEADLINE) == "wait"
    both.thread.call(both.line.forget, [1, 2])
    both.thread.call(both.told.put, "told")
    assert both.next() == "told"
    both.runner.go.set()
    answers = [both.next() for _ in range(3)]
    assert [answer.head[:2] for answer in answers] == [("done", 1), ("skipped", [2]), ("done", 3)]


@pytest.mark.parametrize("at", [f"{__name__}.on_call", f"{SERVER}.decode", f"{SERVER}.WorkerLink.send"])
def test_an_actor_that_ray_ends_answers_nothing(both: Both, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    """Where it was is no error of the sample, which is made again elsewhere; a message may be half sent."""
    end = SystemExit(1)
    end.ray_terminate_msg = "The process receives a SIGTERM."  # type: ignore[attr-defined]
    runner = ChunkRunner(0, Place(1, "node", "id"))
    runner.load(
        pack(
            RayProgram(
                (Call(call_to_end, predicate=False, label="map"),), 1.0, None, (), torch.get_num_threads(), "float32"
            )
        )
    )

    monkeypatch.setattr(at, Mock(side_effect=[end, None]))
    connection = call_back(both.line.name)
    ended: SimpleQueue[Any] = SimpleQueue()

    def serve() -> None:
        try:
            serve_line(connection, runner)
        except SystemExit as error:
            ended.put(error)

    both.actor = threading.Thread(target=serve, daemon=True)
    both.actor.start()
    assert both.next() == "up"
    both.send(([None], (), None, [7], 0))
    assert both.next() == "ended"
    assert ended.get(timeout=DEADLINE) is end


def on_call() -> None:
    """Replaced by the test."""


def call_to_end(key: int) -> int:
    on_call()
    return key


def test_nobody_else_is_listened_to(both: Both) -> None:
    """The name may be seen in /proc by others; a caller is who the system says it is."""
    code = f"import socket; s = socket.socket(socket.AF_UNIX); s.connect({both.line.name!r}); print(s.recv(1))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE, check=True)
    assert other.stdout == "b''\n"
    both.call()
    both.send("a")
    assert both.value(both.next()) == ["a"]


def test_only_one_calls(both: Both) -> None:
    both.call()
    with pytest.raises(ConnectionRefusedError):
        call_back(both.line.name)


def test_what_an_actor_has_said_is_heard_after_its_end(both: Both) -> None:
    """An answer is not lost with its actor, and the end comes after it, once."""
    connection = call_back(both.line.name)
    assert both.next() == "up"
    both.send("a", "b")
    messages = connection.receive()
    next(messages)
    blocked = threading.Event()
    both.thread.call(blocked.wait, DEADLINE)
    connection.send(("skipped", [1]))
    connection.close()  # it has died with the second one unread
    blocked.set()
    assert both.next().head == ("skipped", [1])
    assert both.next() == "ended"
    assert not both.line.is_up
    both.send("c")  # nobody hears it
    both.thread.call(both.line.read)
    both.thread.call(both.told.put, "over")
    assert both.next() == "over"


def test_hanging_up_ends_the_service_though_a_copy_is_left(both: Both) -> None:
    """A child that was forked has the socket, too; the chunk at hand is the last one."""
    both.call()
    assert both.line._connection is not None
    copy = os.dup(both.line._connection.fileno())
    try:
        both.send("wait", "never")
        assert both.runner.begun.get(timeout=DEADLINE) == "wait"
        both.thread.call(both.line.close)
        both.thread.call(both.told.put, "closed")
        assert both.next() == "closed"
        both.runner.go.set()
        assert both.actor is not None
        both.actor.join(DEADLINE)
        assert not both.actor.is_alive()
        assert both.runner.begun.empty()
    finally:
        os.close(copy)


def test_a_line_that_nobody_calls_is_gone_when_it_is_closed(both: Both) -> None:
    both.thread.call(both.line.close)
    both.thread.call(both.line.close)
    both.thread.call(both.told.put, "closed")
    assert both.next() == "closed"
    with pytest.raises(ConnectionRefusedError):
        call_back(both.line.name)
    assert ChunkActor.serve(_Actor(), both.line.name) is False  # type: ignore[arg-type]


class _Actor:
    def __init__(self) -> None:
        from aioloader.executors.ray.chunk_runner import ChunkRunner

        self._runner = ChunkRunner.__new__(ChunkRunner)


def test_a_forked_child_lets_go_of_the_sockets(both: Both) -> None:
    """Or an actor would not hear that its process has ended while a child of it lives."""
    both.call()
    assert both.line._connection is not None
    number = both.line._connection.fileno()
    child = os.fork()
    if child == 0:
        try:
            os.fstat(number)
        except OSError:
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    both.send("a")
    assert both.value(both.next()) == ["a"]


# -- a cluster ---------------------------------------------------------------------------------------------------------


def identity(key: int) -> int:
    return key


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("refused", [False, True])
def test_actors_of_this_host_have_lines_where_they_can_call(monkeypatch: pytest.MonkeyPatch, refused: bool) -> None:
    """Else they are called as everywhere: one in a network of its own has no way back."""
    sent: list[int] = []
    send = Line.send_chunk

    def noted(self: Line, number: int, *args: Any) -> None:
        sent.append(number)
        send(self, number, *args)

    monkeypatch.setattr(Line, "send_chunk", noted)

    class Elsewhere(Line):
        def __init__(self, *args: Any, **others: Any) -> None:
            super().__init__(*args, **others)
            self.name = b"\0aioloader-nobody"

    if refused:
        monkeypatch.setattr(hiring, "Line", Elsewhere)
    with Pipeline(range(300)).map(identity, executor="ray", concurrency=2).batch(50) as loader:
        for _ in range(2):
            assert [batch.tolist() for batch in loader] == [list(range(at, at + 50)) for at in range(0, 300, 50)]
    assert bool(sent) is not refused


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_no_socket_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it runs nobody listens any more, and after the end there is no line."""
    made: list[Line] = []
    begin = Line.__init__

    def noted(self: Line, *args: Any, **others: Any) -> None:
        begin(self, *args, **others)
        made.append(self)

    monkeypatch.setattr(Line, "__init__", noted)

    def sockets() -> list[str]:
        """Those of these lines, as the kernel lists them."""
        listed = Path("/proc/net/unix").read_text(encoding="utf-8").splitlines()
        return [one for one in listed for line in made if line.name[1:].decode() in one]

    with Pipeline(range(300)).map(identity, executor="ray", concurrency=2) as loader:
        assert list(loader) == list(range(300))
        assert not [one for one in sockets() if " 00010000 " in one]  # listens
        assert sockets()
    assert not sockets()


@pytest.mark.parametrize("devices", [False, True])
def test_generators_are_seeded_as_by_torch(monkeypatch: pytest.MonkeyPatch, devices: bool) -> None:
    """Before each batch of a `DataLoader`. Those of devices only where there are some: torch takes its time."""
    seed = (1 << 64) - 7
    of_devices = Mock()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", of_devices)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: devices)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed & (1 << 63) - 1)
        expected = torch.rand(3)
        of_devices.reset_mock()
        chunk_runner._has_devices.cache_clear()
        try:
            chunk_runner._seed(seed)
        finally:
            chunk_runner._has_devices.cache_clear()
        assert torch.equal(torch.rand(3), expected)
    assert of_devices.called == devices
