"""Who is to blame when an actor is lost, and who is listened to; with fakes in place of Ray, and in order."""

from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from aioloader.executors.chunk import ChunkResult
from aioloader.executors.processes.wire import Message, decode, encode
from aioloader.executors.processes.worker_pool import Broken, Died, Outcome
from aioloader.executors.ray import actor_pool, actors, hiring, losses, stores
from aioloader.executors.ray.actor_pool import ActorPool
from aioloader.executors.ray.actors import Place
from aioloader.executors.ray.chunk_actor import ChunkActor
from aioloader.executors.ray.program import Parcel, RayProgram
from aioloader.executors.ray.same_host import Inbox
from aioloader.executors.ray.seats import Seat, Task
from aioloader.executors.ray.values import pack
from aioloader.ray import RayWorkers

ray = pytest.importorskip("ray")
exceptions = ray.exceptions


class FakeThread:
    """Calls at once."""

    closed = False

    def __init__(self) -> None:
        self.due: list[tuple[Callable[..., object], tuple[Any, ...]]] = []

    def call(self, fn: Callable[..., object], *args: Any) -> None:
        fn(*args)

    def later(self, seconds: float, fn: Callable[..., object], *args: Any) -> None:
        self.due.append((fn, args))

    def join_cluster(self, address: str | None) -> "FakeThread":
        return self

    alive = True

    def head_answers(self) -> bool:
        return True


class FakeRef:
    """The result of a call, which a test decides."""

    def __init__(self, payload: Any) -> None:
        self.payload = payload
        self._future: Future[Any] = Future()

    def future(self) -> "Future[Any]":
        return self._future

    def answer(self, *outcomes: Any) -> None:
        self._future.set_result(("done", pack(list(outcomes)), 0.0, 0.0, 0))

    def fail(self, error: BaseException) -> None:
        self._future.set_exception(error)


class FakeActor:
    """Remembers what it was sent."""

    def __init__(self) -> None:
        self.refs: list[FakeRef] = []
        self.run = self

    def remote(self, payload: Any, inbox: Any = None) -> FakeRef:
        self.refs.append(FakeRef(payload))
        return self.refs[-1]


class FakeLine:
    """To an actor on this host: remembers what it was sent.

    Attributes:
        chunks: Their numbers.
        forgotten: Numbers of those that need not begin.
        unread: What it has said, and nobody has read.
        hung_up: By the pool.
    """

    is_up = True

    def __init__(self, pool: ActorPool, seat: Any) -> None:
        self.chunks: list[int] = []
        self.forgotten: list[int] = []
        self.unread: list[Message] = []
        self.hung_up = False
        self._pool, self._seat, self._handle = pool, seat, seat.handle

    def send_chunk(self, number: int, layout: Any, pieces: Any) -> None:
        self.chunks.append(number)

    def forget(self, numbers: list[int]) -> None:
        self.forgotten += numbers

    def unpack(self, message: Message) -> Any:
        return decode(message.body)

    def close(self) -> None:
        self.is_up, self.hung_up = False, True

    def says(self, *head: Any, value: Any = None) -> None:
        """Nobody reads it yet."""
        self.unread.append(Message((*head, [(0, 1)], [], []), bytearray(encode(value)[0]), []))

    def answer(self, at: int, *outcomes: Any) -> None:
        """To a chunk."""
        self.says("done", self.chunks[at], 0.0, 0.0, value=list(outcomes))
        self.read()

    def read(self) -> None:
        while self.unread and not self.hung_up:
            self._pool.received(self._seat, self._handle, self.unread.pop(0))

    def dies(self, error: BaseException | None = None) -> None:
        """The line ends, and Ray says why; or it does not."""
        self.is_up = False
        self._pool.hung_up(self._seat, self._handle)
        if error is not None:
            self._pool.left(self._seat, self._handle, error)


