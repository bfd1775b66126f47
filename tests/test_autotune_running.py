"""`loader.autotune()` in an epoch that is under way; and that it advises only what can be written."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from aioloader import DataLoader, Hedge, Limit, Pipeline, Rate
from aioloader.engine import tuner as tuner_module
from aioloader.engine.knobs import StageKnob
from aioloader.engine.tuning import Tuning
from aioloader.testing import Gate
from tests._support import Face, Steps, collect, on_both_faces, turns, until
from tests.test_autotune import (
    ENDLESS,
    QUICK,
    Squares,
    awaited,
    bounded,
    comes_to,
    decode,
    fetch,
    mapped,
    quiet,
    repeated,
    scripted,
    threads,
    to,
    waits,
    wild,
)


def adopted(steps: Steps, tuning: Tuning, face: Face) -> None:
    """Wait until the epoch is tuned."""
    comes_to(steps, face, lambda: tuning.tuner._run is not None)


def close(loader: Any, steps: Steps, face: Face) -> None:
    if face == "for":
        loader.close()
    else:
        steps.do(loader.aclose)


# -- what is under way -------------------------------------------------------------------------------------------------


@on_both_faces
@pytest.mark.parametrize("memory_bytes", [None, 3000], ids=["no budget", "budget"])
@pytest.mark.parametrize("make", [mapped, bounded, repeated, threads, awaited])
def test_samples_and_their_order_are_those_without_it(
    make: Callable[[], Any], memory_bytes: int | None, face: Face
) -> None:
    """From wherever it begins, whatever it asks for, and when another search takes over."""
    expected = [batch.tolist() for batch in collect(make(), face)]
    with scripted(wild), pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuner_module, "BLOCK_SECONDS", (0.0, 0.0))
        patch.setattr(tuner_module, "BLOCKS", 1)
        loader = make()
        with Steps(loader, face) as steps:
            found = steps.rest(3)
            quiet(loader, 600.0, memory_bytes=memory_bytes)
            found += steps.rest(5)
            quiet(loader, 600.0, memory_bytes=memory_bytes)
            found += steps.rest()
    assert [batch.tolist() for batch in found] == expected


class Standing:
    """A pipeline of four calls at once, all of which stand at a gate."""

    def __init__(self, kind: str) -> None:
        self.gate = Gate()
        self.loader = Pipeline(range(64)).map(self._async if kind == "async" else self._sync, concurrency=4).batch(1)

    async def _async(self, key: int) -> int:
        await self.gate.passing(key)
        return key

    def _sync(self, key: int) -> int:
        self.gate.pass_sync(key)
        return key

    def comes_to(self, steps: Steps, face: Face, count: int) -> None:
        """So many stand there, and no more."""
        comes_to(steps, face, lambda: self.gate.standing == count)
        if face == "async for":
            steps.do(lambda: turns(20))  # would more begin?
        assert self.gate.standing == count

    def tuned(self, steps: Steps, face: Face) -> StageKnob:
        """Begin a search, in the middle of the epoch."""
        tuning = quiet(self.loader, 600.0)
        adopted(steps, tuning, face)
        (stage,) = tuning.tuner.knobs.stages.values()
        assert stage.start == 4
        return stage


@on_both_faces
@pytest.mark.parametrize("kind", ["async", "threads"])
def test_more_calls_begin_beside_those_that_are_under_way(kind: str, face: Face) -> None:
    standing = Standing(kind)
    with Steps(standing.loader, face) as steps:
        first = steps.ask()
        standing.comes_to(steps, face, 4)
        standing.tuned(steps, face).set(9)
        standing.comes_to(steps, face, 9)
        assert standing.loader.stats().stages[1].concurrency == 9
        standing.gate.open_all()
        assert first().tolist() == [0]
        assert [batch.tolist() for batch in steps.rest()] == [[key] for key in range(1, 64)]


@on_both_faces
@pytest.mark.parametrize("kind", ["async", "threads"])
def test_fewer_calls_wait_for_those_that_are_under_way(kind: str, face: Face) -> None:
    """They were begun before there was a limit, and count all the same."""
    standing = Standing(kind)
    with Steps(standing.loader, face) as steps:
        first = steps.ask()
        standing.comes_to(steps, face, 4)
        stage = standing.tuned(steps, face)
        stage.set(2)
        standing.gate.open(0)
        assert first().tolist() == [0]
        standing.comes_to(steps, face, 3)
        assert [len(standing.gate.arrived)] == [4], "nobody began in the place of the one that has ended"
        standing.gate.open(1, 2)
        standing.comes_to(steps, face, 2)
        assert [len(standing.gate.arrived)] == [5]
        stage.set(3)
        standing.comes_to(steps, face, 3)
        standing.gate.open_all()
        assert [batch.tolist() for batch in steps.rest()] == [[key] for key in range(1, 64)]


@on_both_faces
def test_workers_that_rest_go_on_as_others(face: Face) -> None:
    """A consumer that has stood still: all calls have ended, and the window is full."""
    loader = Pipeline(range(200)).map(fetch, concurrency=8).batch(4)
    with Steps(loader, face) as steps:
        found = [steps.next()]
        comes_to(steps, face, lambda: not sum(stage.under_way for stage in loader.stats().stages))
        tuning = quiet(loader, 600.0)
        adopted(steps, tuning, face)
        (stage,) = tuning.tuner.knobs.stages.values()
        stage.set(1)
        found += steps.rest(20)
        assert all(step.concurrency == 1 for step in stage.steps)
        stage.set(30)
        found += steps.rest()
    assert [batch.tolist() for batch in found] == [[*range(at, at + 4)] for at in range(0, 200, 4)]


@on_both_faces
def test_a_search_comes_to_its_end_in_the_epoch_in_which_it_began(face: Face) -> None:
    loader = Pipeline(ENDLESS).map(waits, concurrency=4).map(decode, concurrency=3).batch(4)
    with Steps(loader, face) as steps:
        steps.rest(3)
        tuning = quiet(loader, QUICK)
        adopted(steps, tuning, face)
        while not tuning.finished:
            steps.next()
        assert tuning.rate_after is not None
        close(loader, steps, face)


@on_both_faces
def test_a_second_search_of_the_epoch_begins_with_what_is_written(face: Face) -> None:
    """What the first one found is advice; and its limits are no limits of the user's."""
    limit = Limit(5)
    loader = Pipeline(ENDLESS).map(waits, concurrency=4).map(decode, concurrency=limit).batch(4)
    with Steps(loader, face) as steps, scripted(to(12, 2, 3)):
        steps.next()
        first = quiet(loader)
        adopted(steps, first, face)
        while not first.finished:
            steps.next()
        assert loader.stats().stages[1].concurrency == 12
        second = quiet(loader, 600.0, memory_bytes=1 << 20)
        adopted(steps, second, face)
        assert [(knob.name, knob.start, knob.value) for knob in second.tuner.knobs.stages.values()] == [
            ("map(waits)", 4, 4)
        ]
        steps.next()
        assert loader.stats().stages[1].concurrency == 4
        assert first.tuner.knobs._tuned == [], "the first one holds nothing of the epoch"
        assert [room.places for room in first.tuner.knobs.rooms.values()][-1] == 6, "and says what it has found"
        assert limit.value == 5
        close(loader, steps, face)


