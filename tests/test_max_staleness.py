"""`max_staleness`: the consumer decides when samples begin, and always gets its batch."""

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import Dataset

from aioloader import Pipeline
from aioloader.testing import Gate, assert_resumes_exactly
from tests._support import Face, Started, Steps, collect, on_both_faces, run, turns, until

pytestmark = pytest.mark.usefixtures("fork_server")

on_policies = pytest.mark.parametrize("n", [0, 1, 3])


class Begun:
    """Counts the samples that have begun, in whatever thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.keys: list[int] = []
        self.loop: asyncio.AbstractEventLoop | None = None

    def __len__(self) -> int:
        return len(self.keys)

    async def rollout(self, key: int) -> int:
        self.loop = asyncio.get_running_loop()
        return self.in_a_thread(key)

    def in_a_thread(self, key: int) -> int:
        with self._lock:
            self.keys.append(key)
        return key


def same(key: int) -> int:
    return key


def odd(key: int) -> bool:
    return key % 2 == 1


def third(key: int) -> bool:
    return key % 3 == 0


def at_least(begun: Begun, count: int, face: Face, steps: Steps) -> None:
    """Wait until so many have begun, then let the loader do what else it can: no more have."""
    if face == "for":
        run(lambda: until(lambda: len(begun) >= count))
    else:
        steps.do(lambda: until(lambda: len(begun) >= count))
    for _ in range(3):
        steps.settle(begun.loop)
    assert len(begun) == count


SHAPES: dict[str, Callable[[Callable[[int], Any]], Pipeline]] = {
    "a map": lambda fn: Pipeline(range(64)).map(fn),
    "few at a time": lambda fn: Pipeline(range(64)).map(fn, concurrency=1, ahead=32),
    "several maps": lambda fn: Pipeline(range(64)).map(fn).map(same).map(same, concurrency=40, ahead=40),
    "a stream": lambda fn: Pipeline(lambda: iter(range(64))).map(fn),
    "as completed": lambda fn: Pipeline(range(64)).map(fn, ordered=False),
    "sent back": lambda fn: Pipeline(range(64)).map(fn).drop_if(lambda _: False, requeue=True),
    "several sources": lambda fn: Pipeline.interleave(range(0, 64, 2), range(1, 64, 2)).map(fn),
    "in rounds": lambda fn: Pipeline(range(16)).map(fn).repeat(4),
}


@on_both_faces
@on_policies
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prefetch", [0, 4])
def test_as_many_begin_as_may_and_no_more(face: Face, n: int, shape: str, prefetch: int) -> None:
    """After each batch, those of the `n` batches that follow have begun, and none but these."""
    begun = Begun()
    loader = SHAPES[shape](begun.rollout).batch(4, collate_fn=list).prefetch(prefetch).max_staleness(n)
    with Steps(loader, face) as steps:
        seen = []
        for count in range(1, 12):
            seen += steps.next()
            if prefetch or shape != "in rounds":  # a round begins when the one before it has been taken
                at_least(begun, 4 * (count + n), face, steps)
        seen += itertools.chain(*steps.rest())
    assert sorted(seen) == (sorted([*range(16)] * 4) if shape == "in rounds" else [*range(64)])
    assert len(begun) == 64


@on_both_faces
@on_policies
def test_batches_of_batches_count_all_their_samples(face: Face, n: int) -> None:
    """`batch(4).batch(2)`: a batch is eight samples."""
    begun = Begun()
    loader = Pipeline(range(80)).map(begun.rollout).batch(4, collate_fn=list).batch(2, collate_fn=list).max_staleness(n)
    with Steps(loader, face) as steps:
        for count in range(1, 6):
            steps.next()
            at_least(begun, 8 * (count + n), face, steps)


@on_both_faces
@on_policies
@pytest.mark.parametrize("how", ["filter", "drop_if", "after the batch"])
def test_what_is_left_out_makes_room_at_once(face: Face, n: int, how: str) -> None:
    """Every other sample goes: twice as many begin."""
    begun = Begun()
    samples = Pipeline(range(200)).map(begun.rollout)
    if how == "filter":
        batches = samples.filter(odd).batch(4, collate_fn=list)
    elif how == "drop_if":
        batches = samples.drop_if(lambda key: not odd(key)).batch(4, collate_fn=list)
    else:
        batches = samples.batch(4, collate_fn=list).filter(lambda batch: batch[0] % 8 == 4)
    assert collect(batches.max_staleness(n), face) == collect(batches, "for")
    assert begun.keys == [*range(200)] * 2


@on_both_faces
@on_policies
def test_failed_samples_and_sources_make_room(face: Face, n: int) -> None:
    """An error is given in its place, and the next batch comes, to the end of a source that fails."""

    def source() -> Iterator[int]:
        yield from range(30)
        raise OSError("gone")

    def decode(key: int) -> int:
        if key % 5 == 0:
            raise ValueError(key)
        return key

    loader = Pipeline(source).map(decode).batch(2, collate_fn=list).max_staleness(n)
    with Steps(loader, face) as steps:
        found = steps.outcomes()
    expected = [ValueError if 0 in (a % 5, b % 5) else list for a, b in zip(*[iter(range(30))] * 2, strict=True)]
    assert [type(outcome) for outcome in found] == [*expected, OSError]


@on_both_faces
@on_policies
@pytest.mark.parametrize("drop_last", [False, True])
def test_one_source_of_several_fails(face: Face, n: int, drop_last: bool) -> None:
    """The others go on, and nobody waits for ever."""

    def broken() -> Iterator[int]:
        yield 100
        raise OSError("gone")

    loader = (
        Pipeline.interleave(broken, lambda: iter(range(11)))
        .map(same)
        .batch(4, drop_last=drop_last, collate_fn=list)
        .max_staleness(n)
    )
    with Steps(loader, face) as steps:
        found = steps.outcomes()
    assert sum(isinstance(outcome, OSError) for outcome in found) == 1
    assert [key for outcome in found if isinstance(outcome, list) for key in outcome] == [100, *range(11)]


@on_both_faces
@on_policies
def test_leftovers_of_rounds_make_room(face: Face, n: int) -> None:
    """`drop_last` and `take` leave samples over at the end of each round."""
    begun = Begun()
    samples = Pipeline(range(10)).map(begun.rollout)
    dropped = samples.batch(4, drop_last=True, collate_fn=list).repeat(5).max_staleness(n)
    assert collect(dropped, face) == [[0, 1, 2, 3], [4, 5, 6, 7]] * 5
    cut = Pipeline(lambda: iter(range(100))).map(same).take(6).batch(4, collate_fn=list).repeat(5).max_staleness(n)
    assert collect(cut, face) == [[0, 1, 2, 3], [4, 5]] * 5
    endless = samples.batch(3, collate_fn=list).repeat().max_staleness(n)
    assert collect(endless, face, limit=9)[3:] == [[9], [0, 1, 2], [3, 4, 5], [6, 7, 8], [9], [0, 1, 2]]


@on_both_faces
@on_policies
def test_a_batch_that_is_given_early_lets_the_next_one_come(face: Face, n: int) -> None:
    """`max_wait`: a short batch counts as a full one while it is here, and nobody hangs."""
    gate = Gate()
    gate.open(0, 1, 2)

    async def source() -> AsyncIterator[int]:
        for key in range(9):
            await gate.passing(key)
            yield key

    loader = Pipeline(source).map(same).batch(4, collate_fn=list, max_wait=0.0).max_staleness(n)
    with Steps(loader, face) as steps:
        found: list[Any] = []
        while len(found) < 3:
            found += steps.next()
        gate.open_all()
        for batch in steps.rest():
            assert len(batch) <= 4
            found += batch
    assert found == [*range(9)]


class Loads(Dataset[int]):
    """Counts what it loads."""

    def __init__(self) -> None:
        self.begun = Begun()

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> int:
        return self.begun.in_a_thread(index)


class LoadsMany(Loads):
    def __getitems__(self, indices: list[int]) -> list[int]:
        return [self[index] for index in indices]


class LoadsOnTheLoop(Loads):
    async def __getitem__(self, index: int) -> int:  # type: ignore[override]
        return await self.begun.rollout(index)


@on_both_faces
@on_policies
@pytest.mark.parametrize("kind", [Loads, LoadsMany, LoadsOnTheLoop])
@pytest.mark.parametrize("shuffled", [False, True])
def test_datasets_begin_where_they_are_loaded(face: Face, n: int, kind: type[Loads], shuffled: bool) -> None:
    """One by one, as whole batches, and on the loop; nothing is loaded before its time."""
    dataset = kind()
    pipeline = Pipeline(dataset)
    loader = (pipeline.shuffle() if shuffled else pipeline).batch(4, collate_fn=list).max_staleness(n)
    with Steps(loader, face) as steps:
        for count in range(1, 17):
            steps.next()
            assert len(dataset.begun) <= 4 * (count + n)
        assert steps.rest() == []
    assert sorted(dataset.begun.keys) == [*range(64)]


# -- who asks ----------------------------------------------------------------------------------------------------------


def test_several_tasks_ask_at_once() -> None:
    """`asked` is how many batches are waited for."""

    async def main() -> None:
        gate = Gate()

        async def rollout(key: int) -> int:
            await gate.passing(key)
            return key

        batches = aiter(Pipeline(range(40)).map(rollout).batch(4, collate_fn=list).max_staleness(1))
        asks = [asyncio.ensure_future(anext(batches)) for _ in range(3)]
        await gate.until_arrived(16)
        await turns()
        assert len(gate.arrived) == 16
        gate.open(*range(4))
        assert await asks[0] == [0, 1, 2, 3]
        await turns()
        assert len(gate.arrived) == 16
        gate.open_all()
        assert await asyncio.gather(*asks[1:]) == [[4, 5, 6, 7], [8, 9, 10, 11]]
        await turns()
        assert len(gate.arrived) == 16

    run(main)


def test_who_gives_up_has_asked() -> None:
    """What was begun for a cancelled or timed-out call is the next batch, and no more begin for the next call."""

    async def main() -> None:
        gate = Gate()

        async def rollout(key: int) -> int:
            await gate.passing(key)
            return key

        batches = aiter(Pipeline(range(40)).map(rollout).batch(4, collate_fn=list).max_staleness(0))
        for _ in range(5):
            ask = asyncio.ensure_future(anext(batches))
            await gate.until_arrived(4)
            await turns(50)
            ask.cancel()
            await asyncio.wait([ask])
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(batches), 0)
            assert gate.arrived == (0, 1, 2, 3)
        gate.open_all()
        assert [batch async for batch in batches] == [[*range(at, at + 4)] for at in range(0, 40, 4)]

    run(main)


@on_policies
def test_several_threads_ask_at_once(n: int) -> None:
    """Never more than they have asked for, and `n` batches; nothing is lost."""
    lock = threading.Lock()
    asked, handed, begun, broken = 0, 0, 0, 0
    found: list[Any] = []

    def rollout(key: int) -> int:
        nonlocal begun, broken
        with lock:
            begun += 1
            broken += begun - 4 * handed > 4 * (asked - handed + n)
        return key

    loader = Pipeline(range(400)).map(rollout, concurrency=4).batch(4, collate_fn=list).max_staleness(n)
    batches = iter(loader)

    def consume() -> None:
        nonlocal asked, handed
        while True:
            with lock:
                asked += 1
            try:
                batch = next(batches)
            except StopIteration:
                return
            with lock:
                handed += 1
                found.extend(batch)

    for consumer in [Started(consume) for _ in range(4)]:
        consumer.outcome()
    assert sorted(found) == [*range(400)]
    assert not broken


@on_both_faces
@on_policies
def test_two_iterators_count_for_themselves(face: Face, n: int) -> None:
    """What one of them asks for begins nothing for the other one."""
    begun = Begun()
    loader = Pipeline(range(40)).map(begun.rollout).batch(4, collate_fn=list).max_staleness(n)
    with Steps(loader, face) as one:
        one.next()
        at_least(begun, 4 * (1 + n), face, one)
        if face == "for":
            with Steps(loader, face) as other:
                assert other.next() == [0, 1, 2, 3]
                at_least(begun, 8 * (1 + n), face, other)
        assert one.next() == [4, 5, 6, 7]


@on_both_faces
@on_policies
def test_skipped_steps_make_room(face: Face, n: int) -> None:
    """They are made and not handed out."""
    loader = Pipeline(range(40)).map(same).batch(4, collate_fn=list).max_staleness(n)
    loader.skip_steps(1, 4)
    assert collect(loader, face) == [[*range(at, at + 4)] for at in (0, 16, 20, 24, 28, 32, 36)]


@on_both_faces
@on_policies
@pytest.mark.parametrize("batches", [0, 1, 3])
def test_closing_leaves_nothing_behind(face: Face, n: int, batches: int) -> None:
    """After some batches, while samples stand at a gate."""
    gate = Gate()
    gate.open(*range(4 * batches))

    async def rollout(key: int) -> int:
        await gate.passing(key)
        return key

    loader = Pipeline(range(100)).map(rollout).batch(4, collate_fn=list).max_staleness(n)
    steps = Steps(loader, face)
    with steps:
        assert len(steps.rest(batches)) == batches
        if batches and n:
            steps.until_arrived(gate, 4 * (batches + n))
        if face == "async for":
            steps.do(loader.aclose)
    loader.close()


# -- where it runs -----------------------------------------------------------------------------------------------------


class BegunInAFile:
    """Counts in another process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def __len__(self) -> int:
        return self.path.stat().st_size

    async def rollout(self, key: int) -> int:
        return self.in_a_thread(key)

    def in_a_thread(self, key: int) -> int:
        with self.path.open("ab", buffering=0) as file:
            file.write(b".")
        return key