class Cluster:
    """A pool whose actors run at once, or when the test says so.

    Attributes:
        begun: All that were asked for.
        killed: Those that were ended.
        lines: Those to actors of this host, which all are if the test says so.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, width: int, *, awaits: bool = False, lines: bool = False
    ) -> None:
        self.begun: list[FakeActor] = []
        self.lines: list[FakeLine] = []
        self.near = lines
        self.killed: list[FakeActor] = []
        self.starts = True
        self.outcomes: dict[str, Outcome] = {}
        self.thread = FakeThread()
        monkeypatch.setattr(hiring, "begin_actor", self._begin)
        monkeypatch.setattr(hiring, "kill_actor", self.killed.append)
        for module in (actor_pool, losses):
            monkeypatch.setattr(module, "kill_actor", self.killed.append)
        monkeypatch.setattr(stores, "look", lambda: ("id", {"id": (1 << 20, 1 << 20)}))
        monkeypatch.setattr(ray, "put", lambda value: value)
        program = RayProgram((), 1.0, None, (), 1, "float32")
        self.pool = ActorPool(self.thread, width, lambda: program, RayWorkers(), awaits=awaits)  # type: ignore[arg-type]
        self.pool.prepare()

    def _begin(self, *args: Any, ready: Any, **more: Any) -> FakeActor:
        actor = FakeActor()
        self.begun.append(actor)
        if self.starts:
            seat = ready.args[1]
            seat.handle = actor
            if self.near:
                self.lines.append(FakeLine(self.pool, seat))
                seat.line = self.lines[-1]
            seat.runs(Place(len(self.begun), "node", "id"), None)
        return actor

    def submit(self, name: str, samples: int = 1, *, quick: bool = True, alone: bool = False) -> None:
        def done(outcome: Outcome) -> None:
            assert name not in self.outcomes, "a task is done once"
            self.outcomes[name] = outcome

        self.pool.submit("owner", Parcel(((), (), None, [name] * samples), quick, alone), done)


@pytest.fixture
def one(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """With one actor, for sync calls."""
    return Cluster(monkeypatch, 1)


@pytest.fixture
def near(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The same on this host."""
    return Cluster(monkeypatch, 1, lines=True)


DEAD = exceptions.ActorDiedError


def test_only_the_first_of_the_queue_is_to_blame(one: Cluster) -> None:
    """Ray fails them all alike; the others had not begun, and are sent to the replacement in their order."""
    for name in "abc":
        one.submit(name)
    first, second = one.begun[0].refs
    first.fail(DEAD())
    assert [type(outcome) for outcome in one.outcomes.values()] == [Died]
    second.fail(DEAD())  # it comes later, and says nothing new
    assert list(one.outcomes) == ["a"]
    assert one.killed == one.begun[:1]
    again = one.begun[1].refs
    assert len(again) == 2
    for ref in again:
        ref.answer("made")
    assert {name: type(outcome).__name__ for name, outcome in one.outcomes.items()} == {
        "a": "Died",
        "b": "RayResult",
        "c": "RayResult",
    }


def test_an_answer_on_its_way_counts(one: Cluster) -> None:
    """A large result comes later than the news that the actor died with the next call."""
    one.submit("a")
    one.submit("b")
    first, second = one.begun[0].refs
    second.fail(DEAD())
    assert one.outcomes == {}  # "a" may be on its way, or may have been its death
    first.answer("made")
    assert isinstance(one.outcomes["a"], ChunkResult)
    assert isinstance(one.outcomes["b"], Died)
    assert not one.begun[1].refs


def test_the_first_of_the_queue_is_to_blame_in_whatever_order_ray_fails_them(one: Cluster) -> None:
    """Otherwise an innocent one would fail, and a deadly one be made again for ever."""
    one.submit("a")
    one.submit("b")
    first, second = one.begun[0].refs
    second.fail(DEAD())
    first.fail(DEAD())
    assert isinstance(one.outcomes["a"], Died)
    (again,) = one.begun[1].refs
    again.answer("made")
    assert isinstance(one.outcomes["b"], ChunkResult)


def test_nobody_is_sure_where_an_answer_may_have_died_with_its_actor(one: Cluster) -> None:
    """Ray had not sent it when the next call ended the actor: the first one is made again alone, whatever `retries`."""
    one.submit("a")
    one.submit("b")
    for ref in one.begun[0].refs:
        ref.fail(DEAD())
    assert isinstance(one.outcomes["a"], Died)
    assert not one.outcomes["a"].sure
    (again,) = one.begun[1].refs
    again.fail(DEAD())
    assert isinstance(one.outcomes["b"], Died)
    assert one.outcomes["b"].sure


def test_what_is_never_heard_of_holds_nobody_up(one: Cluster) -> None:
    """Ray may never say what became of the first call, for instance while its node cannot be reached."""
    one.submit("a")
    one.submit("b")
    _, second = one.begun[0].refs
    second.fail(exceptions.ActorUnavailableError("gone?", None))
    assert one.outcomes == {}
    for fn, args in list(one.thread.due):
        fn(*args)
    assert isinstance(one.outcomes["a"], Died)
    one.begun[1].refs[0].answer("made")
    assert isinstance(one.outcomes["b"], ChunkResult)


