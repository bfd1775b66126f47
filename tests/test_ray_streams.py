"""Parts of a pipeline and the actors that they are in, with fakes in place of Ray: who is listened to, who is to blame.

The fake actors run the real server of parts (`PartServer`) on one loop of the test; what is answered, and in which
order, is for the test to say.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextvars import ContextVar, copy_context
from typing import Any

import pytest

from aioloader import Pipeline, WorkerDiedError
from aioloader.core.entry import Entry
from aioloader.engine.ray_server import PartServer, RayServing
from aioloader.engine.travel import unpacked
from aioloader.executors.processes.stream_worker import Arrived, Failure, Heard, Rested, StreamEnded, StreamWorkerDied
from aioloader.executors.ray import reader_seats
from aioloader.executors.ray.actors import Place
from aioloader.executors.ray.reader import ReaderActor
from aioloader.executors.ray.readers import Readers, ReadersTerms
from aioloader.executors.ray.suspects import Suspects
from aioloader.executors.ray.values import unpack
from aioloader.executors.ray.workers import RayWorkers
from aioloader.plan.builder import part_window
from aioloader.plan.in_ray import PartProgram
from aioloader.stages.base import Pass

ray = pytest.importorskip("ray")

PARTS = 2


def plus_one(sample: int) -> int:
    return sample + 1


def program_of(pipeline: Pipeline[Any], parts: int = PARTS) -> RayServing:
    return RayServing(PartProgram(pipeline._plan, parts, (), False, part_window))


def part(number: int) -> tuple[Any, ...]:
    """What asks for a part: see `PartProgram`."""
    return number, Pass(0), ()


# -- the server --------------------------------------------------------------------------------------------------------


def samples(answer: Any) -> list[Any]:
    kind, _, packed = answer
    assert kind == "entries"
    return list(unpack(packed)[0])


async def server_of(pipeline: Pipeline[Any], *, paused: int = 0, suspects: Suspects | None = None) -> PartServer:
    """With part 0 open."""
    server = program_of(pipeline).begin("there")
    await server.open("wire", (part(0), 0, None, True, paused, suspects))
    return server


def serving(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 30))


def test_reads_are_answered_in_the_order_of_their_numbers() -> None:
    """Calls of an async actor begin in any order."""

    async def main() -> None:
        server = await server_of(Pipeline(range(12)).map(plus_one))
        late = [asyncio.ensure_future(server.read("wire", number, 1, 0)) for number in (2, 1)]
        await asyncio.sleep(0)
        first = await server.read("wire", 0, 1, 0)
        assert samples(first) == [1]
        assert [samples(await read) for read in reversed(late)] == [[3], [5]]
        await server.close()

    serving(main)


def test_all_reads_are_told_of_the_end_and_of_what_is_gone() -> None:
    """None waits for ever."""

    async def main() -> None:
        server = await server_of(Pipeline(range(2)).map(plus_one))
        reads = [asyncio.ensure_future(server.read("wire", number, 1, 0)) for number in range(3)]
        found = [await read for read in reads]
        assert [answer[0] for answer in found] == ["entries", "ended", "ended"]
        server.end("wire")
        assert await server.read("wire", 3, 1, 0) == ("gone",)

        await server.open("other", (part(0), 0, None, True, 1, None))  # paused, so that nothing comes
        waits = asyncio.ensure_future(server.read("other", 0, 1, 0))
        await asyncio.sleep(0)
        server.end("other")
        assert await waits == ("gone",)

    serving(main)


def test_a_pause_that_is_over_is_not_begun_by_a_call_that_is_late() -> None:
    """`rest` of a pause may begin after the `let_go` that ended it."""

    async def main() -> None:
        server = await server_of(Pipeline(range(12)).map(plus_one))
        server.let_go("wire", 1)
        await server.rest("wire", 1, True)
        assert samples(await server.read("wire", 0, 1, 0)) == [1]
        await server.rest("wire", 2, True)
        waits = asyncio.ensure_future(server.read("wire", 1, 20, 0))
        server.let_go("wire", 1)
        server.let_go("wire", 2)
        await waits
        await server.close()

    serving(main)


def test_calls_begin_one_by_one_when_they_are_suspected() -> None:
    """Each waits for leave, and the guilty are not made."""
    called: list[int] = []

    def note(sample: int) -> int:
        called.append(sample)
        return sample

    async def main() -> None:
        guilty = ((1,), 2, "it has killed its actor")
        server = await server_of(Pipeline(range(12)).map(note), suspects=Suspects(True, (guilty,)))
        reads = [asyncio.ensure_future(server.read("wire", number, 1, 0)) for number in range(3)]
        number, stage, key, address = await server.watch("wire", 0)
        assert (number, stage, unpack(key), address) == (0, "map(note)", 0, (1,))
        assert not called
        server.go("wire", 0)
        assert samples(await reads[0]) == [0]
        _, places, packed = await reads[1]
        (entry,) = unpacked(places, *unpack(packed)[:2])
        assert isinstance(entry.error, WorkerDiedError)
        assert "it has killed its actor" in str(entry.error)
        assert unpack((await server.watch("wire", 1))[2]) == 4
        assert called == [0]
        server.go("wire", None)
        assert samples(await reads[2]) == [4]
        await server.close()

    serving(main)


# -- streams and actors ------------------------------------------------------------------------------------------------


class FakeThread:
    """Calls what is due when the test says so."""

    closed = False
    connected = True

    def __init__(self) -> None:
        self.jobs: list[tuple[Callable[..., object], tuple[Any, ...]]] = []

    def call(self, fn: Callable[..., object], *args: Any) -> None:
        self.jobs.append((fn, args))

    def later(self, seconds: float, fn: Callable[..., object], *args: Any) -> None:
        """Never: no test waits."""

    def join_cluster(self, address: str | None) -> None:
        """It is."""


class FakeRef:
    """The result of a call."""

    def __init__(self) -> None:
        self._future: Future[Any] = Future()

    def future(self) -> "Future[Any]":
        return self._future

    def answer(self, value: Any) -> None:
        if not self._future.done():
            self._future.set_result(value)

    def fail(self, error: BaseException) -> None:
        if not self._future.done():
            self._future.set_exception(error)


HERE: "ContextVar[FakeActor]" = ContextVar("HERE")
"""In which actor a function of the user's is."""