@on_both_faces
def test_an_epoch_that_is_over_is_left_alone(face: Face) -> None:
    loader = Pipeline(range(40)).map(fetch).batch(4)
    collect(loader, face)
    tuning = quiet(loader, 600.0)
    assert tuning.tuner._run is None
    assert len(collect(loader, face)) == 10


def test_a_second_call_gives_back_only_a_slot_that_it_had() -> None:
    """It began before there was a limit; what it gave back would be a slot of somebody else's."""
    gate, second = Gate(), Gate()
    gate.open(*range(1, 8))
    calls: list[int] = []

    async def request(key: int) -> int:
        calls.append(key)
        await (second if calls.count(key) > 1 else gate).passing(key)
        return key

    async def main() -> None:
        loader = Pipeline(range(32)).map(request, concurrency=4, hedge=Hedge(after=0.001, budget=0.1)).batch(1)
        async with loader:
            batches = aiter(loader)
            first = asyncio.ensure_future(anext(batches))
            await until(lambda: second.standing == 1 and gate.standing == 3)
            assert second.arrived == (0,), "the first one, and no others: that is the budget"
            tuning = quiet(loader, 600.0)
            await until(lambda: tuning.tuner._run is not None)
            (stage,) = tuning.tuner.knobs.stages.values()
            (limit,) = [step.limit for step in stage.steps]
            assert limit is not None
            gate.open(8)
            await until(lambda: limit.under_way == 1)
            second.open(0)
            assert (await first).tolist() == [0]
            await until(lambda: gate.standing + second.standing == 4)
            await turns(20)
            assert limit.under_way == 3, "all but the one that began before"

    asyncio.run(main())


