"""`replay` reads from copies: the epoch under way, those behind it and everybody's generators go on undisturbed."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, DistributedSampler, IterableDataset, RandomSampler, Sampler

from aioloader import DataLoader, Pipeline
from tests._support import Face, Steps, on_both_faces
from tests.test_around_resume import OtherOrderEachEpoch
from tests.test_resume import Stateful

TWELVE: Any = range(12)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


class StatefulSet(Stateful, IterableDataset[int]):
    """As torch's loader wants it."""


class AsyncItems:
    def __len__(self) -> int:
        return 40

    async def __getitem__(self, index: int) -> int:
        await asyncio.sleep(0)
        return index


def replacing(generator: torch.Generator) -> RandomSampler:
    """Draws 32 numbers whenever it needs more."""
    return RandomSampler(range(200), replacement=True, num_samples=200, generator=generator)


LOADERS: dict[str, Callable[[torch.Generator], Any]] = {
    "generator": lambda g: DataLoader(range(40), 2, shuffle=True, generator=g),
    "generator, workers": lambda g: DataLoader(range(40), 2, shuffle=True, generator=g, num_workers=2),
    "generator, async": lambda g: DataLoader(AsyncItems(), 2, shuffle=True, generator=g),
    "draws on the way": lambda g: DataLoader(range(200), 10, sampler=replacing(g), num_workers=2),
    "draws on the way, pipeline": lambda g: Pipeline(range(200), sampler=replacing(g)).batch(10),
    "draws on the way, repeated": lambda g: Pipeline(range(200), sampler=replacing(g)).repeat(2).batch(20),
    "two of them": lambda g: Pipeline.zip(
        Pipeline(range(200), sampler=replacing(g)), Pipeline(range(200), sampler=RandomSampler(range(200)))
    ).batch(10),
    "tells its state": lambda _: Pipeline(Stateful()).batch(30),
    "tells its state, inline": lambda _: DataLoader(StatefulSet(), 30),
    "tells its state, workers": lambda _: DataLoader(StatefulSet(), 30, num_workers=2),
    "another order each epoch": lambda _: Pipeline(OtherOrderEachEpoch(200)).batch(10),
}