class FakeActor:
    """A `ReaderActor` on the loop of the test.

    Attributes:
        mute: It works, and nothing of what it answers arrives, until `speak`.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, number: int) -> None:
        self._actor = ReaderActor.__new__(ReaderActor)
        self._actor._programs, self._actor._serves = {}, {}
        self._actor.place = lambda: Place(number, "node", "id")  # type: ignore[method-assign]
        self._loop = loop
        self.mute = False
        self.dead = False
        self.held: list[tuple[FakeRef, Any]] = []
        self.refs: list[FakeRef] = []

    def __getattr__(self, name: str) -> Any:
        return _Method(self, name)

    def call(self, name: str, *args: Any) -> FakeRef:
        ref = FakeRef()
        self.refs.append(ref)
        if self.dead:
            ref.fail(ray.exceptions.ActorDiedError())
            return ref
        context = copy_context()
        context.run(HERE.set, self)
        task = self._loop.create_task(getattr(self._actor, name)(*args), context=context)
        task.add_done_callback(lambda done: self._answered(ref, done.result()))
        return ref

    def _answered(self, ref: FakeRef, value: Any) -> None:
        if self.mute:
            self.held.append((ref, value))
        elif not self.dead:
            ref.answer(value)

    def speak(self) -> None:
        """What has been held up arrives."""
        self.mute = False
        for ref, value in self.held:
            ref.answer(value)

    def kill(self) -> None:
        """Dead."""
        self.dead = True
        for ref in self.refs:
            ref.fail(ray.exceptions.ActorDiedError())


class _Method:
    def __init__(self, actor: FakeActor, name: str) -> None:
        self._actor, self._name = actor, name

    def remote(self, *args: Any) -> FakeRef:
        return self._actor.call(self._name, *args)


class Bench:
    """Readers whose actors are fakes.

    Attributes:
        actors: All that were asked for.
        begun: Tells that one of them runs.
        heard: Of each part.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pipeline: Pipeline[Any], actors: int, retries: int) -> None:
        self.loop = asyncio.new_event_loop()
        self.actors: list[FakeActor] = []
        self.ready: list[Callable[[], None]] = []
        self.heard: dict[int, list[Heard]] = {}
        self.thread = FakeThread()
        monkeypatch.setattr(reader_seats, "begin_actor", self._begin)
        monkeypatch.setattr(reader_seats, "kill_actor", id)
        monkeypatch.setattr(ray, "put", lambda value: value)
        monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": "id", "Resources": {"object_store_memory": 1e9}}])
        workers = RayWorkers(retries=retries)
        program = program_of(pipeline)
        self.readers = Readers(self.thread, ReadersTerms(actors, workers), lambda: program)  # type: ignore[arg-type]

    def _begin(
        self, thread: Any, kind: Any, args: Any, workers: Any, *, ready: Any, late: Any, **more: Any
    ) -> FakeActor:
        number = len(self.actors)
        actor = FakeActor(self.loop, number)
        self.actors.append(actor)
        self.ready.append(lambda: ready(actor, Place(number, "node", "id")))
        return actor

    def open(self, number: int, *, room: int = 2, paused: bool = False) -> int:
        """Begin a part; returns its stream."""
        heard = self.heard[number] = []
        return self.readers.open((part(number), 0, None, room, True, paused), heard.append, None)

    def settle(self) -> None:
        """Until nothing happens any more."""
        quiet = 0
        while quiet < 20:
            quiet = 0 if self.thread.jobs else quiet + 1
            jobs, self.thread.jobs = self.thread.jobs, []
            for fn, args in jobs:
                fn(*args)
            self.loop.run_until_complete(asyncio.sleep(0.001))

    def entries(self, number: int) -> list[Entry]:
        """That have come of a part."""
        arrived = [heard for heard in self.heard[number] if isinstance(heard, Arrived)]
        return [entry for heard in arrived for entry in unpacked(heard.places, *heard.values[:2])]

    def samples(self, number: int) -> list[Any]:
        return [entry.value for entry in self.entries(number)]

    def read_all(self, number: int, stream: int) -> None:
        """Take what comes until the end."""
        for _ in range(100):
            self.readers.grant(stream, 1, 0)
            self.settle()
            if any(isinstance(heard, StreamEnded | Failure | StreamWorkerDied) for heard in self.heard[number]):
                return
        raise AssertionError("it does not end")

    def close(self) -> None:
        for actor in self.actors:
            self.loop.run_until_complete(actor._actor.close())
        self.loop.run_until_complete(asyncio.sleep(0))
        self.loop.close()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Bench]]:
    """Makes one."""
    made: list[Bench] = []

    def make(pipeline: Pipeline[Any], actors: int = 1, retries: int = 3) -> Bench:
        made.append(Bench(monkeypatch, pipeline, actors, retries))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_only_actors_that_run_get_work(bench: Callable[..., Bench]) -> None:
    """One that waits for a CPU may wait for ever."""
    there = bench(Pipeline(range(12)).map(plus_one), actors=2)
    stream = there.open(0)
    there.settle()
    assert [len(actor.refs) for actor in there.actors] == [0, 0]
    there.ready[1]()
    there.read_all(0, stream)
    assert there.samples(0) == [1, 3, 5, 7, 9, 11]
    assert not there.actors[0].refs


