"""Parts of a pipeline and the actors that they are in, with fakes in place of Ray: who is listened to, who is to blame.

The fake actors run the real server of parts (`PartServer`) on one loop of the test; what is answered, and in which
order, is for the test to say.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from aioloader import Pipeline, WorkerDiedError
from aioloader.engine.ray_server import PartServer
from aioloader.engine.travel import unpacked
from aioloader.executors.processes.stream_worker import Rested, StreamEnded
from aioloader.executors.ray.suspects import CallName, Suspects
from aioloader.executors.ray.values import unpack
from tests._ray_fakes import HERE, Bench, bench, part, program_of

ray = pytest.importorskip("ray")

__all__ = ["bench"]  # a fixture


def plus_one(sample: int) -> int:
    return sample + 1


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
        guilty = CallName((1,), "2", 2), "it has killed its actor"
        server = await server_of(Pipeline(range(12)).map(note), suspects=Suspects(True, (guilty,)))
        reads = [asyncio.ensure_future(server.read("wire", number, 1, 0)) for number in range(3)]
        assert await server.watch("wire", 0) == (0, "map(note)", "0", CallName((1,), "0", 0))
        assert not called
        server.go("wire", 0)
        assert samples(await reads[0]) == [0]
        _, places, packed = await reads[1]
        (entry,) = unpacked(places, *unpack(packed)[:2])
        assert isinstance(entry.error, WorkerDiedError)
        assert "it has killed its actor" in str(entry.error)
        assert (await server.watch("wire", 1))[2] == "4"
        assert called == [0]
        server.go("wire", None)
        assert samples(await reads[2]) == [4]
        await server.close()

    serving(main)


# -- streams and actors ------------------------------------------------------------------------------------------------


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
