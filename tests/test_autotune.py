"""`loader.autotune()`: what runs is what would run without it, only wider; and it says what to write."""

import asyncio
import pickle
import random
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from aioloader import DataLoader, Limit, Pipeline, Retry
from aioloader.core.climbing import Axis, Found, Measured, Point
from aioloader.core.entry import Entry
from aioloader.core.sizes import MeanBytes
from aioloader.engine import tuner as tuner_module
from aioloader.engine.room import GrowingRoom, Room
from aioloader.engine.tuned_room import UNKNOWN, BytesBudget, TunedRoom
from aioloader.engine.tuning import Tuning
from aioloader.testing import Gate
from tests._support import Face, Steps, collect, on_both_faces, run, turns, until, wait_until

pytestmark = pytest.mark.usefixtures("fork_server")

ENDLESS = range(1 << 40)
QUICK = 0.2  # seconds of a search whose outcome does not matter


async def fetch(key: int) -> int:
    await asyncio.sleep(0)
    return key


async def waits(key: int) -> int:
    """Long enough that nobody takes it for cheap: then there is no more room than calls have use for."""
    await asyncio.sleep(0.003)
    return key


def decode(key: int) -> int:
    return key + 1


class Squares(torch.utils.data.Dataset[int]):
    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> int:
        return index * index


class Slow(torch.utils.data.Dataset[int]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        time.sleep(0.005)
        return index


class AsyncSquares:
    def __len__(self) -> int:
        return 96

    async def __getitem__(self, index: int) -> int:
        await asyncio.sleep(0)
        return index * index


@contextmanager
def scripted(points: Callable[[Sequence[Axis]], Iterator[Point]]) -> Iterator[list[Measured]]:
    """Searches ask for `points` and find the last of them; what was measured."""
    seen: list[Measured] = []

    def climb(axes: Sequence[Axis]) -> Generator[Point, Measured, Found]:
        point = tuple(axis.start for axis in axes)
        for point in points(axes):
            seen.append((yield point))
        return Found(point, seen[0], seen[-1], "best", len(seen))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuner_module, "climb", climb)
        yield seen


def to(*values: int) -> Callable[[Sequence[Axis]], Iterator[Point]]:
    """The start, then these."""

    def points(axes: Sequence[Axis]) -> Iterator[Point]:
        yield tuple(axis.start for axis in axes)
        yield values

    return points


def until_finished(loader: Any, tuning: Tuning, face: Face) -> int:
    """Take batches until the search is over; how many."""
    count = 0
    with Steps(loader, face) as steps:
        while not tuning.finished:
            steps.next()
            count += 1
        if face == "for":
            loader.close()
        else:
            steps.do(loader.aclose)
    return count


def quiet(loader: Any, seconds: float = QUICK, **more: Any) -> Tuning:
    tuning: Tuning = loader.autotune(seconds=seconds, tell=None, **more)
    return tuning


# -- nothing changes in what comes -------------------------------------------------------------------------------------


def wild(axes: Sequence[Axis]) -> Iterator[Point]:
    chance = random.Random(0)
    while True:
        yield tuple(chance.randint(axis.least, min(axis.most, 50)) for axis in axes)


def mapped() -> Pipeline:
    return Pipeline(range(3000)).shuffle(seed=1).map(fetch).map(decode).filter(lambda key: key % 7 != 0).batch(4)


def bounded() -> Pipeline:
    return Pipeline(range(2000)).map(fetch, ahead=70).map(decode, concurrency=3, ahead_bytes=4000).batch(4)


def repeated() -> Pipeline:
    return Pipeline(range(50)).map(fetch).repeat(40).map(decode).batch(4).map(lambda batch: batch * 2, concurrency=3)


def threads() -> DataLoader:
    return DataLoader(Squares(), 4, num_workers=3, shuffle=True, seed=3)


def awaited() -> DataLoader:
    return DataLoader(AsyncSquares(), 4, concurrency=8, shuffle=True, seed=3)