def test_a_result_that_is_lost_with_its_node_blames_nobody_for_it(one: Cluster) -> None:
    """It had been made; the next one was under way when the node died."""
    one.submit("a")
    one.submit("b")
    first, second = one.begun[0].refs
    second.fail(DEAD())
    first.fail(exceptions.ObjectLostError("00" * 28, None, ""))
    assert list(one.outcomes) == ["b"]
    one.begun[1].refs[0].answer("made")
    assert isinstance(one.outcomes["a"], ChunkResult)


def test_nobody_listens_to_an_actor_that_was_given_up(one: Cluster) -> None:
    """A node that seems lost may come back: what it says then is for nobody."""
    one.submit("a")
    one.submit("b")
    first, second = one.begun[0].refs
    first.fail(exceptions.ActorUnavailableError("gone?", None))
    assert one.killed == one.begun[:1]
    second.answer("late")
    assert "b" not in one.outcomes
    one.begun[1].refs[0].answer("made again")
    assert one.outcomes["b"].outcomes == ["made again"]  # type: ignore[union-attr]


def test_an_actor_that_awaits_may_have_been_at_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is made again alone."""
    cluster = Cluster(monkeypatch, 4, awaits=True)
    for name in "ab":
        cluster.submit(name)
    for ref in cluster.begun[0].refs:
        ref.fail(DEAD())
    assert [type(outcome) for outcome in cluster.outcomes.values()] == [Died, Died]
    assert not any(outcome.sure for outcome in cluster.outcomes.values())  # type: ignore[union-attr]
    cluster.submit("a again", alone=True)
    cluster.submit("b again", alone=True)
    assert len(cluster.begun[1].refs) == 1
    cluster.begun[1].refs[0].answer("a")
    assert len(cluster.begun[1].refs) == 2


def test_a_result_that_is_lost_blames_nobody_until_it_is_lost_too_often(one: Cluster) -> None:
    """It had been made, and is made again; the actor lives."""
    one.submit("a")
    for _ in range(losses.MOST_LOSSES):
        one.begun[0].refs[-1].fail(exceptions.ObjectLostError("00" * 28, None, ""))
        assert not one.outcomes
        assert not one.killed
    one.begun[0].refs[-1].fail(exceptions.ObjectLostError("00" * 28, None, ""))
    assert isinstance(one.outcomes["a"], Died)


def test_slow_chunks_do_not_wait_after_another_one(one: Cluster) -> None:
    """The next one is sent when the actor has nothing."""
    one.submit("a", quick=False)
    one.submit("b", quick=False)
    assert len(one.begun[0].refs) == 1
    one.begun[0].refs[0].answer("made")
    assert len(one.begun[0].refs) == 2


def test_chunks_leave_room_in_the_object_store(one: Cluster) -> None:
    """No second one is sent where its results would fill more than a quarter of the store."""
    one.submit("a")
    one.begun[0].refs[0].answer(bytes(200_000))
    one.submit("b")
    one.submit("c")
    assert len(one.begun[0].refs) == 2  # "c" waits: the store has a megabyte
    one.begun[0].refs[1].answer(bytes(200_000))
    assert len(one.begun[0].refs) == 3


def test_only_actors_that_run_are_sent_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that waits for a CPU may wait for ever."""
    cluster = Cluster(monkeypatch, 2)
    cluster.starts = False
    first = cluster.begun[0]
    cluster.submit("a")
    cluster.submit("b")
    assert [len(actor.refs) for actor in cluster.begun] == [1, 1]
    first.refs[0].fail(DEAD())  # its replacement never runs
    for name in "cde":
        cluster.submit(name)
    for ref in cluster.begun[1].refs:
        ref.answer("made")
    while len(cluster.outcomes) < 5:
        cluster.begun[1].refs[-1].answer("made")
    assert not cluster.begun[2].refs


def test_what_is_over_is_told_once(one: Cluster) -> None:
    """After `ray.shutdown()` no call is ever answered, and none is made: Ray would join whatever it finds."""
    one.submit("a")
    one.thread.alive = False
    fn, args = one.thread.due.pop()
    fn(*args)
    assert isinstance(one.outcomes["a"], Broken)
    assert "the connection to Ray has ended" in str(one.outcomes["a"].error)
    one.submit("b")
    assert isinstance(one.outcomes["b"], Broken)
    assert one.killed == []
    assert len(one.begun) == 1


