"""`drop_if(requeue=True)`: what is refused is begun again, keeps its number and its slot, and is never lost."""

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aioloader import Pipeline
from aioloader.testing import Gate, assert_resumes_exactly
from tests._support import Face, Steps, collect, on_both_faces, run, turns, until

on_orders = pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "as completed"])


def same(key: int) -> int:
    return key


class Rollouts:
    """Refuses each sample as often as its key says."""

    def __init__(self, times: Callable[[int], int] = lambda key: key % 4) -> None:
        self._times = times
        self._lock = threading.Lock()
        self.attempts: Counter[int] = Counter()
        self.loop: asyncio.AbstractEventLoop | None = None

    async def rollout(self, key: int) -> int:
        self.loop = asyncio.get_running_loop()
        await asyncio.sleep(0)
        return self.in_a_thread(key)

    def in_a_thread(self, key: int) -> int:
        with self._lock:
            self.attempts[key] += 1
        return key

    def stale(self, key: int) -> bool:
        return self.attempts[key] <= self._times(key)

    def round_by_round(self, key: int) -> bool:
        """The same where each sample comes once in each epoch."""
        return bool(self.attempts[key] % (self._times(key) + 1))


@on_both_faces
@on_orders
@pytest.mark.parametrize("place", ["on the loop", "in threads"])
def test_samples_come_when_they_pass(face: Face, ordered: bool, place: str) -> None:
    """Each once, in order if there is one, and as often begun as it took; the batch knows how often."""
    rollouts = Rollouts()
    fn: Any = rollouts.rollout if place == "on the loop" else rollouts.in_a_thread
    loader = Pipeline(range(41)).map(fn, ordered=ordered).drop_if(rollouts.stale, requeue=True)
    batches = collect(loader.batch(4, collate_fn=list).with_info(), face)
    found = [key for batch, _ in batches for key in batch]
    assert (found if ordered else sorted(found)) == [*range(41)]
    assert rollouts.attempts == {key: key % 4 + 1 for key in range(41)}
    for batch, info in batches:
        assert info.attempts == max(key % 4 + 1 for key in batch)
        assert list(info.keys) == batch
    assert len(loader) == 41


def attempts_from(folder: Path, key: int) -> int:
    """One more; counted across processes."""
    path = folder / str(key)
    with path.open("ab", buffering=0) as file:
        file.write(b".")
    return path.stat().st_size


class InProcesses:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, key: int) -> tuple[int, int]:
        return key, attempts_from(self.folder, key)


@pytest.mark.usefixtures("fork_server")
@on_both_faces
@on_orders
def test_worker_processes_begin_them_again(face: Face, ordered: bool, tmp_path: Path) -> None:
    """From what came into the map, not from what it made."""
    samples = Pipeline(range(20)).map(InProcesses(tmp_path), executor="process", concurrency=2, ordered=ordered)
    loader = samples.drop_if(lambda sample: sample[1] <= sample[0] % 3, requeue=True)
    with loader:
        assert sorted(collect(loader, face)) == [(key, key % 3 + 1) for key in range(20)]