def test_a_part_goes_on_elsewhere_and_late_answers_fall_on_deaf_ears(bench: Callable[..., Bench]) -> None:
    """A lost node shows as "unavailable" first: its actor may live on, and its answers may come yet."""
    there = bench(Pipeline(range(12)).map(plus_one))
    stream = there.open(0)
    there.settle()
    there.ready[0]()
    there.settle()
    assert there.samples(0) == [1, 3]
    there.actors[0].mute = True
    there.readers.grant(stream, 2, 0)
    there.settle()
    assert len(there.actors[0].held) == 2
    lost = there.actors[0].held[-1][0]
    there.actors[0].held = there.actors[0].held[:1]
    lost.fail(ray.exceptions.ActorUnavailableError("unavailable", None))
    there.settle()
    there.ready[1]()
    there.settle()
    there.actors[0].speak()
    there.read_all(0, stream)
    assert there.samples(0) == [1, 3, 5, 7, 9, 11]
    assert [entry.attempts for entry in there.entries(0)] == [1, 1, 2, 2, 1, 1]


def test_an_actor_that_dies_while_a_part_is_opened_costs_nothing(bench: Callable[..., Bench]) -> None:
    """It is opened at the next one."""
    there = bench(Pipeline(range(12)).map(plus_one))
    stream = there.open(1)
    there.settle()
    there.actors[0].dead = True
    there.ready[0]()
    there.settle()
    there.ready[1]()
    there.read_all(1, stream)
    assert there.samples(1) == [2, 4, 6, 8, 10, 12]


