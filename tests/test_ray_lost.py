"""What is lost besides actors: the connection, the head, readers that share a pool; and what object stores hold."""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from aioloader import Pipeline, WorkerDiedError
from aioloader.executors.processes.stream_worker import Failure, StreamEnded
from aioloader.executors.ray import lookout, reader
from aioloader.executors.ray.actors import Shortage
from aioloader.executors.ray.owners import Owner
from aioloader.executors.ray.reader import ReaderActor
from aioloader.executors.ray.thread import RayThread
from aioloader.executors.ray.values import pack
from tests._ray_fakes import HERE, Bench, bench, part, program_of
from tests._support import DEADLINE

ray = pytest.importorskip("ray")

__all__ = ["bench"]  # a fixture


def plus_one(sample: int) -> int:
    return sample + 1


def failure(there: Bench, number: int) -> BaseException:
    """What a part has failed with."""
    (found,) = (heard.error for heard in there.heard[number] if isinstance(heard, Failure))
    return found


# -- the connection and the head ---------------------------------------------------------------------------------------


def test_whoever_waits_is_told_that_the_connection_has_ended(bench: Callable[..., Bench]) -> None:
    """No call of before is ever answered, and nothing else would tell a consumer that waits for one."""
    there = bench(Pipeline(range(12)).map(plus_one))
    there.open(0)
    there.settle()
    there.actors[0].mute = True
    there.run_all()
    there.settle()
    assert there.heard[0] == []
    there.thread.membership.alive = False
    there.thread.call_due()
    there.settle()
    assert isinstance(failure(there, 0), WorkerDiedError)
    assert "the connection to Ray has ended" in str(failure(there, 0))


def test_nothing_is_asked_of_ray_when_the_connection_has_ended(bench: Callable[..., Bench]) -> None:
    """Ray would join, or begin, any cluster: at each call of an actor, and for each actor that is asked for."""
    there = bench(Pipeline(range(12)).map(plus_one), actors=2, pool="pool")
    stream = there.open(0)
    there.open(1)
    there.settle()
    there.run_all()
    there.settle()
    there.actors[1].kill()  # its replacement is to be asked for a moment later
    there.settle()
    there.actors[0].mute = True
    there.readers.grant(stream, 2, 0)
    there.settle()
    there.actors[0].speak()  # it has answered, and nobody has looked yet
    asked = len(there.actors), [len(actor.refs) for actor in there.actors]
    there.thread.membership.alive = False
    there.settle()
    there.thread.call_due()
    there.settle()
    assert (len(there.actors), [len(actor.refs) for actor in there.actors]) == asked
    assert "the connection to Ray has ended" in str(failure(there, 0))


def test_another_epoch_begins_with_another_connection(bench: Callable[..., Bench]) -> None:
    """With actors of its own."""
    there = bench(Pipeline(range(12)).map(plus_one))
    there.open(0)
    there.settle()
    there.run_all()
    there.thread.membership.alive = False
    there.settle()
    stream = there.open(0)
    there.settle()
    there.run_all()
    there.read_all(0, stream)
    assert there.samples(0) == [1, 3, 5, 7, 9, 11]
    assert len(there.actors) == 2


