"""`DataLoader(shard=True)`: this rank's part, the same keys as by torch's `DistributedSampler`."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch.utils.data
from torch.utils.data import DistributedSampler, IterableDataset, RandomSampler

from aioloader import DataLoader, StateError, UnsplitWarning, sample_rng
from aioloader.testing import assert_resumes_exactly
from tests._support import Face, Steps, collect, on_both_faces

COUNT = 22


class Keys:
    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, key: int) -> int:
        return key


class AsyncKeys(Keys):
    async def __getitem__(self, key: int) -> int:  # type: ignore[override]
        await asyncio.sleep(0)
        return key


class Together(Keys):
    def __getitems__(self, keys: list[int]) -> list[int]:
        return keys


class Draws(Keys):
    def __getitem__(self, key: int) -> int:
        return sample_rng().random().randrange(1 << 30)


def repr_of_type(dataset: Any) -> str:
    return type(dataset).__name__


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes this process a rank of several, as torchrun says it."""

    def become(rank: int, world_size: int) -> None:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world_size))

    return become


def torchs(rank: int, world_size: int, epoch: int, *, shuffle: bool, seed: int = 0, **how: Any) -> list[list[int]]:
    """The batches of torch's own loader, with its own sampler."""
    dataset: Any = Keys()
    sampler: Any = DistributedSampler(dataset, world_size, rank, shuffle=shuffle, seed=seed)
    sampler.set_epoch(epoch)
    return [batch.tolist() for batch in torch.utils.data.DataLoader(dataset, sampler=sampler, **how)]


WORKERS: list[dict[str, Any]] = [{"num_workers": 0}, {"num_workers": 2}]


