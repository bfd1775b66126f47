"""Readers of `in_ray` whose actors are fakes, which run the real server of parts on one loop of the test.

What is answered, and in which order, is for the test to say.
"""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextvars import ContextVar, copy_context
from typing import Any

import pytest

from aioloader import Pipeline
from aioloader.core.entry import Entry
from aioloader.engine.ray_server import RayServing
from aioloader.engine.travel import unpacked
from aioloader.executors.processes.stream_worker import Arrived, Failure, Heard, StreamEnded, StreamWorkerDied
from aioloader.executors.ray import reader_seats, readers, stores
from aioloader.executors.ray.actors import Place, Shortage
from aioloader.executors.ray.owners import Owner
from aioloader.executors.ray.reader import ReaderActor
from aioloader.executors.ray.readers import Readers, ReadersTerms
from aioloader.executors.ray.workers import RayWorkers
from aioloader.plan.builder import part_window
from aioloader.plan.in_ray import PartProgram
from aioloader.stages.base import Pass

ray = pytest.importorskip("ray")

PARTS = 2


def program_of(pipeline: Pipeline[Any], parts: int = PARTS) -> RayServing:
    return RayServing(PartProgram(pipeline._plan, parts, (), False, part_window))


def part(number: int) -> tuple[Any, ...]:
    """What asks for a part: see `PartProgram`."""
    return number, Pass(0), ()


class FakeMembership:
    """A connection, until the test ends it."""

    alive = True


class FakeThread:
    """Calls what is due when the test says so.

    Attributes:
        due: What was asked for later; no test waits for it.
    """

    closed = False
    head_answers = True

    def __init__(self) -> None:
        self.jobs: list[tuple[Callable[..., object], tuple[Any, ...]]] = []
        self.due: list[tuple[float, Callable[..., object], tuple[Any, ...]]] = []
        self.membership = FakeMembership()

    def call(self, fn: Callable[..., object], *args: Any) -> None:
        self.jobs.append((fn, args))

    def later(self, seconds: float, fn: Callable[..., object], *args: Any) -> None:
        self.due.append((seconds, fn, args))

    def call_due(self, most: float = 1e9) -> None:
        """Its time has come: of what was to come in so many seconds at most."""
        due, self.due = self.due, []
        for seconds, fn, args in due:
            if seconds <= most:
                self.call(fn, *args)
            else:
                self.later(seconds, fn, *args)

    def join_cluster(self, address: str | None) -> FakeMembership:
        if not self.membership.alive:
            self.membership = FakeMembership()
        return self.membership


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
        self._actor._programs, self._actor._serves, self._actor._owners = {}, {}, {}
        self._actor._looks = False
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
        told: Tells of each why it has died before it ran.
        late: Tells of each why it does not run yet.
        named: Those of pools that live.
        killed: Those that were ended.
        store_bytes: The size of the object store of the node.
    """

    store_bytes = 1e9

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        pipeline: Pipeline[Any],
        actors: int = 1,
        retries: int = 3,
        *,
        pool: str | None = None,
        beside: "Bench | None" = None,
    ) -> None:
        self.loop: asyncio.AbstractEventLoop = asyncio.new_event_loop() if beside is None else beside.loop
        self.actors: list[FakeActor] = [] if beside is None else beside.actors
        self.ready: list[Callable[[], None]] = [] if beside is None else beside.ready
        self.told: list[Callable[[BaseException], None]] = []
        self.late: list[Callable[[Shortage], None]] = []
        self.named: dict[str, FakeActor] = {} if beside is None else beside.named
        self.killed: list[FakeActor] = [] if beside is None else beside.killed
        self.heard: dict[int, list[Heard]] = {}
        self.thread = FakeThread()
        monkeypatch.setattr(reader_seats, "begin_actor", self._begin)
        monkeypatch.setattr(reader_seats, "kill_actor", self.killed.append)
        monkeypatch.setattr(reader_seats, "_end_actors", lambda actors, _: self.killed.extend(actors))
        monkeypatch.setattr("ray._private.auto_init_hook.enable_auto_connect", False)  # an accident is an error
        monkeypatch.setattr(ray, "put", lambda value: value)
        monkeypatch.setattr(stores, "look", lambda: ("id", {"id": (self.store_bytes, self.store_bytes)}))
        monkeypatch.setattr(readers, "this_process", lambda: Owner("job", None))
        workers = RayWorkers(retries=retries)
        program = program_of(pipeline)
        self.readers = Readers(self.thread, ReadersTerms(actors, workers, pool), lambda: program)  # type: ignore[arg-type]

    def _begin(
        self, thread: Any, kind: Any, args: Any, workers: Any, *, ready: Any, late: Any, **more: Any
    ) -> FakeActor:
        name = more.get("name")
        actor = None if name is None else self.named.get(name)
        if actor is None or actor.dead:
            actor = FakeActor(self.loop, len(self.actors))
            self.actors.append(actor)
            if name is not None:
                self.named[name] = actor
        number = self.actors.index(actor)
        self.told.append(lambda error: ready(actor, error))
        self.late.append(lambda why: late(actor, why))
        self.ready.append(lambda: ready(actor, Place(number, "node", "id")))
        return actor

    def run_all(self) -> None:
        """All actors that were asked for run."""
        while self.ready:
            self.ready.pop(0)()

    def open(self, number: int, *, room: int = 2, batches: bool = True, paused: bool = False) -> int:
        """Begin a part; returns its stream."""
        heard = self.heard[number] = []
        return self.readers.open((part(number), 0, None, room, batches, paused), heard.append, None)

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
        if self.loop.is_closed():
            return
        for actor in self.actors:
            self.loop.run_until_complete(actor._actor.close())
        self.loop.run_until_complete(asyncio.sleep(0))
        self.loop.close()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Bench]]:
    """Makes one."""
    made: list[Bench] = []

    def make(pipeline: Pipeline[Any], actors: int = 1, retries: int = 3, **more: Any) -> Bench:
        made.append(Bench(monkeypatch, pipeline, actors, retries, **more))
        return made[-1]

    yield make
    for one in made:
        one.close()