@on_both_faces
@pytest.mark.parametrize("name", LOADERS)
def test_a_replay_disturbs_nothing(name: str, face: Face) -> None:
    """It gives the batch, and all that comes behind is as it would have been; the generators too.

    What an object gives first is in none of its states: a copy begins as it does now.
    """
    first = 1 if name == "another order each epoch" else 0

    def epochs(*, replays: bool) -> tuple[list[list[Any]], torch.Tensor, torch.Tensor]:
        torch.manual_seed(7)
        generator = seeded()
        loader = LOADERS[name](generator)
        found: list[list[Any]] = []
        for _ in range(3):
            found.append([])
            with Steps(loader, face) as steps:
                for batch in iter_of(steps):
                    found[-1].append(listed(batch))
                    number = len(found[-1]) - 1
                    if replays and number % 4 == 3:
                        for step in (first, number // 2, number):
                            assert listed(loader.replay(step)) == found[-1][step]
            if replays:
                assert listed(loader.replay(1)) == found[-1][1]
        loader.close()
        return found, generator.get_state(), torch.get_rng_state()

    undisturbed, its, everybodys = epochs(replays=False)
    found, its_now, everybodys_now = epochs(replays=True)
    assert found == undisturbed
    assert torch.equal(its, its_now)
    assert torch.equal(everybodys, everybodys_now)


def iter_of(steps: Steps) -> Iterator[Any]:
    while True:
        try:
            yield steps.next()
        except StopIteration:
            return


def listed(batch: Any) -> Any:
    return [listed(part) for part in batch] if isinstance(batch, list | tuple) else batch.tolist()


def test_a_sampler_that_was_told_its_next_epoch_stays_there() -> None:
    """Also after a resume in which the loader was told."""
    sampler: DistributedSampler[int] = DistributedSampler(TWELVE, 2, 0)

    def epoch(loader: DataLoader[Any], number: int) -> list[Any]:
        loader.set_epoch(number)
        return [batch.tolist() for batch in loader]

    plain: DataLoader[Any] = DataLoader(range(12), 2, sampler=DistributedSampler(TWELVE, 2, 0))
    expected = {number: epoch(plain, number) for number in (3, 4)}
    loader: DataLoader[Any] = DataLoader(range(12), 2, sampler=sampler)
    loader.set_epoch(3)
    next(iter(loader))
    state = loader.state_dict()
    loader.load_state_dict(state)
    assert epoch(loader, 3) == expected[3][1:]
    loader.set_epoch(4)
    assert loader.replay(2).tolist() == expected[3][2]
    assert sampler.epoch == 4
    assert [batch.tolist() for batch in loader] == expected[4]


class Told(Dataset[int]):
    """Is told its epoch, and cannot be copied."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.told: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.told.append(epoch)

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> int:
        return index + 10 * self.told[-1]


class OverTold(Sampler[int]):
    """Holds its dataset by a name of its own."""

    def __init__(self, told: Told) -> None:
        self.told = told

    def __iter__(self) -> Iterator[int]:
        return iter(range(6))

    def __len__(self) -> int:
        return 6


def test_a_dataset_is_not_copied_and_goes_on_in_its_epoch() -> None:
    """Whoever holds it; a loader tells it the epoch that is replayed, and then its own again."""
    data = Told()
    loader: DataLoader[Any] = DataLoader(data, 2, sampler=OverTold(data))
    loader.set_epoch(1)
    assert [batch.tolist() for batch in loader][1] == [12, 13]
    loader.set_epoch(2)
    assert loader.replay(1).tolist() == [12, 13]
    assert data.told[-1] == 2
    data.told.append(0)
    pipeline = Pipeline(data, sampler=OverTold(data)).batch(2)
    assert [batch.tolist() for batch in pipeline] == [[0, 1], [2, 3], [4, 5]]
    assert pipeline.replay(2).tolist() == [4, 5]


class Locked(Sampler[int]):
    """Cannot be copied."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __iter__(self) -> Iterator[int]:
        return iter(range(6))

    def __len__(self) -> int:
        return 6


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: DataLoader(range(6), 2, sampler=Locked()), "cannot be copied"),
        (lambda: Pipeline(range(6), sampler=Locked()).batch(2), "cannot be copied"),
        (lambda: Pipeline(iter(range(6))).batch(2), "can be iterated once"),
    ],
)
@pytest.mark.parametrize("face", ["for", "async for"])
def test_what_cannot_be_read_apart_is_refused(make: Callable[[], Any], why: str, face: Face) -> None:
    """With the reason; the epoch goes on."""
    loader = make()
    with Steps(loader, face) as steps:
        assert listed(steps.next()) == [0, 1]
        with pytest.raises(LookupError, match=why):
            loader.replay(0)
        assert listed(steps.next()) == [2, 3]
        steps.rest()


@pytest.mark.asyncio
async def test_a_replay_for_async_code_runs_on_the_loop_of_the_caller() -> None:
    """Where its client works."""
    home = asyncio.get_running_loop()
    asked: list[int] = []

    async def fetch(key: int) -> int:
        assert asyncio.get_running_loop() is home
        asked.append(key)
        return 10 * key

    loader = Pipeline(range(6)).shuffle(seed=1).map(fetch).batch(2)
    found = [batch.tolist() async for batch in loader]
    asked.clear()
    assert (await loader.areplay(1)).tolist() == found[1]
    assert {10 * key for key in asked} >= set(found[1])
    with pytest.raises(LookupError, match="step=3"):
        await loader.areplay(3)
    assert [batch.tolist() async for batch in loader] != found
    await loader.aclose()


@pytest.mark.asyncio
async def test_a_replay_for_async_code_raises_what_the_step_raised() -> None:
    """The user's own exception."""
    error = ValueError("broken")

    def fail(key: int) -> int:
        if key == 3:
            raise error
        return key

    loader = Pipeline(range(6)).map(fail).batch(2)
    batches = aiter(loader)
    await anext(batches)
    with pytest.raises(ValueError, match="broken"):
        await anext(batches)
    with pytest.raises(ValueError, match="broken"):
        await loader.areplay(1)
    assert (await anext(batches)).tolist() == [4, 5]
    await loader.aclose()