@on_both_faces
@pytest.mark.parametrize("memory_bytes", [None, 3000], ids=["no budget", "budget"])
@pytest.mark.parametrize("make", [mapped, bounded, repeated, threads, awaited])
def test_samples_and_their_order_are_those_without_it(
    make: Callable[[], Any], memory_bytes: int | None, face: Face
) -> None:
    """Whatever the search asks for, at any time, for several epochs."""
    plain = make()
    expected = [[batch.tolist() for batch in collect(plain, face)] for _ in range(3)]
    with scripted(wild), pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuner_module, "BLOCK_SECONDS", (0.001, 0.001))
        patch.setattr(tuner_module, "BLOCKS", 1)
        loader = make()
        quiet(loader, 600.0, memory_bytes=memory_bytes)
        assert [[batch.tolist() for batch in collect(loader, face)] for _ in range(3)] == expected


@on_both_faces
def test_a_state_that_is_taken_meanwhile_resumes_exactly(face: Face) -> None:
    with scripted(wild), pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuner_module, "BLOCK_SECONDS", (0.001, 0.001))
        patch.setattr(tuner_module, "BLOCKS", 1)
        loader = mapped()
        quiet(loader, 600.0)
        head = collect(loader, face, limit=200)
        state = loader.state_dict()
        assert state["batches"] == 200
        assert state["epoch"] == 0
        loader.load_state_dict(state)
        rest = collect(loader, face)
    whole = [batch.tolist() for batch in collect(mapped(), face)]
    assert [batch.tolist() for batch in head + rest] == whole
    plain = mapped()
    plain.load_state_dict(state)
    assert [batch.tolist() for batch in collect(plain, face)] == whole[200:]


@on_both_faces
def test_errors_stay_at_their_places(face: Face) -> None:
    def fails(key: int) -> int:
        if key == 5:
            raise ValueError("five")
        return key

    loader = Pipeline(range(12)).map(fails, concurrency=4).batch(2)
    quiet(loader)
    with Steps(loader, face) as steps:
        assert [steps.next().tolist() for _ in range(2)] == [[0, 1], [2, 3]]
        with pytest.raises(ValueError, match="five"):
            steps.next()
        assert [batch.tolist() for batch in steps.rest()] == [[6, 7], [8, 9], [10, 11]]


# -- widths change while it runs ---------------------------------------------------------------------------------------


@on_both_faces
@pytest.mark.parametrize("kind", ["async", "threads"])
def test_a_width_changes_in_the_middle_of_an_epoch(kind: str, face: Face) -> None:
    """More begin at once; fewer cancels nobody, and nobody begins until enough have ended."""
    gate = Gate()

    async def awaited(key: int) -> int:
        await gate.passing(key)
        return key

    def in_thread(key: int) -> int:
        gate.pass_sync(key)
        return key

    loader = Pipeline(range(64)).map(awaited if kind == "async" else in_thread, concurrency=4).batch(1)
    tuning = quiet(loader, 600.0)
    with Steps(loader, face) as steps:
        first = steps.ask()
        _standing(steps, gate, face, 4)
        (stage,) = tuning.tuner.knobs.stages.values()
        assert (stage.name.startswith("map("), stage.start) == (True, 4)
        stage.set(9)
        _standing(steps, gate, face, 9)
        stage.set(2)
        for key in range(7):
            gate.open(key)
        _standing(steps, gate, face, 2)
        assert len(gate.arrived) == 9, "two were under way all the time"
        gate.open_all()
        assert first().tolist() == [0]
        assert [batch.tolist() for batch in steps.rest()] == [[key] for key in range(1, 64)]


def _standing(steps: Steps, gate: Gate, face: Face, count: int) -> None:
    comes_to(steps, face, lambda: gate.standing == count)
    if face == "async for":
        steps.do(lambda: turns(20))  # would more begin?
    assert gate.standing == count


def comes_to(steps: Steps, face: Face, condition: Callable[[], bool]) -> None:
    """Wait until it does, while the loop runs."""
    if face == "for":
        wait_until(condition)
    else:
        steps.do(lambda: until(condition))