@on_both_faces
def test_what_waits_for_its_rate_goes_on_with_other_workers(face: Face) -> None:
    """All workers end with the samples that they have, and nothing comes in that would let in what waits."""
    gate = Gate()

    async def request(key: int) -> int:
        await gate.passing(key)
        return key

    loader = Pipeline(range(3)).map(request, concurrency=2, rate=Rate(1e9, burst=2)).batch(1)
    with Steps(loader, face) as steps:
        first = steps.ask()
        comes_to(steps, face, lambda: gate.standing == 2)
        adopted(steps, quiet(loader, 600.0), face)
        gate.open_all()
        assert first().tolist() == [0]
        assert [batch.tolist() for batch in steps.rest()] == [[key] for key in range(1, 3)]


# -- only what can be written ------------------------------------------------------------------------------------------


def lines_of(tuning: Tuning) -> list[str]:
    return [line.split("#")[0].strip() for line in str(tuning).splitlines() if line.startswith("    ")]


def other(key: int) -> int:
    return key


def keep(key: int) -> bool:
    return True


@on_both_faces
def test_functions_that_cross_into_a_thread_together_are_all_written(face: Face) -> None:
    """One that is left as it was would cross for itself, which is not what was measured."""
    loader = Pipeline(ENDLESS).map(decode, concurrency=3).map(other, concurrency=3).batch(4)
    with scripted(to(7, 2)), Steps(loader, face) as steps:
        tuning = quiet(loader)
        while not tuning.finished:
            steps.next()
        close(loader, steps, face)
    assert lines_of(tuning)[:2] == [".map(decode, concurrency=7)", ".map(other, concurrency=7)"]
    assert tuning.settings[0].stage == "map(decode) + map(other)"


@on_both_faces
def test_a_filter_after_a_cache_is_what_is_written(face: Face) -> None:
    """It crosses together with the copies of what is kept, which are nothing that a user writes."""
    loader = Pipeline(range(400)).map(fetch).cache(memory_bytes=1 << 20).filter(keep).repeat().batch(4)
    seen: list[StageKnob] = []
    with Steps(loader, face) as steps:
        tuning = quiet(loader, 600.0)
        steps.next()
        adopted(steps, tuning, face)
        seen += tuning.tuner.knobs.stages.values()
        close(loader, steps, face)
    assert [[written.call for written in stage.written] for stage in seen if "filter" in stage.name] == [
        [".filter(keep"]
    ]


@on_both_faces
def test_samples_in_memory_have_no_concurrency_to_write(face: Face) -> None:
    """Though a sampler has them looked up by a stage of their own: `Pipeline(list, concurrency=4)` is refused."""
    loader = Pipeline([*range(100)], sampler=range(100)).batch(4)
    tuning = quiet(loader, 600.0)
    assert len(collect(loader, face)) == 25
    assert not tuning.tuner.knobs.stages


def test_two_stages_that_read_alike_are_two_lines() -> None:
    loader = Pipeline(ENDLESS).map(waits, concurrency=4).map(waits, concurrency=6).batch(4)
    with scripted(to(12, 13, 1, 2)), Steps(loader, "for") as steps:
        tuning = quiet(loader)
        while not tuning.finished:
            steps.next()
        loader.close()
    assert lines_of(tuning)[:2] == [".map(waits, concurrency=12)", ".map(waits, concurrency=13)"]


@on_both_faces
def test_a_dataset_is_written_where_the_pipeline_begins(face: Face) -> None:
    loader = Pipeline(Squares(), concurrency=3).batch(4)
    with scripted(to(7, 1)):
        tuning = quiet(loader)
        while not tuning.finished:
            collect(loader, face)
    assert lines_of(tuning)[0] == "Pipeline(Squares, concurrency=7)"


@on_both_faces
def test_a_dataloader_may_be_called_anything(face: Face) -> None:
    """What its stages are called does not matter, nor what a function of the user's is called."""

    class fetch(Squares):  # noqa: N801 - as the stage of a `DataLoader` is called
        pass

    loader = DataLoader(fetch(), 4, num_workers=2)
    with scripted(to(6, 2)):
        tuning = quiet(loader)
        while not tuning.finished:
            collect(loader, face)
    assert lines_of(tuning) == ["DataLoader(..., num_workers=6, prefetch_factor=4)"]
