"""`sample_rng`: numbers that belong to a sample, whoever loads it, wherever, and however many at once."""

import asyncio
import json
import random
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy
import pytest
import torch
from torch.utils.data import Dataset, Subset

import aioloader
from aioloader import DataLoader, Pipeline, ReplayWarning
from tests._support import Face, collect, on_both_faces

pytestmark = pytest.mark.usefixtures("fork_server")


def draw(sample: Any) -> tuple[Any, int]:
    """What augmentation does: numbers that the sample decides."""
    return sample, int(torch.randint(1 << 40, (), generator=aioloader.sample_rng()))


async def draw_on_the_loop(sample: Any) -> tuple[Any, int]:
    return draw(sample)


class Drawing(Dataset[tuple[int, int]]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[int, int]:
        return draw(index)


class DrawingOnTheLoop:
    def __len__(self) -> int:
        return 40

    async def __getitem__(self, index: int) -> tuple[int, int]:
        return draw(index)


class DrawingInGroups(Drawing):
    """Loads several samples by one call; notes how many each call was for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __getitems__(self, indices: list[int]) -> Any:
        self.asked.append(len(indices))
        return [self[index] for index in indices]


class DrawingInGroupsAlone:
    """Has no other way to load a sample."""

    def __len__(self) -> int:
        return 40

    def __getitems__(self, indices: list[int]) -> list[tuple[int, int]]:
        return [draw(index) for index in indices]


class DrawingInGroupsOnTheLoop:
    """The same, async."""

    def __len__(self) -> int:
        return 40

    async def __getitems__(self, indices: list[int]) -> list[tuple[int, int]]:
        return [draw(index) for index in indices]


class DrawingWhereItMay(DrawingInGroups):
    """Lets nobody see that it could not draw."""

    def __getitems__(self, indices: list[int]) -> Any:
        try:
            return super().__getitems__(indices)
        except RuntimeError:
            return [(index, 0) for index in indices]


def nameless(count: int) -> Callable[[], Iterator[list[int]]]:
    """A stream of samples that have no name."""
    return lambda: ([index] for index in range(count))


def pairs(batches: list[Any]) -> dict[int, int]:
    """From index to number, of batches of both."""
    return {int(key): int(number) for keys, numbers in batches for key, number in zip(keys, numbers, strict=True)}


@on_both_faces
@pytest.mark.parametrize("concurrency", [1, 2, 8])
def test_numbers_do_not_depend_on_concurrency_or_place(concurrency: int, face: Face) -> None:
    """Threads, the event loop and a pool of the user's: each sample has the same numbers, and each its own."""
    expected = list(Pipeline(range(50)).with_seed(3).map(draw, concurrency=1))
    assert len({number for _, number in expected}) == 50
    with ThreadPoolExecutor(concurrency) as pool:
        for fn, executor in ((draw, None), (draw_on_the_loop, None), (draw, pool)):
            loader = Pipeline(range(50)).with_seed(3).map(fn, concurrency=concurrency, executor=executor)
            assert collect(loader, face) == expected


@on_both_faces
@pytest.mark.parametrize("workers", [0, 2, 8])
@pytest.mark.parametrize("dataset", [Drawing(), DrawingOnTheLoop()], ids=["sync", "async"])
def test_a_drop_in_gives_each_index_its_numbers(dataset: Any, workers: int, face: Face) -> None:
    """Also one by one in a batch, whatever its size and order."""
    reference = pairs(list(DataLoader(Drawing(), batch_size=7, seed=3)))
    loader = DataLoader(dataset, batch_size=4, shuffle=True, num_workers=workers, seed=3)
    assert pairs(collect(loader, face)) == reference
    assert pairs(collect(loader, face)) != reference  # the next epoch has others
    loader.set_epoch(0)
    assert pairs(collect(loader, face)) == reference


@on_both_faces
def test_worker_processes_give_the_same_numbers(face: Face) -> None:
    """Samples that name themselves, and samples whose names travel with them; in every epoch."""
    for source in (range(30), [torch.tensor(number) for number in range(30)], lambda: iter([0.5] * 30)):
        here = Pipeline(source).with_seed(3).map(draw, concurrency=1).map(draw)
        with Pipeline(source).with_seed(3).map(draw, executor="process", concurrency=2).map(draw) as there:
            for _ in range(2):
                assert collect(there, face) == list(here)
    reference: DataLoader[Any] = DataLoader(Drawing(), batch_size=7, seed=3)
    with DataLoader(Drawing(), batch_size=4, shuffle=True, num_workers=2, worker_type="process", seed=3) as loader:
        for _ in range(2):
            assert pairs(collect(loader, face)) == pairs(list(reference))


IN_GROUPS = {
    "Subset": lambda: Subset(Drawing(), range(40)),
    "both": DrawingInGroups,
    "__getitems__ alone": DrawingInGroupsAlone,
    "swallowed error": DrawingWhereItMay,
}


@on_both_faces
@pytest.mark.parametrize("make", IN_GROUPS.values(), ids=IN_GROUPS)
def test_samples_that_are_loaded_together_have_their_own_numbers(make: Callable[[], Any], face: Face) -> None:
    """Those they would have alone, whatever the size and order of a batch."""
    expected = pairs(list(DataLoader(Drawing(), batch_size=7, seed=3)))
    for workers in (0, 2):
        loader = DataLoader(make(), batch_size=4, shuffle=True, num_workers=workers, seed=3)
        assert pairs(collect(loader, face)) == expected
    for size in (3, 8):
        assert pairs(collect(Pipeline(make()).with_seed(3).batch(size), face)) == expected
        assert pairs(collect(Pipeline(make()).shuffle(seed=1).with_seed(3).batch(size), face)) == expected
    assert dict(collect(Pipeline(make()).with_seed(3), face)) == expected


@on_both_faces
def test_samples_that_are_loaded_together_on_the_loop_have_their_own_numbers(face: Face) -> None:
    expected = pairs(list(DataLoader(Drawing(), batch_size=7, seed=3)))
    for size in (4, 7):
        loader: DataLoader[Any] = DataLoader(DrawingInGroupsOnTheLoop(), batch_size=size, shuffle=True, seed=3)
        assert pairs(collect(loader, face)) == expected


@pytest.mark.parametrize("make", IN_GROUPS.values(), ids=IN_GROUPS)
def test_samples_that_are_loaded_together_elsewhere_have_their_own_numbers(make: Callable[[], Any]) -> None:
    expected = pairs(list(DataLoader(Drawing(), batch_size=7, seed=3)))
    with DataLoader(make(), batch_size=4, shuffle=True, num_workers=1, worker_type="process", seed=3) as there:
        assert pairs(list(there)) == expected
    with Pipeline(make()).with_seed(3).batch(3).in_process() as apart:
        assert pairs(list(apart)) == expected


def test_samples_are_loaded_one_by_one_only_where_that_is_asked_for() -> None:
    """And it is found out once in an epoch, not with each batch."""
    asking = DrawingInGroups()
    list(DataLoader(asking, batch_size=20, seed=3))
    assert asking.asked == [20] + [1] * 40

    class Silent(DrawingInGroups):
        def __getitem__(self, index: int) -> tuple[int, int]:
            return index, 0

    silent = Silent()
    list(DataLoader(silent, batch_size=20, seed=3))
    list(Pipeline(silent).batch(20))
    assert silent.asked == [20] * 4


def test_samples_that_are_only_had_together_are_refused_numbers() -> None:
    class Columns(DrawingInGroups):
        def __getitems__(self, indices: list[int]) -> Any:
            return {"number": [draw(index) for index in indices]}

    with pytest.raises(TypeError, match=r"must return a list of one sample then, got \{'number'"):
        list(DataLoader(Columns(), batch_size=4, collate_fn=lambda columns: columns, seed=3))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_samples_loaded_together_is_that_of_the_sample(workers: int) -> None:
    """One by one it has a note that says which; and where nobody asked for numbers, it stays as it is."""

    class Broken(DrawingInGroups):
        def __getitem__(self, index: int) -> tuple[int, int]:
            if index == 2:
                raise ValueError("no 2")
            return draw(index)

    with pytest.raises(ValueError, match="no 2") as caught:
        list(DataLoader(Broken(), batch_size=4, num_workers=workers, seed=3))
    assert "aioloader: dataset index 2, sample 2 of its batch" in caught.value.__notes__


def test_numbers_do_not_depend_on_the_number_of_ranks() -> None:
    whole = dict(Pipeline(range(30)).with_seed(1).map(draw))
    for world_size in (2, 3):
        parts = [Pipeline(range(30)).with_seed(1).map(draw).shard(rank, world_size) for rank in range(world_size)]
        assert {key: number for part in parts for key, number in part} == whole


def test_another_seed_epoch_or_stage_gives_other_numbers() -> None:
    base = list(Pipeline(range(5)).with_seed(1).map(draw))
    assert list(Pipeline(range(5)).with_seed(2).map(draw)) != base
    loader = Pipeline(range(5)).with_seed(1).map(draw)
    assert list(loader) == base
    assert list(loader) != base
    (first, number), again = next(iter(Pipeline([0]).with_seed(1).map(draw).map(draw)))
    assert (first, number) == base[0]
    assert again != number


def test_without_a_seed_a_loader_keeps_one_of_its_own() -> None:
    loader = Pipeline(range(5)).map(draw)
    first = list(loader)
    loader.set_epoch(0)
    assert list(loader) == first
    assert list(Pipeline(range(5)).map(draw)) != first


def test_asking_again_goes_on_and_all_three_kinds_are_there() -> None:
    def look(sample: int) -> list[float]:
        rng = aioloader.sample_rng()
        assert rng is aioloader.sample_rng()
        return [
            float(torch.rand((), generator=rng)),
            float(torch.rand((), generator=rng)),
            float(rng.numpy().random()),
            float(aioloader.sample_rng().numpy().random()),
            rng.random().random(),
            rng.random().random(),
        ]

    (numbers,) = Pipeline([0]).with_seed(0).map(look)
    assert len(set(numbers)) == 6
    assert list(Pipeline([0]).with_seed(0).map(look)) == [numbers]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Pipeline(lambda: iter(range(3, 9))).map(draw),
        lambda: Pipeline(["a", "b"]).flat_map(lambda sample: [sample] * 3).map(draw),
        lambda: Pipeline([[1] * 3, [2] * 3]).unbatch().map(draw),
        lambda: Pipeline(torch.zeros(6)).batch(2).unbatch().map(draw),
        lambda: Pipeline(range(3)).repeat(2).map(draw),
        lambda: Pipeline(range(3)).map(draw).repeat(2),
        lambda: Pipeline.interleave(*[Pipeline(range(1)).map(draw).repeat(3) for _ in range(2)]),
        lambda: Pipeline.interleave(*[Pipeline(range(1)).map(draw).repeat(1) for _ in range(3)]).repeat(2),
        lambda: Pipeline.interleave(*[Pipeline(range(1)).map(draw).repeat(1).repeat(3) for _ in range(2)]),
        lambda: Pipeline.mix([range(3), range(3)], [1, 1]).map(draw),
        lambda: Pipeline.zip(range(6), range(6)).map(draw),
        lambda: Pipeline(range(12)).filter(lambda sample: sample % 2 == 0).map(draw),
        lambda: Pipeline(nameless(6)).map(draw),
        lambda: Pipeline(nameless(6)).shuffle(3).map(draw),
        lambda: Pipeline.mix([nameless(3), nameless(3)], [1, 1]).map(draw),
        lambda: Pipeline.interleave(nameless(3), nameless(3)).batch(2, collate_fn=list).unbatch().map(draw),
        lambda: Pipeline.zip(nameless(6), nameless(6)).map(draw),
        lambda: Pipeline(nameless(3)).repeat(2).map(draw),
        lambda: Pipeline(nameless(3)).flat_map(lambda sample: [sample] * 2).map(draw),
        lambda: Pipeline(nameless(12)).batch(2, collate_fn=list).map(draw),
        lambda: Pipeline(nameless(6)).batch(2, collate_fn=list).repeat(2).map(draw),
        lambda: Pipeline.interleave(*[Pipeline(range(6)).batch(2) for _ in range(2)]).map(draw),
        lambda: Pipeline(nameless(6)).filter(lambda _: True).batch(2, collate_fn=list).unbatch().map(draw),
        lambda: Pipeline(range(4)).batch(2, collate_fn=list).map(lambda pair: [*pair, 9]).unbatch().map(draw),
        lambda: Pipeline(range(6)).batch(2, collate_fn=list).batch(2, collate_fn=list).unbatch().unbatch().map(draw),
    ],
    ids=[
        "stream", "flat_map", "unbatch", "rows", "repeat", "inside repeat", "repeats side by side",
        "repeats side by side in a repeat", "repeats in repeats side by side", "mix", "zip", "filter", "nameless",
        "nameless in a shuffle", "nameless in a mix", "nameless in an interleave", "nameless in a zip",
        "nameless in a repeat", "nameless in a flat_map", "batches", "batches in a repeat", "batches in an interleave",
        "out of a batch", "out of a batch that has grown", "out of batches of batches",
    ],
)  # fmt: skip
def test_no_two_samples_share_their_numbers_before_and_after_a_resume(make: Callable[[], Pipeline]) -> None:
    """Also where several come from one, or one comes again, or none has a name."""
    first = [number for _, number in make().with_seed(0)]
    assert len(first) == len(set(first)) == 6
    assert [number for _, number in make().with_seed(0)] == first
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ReplayWarning)
        for done in range(1, 6):
            loader = make().with_seed(0)
            samples = iter(loader)
            for _ in range(done):
                next(samples)
            resumed = make().with_seed(0)
            resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
            samples.close()
            assert [number for _, number in resumed] == first[done:]