@on_both_faces
def test_later_epochs_have_what_was_found_and_no_limit(face: Face) -> None:
    loader = Pipeline(range(1000)).map(waits, concurrency=4).map(decode, concurrency=3).batch(4)
    with scripted(to(12, 5, 2, 3)):
        tuning = quiet(loader)
        while not tuning.finished:
            collect(loader, face)
    assert [(one.stage, one.argument, one.before, one.after) for one in tuning.settings][:2] == [
        ("map(waits)", "concurrency", 4, 12),
        ("map(decode)", "concurrency", 3, 5),
    ]
    assert ("prefetch", 2, 6) in [(one.argument, one.before, one.after) for one in tuning.settings]
    with Steps(loader, face) as steps:
        steps.next()
        stages = {stage.name: stage for stage in loader.stats().stages}
        knobs = tuning.tuner.knobs.stages.values()
        assert all(step.limit is None for knob in knobs for step in knob.steps if not step.closed)
        assert (stages["map(waits)"].concurrency, stages["map(decode)"].concurrency) == (12, 5)
        assert stages["collate"].room == 6
        steps.rest()


@on_both_faces
def test_what_it_says_can_be_written(face: Face) -> None:
    loader = Pipeline(ENDLESS).map(waits, concurrency=4).map(decode, concurrency=3).batch(4)
    with scripted(to(12, 5, 2, 3)):
        tuning = quiet(loader)
        until_finished(loader, tuning, face)
    lines = [line.split("#")[0].strip() for line in str(tuning).splitlines()]
    (ahead,) = [one.after for one in tuning.settings if one.argument == "ahead"]
    assert lines[1:4] == [f".map(waits, concurrency=12, ahead={ahead})", ".map(decode, concurrency=5)", ".prefetch(6)"]
    written = Pipeline(range(100)).map(waits, concurrency=12, ahead=ahead).map(decode, concurrency=5).batch(4)
    assert len(collect(written.prefetch(6), face)) == 25


@on_both_faces
def test_the_room_of_cheap_samples_is_left_to_the_engine(face: Face) -> None:
    """It has more for them already, and a written `ahead` would end that."""
    loader = Pipeline(ENDLESS).map(decode, concurrency=3).batch(4)
    with scripted(to(5, 3)):
        tuning = quiet(loader)
        until_finished(loader, tuning, face)
    assert [(one.argument, one.after) for one in tuning.settings] == [("concurrency", 5), ("prefetch", 6)]


@on_both_faces
def test_a_dataloader_is_tuned_by_its_own_words(face: Face) -> None:
    loader = DataLoader(Squares(), 4, num_workers=2)
    with scripted(to(6, 2)):
        tuning = quiet(loader)
        while not tuning.finished:
            collect(loader, face)
    assert [(one.stage, one.argument, one.before, one.after) for one in tuning.settings] == [
        ("", "num_workers", 2, 6),
        ("", "prefetch_factor", 2, 4),
    ]
    assert "DataLoader(..., num_workers=6, prefetch_factor=4)" in str(tuning)
    collect(loader, face)
    (stage,) = [stage for stage in loader.stats().stages if stage.name == "fetch"]
    assert (stage.concurrency, stage.room) == (6, 24)


@on_both_faces
def test_an_awaited_dataset_has_its_concurrency_tuned(face: Face) -> None:
    loader = DataLoader(AsyncSquares(), 4, concurrency=8)
    with scripted(to(32)):
        tuning = quiet(loader)
        while not tuning.finished:
            collect(loader, face)
    assert [(one.argument, one.before, one.after) for one in tuning.settings] == [("concurrency", 8, 32)]


# -- what is left alone ------------------------------------------------------------------------------------------------


@on_both_faces
def test_what_the_user_bounded_is_not_changed(face: Face) -> None:
    """One place, a limit of the user's, and rooms with a bound."""
    limit = Limit(5)
    loader = (
        Pipeline(ENDLESS)
        .map(fetch, concurrency=1)
        .map(decode, concurrency=limit)
        .map(lambda key: key, concurrency=2, ahead=6)
        .batch(4)
    )
    seen: list[Sequence[Axis]] = []

    def points(axes: Sequence[Axis]) -> Iterator[Point]:
        seen.append(axes)
        yield tuple(axis.start for axis in axes)

    with scripted(points):
        tuning = quiet(loader)
        until_finished(loader, tuning, face)
    ((inner, rooms),) = [([axis for axis in axes if not axis.is_room], axes[-1:]) for axes in seen]
    assert [(axis.start, axis.most) for axis in inner] == [(2, 6)], "no more than ahead"
    assert [axis.is_room for axis in rooms] == [True], "prefetch"
    assert limit.value == 5
    assert tuning.settings == ()