# -- lines -------------------------------------------------------------------------------------------------------------


def test_what_dies_with_a_line_is_the_first_that_was_not_answered(near: Cluster) -> None:
    """Whatever was read of it before: the second one had not begun, and Ray need not be asked for its fate."""
    for name in "abc":
        near.submit(name)
    (line,) = near.lines
    assert len(line.chunks) == 2
    assert not near.begun[0].refs
    line.says("done", line.chunks[0], 0.0, 0.0, value=["made"])
    line.dies(DEAD())
    assert isinstance(near.outcomes["a"], ChunkResult)
    assert isinstance(near.outcomes["b"], Died)
    assert "died: The actor died" in near.outcomes["b"].reason
    assert near.outcomes["b"].sure
    assert near.killed == near.begun[:1]
    assert line.hung_up
    near.lines[1].answer(0, "made")
    assert isinstance(near.outcomes["c"], ChunkResult)
    near.submit("b again", alone=True)
    near.lines[1].dies(DEAD())
    assert isinstance(near.outcomes["b again"], Died)
    assert near.outcomes["b again"].sure


def test_ray_is_waited_for_if_not_long(near: Cluster) -> None:
    """It says how an actor has died. Meanwhile nothing is sent to it."""
    near.submit("a")
    (line,) = near.lines
    line.dies()
    near.submit("b")
    assert near.outcomes == {}
    assert len(line.chunks) == 1
    due, near.thread.due = near.thread.due, []
    for fn, args in due:
        fn(*args)
    assert isinstance(near.outcomes["a"], Died)
    assert "its connection has ended" in near.outcomes["a"].reason
    near.lines[1].answer(0, "made")
    assert isinstance(near.outcomes["b"], ChunkResult)
    near.pool.left(line._seat, line._handle, DEAD())  # so late
    near.submit("c")
    near.lines[1].answer(1, "made")
    assert isinstance(near.outcomes["c"], ChunkResult)
    assert near.killed == near.begun[:1]


def test_nobody_is_to_blame_for_the_death_of_an_idle_actor(near: Cluster) -> None:
    """And none is asked for in its place before it has something to do."""
    near.submit("a")
    near.lines[0].answer(0, "made")
    near.lines[0].dies(DEAD())
    for fn, args in near.thread.due:  # it need not be waited for any more
        fn(*args)
    assert len(near.begun) == 1
    assert near.pool.actors()[0].restarts == 1
    near.submit("b")
    near.lines[1].answer(0, "made")
    assert isinstance(near.outcomes["b"], ChunkResult)


def test_forgotten_chunks_free_their_places_when_the_actor_says_so(near: Cluster) -> None:
    """It knows which of them it has begun."""
    near.submit("a")
    near.submit("b")
    (line,) = near.lines
    near.pool.forget("owner")
    assert line.forgotten == line.chunks
    near.submit("c")
    assert len(line.chunks) == 2
    line.says("skipped", line.chunks[1:])
    line.read()
    assert len(line.chunks) == 3
    line.answer(0, "late")
    line.answer(2, "made")
    assert list(near.outcomes) == ["c"]


def test_lines_take_no_room_in_the_object_store(near: Cluster) -> None:
    """It has a megabyte, of which a quarter is ours."""
    near.submit("a")
    near.lines[0].answer(0, bytes(900_000))
    near.submit("b")
    near.submit("c")
    assert len(near.lines[0].chunks) == 3