PLACES: dict[str, Callable[[BegunInAFile], Pipeline]] = {
    "workers": lambda begun: (
        Pipeline(range(40)).map(begun.in_a_thread, executor="process", concurrency=2).batch(4, collate_fn=list)
    ),
    "the batch is in there": lambda begun: (
        Pipeline(range(40)).map(begun.rollout).map(same).batch(4, collate_fn=list).in_process()
    ),
    "the batch is here": lambda begun: Pipeline(range(40)).map(begun.rollout).in_process().batch(4, collate_fn=list),
    "the map is here": lambda begun: Pipeline(range(40)).in_process().map(begun.rollout).batch(4, collate_fn=list),
    "batches of batches": lambda begun: (
        Pipeline(range(40)).map(begun.rollout).batch(2, collate_fn=list).in_process().batch(2, collate_fn=sum_of)
    ),
}


def sum_of(batches: list[list[int]]) -> list[int]:
    return [key for batch in batches for key in batch]


@on_both_faces
@pytest.mark.parametrize("n", [0, 2])
@pytest.mark.parametrize("place", PLACES)
def test_processes_begin_what_may_begin(face: Face, n: int, place: str, tmp_path: Path) -> None:
    """As many as may, and no more: told across, however late the word comes."""
    begun = BegunInAFile(tmp_path / "begun")
    with PLACES[place](begun).max_staleness(n) as loader, Steps(loader, face) as steps:
        for count in range(1, 11):
            assert steps.next() == [*range(4 * count - 4, 4 * count)]
            most = min(40, 4 * (count + n))
            wait = lambda most=most: until(lambda: len(begun) >= most)  # noqa: E731
            if face == "for":
                run(wait)
            else:
                steps.do(wait)
            assert len(begun) == most
        assert steps.rest() == []