@on_both_faces
def test_where_nothing_can_be_changed_it_says_so(face: Face) -> None:
    told: list[str] = []
    loader = Pipeline(range(100)).map(fetch, concurrency=Limit(3))
    tuning = loader.autotune(seconds=QUICK, tell=told.append)
    while not tuning.finished:
        collect(loader, face)
    assert len(told) == 1
    assert "nothing here can be changed" in told[0]
    assert len(collect(loader, face)) == 100


@on_both_faces
def test_what_runs_in_another_process_is_left_alone(face: Face) -> None:
    loader = Pipeline(range(64)).map(decode, concurrency=2).batch(4).in_process()
    tuning = quiet(loader)
    while not tuning.finished:
        collect(loader, face)
    loader.close()
    assert "or in other processes are left as they are" in str(tuning)


@on_both_faces
def test_nothing_of_an_epoch_that_is_over_is_held(face: Face) -> None:
    """Neither its windows, which may have batches in them, nor their part of the budget."""
    loader = Pipeline(range(400)).map(fetch).repeat(3).map(decode, concurrency=2, ahead=9).batch(4)
    tuning = quiet(loader, 600.0, memory_bytes=1 << 20)
    collect(loader, face)
    loader.close()
    knobs, budget = tuning.tuner.knobs, tuning.tuner.budget
    assert budget is not None
    assert budget.share == budget.nbytes
    assert (knobs._tuned, [room._windows for room in knobs.rooms.values()]) == ([], [[]] * len(knobs.rooms))
    assert (tuning.tuner._run, tuning.tuner._windows, tuning.tuner._timer) == (None, [], None)