class Squares:
    """A dataset."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> int:
        return index


SHAPES: dict[str, Callable[[Rollouts, bool], Pipeline]] = {
    "a map": lambda r, ordered: Pipeline(range(20)).map(r.rollout, ordered=ordered),
    "several maps": lambda r, ordered: (
        Pipeline(range(20)).map(r.rollout, ordered=ordered).map(same).map(same, ordered=ordered)
    ),
    "a filter before": lambda r, ordered: (
        Pipeline(range(30)).filter(lambda key: key < 20).map(r.rollout, ordered=ordered)
    ),
    "a filter between": lambda r, ordered: (
        Pipeline(range(30)).map(r.rollout, ordered=ordered).filter(lambda key: key < 20).map(same)
    ),
    "a filter after": lambda r, ordered: (
        Pipeline(range(30)).map(r.rollout, ordered=ordered).filter(lambda key: key < 20)
    ),
    "a dataset": lambda r, ordered: Pipeline(Squares()).shuffle().map(r.rollout, ordered=ordered),
    "a stream": lambda r, ordered: Pipeline(lambda: iter(range(20))).map(r.rollout, ordered=ordered),
    "one at a time": lambda r, ordered: Pipeline(range(20)).map(r.rollout, ordered=ordered, concurrency=1, ahead=1),
    "little overtaking": lambda r, ordered: Pipeline(range(20)).map(
        r.rollout, ordered=ordered, max_overtaken=None if ordered else 1
    ),
    "a cache before": lambda r, ordered: (
        Pipeline(range(20)).map(same).cache(memory_bytes=1 << 20).map(r.rollout, ordered=ordered)
    ),
}


@on_both_faces
@on_orders
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [None, 0, 2])
def test_whatever_is_around_it(face: Face, ordered: bool, shape: str, n: int | None) -> None:
    """Nothing lost, nothing twice, and nobody waits for ever."""
    if shape == "a cache before" and n is not None:
        pytest.skip("max_staleness is refused there")
    rollouts = Rollouts()
    loader = SHAPES[shape](rollouts, ordered).drop_if(rollouts.stale, requeue=True).batch(3, collate_fn=list)
    found = [key for batch in collect(loader if n is None else loader.max_staleness(n), face) for key in batch]
    if ordered and shape != "a dataset":
        assert found == [*range(20)]
    assert sorted(found) == [*range(20)]


@on_orders
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "a cache before"])
@pytest.mark.filterwarnings("ignore::aioloader.errors.ReplayWarning")
def test_every_state_resumes_exactly(ordered: bool, shape: str) -> None:
    """Also while samples are being made once more: they are still to come."""

    def make() -> Pipeline:
        rollouts = Rollouts()
        loader = SHAPES[shape](rollouts, ordered).drop_if(rollouts.round_by_round, requeue=True)
        assert loader.state_dict()["guarantee"] == ("replayed" if shape == "a stream" else "exact")
        return loader.batch(3, collate_fn=list)

    assert_resumes_exactly(make, samples=None if ordered else list, limit=6)


@on_both_faces
@on_orders
def test_errors_stand_at_their_place(face: Face, ordered: bool) -> None:
    """Of a map in its first or a later attempt, and of the predicate; the others come."""
    rollouts = Rollouts(lambda _: 1)

    async def rollout(key: int) -> int:
        await rollouts.rollout(key)
        if key % 8 == 3 or (key % 8 == 5 and rollouts.attempts[key] == 2):
            raise ValueError(key)
        return key

    def stale(key: int) -> bool:
        if key % 8 == 6 and rollouts.attempts[key] == 2:
            raise ValueError(key)
        return rollouts.stale(key)

    loader = Pipeline(range(40)).map(rollout, ordered=ordered).drop_if(stale, requeue=True)
    with Steps(loader, face) as steps:
        found = [(type(one), one.args[0] if isinstance(one, ValueError) else one) for one in steps.outcomes()]
    expected = [(ValueError if key % 8 in (3, 5, 6) else int, key) for key in range(40)]
    assert (found if ordered else sorted(found, key=lambda one: one[1])) == expected


@on_both_faces
@on_orders
def test_a_failed_source_waits_for_those_that_are_sent_back(face: Face, ordered: bool) -> None:
    """It ends the epoch, after all that came before it."""

    def source() -> Iterator[int]:
        yield from range(10)
        raise OSError("gone")

    rollouts = Rollouts(lambda key: 3 if key == 9 else 0)
    loader = Pipeline(source).map(rollouts.rollout, ordered=ordered).drop_if(rollouts.stale, requeue=True)
    with Steps(loader, face) as steps:
        *found, error = steps.outcomes()
    assert sorted(found) == [*range(10)]
    assert isinstance(error, OSError)


@on_both_faces
@on_orders
def test_filters_may_refuse_them_later(face: Face, ordered: bool) -> None:
    """A sample that is begun again may be left out, and then its place is free."""
    rollouts = Rollouts(lambda _: 2)
    samples = Pipeline(range(30)).map(rollouts.rollout, ordered=ordered)
    kept = samples.filter(lambda key: key % 3 or rollouts.attempts[key] < 2)
    loader = kept.drop_if(rollouts.stale, requeue=True).batch(4, collate_fn=list).max_staleness(1)
    assert sorted(key for batch in collect(loader, face) for key in batch) == [key for key in range(30) if key % 3]


@on_orders
def test_they_come_after_those_under_way_and_take_no_more_room(ordered: bool) -> None:
    """With all eight places lent or under way nothing else begins, however often they are sent back."""

    async def main() -> None:
        gate = Gate()
        attempts: Counter[int] = Counter()

        async def rollout(key: int) -> int:
            attempts[key] += 1
            await gate.passing((key, attempts[key]))
            return key

        samples = Pipeline(range(100)).map(rollout, concurrency=2, ahead=8, ordered=ordered)
        loader = samples.drop_if(lambda key: attempts[key] < 4, requeue=True).batch(4, collate_fn=list)
        ask = asyncio.ensure_future(anext(batches := aiter(loader)))
        order: list[Any] = []
        for _ in (1, 2, 3):
            for _ in range(8):
                await gate.until_arrived(len(order) + 1)
                await turns(100)
                assert set(attempts) <= {*range(8)}
                order.append(gate.arrived[len(order)])
                gate.open(order[-1])
                await turns(20)
                await asyncio.sleep(0)
                assert gate.standing <= 2
        assert set(attempts) == {*range(8)}
        stages = loader.stats().stages
        assert next(stage.room for stage in stages if stage.name == "map(rollout)") == 8
        gate.open_all()
        assert len(await ask) == 4
        found = [key async for batch in batches for key in batch]
        assert len(found) == 96
        assert order[:2] == [(0, 1), (1, 1)]

    run(main)


@on_both_faces
@on_orders
def test_closing_while_all_are_sent_back_for_ever(face: Face, ordered: bool) -> None:
    """The predicate alone is to blame that it is endless; it ends when it is closed."""
    rollouts = Rollouts(lambda key: 1 << 30 if key > 5 else 0)
    loader = (Pipeline(range(100)).map(rollouts.rollout, ordered=ordered).drop_if(rollouts.stale, requeue=True)).batch(
        2, collate_fn=list
    )
    with Steps(loader, face) as steps:
        found = steps.rest(3)
        if face == "async for":
            steps.do(lambda: until(lambda: rollouts.attempts[7] > 3 or rollouts.attempts[6] > 3))
            steps.do(loader.aclose)
    loader.close()
    assert sorted(key for batch in found for key in batch) == [*range(6)]


@on_both_faces
@on_orders
def test_batches_are_made_again_from_what_came_into_the_map(face: Face, ordered: bool) -> None:
    """After `batch`: a batch is sent back as a whole."""
    rollouts = Rollouts(lambda _: 2)

    def train(batch: list[int]) -> list[int]:
        rollouts.in_a_thread(batch[0])
        return batch

    batches = Pipeline(range(10)).batch(3, collate_fn=list).map(train, ordered=ordered)
    loader = batches.drop_if(lambda batch: rollouts.stale(batch[0]), requeue=True)
    assert sorted(collect(loader, face)) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    assert rollouts.attempts == {0: 3, 3: 3, 6: 3, 9: 3}


@pytest.mark.parametrize("seed", range(30))
def test_any_order_of_any_number_of_attempts(seed: int) -> None:
    """With two windows of filters, limits of all kinds, and random lengths."""
    draw = random.Random(seed)
    rollouts = Rollouts(lambda key: random.Random(f"{seed} {key}").choice((0, 0, 1, 5)))

    async def rollout(key: int) -> int:
        for _ in range(draw.randrange(6)):
            await asyncio.sleep(0)
        return await rollouts.rollout(key)

    ordered = draw.random() < 0.5
    width = draw.choice((1, 3, 20))
    samples = Pipeline(range(50)).map(
        rollout,
        concurrency=width,
        ahead=draw.choice((None, width, width + 3)),
        ordered=ordered,
        max_overtaken=None if ordered else draw.choice((None, 0, 2)),
    )
    loader: Any = samples.drop_if(rollouts.stale, requeue=True).batch(draw.choice((1, 3, 8)), collate_fn=list)
    loader = loader if draw.random() < 0.3 else loader.max_staleness(draw.choice((0, 1, 3)))
    found = [key for batch in collect(loader, draw.choice(("for", "async for"))) for key in batch]
    assert (found if ordered else sorted(found)) == [*range(50)]


def test_it_is_refused_where_nothing_could_be_made_anew(tmp_path: Path) -> None:
    """With the rule, what was found, and the way out."""
    keys = range(4)

    def again(pipeline: Pipeline) -> Pipeline:
        return pipeline.drop_if(lambda _: False, requeue=True)

    rule = r"must come right after map\(\)"
    for nothing, found in (
        (Pipeline(keys), "the source is"),
        (Pipeline(keys).filter(bool), r"filter\(bool\) is"),
        (Pipeline(keys).map(same).shuffle(3), r"shuffle\(3\) is"),
        (Pipeline(keys).map(same).batch(2), r"batch\(2\) is"),
        (Pipeline(keys).map(same).cache(memory_bytes=9), "cache.* is"),
        (Pipeline(keys).map(same).in_process(), r"in_process\(\) is"),
    ):
        with pytest.raises(ValueError, match=f"{rule}.*{found} before it; put it after the map"):
            again(nothing)
    with pytest.raises(ValueError, match="leave record_order and replay_order out"):
        again(Pipeline(keys).map(same, ordered=False, record_order=tmp_path))
    with pytest.raises(TypeError):
        Pipeline(keys).map(same).drop_if(3, requeue=True)  # type: ignore[arg-type]