def test_only_what_is_called_fills_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an actor on this host has is not in it."""
    cluster = Cluster(monkeypatch, 2, lines=True)
    far = cluster.pool._seats[1]
    far.line = None
    cluster.submit("a")
    cluster.lines[0].answer(0, bytes(400_000))
    cluster.submit("b")
    cluster.submit("c")
    assert len(cluster.lines[0].chunks) == 2
    assert len(cluster.begun[1].refs) == 1


def test_a_line_that_ends_with_the_connection_says_so(near: Cluster) -> None:
    """It is no death of a sample."""
    near.submit("a")
    near.thread.alive = False
    near.lines[0].dies(DEAD())
    assert isinstance(near.outcomes["a"], Broken)
    assert "the connection to Ray has ended" in str(near.outcomes["a"].error)


def test_a_call_over_a_line_that_takes_too_long_costs_its_actor(near: Cluster) -> None:
    """It is hung up, and what waited after it goes elsewhere."""
    near.submit("a")
    near.submit("b")
    near.pool.expire("owner", 0.0)
    assert isinstance(near.outcomes["a"], Died)
    assert near.outcomes["a"].expired
    assert near.lines[0].hung_up
    near.lines[1].answer(0, "made")
    assert isinstance(near.outcomes["b"], ChunkResult)


INBOX = Inbox(1)


class Asked:
    """An actor on this host that is asked to call, and who asks: a seat that is filled.

    Attributes:
        calls: Of its methods, by their names.
        line: That it is to call.
        told: What the pool hears.
    """

    closed = False

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, FakeRef]] = []
        self.told: list[Any] = []
        self.killed: list[Any] = []
        self.begun: list[Any] = []
        self.line: Any = None
        self.lines = 0
        self.seat = Seat(0, 1)
        monkeypatch.setattr(hiring, "begin_actor", self._begin)
        monkeypatch.setattr(hiring, "kill_actor", self.killed.append)
        monkeypatch.setattr(hiring, "Line", self._line)
        monkeypatch.setattr(Inbox, "of", lambda *_: INBOX)
        monkeypatch.setattr(ray, "put", lambda value: value)
        program = RayProgram((), 1.0, None, (), 1, "float32")
        thread: Any = FakeThread()
        hiring.Hiring(thread, ChunkActor, RayWorkers(), [self.seat], lambda: program, self).fill()

    def _begin(self, *args: Any, ready: Any, **more: Any) -> "Asked":
        self.begun.append(ready)
        return self

    def _line(self, thread: Any, pid: int, *, up: Any, **more: Any) -> "Asked":
        self.lines += 1
        self.up = up
        self.line = SimpleNamespace(name=b"name", is_up=True, close=lambda: self.told.append("hung up"), read=list)
        return self.line  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        def remote(*args: Any) -> FakeRef:
            self.calls.append((name, FakeRef(args)))
            return self.calls[-1][1]

        return SimpleNamespace(remote=remote)

    def safely(self, fn: Callable[..., None], *args: Any) -> None:
        fn(*args)

    def has_gone(self) -> bool:
        return False

    def give_up(self, error: BaseException) -> None:
        raise error

    def runs(self, seat: Seat) -> None:
        self.told.append("runs")

    def received(self, *args: Any) -> None: ...

    def hung_up(self, *args: Any) -> None: ...

    def left(self, seat: Seat, handle: Any, error: BaseException | None) -> None:
        self.told.append(error)

    def starts(self) -> FakeRef:
        """It runs and has its functions; returns the call in which it serves."""
        self.begun[-1](self, Place(1, "node", "id"))
        name, loads = self.calls[-1]
        assert name == "load"
        loads._future.set_result(None)
        name, serves = self.calls[-1]
        assert name == "serve"
        assert serves.payload == (b"name",)
        return serves


def test_an_actor_runs_when_it_has_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before that it has no way to get anything."""
    asked = Asked(monkeypatch)
    serves = asked.starts()
    assert asked.told == []
    assert not asked.seat.has_room(Task("owner", Parcel((), True, False), print, b"", []))
    asked.up()
    assert asked.told == ["runs"]
    assert asked.seat.line is asked.line
    error = DEAD()
    serves.fail(error)
    assert asked.told == ["runs", error]


def test_an_actor_that_cannot_call_runs_without_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in a network of its own."""
    asked = Asked(monkeypatch)
    asked.starts()._future.set_result(False)
    assert asked.told == ["hung up", "runs"]
    assert asked.seat.line is None
    assert asked.seat.inbox is INBOX


def test_an_actor_that_dies_before_it_calls_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is one that did not start."""
    asked = Asked(monkeypatch)
    asked.starts().fail(DEAD())
    assert asked.told == ["hung up"]
    assert len(asked.begun) == 2
    assert asked.killed == [asked]
    asked.starts()
    asked.up()
    assert asked.told == ["hung up", "runs"]


def test_where_there_are_no_more_sockets_chunks_are_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not so quick, but it works."""
    asked = Asked(monkeypatch)

    def none(*_: Any, **__: Any) -> Any:
        raise OSError("too many open files")

    monkeypatch.setattr(hiring, "Line", none)
    asked.begun[-1](asked, Place(1, "node", "id"))
    asked.calls[-1][1]._future.set_result(None)
    assert asked.told == ["runs"]
    assert asked.seat.line is None


def test_words_of_ray_are_one_line() -> None:
    """Its messages have many."""
    assert actors.words_of(RuntimeError("\n  The actor died.\n  more\n")) == "The actor died"
    assert actors.words_of(RuntimeError()) == "RuntimeError"