@pytest.mark.parametrize(
    ("loader", "what"),
    [
        (Pipeline(range(5)), "this pipeline has none; add map"),
        (DataLoader(Squares(), 4), "num_workers=0 .* pass num_workers=2"),
        (DataLoader(Squares(), 4, num_workers=2, worker_type="process"), "worker processes .* epoch by epoch"),
    ],
    ids=["no stage", "no workers", "processes"],
)
def test_nothing_to_tune_is_an_error_of_the_call(loader: Any, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        loader.autotune()


@pytest.mark.parametrize(
    ("arguments", "kind", "what"),
    [
        ({"memory_bytes": 0}, ValueError, "memory_bytes must be at least 1, got 0"),
        ({"memory_bytes": 1.5}, TypeError, "memory_bytes"),
        ({"seconds": 0}, ValueError, "seconds must be more than 0, got 0"),
        ({"seconds": -1}, ValueError, "seconds"),
        ({"seconds": "long"}, TypeError, "seconds"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], kind: type[Exception], what: str) -> None:
    loader = mapped()
    with pytest.raises(kind, match=what):
        loader.autotune(**arguments)
    assert loader._tuner is None


# -- the budget --------------------------------------------------------------------------------------------------------


def room_of(inner: Room, nbytes: int | None, *, size: int | None = None) -> TunedRoom:
    mean = MeanBytes()
    if size is not None:
        mean.saw(b"x" * (size - 33))
    return TunedRoom(inner, None if nbytes is None else BytesBudget(nbytes), mean)


def test_a_room_is_a_multiple_of_what_it_was_or_its_floor() -> None:
    room = room_of(Room(10), None)
    assert room.now(0) == 10
    room.floor, room.factor = 14, 3
    assert room.now(0) == 42


def test_a_budget_is_kept_before_and_after_samples_have_been_weighed() -> None:
    room = room_of(Room(100), 1000)
    assert room.now(0) == UNKNOWN
    entry = Entry(b"x" * 67, None, 0)
    room.gave([entry])
    assert (room.now(0), room.held_back) == (10, True)
    assert room_of(Room(100), 1000, size=5000).now(0) == 1, "one in any case"


def test_a_budget_is_shared_by_the_rooms_that_there_are() -> None:
    budget, rooms = BytesBudget(1200), []
    for _ in range(3):
        mean = MeanBytes()
        mean.saw(b"x" * 67)
        rooms.append(TunedRoom(Room(100), budget, mean))
    assert [room.now(0) for room in rooms] == [4, 4, 4]
    rooms[0].close()
    assert [room.now(0) for room in rooms[1:]] == [6, 6]


def test_growth_is_within_the_budget() -> None:
    room = room_of(GrowingRoom(10, 10), 2000, size=100)
    assert room.growth is not None
    assert room.growth.most(10, []) == 20
    assert room_of(GrowingRoom(10, 10), None).growth is not None


@on_both_faces
def test_finished_samples_take_no_more_than_the_budget(face: Face) -> None:
    """A consumer that stands still: what was begun and not handed out is within it, but for the batch that fills."""
    begun = 0
    lock = threading.Lock()
    size, batch, budget = 10_000, 4, 400_000

    def make(key: int) -> torch.Tensor:
        nonlocal begun
        with lock:
            begun += 1
        return torch.zeros(size, dtype=torch.uint8)

    loader = Pipeline(ENDLESS).map(make, concurrency=64).batch(batch).prefetch(50)
    with scripted(wild):
        quiet(loader, 600.0, memory_bytes=budget)
        with Steps(loader, face) as steps:
            for handed_out in range(1, 60):
                steps.next()
                assert (begun - handed_out * batch) * size <= budget + (2 * batch - 1) * size
            assert loader.stats().stages[1].room <= budget // 2 // size
            if face == "for":
                loader.close()
            else:
                steps.do(loader.aclose)


# -- how it ends -------------------------------------------------------------------------------------------------------


@on_both_faces
@pytest.mark.parametrize(
    "make",
    [
        lambda: Pipeline(ENDLESS).map(fetch).map(decode).batch(4),
        lambda: Pipeline(range(40)).map(fetch).repeat().map(decode).batch(4),
        lambda: DataLoader(Squares(), 4, num_workers=2),
    ],
    ids=["pipeline", "repeat", "short epochs"],
)
def test_a_search_comes_to_its_end_and_tells_once(make: Callable[[], Any], face: Face) -> None:
    told: list[str] = []
    loader = make()
    tuning = loader.autotune(seconds=QUICK, tell=told.append)
    assert not tuning.finished
    assert "not finished" in str(tuning)
    while not tuning.finished:
        collect(loader, face, limit=400)
        loader.close()
    wait_until(lambda: bool(told))
    assert told == [str(tuning)]
    assert tuning.rate_before is not None
    assert tuning.rate_after is not None
    assert tuning.limit
    assert tuning.as_dict()["finished"] is True
    collect(loader, face, limit=3)
    loader.close()
    assert len(told) == 1


@on_both_faces
@pytest.mark.parametrize("limit", [None, 3], ids=["whole", "left early"])
def test_epochs_that_are_over_before_it_looks_once_are_measured_as_a_whole(face: Face, limit: int | None) -> None:
    with scripted(to(6, 2)) as seen, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuner_module.Tuner, "_again", lambda *_: None)
        told: list[str] = []
        loader = DataLoader(Squares(), 4, num_workers=2)
        tuning = loader.autotune(seconds=QUICK, tell=told.append)
        taken = []
        while not tuning.finished:
            taken.append(len(collect(loader, face, limit=limit)))
            loader.close()
        assert [one.argument for one in tuning.settings] == ["num_workers", "prefetch_factor"]
        assert told == [str(tuning)]
        assert len(seen) == 2
        counted = sum(count for one in seen for count, _ in one.blocks)
        if limit is None:
            assert abs(counted - sum(taken[1:])) <= taken[0], "those of the last epoch may be given after its end"
        for one in seen:
            assert one.rate > 0.0
            assert one.seconds > 0.0


@on_both_faces
def test_a_search_over_epochs_that_are_left_early_ends(face: Face, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under `async for` each begins before the one before it has ended; the timer does not help."""
    monkeypatch.setattr(tuner_module.Tuner, "_again", lambda *_: None)
    loader = Pipeline(range(400)).map(waits, concurrency=2).batch(2)
    tuning = quiet(loader)

    async def ours() -> None:
        for _ in range(1000):
            async for _ in loader:
                break
            if tuning.finished:
                break

    if face == "async for":
        run(ours)
    else:
        for _ in range(1000):
            next(iter(loader))
            if tuning.finished:
                break
    assert tuning.finished
    loader.close()


@on_both_faces
def test_a_wait_for_the_first_batch_is_one(face: Face) -> None:
    """A consumer that does nothing else, in epochs of one batch, is not the limit."""
    with scripted(to(2, 1)) as seen:
        loader = DataLoader(Slow(), 4, num_workers=2)
        tuning = quiet(loader, 0.1)
        while not tuning.finished:
            collect(loader, face)
    for one in seen:
        assert one.waited > 0.5
    assert "your loop is the limit" not in tuning.limit


@on_both_faces
def test_a_consumer_that_is_slow_ends_it_after_one_point(face: Face) -> None:
    """It does not wait for batches, so nothing is to be gained."""
    loader = Pipeline(ENDLESS).map(fetch).batch(4)
    tuning = quiet(loader, 3.0)
    pause = threading.Event()
    with Steps(loader, face) as steps:
        while not tuning.finished:
            steps.next()
            if face == "for":
                pause.wait(0.005)
            else:
                steps.do(lambda: asyncio.sleep(0.005))
        if face == "for":
            loader.close()
        else:
            steps.do(loader.aclose)
    assert tuning.tuner.found is not None
    assert tuning.tuner.found.why == "consumer"
    assert "your loop is the limit" in str(tuning)
    assert tuning.settings == ()


@on_both_faces
def test_stop_puts_back_what_was_written(face: Face) -> None:
    loader = Pipeline(ENDLESS).map(fetch, concurrency=4).batch(4)
    with scripted(wild), Steps(loader, face) as steps:
        tuning = quiet(loader, 600.0)
        while not tuning.tuner.stages:
            steps.next()
        (stage,) = tuning.tuner.stages
        tuning.stop()
        assert (stage.value, tuning.finished, tuning.settings) == (4, True, ())
        assert "stopped" in str(tuning)
        steps.next()
        assert loader.stats().stages[1].concurrency == 4
        if face == "for":
            loader.close()
        else:
            steps.do(loader.aclose)


def test_another_search_stops_the_one_before() -> None:
    loader = mapped()
    first, second = quiet(loader), quiet(loader)
    assert first.finished
    assert not second.finished
    assert loader._tuner is second.tuner


@on_both_faces
def test_a_teller_that_fails_is_a_warning(face: Face) -> None:
    def tell(text: str) -> None:
        raise OSError("closed")

    loader = Pipeline(ENDLESS).map(fetch).batch(4)
    tuning = loader.autotune(seconds=QUICK, tell=tell)
    with pytest.warns(UserWarning, match="raised OSError"):
        until_finished(loader, tuning, face)
    assert tuning.rate_after is not None


@on_both_faces
def test_a_search_goes_on_after_a_pause(face: Face) -> None:
    """In a pause nothing is measured, and no time is spent."""
    loader = Pipeline(ENDLESS).map(fetch).batch(4)
    tuning = quiet(loader, 0.5)
    looks, look = [0], tuning.tuner._look

    def counted(run: Any) -> bool:
        looks[0] += 1
        return look(run)

    tuning.tuner._look = counted  # type: ignore[method-assign]
    with Steps(loader, face) as steps:
        steps.next()
        with loader.paused():
            before, later = tuning.tuner.spent, looks[0] + 5
            asked = steps.ask()
            comes_to(steps, face, lambda: looks[0] >= later)
            assert tuning.tuner.spent - before <= tuning.tuner._block_seconds
        asked()
        while not tuning.finished:
            steps.next()
        if face == "for":
            loader.close()
        else:
            steps.do(loader.aclose)


@on_both_faces
def test_calls_that_are_tried_again_are_seen(face: Face) -> None:
    tries: dict[int, int] = {}

    async def refused_once(key: int) -> int:
        tries[key] = tries.get(key, 0) + 1
        if tries[key] == 1:
            raise OSError("429")
        return key

    retry = Retry(3, on=OSError, wait_initial=0, jitter=0)
    loader = Pipeline(ENDLESS).map(refused_once, concurrency=4, retry=retry).batch(4)
    with scripted(to(8, 1, 1)) as seen:
        tuning = quiet(loader)
        until_finished(loader, tuning, face)
    assert max(measured.failed for measured in seen) > 0.3, "every other call, where there was time for several"
    assert "tried again" in str(tuning)


def test_a_loader_that_is_tuned_can_be_pickled() -> None:
    """A copy is not tuned."""
    loader = Pipeline(range(8)).map(fetch).batch(4)
    quiet(loader)
    copy = pickle.loads(pickle.dumps(loader))
    assert copy._tuner is None
    assert len(collect(copy, "for")) == 2