@on_both_faces
@pytest.mark.parametrize("dataset", [Keys(), AsyncKeys(), Together(), list(range(COUNT))], ids=repr_of_type)
@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("shuffle", [False, True])
def test_the_keys_are_those_of_torchs_sampler(
    shuffle: bool, workers: dict[str, Any], dataset: Any, face: Face, as_rank: Any
) -> None:
    """In each epoch, without anybody telling it, and with."""
    for rank, world_size in ((0, 1), (0, 2), (1, 2), (2, 3)):
        as_rank(rank, world_size)
        seed = None if rank else 5
        loader: DataLoader[Any] = DataLoader(
            dataset, 4, shuffle=shuffle, shard=True, seed=seed, drop_last=rank == 1, **workers
        )
        how: dict[str, Any] = {"shuffle": shuffle, "seed": seed or 0, "batch_size": 4, "drop_last": rank == 1}
        for epoch in (0, 1, 7):
            if epoch == 7:
                loader.set_epoch(7)
            expected = torchs(rank, world_size, epoch, **how)
            assert len(loader) == len(expected)
            assert [batch.tolist() for batch in collect(loader, face)] == expected


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_all_ranks_together_have_all_samples(world_size: int, as_rank: Any) -> None:
    """Some twice, so that each has as many."""
    union: list[int] = []
    for rank in range(world_size):
        as_rank(rank, world_size)
        union += [key for batch in DataLoader(Keys(), 4, shuffle=True, shard=True) for key in batch.tolist()]
    assert set(union) == set(range(COUNT))
    assert len(union) == -(-COUNT // world_size) * world_size


@on_both_faces
def test_ranks_are_looked_up_when_an_epoch_begins(face: Face, as_rank: Any) -> None:
    """Trainers make them between the loader and its first batch."""
    loader: DataLoader[Any] = DataLoader(Keys(), 4, shard=True)
    assert len(loader) == 6
    as_rank(1, 2)
    assert len(loader) == 3
    assert [batch.tolist() for batch in collect(loader, face)] == torchs(1, 2, 0, shuffle=False, batch_size=4)


@on_both_faces
@pytest.mark.parametrize("workers", WORKERS)
def test_nobody_is_warned_of_what_is_split(workers: dict[str, Any], face: Face, as_rank: Any) -> None:
    """The warning where it is not names the argument."""
    as_rank(0, 2)
    collect(DataLoader(Keys(), 4, shard=True, **workers), face)
    with pytest.warns(UnsplitWarning, match="shard=True"):
        collect(DataLoader(Keys(), 4, **workers), face)


def test_it_resumes_exactly(as_rank: Any) -> None:
    """And draws nothing from anybody's generator."""
    as_rank(1, 2)
    for arguments in ({}, {"shuffle": True}, {"shuffle": True, "seed": 3}, {"shuffle": True, "batch_size": None}):

        def make(arguments: dict[str, Any] = arguments, **workers: Any) -> DataLoader[Any]:
            return DataLoader(Keys(), **({"batch_size": 4} | arguments), shard=True, **workers)

        states = assert_resumes_exactly(make, variants=WORKERS)
        assert {state["guarantee"] for state in states} == {"exact"}
        assert "drawn" not in json.dumps(states)


def test_a_state_of_as_many_ranks_is_good_for_each(as_rank: Any) -> None:
    """Of another number it is refused."""
    as_rank(0, 2)
    loader: DataLoader[Any] = DataLoader(Keys(), 4, shuffle=True, shard=True)
    with Steps(loader, "for") as steps:
        steps.next()
        state = loader.state_dict()
    as_rank(1, 2)
    other: DataLoader[Any] = DataLoader(Keys(), 4, shuffle=True, shard=True)
    other.load_state_dict(state)
    rest = [batch.tolist() for batch in other]
    assert rest == torchs(1, 2, 0, shuffle=True, batch_size=4)[1:]
    as_rank(1, 3)
    with pytest.raises(StateError, match="num_replicas=3, and had 2"):
        DataLoader(Keys(), 4, shuffle=True, shard=True).load_state_dict(state)
    with pytest.raises(StateError, match="sampler"):
        DataLoader(Keys(), 4, shuffle=True).load_state_dict(state)


@on_both_faces
def test_random_numbers_of_samples_are_the_same_on_all_ranks(face: Face, as_rank: Any) -> None:
    """So that it does not matter which rank has a sample: as with `Pipeline.shard`."""
    drawn = []
    for rank, world_size in ((0, 1), (0, 2), (1, 2)):
        as_rank(rank, world_size)
        loader: DataLoader[Any] = DataLoader(Draws(), 1, shard=True, num_workers=2)
        drawn.append([int(batch) for batch in collect(loader, face)])
    assert drawn[0][0::2] == drawn[1]
    assert drawn[0][1::2] == drawn[2]


def test_worker_processes_load_it(as_rank: Any) -> None:
    as_rank(1, 2)
    with DataLoader(Keys(), 4, shuffle=True, shard=True, num_workers=1, worker_type="process") as loader:
        assert [batch.tolist() for batch in loader] == torchs(1, 2, 0, shuffle=True, batch_size=4)


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


class Endless:
    def __getitem__(self, key: int) -> int:
        return key


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"dataset": Stream()}, ValueError, r"has none; use Pipeline\(dataset\)\.shard\(\)"),
        ({"dataset": Endless()}, TypeError, "no __len__"),
        ({"sampler": [1, 2]}, ValueError, r"got sampler=\[1, 2\]"),
        ({"sampler": RandomSampler(range(3))}, ValueError, "pass one of the two"),
        ({"batch_sampler": [[1, 2]]}, ValueError, r"got batch_sampler=\[\[1, 2\]\]"),
    ],
)
def test_what_cannot_be_dealt_is_refused(arguments: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        DataLoader(**({"dataset": Keys()} | arguments), shard=True)


def test_it_cannot_be_set_later() -> None:
    loader: DataLoader[Any] = DataLoader(Keys())
    with pytest.raises(ValueError, match="shard"):
        loader.shard = True