@on_both_faces
@pytest.mark.parametrize("inside", [False, True])
def test_what_is_left_out_beside_a_process_makes_room(face: Face, inside: bool) -> None:
    """Refused there or here, the next ones may begin there."""
    samples = Pipeline(range(60)).map(same)
    kept = samples.filter(third).in_process() if inside else samples.in_process().filter(third)
    with kept.batch(4, collate_fn=list).max_staleness(0) as loader:
        assert collect(loader, face) == [[*range(at, at + 12, 3)] for at in range(0, 60, 12)]


# -- states and arguments ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["a map", "a stream", "in rounds"])
@pytest.mark.filterwarnings("ignore::aioloader.errors.ReplayWarning")
def test_a_resume_is_exact_and_counts_anew(shape: str) -> None:
    """The state knows nothing of it, so that one with another number fits."""

    def make(n: int | None, concurrency: int) -> Pipeline:
        async def rollout(key: int) -> int:
            return key

        loader = SHAPES[shape](rollout).filter(odd).batch(4, collate_fn=list)
        return loader if n is None else loader.max_staleness(n)

    variants = [{"n": n, "concurrency": 3} for n in (1, None, 0, 3)]
    assert_resumes_exactly(make, variants=variants, limit=8)


def test_it_is_refused_where_it_cannot_hold() -> None:
    """With the rule, what was found, and the way out."""
    keys = range(10)
    with pytest.raises(ValueError, match=r"batches must be at least 0|max_staleness must be at least 0"):
        Pipeline(keys).map(same).batch(2).max_staleness(-1)
    with pytest.raises(TypeError):
        Pipeline(keys).map(same).batch(2).max_staleness(1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must come after map\(\) and batch\(\)"):
        Pipeline(keys).map(same).max_staleness(1)
    with pytest.raises(ValueError, match=r"must come after map\(\) and batch\(\)"):
        Pipeline(keys).batch(2).map(sum).max_staleness(1)
    for nothing in (Pipeline(keys), Pipeline(keys).drop_if(odd), Pipeline([[1], [2]]).flat_map(list)):
        with pytest.raises(ValueError, match="there is none before batch"):
            nothing.batch(2).max_staleness(1)
    with pytest.raises(ValueError, match=r"shuffle\(.*put it before map"):
        Pipeline(lambda: iter(keys)).map(same).shuffle(5).batch(2).max_staleness(1)
    with pytest.raises(ValueError, match=r"put map\(\) and filter\(\) after Pipeline.merge"):
        Pipeline.merge(Pipeline(keys).map(same), keys).batch(2).max_staleness(1)
    with pytest.raises(ValueError, match=r"put .max_staleness\(\) after .merge\(\)"):
        Pipeline.merge(Pipeline(keys).map(same).batch(2).max_staleness(1))
    with pytest.raises(ValueError, match=r"unbatch\(\)"):
        Pipeline(keys).map(same).batch(2).max_staleness(1).unbatch()


@on_both_faces
def test_what_is_dropped_before_the_first_map_has_not_begun(face: Face) -> None:
    """`drop_if` before the maps looks at what is about to begin; what waits between them must not."""
    begun = Begun()
    loader = Pipeline(range(100)).drop_if(odd).shuffle(10).map(begun.rollout).batch(4, collate_fn=list).max_staleness(1)
    with Steps(loader, face) as steps:
        steps.next()
        at_least(begun, 8, face, steps)
        assert sorted(begun.keys + list(itertools.chain(*steps.rest())))[-1] == 98
    assert sorted(begun.keys) == [*range(0, 100, 2)]


@on_both_faces
def test_batches_among_the_sources_are_no_samples_that_begin(face: Face) -> None:
    """They are made as the maps after them ask for them."""
    sources = [Pipeline(range(at, at + 20)).batch(4, collate_fn=list) for at in (0, 20)]
    loader = Pipeline.interleave(*sources).map(sum).batch(2, collate_fn=list).max_staleness(0)
    assert collect(loader, face) == [[6, 86], [22, 102], [38, 118], [54, 134], [70, 150]]