def deadly(sample: int) -> int:
    """Number 6 kills the actor that it is in."""
    if sample == 6:
        actor = HERE.get()
        actor._loop.call_soon_threadsafe(actor.kill)
        while not actor.dead:
            time.sleep(0)
    return sample


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_a_deadly_sample_is_found_among_the_parts_of_an_actor(bench: Callable[..., Bench], retries: int) -> None:
    """It fails at its place, and nobody else does."""
    there = bench(Pipeline(range(12)).map(deadly, concurrency=1), retries=retries)
    streams = [there.open(0), there.open(1)]
    there.settle()
    turn, taken = 0, [0, 0]
    for _ in range(100):  # entries are taken in turn
        while there.ready:
            there.ready.pop(0)()
        there.settle()
        if all(heard and isinstance(heard[-1], StreamEnded) for heard in there.heard.values()):
            break
        if len(there.entries(turn)) > taken[turn]:
            taken[turn] += 1
            there.readers.grant(streams[turn], 1, 0)
            turn = 1 - turn
        elif there.heard[turn] and isinstance(there.heard[turn][-1], StreamEnded):
            turn = 1 - turn
    assert there.samples(1) == [1, 3, 5, 7, 9, 11]
    entries = there.entries(0)
    assert [entry.value for entry in entries] == [0, 2, 4, None, 8, 10]
    assert isinstance(entries[3].error, WorkerDiedError)
    assert "with key 6" in str(entries[3].error)
    assert "map(deadly)" in str(entries[3].error)


def test_a_part_that_is_paused_while_it_is_opened_rests(bench: Callable[..., Bench]) -> None:
    """Whoever pauses is answered when it does."""
    there = bench(Pipeline(range(12)).map(plus_one))
    stream = there.open(0)
    there.settle()
    there.ready[0]()
    there.readers.hold(stream, 1)
    there.settle()
    assert [heard for heard in there.heard[0] if isinstance(heard, Rested)] == [Rested(1, False), Rested(1, True)]
    before = len(there.samples(0))
    there.readers.grant(stream, 8, 0)
    there.settle()
    there.readers.let_go(stream)
    there.read_all(0, stream)
    assert before <= 4
    assert there.samples(0) == [1, 3, 5, 7, 9, 11]


def test_actors_that_come_and_go_take_over_parts(bench: Callable[..., Bench]) -> None:
    """Nothing is lost or repeated."""
    there = bench(Pipeline(range(12)).map(plus_one))
    streams = [there.open(0), there.open(1)]
    there.settle()
    there.ready[0]()
    there.settle()
    there.readers.scale(2)
    there.settle()
    there.ready[1]()
    there.settle()
    assert sum(bool(seat.streams) for seat in there.readers._seats.running()) == 2
    there.readers.scale(1)
    there.settle()
    for number, stream in enumerate(streams):
        there.read_all(number, stream)
    assert there.samples(0) == [1, 3, 5, 7, 9, 11]
    assert there.samples(1) == [2, 4, 6, 8, 10, 12]