def test_a_head_that_is_silent_for_long_ends_the_epoch(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the program can still save its state: Ray ends it soon."""
    monkeypatch.setattr(lookout, "SILENT_SECONDS", 0.0)
    there = bench(Pipeline(range(12)).map(plus_one))
    there.open(0)
    there.settle()
    there.thread.head_answers = False
    for _ in range(2):
        assert not [heard for heard in there.heard[0] if isinstance(heard, Failure)]
        there.thread.call_due()
        there.settle()
    assert "the head of the Ray cluster has not answered" in str(failure(there, 0))


def test_what_is_due_does_not_wait_for_a_thread_that_always_has_something_to_do() -> None:
    """Lost actors are replaced, and looks are taken, under load as well."""
    thread, came = RayThread(), threading.Event()

    def again() -> None:
        if not came.is_set():
            thread.call(again)

    try:
        thread.call(again)
        thread.call(lambda: thread.later(0.0, came.set))
        assert came.wait(DEADLINE)
    finally:
        came.set()
        thread.close()
        assert thread.join(DEADLINE)


# -- actors that do not begin ------------------------------------------------------------------------------------------


def test_actors_that_die_before_they_run_are_ended_and_asked_for_again(bench: Callable[..., Bench]) -> None:
    """`retries` is about samples; one that cannot be reached may live, and hold CPUs."""
    there = bench(Pipeline(range(12)).map(plus_one), retries=0)
    stream = there.open(0)
    there.settle()
    for error in (ray.exceptions.ActorDiedError(), ray.exceptions.ActorUnavailableError("gone?", None)):
        there.told[-1](error)
        there.settle()
        there.thread.call_due()
        there.settle()
    assert there.killed == there.actors[:2]
    there.ready[-1]()
    there.read_all(0, stream)
    assert there.samples(0) == [1, 3, 5, 7, 9, 11]


def test_a_pool_whose_actor_cannot_be_reached_waits_for_the_cluster_to_say_so(bench: Callable[..., Bench]) -> None:
    """Its name is that of the lost one until then, which takes as long as a node may be silent."""
    there = bench(Pipeline(range(12)).map(plus_one), retries=0, pool="pool")
    there.open(0)
    there.settle()
    for _ in range(20):
        there.told[-1](ray.exceptions.ActorUnavailableError("gone?", None))
        there.settle()
        there.thread.call_due()
        there.settle()
    assert there.heard[0] == []


def test_actors_that_find_no_room_are_told_of(bench: Callable[..., Bench]) -> None:
    """Once; nobody would know why it is slow. One that no node could ever hold ends the epoch if none runs."""
    there = bench(Pipeline(range(12)).map(plus_one), actors=2)
    stream = there.open(0)
    there.settle()
    there.ready[0]()
    words = "1 of 2 actors of in_ray run: the cluster is busy; .* Those that run do all the work until then"
    with pytest.warns(RuntimeWarning, match=words):
        there.late[1](Shortage("the cluster is busy", hopeless=False))
    there.late[1](Shortage("no node has that", hopeless=True))
    there.read_all(0, stream)
    assert there.samples(0) == [1, 3, 5, 7, 9, 11]
    other = bench(Pipeline(range(12)).map(plus_one))
    other.open(0)
    other.settle()
    with pytest.warns(RuntimeWarning, match="0 of 1 actors of in_ray run"):
        other.late[0](Shortage("the cluster is busy", hopeless=False))
    other.late[0](Shortage("no node has that", hopeless=True))
    assert "0 of 1 actors of in_ray run: no node has that" in str(failure(other, 0))


# -- who is to blame ---------------------------------------------------------------------------------------------------


def deadly(sample: int) -> int:
    """Number 6 kills the actor that it is in."""
    if sample == 6:
        actor = HERE.get()
        actor._loop.call_soon_threadsafe(actor.kill)
        while not actor.dead:
            time.sleep(0)
    return sample


class Thing:
    """A key without a text of its own, and that cannot be sent."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> Any:
        return Thing, (self.number,)


class Sealed(Thing):
    """What came once can go nowhere else."""

    def __reduce__(self) -> Any:
        if HERE.get(None) is not None:
            raise TypeError("this stays where it is")
        return Sealed, (self.number,)


class ByThing:
    def __getitem__(self, thing: Thing) -> int:
        return thing.number

    def __len__(self) -> int:
        return 12


@pytest.mark.parametrize("kind", [Thing, Sealed])
def test_a_deadly_sample_is_found_whatever_its_key_is(bench: Callable[..., Bench], kind: type[Thing]) -> None:
    """Otherwise actors would die for ever, or the call would wait for leave for ever."""
    things = [kind(number) for number in range(12)]
    there = bench(Pipeline(ByThing(), sampler=things).map(deadly, concurrency=1), retries=1)
    streams = [there.open(0), there.open(1)]
    entries = taken_in_turn([there], [streams])[0][0]
    assert [error is not None for _, error in entries] == [False, False, False, True, False, False]
    assert [value for value, _ in entries] == [0, 2, 4, None, 8, 10]


def taken_in_turn(ranks: list[Bench], streams: list[list[int]]) -> list[list[list[tuple[Any, Any]]]]:
    """What comes of both parts of each rank, read in turn: values and errors."""
    taken = [[0, 0] for _ in ranks]
    turns = [0 for _ in ranks]
    over = [False for _ in ranks]
    for _ in range(300):
        for rank, there in enumerate(ranks):
            there.run_all()
            there.settle()
            ended = [bool(heard) and not hasattr(heard[-1], "places") for heard in there.heard.values()]
            over[rank] = all(ended)
            turn = turns[rank]
            if len(there.entries(turn)) > taken[rank][turn]:
                taken[rank][turn] += 1
                there.readers.grant(streams[rank][turn], 1, 0)
                turns[rank] = 1 - turn
            elif ended[turn]:
                turns[rank] = 1 - turn
            there.thread.call_due(1.0)
        if all(over):
            break
    assert all(over)
    assert all(isinstance(heard[-1], StreamEnded) for there in ranks for heard in there.heard.values())
    return [[[(entry.value, entry.error) for entry in there.entries(number)] for number in (0, 1)] for there in ranks]


def test_ranks_that_share_actors_do_not_pay_for_each_others_samples(bench: Callable[..., Bench]) -> None:
    """A pool's actors cannot be had alone, so a trial has one of its own."""
    guilty = bench(Pipeline(range(12)).map(deadly, concurrency=1), retries=1, pool="pool")
    innocent = bench(Pipeline(range(12)).map(plus_one, concurrency=1), retries=1, pool="pool", beside=guilty)
    streams = [[there.open(0), there.open(1)] for there in (guilty, innocent)]
    found = taken_in_turn([guilty, innocent], streams)
    assert [value for value, _ in found[0][0]] == [0, 2, 4, None, 8, 10]
    assert isinstance(found[0][0][3][1], WorkerDiedError)
    assert found[1] == [[(number + 1, None) for number in range(first, 12, 2)] for first in (0, 1)]


# -- what nobody reads any more ----------------------------------------------------------------------------------------


def test_parts_of_a_process_that_was_killed_end_when_somebody_else_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The actor of a pool outlives it, and nobody else would ever end them."""
    dead = {Owner("first", None)}
    monkeypatch.setattr(reader, "is_gone", lambda owner: owner in dead)
    monkeypatch.setattr(reader, "use_cores", lambda _: None)
    monkeypatch.setattr(ReaderActor, "place", lambda _: "here")

    async def main() -> None:
        actor = ReaderActor(1)
        program = pack(program_of(Pipeline(range(12)).map(plus_one)))

        async def begin(name: str, owner: Owner) -> None:
            request = pack((part(0), 0, None, True, 0, None))
            assert await actor.open(f"{name}-1", (name, owner), program, True, request) is None

        await begin("one", Owner("first", None))
        waits = asyncio.ensure_future(actor.read("one-1", 0, 100, 0))
        await begin("two", Owner("second", None))
        while (await waits)[0][0] == "entries":
            waits = asyncio.ensure_future(actor.read("one-1", 1, 0, 0))
        assert (await waits)[0] == ("gone",)
        assert list(actor._serves) == ["two-1"]
        assert list(actor._programs) == ["two"]
        await begin("three", Owner("second", None))
        assert sorted(actor._serves) == ["three-1", "two-1"]
        await actor.close()

    asyncio.run(asyncio.wait_for(main(), DEADLINE))


def test_actors_of_other_parts_end_when_nothing_is_open_there(bench: Callable[..., Bench]) -> None:
    """They hold CPUs that those of the new parts need."""
    there = bench(Pipeline(range(12)).map(plus_one))
    stream = there.open(0)
    there.settle()
    there.run_all()
    there.readers.retire()
    there.settle()
    assert there.killed == []
    there.read_all(0, stream)
    assert there.samples(0) == [1, 3, 5, 7, 9, 11]
    assert there.killed == there.actors
    stream = there.open(0)
    there.settle()
    there.run_all()
    there.read_all(0, stream)
    assert there.samples(0) == [1, 3, 5, 7, 9, 11]
    assert len(there.actors) == 2


# -- object stores -----------------------------------------------------------------------------------------------------


def large(sample: int) -> bytes:
    return bytes([sample]) * 1000


def test_entries_that_fill_the_store_come_one_after_the_other(bench: Callable[..., Bench]) -> None:
    """Of all parts together: nothing is spilled for a loader."""
    there = bench(Pipeline(range(12)).map(large))
    there.store_bytes = 8000.0  # of which a quarter is ours: room for one
    streams = [there.open(0), there.open(1)]
    there.settle()
    told: list[int] = []
    read = there.readers._read

    def noted(stream: Any) -> None:
        read(stream)
        told.append(sum(one.told for one in there.readers._streams.values()))

    there.readers._read = noted  # type: ignore[method-assign]
    there.run_all()
    there.settle()
    first = len(told)  # how large they are is known from here on
    for number, stream in enumerate(streams):
        there.read_all(number, stream)
    assert [sample[0] for sample in there.samples(0)] == [0, 2, 4, 6, 8, 10]
    assert [sample[0] for sample in there.samples(1)] == [1, 3, 5, 7, 9, 11]
    assert max(told[first:]) == 1


def test_less_is_asked_for_when_others_fill_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """A share of what is free, where little is."""
    from aioloader.executors.ray import stores

    seen = {"a": (1000.0, 900.0), "b": (1000.0, 100.0), "c": (0.0, 0.0)}
    monkeypatch.setattr(stores, "look", lambda: ("a", seen))
    known = stores.Stores()
    assert known.share() is None
    known.learn()
    assert (known.share(["a"]), known.share(["b"]), known.share(["c"]), known.share()) == (250.0, 25.0, None, 25.0)