def test_stages_have_numbers_of_their_own_in_processes_of_their_own() -> None:
    """Those they would have here, in several repeats and of one pipeline that is there twice."""

    def make(*, apart: bool) -> Pipeline:
        part = Pipeline(range(2)).map(draw).repeat(2)
        part = part.in_process() if apart else part
        return Pipeline.interleave(part, part, Pipeline(range(2)).map(draw).repeat(2)).map(draw).with_seed(0)

    with make(apart=True) as apart:
        for epoch in range(2):
            here = make(apart=False)
            here.set_epoch(epoch)
            samples = collect(apart, "for")
            assert samples == list(here)
            numbers = [number for sample in samples for number in (sample[1], sample[0][1])]
            assert len(set(numbers)) == len(numbers) == 24


@on_both_faces
def test_a_filter_has_numbers_too(face: Face) -> None:
    def keep(sample: int) -> bool:
        return aioloader.sample_rng().random().random() < 0.5

    kept = collect(Pipeline(range(100)).with_seed(0).filter(keep), face)
    assert 20 < len(kept) < 80
    assert collect(Pipeline(range(100)).with_seed(0).filter(keep), face) == kept


@pytest.mark.asyncio
async def test_tasks_of_a_function_share_the_sample_of_their_parent() -> None:
    """A context variable travels into `gather`."""

    async def ask() -> int:
        return int(torch.randint(1 << 40, (), generator=aioloader.sample_rng()))

    async def fan_out(sample: int) -> list[int]:
        return list(await asyncio.gather(ask(), ask()))

    once = [numbers async for numbers in Pipeline(range(4)).with_seed(0).map(fan_out)]
    assert len({number for numbers in once for number in numbers}) == 8
    assert [numbers async for numbers in Pipeline(range(4)).with_seed(0).map(fan_out)] == once


def test_numbers_are_those_of_the_index_however_it_is_spelled() -> None:
    class Sampler:
        def __init__(self, keys: list[Any]) -> None:
            self.keys = keys

        def __iter__(self) -> Iterator[Any]:
            return iter(self.keys)

    plain = list(Pipeline(range(3), sampler=Sampler([0, 1, 2])).with_seed(0).map(draw))
    spelled = Sampler([numpy.int64(0), torch.tensor(1), numpy.int32(2)])
    assert [n for _, n in Pipeline(range(3), sampler=spelled).with_seed(0).map(draw)] == [n for _, n in plain]


def collate_with_numbers(samples: list[Any]) -> Any:
    return aioloader.sample_rng().random().random()


def drained(loader: DataLoader) -> None:
    with loader:
        list(loader)


async def one_by_one() -> AsyncIterator[int]:
    aioloader.sample_rng()
    yield 1


@pytest.mark.parametrize(
    "ask",
    [
        aioloader.sample_rng,
        lambda: list(Pipeline(one_by_one)),
        lambda: list(Pipeline([1]).batch(1, collate_fn=lambda _: aioloader.sample_rng())),
        lambda: list(Pipeline(Subset(Drawing(), [1])).batch(1, collate_fn=collate_with_numbers)),
        lambda: list(DataLoader(Drawing(), batch_size=2, collate_fn=collate_with_numbers)),
        lambda: list(DataLoader(Subset(Drawing(), [1, 2]), batch_size=2, collate_fn=collate_with_numbers)),
        lambda: list(DataLoader(Drawing(), batch_size=2, collate_fn=collate_with_numbers, num_workers=1)),
        lambda: drained(
            DataLoader(Drawing(), batch_size=2, collate_fn=collate_with_numbers, num_workers=1, worker_type="process")
        ),
        lambda: list(Pipeline([1]).flat_map(lambda _: [aioloader.sample_rng()])),
    ],
    ids=[
        "outside",
        "in a source",
        "in collate",
        "in collate behind __getitems__",
        "in collate_fn",
        "in collate_fn behind __getitems__",
        "in collate_fn in a thread",
        "in collate_fn in a process",
        "in flat_map",
    ],
)
def test_where_there_is_no_sample_it_says_so(ask: Callable[[], Any]) -> None:
    with pytest.raises(RuntimeError, match=r"sample_rng\(\) gives the random numbers of a sample, got a call where"):
        ask()


def test_nothing_else_is_drawn_from() -> None:
    """The process's generators are as they were, and a sample that has been handed out is not kept."""
    before = torch.get_rng_state(), random.getstate(), str(numpy.random.get_state())
    list(Pipeline(range(10)).map(draw))
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1], before[2]) == (random.getstate(), str(numpy.random.get_state()))


def test_with_seed_checks_its_argument() -> None:
    with pytest.raises(TypeError, match="seed must be an integer"):
        Pipeline([1]).with_seed(1.5)  # type: ignore[arg-type]
