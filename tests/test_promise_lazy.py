"""Promise 7: `iter()` starts nothing, each is a new epoch, and several iterators may be alive."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from aioloader import DataLoader, Pipeline
from aioloader.errors import SourceUsedUpError
from aioloader.testing import RecordingSource, SyncRecordingSource
from tests._support import Face, Steps, collect, join_loader_threads, on_both_faces, turns


class Counted(Dataset[int]):
    """Counts what is read."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> int:
        self.read.append(index)
        return index


@pytest.mark.parametrize("kind", [RecordingSource, SyncRecordingSource])
def test_iter_starts_nothing(kind: Any) -> None:
    """No thread, no read, for a hundred iterators."""
    source = kind(range(10))
    loader = Pipeline(source).map(lambda key: key).batch(2)
    threads = set(threading.enumerate())
    iterators = [iter(loader) for _ in range(100)]
    assert set(threading.enumerate()) == threads
    assert source.opened == 0
    assert len(iterators) == 100


@pytest.mark.asyncio
async def test_aiter_starts_nothing() -> None:
    """No task, no thread, no read, though the loop turns."""
    source = RecordingSource(range(10))
    loader = Pipeline(source).map(lambda key: key).batch(2)
    threads, tasks = set(threading.enumerate()), asyncio.all_tasks()
    iterators = [aiter(loader) for _ in range(100)]
    await turns()
    assert set(threading.enumerate()) == threads
    assert asyncio.all_tasks() == tasks
    assert source.opened == 0
    assert len(iterators) == 100


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_dataloader_starts_nothing_either(num_workers: int) -> None:
    """Neither making it nor `iter()`."""
    dataset = Counted()
    threads = set(threading.enumerate())
    batches = iter(DataLoader(dataset, batch_size=4, num_workers=num_workers))
    assert set(threading.enumerate()) == threads
    assert dataset.read == []
    del batches


def test_describing_a_pipeline_starts_nothing() -> None:
    """A source function is not called before there is an epoch, not even for `len` or `repr`."""

    def listing() -> list[int]:
        raise AssertionError("nobody asked for a sample")

    loader = Pipeline(listing).map(lambda key: key).batch(2).prefetch(1)
    repr(loader)
    with pytest.raises(TypeError):
        len(loader)


@on_both_faces
def test_each_iteration_reads_anew(face: Face) -> None:
    """A source that can be iterated again is, from its start."""
    source = RecordingSource(range(4))
    loader = Pipeline(source)
    for count in range(1, 4):
        assert collect(loader, face) == [0, 1, 2, 3]
        assert source.opened == count


@on_both_faces
def test_each_epoch_has_its_own_shuffle(face: Face) -> None:
    """Different by epoch, the same for the same seed and epoch, and all samples in each."""

    def epochs(seed: int) -> list[list[int]]:
        loader = Pipeline(range(40)).shuffle(seed=seed)
        return [collect(loader, face) for _ in range(3)]

    first = epochs(1)
    assert first == epochs(1)
    assert first != epochs(2)
    assert [sorted(epoch) for epoch in first] == [list(range(40))] * 3
    assert len({tuple(epoch) for epoch in first}) == 3


@on_both_faces
def test_set_epoch_chooses_the_epoch(face: Face) -> None:
    """As torch's samplers have it; counting goes on from there."""
    loader: Any = Pipeline(range(40)).shuffle(seed=1)
    epochs = [collect(loader, face) for _ in range(4)]
    loader.set_epoch(1)
    assert collect(loader, face) == epochs[1]
    assert collect(loader, face) == epochs[2]
    fresh: Any = Pipeline(range(40)).shuffle(seed=1)
    fresh.set_epoch(3)
    assert collect(fresh, face) == epochs[3]


@on_both_faces
def test_an_iterator_that_is_never_asked_is_no_epoch(face: Face) -> None:
    """The epoch is counted at the first `next()`."""
    loader = Pipeline(range(40)).shuffle(seed=1)
    first = collect(Pipeline(range(40)).shuffle(seed=1), face)
    with Steps(loader, face):
        pass
    assert collect(loader, face) == first


def test_several_iterators_are_independent() -> None:
    """Two by `for`, moved in turns: each gives a whole epoch of its own."""
    loader = Pipeline(range(40)).shuffle(seed=1).map(lambda key: key, concurrency=2)
    same = Pipeline(range(40)).shuffle(seed=1)
    epochs = [list(same), list(same)]

    first, second = iter(loader), iter(loader)
    pairs = [(next(first), next(second)) for _ in range(40)]

    assert [list(samples) for samples in zip(*pairs, strict=True)] == epochs
    assert list(first) == list(second) == []


@pytest.mark.asyncio
async def test_several_iterators_are_independent_by_async_for() -> None:
    """Two tasks, each with its own epoch."""
    loader = Pipeline(range(40)).shuffle(seed=1).map(lambda key: key, concurrency=2)
    same = Pipeline(range(40)).shuffle(seed=1)
    epochs = [list(same), list(same)]

    async def epoch() -> list[Any]:
        return [sample async for sample in loader]

    assert list(await asyncio.gather(epoch(), epoch())) == epochs


def test_one_iterator_ends_and_the_other_goes_on() -> None:
    """Dropping or finishing one does nothing to another."""
    loader = Pipeline(range(10)).map(lambda key: key, concurrency=2)
    first, second = iter(loader), iter(loader)
    assert next(first) == next(second) == 0
    del first
    assert list(second) == list(range(1, 10))
    join_loader_threads()


def test_an_iterator_is_its_own_iterator() -> None:
    """`iter(iter(loader))` goes on; `for` may take a half-consumed iterator."""
    batches = iter(Pipeline(range(5)))
    assert next(batches) == 0
    assert iter(batches) is batches
    assert list(batches) == [1, 2, 3, 4]


@on_both_faces
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_dataloader_shuffles_each_epoch_anew(face: Face, num_workers: int) -> None:
    """With `seed=` the order depends on it and the epoch alone, not on torch's generator."""

    def epochs() -> list[list[int]]:
        loader = DataLoader(Counted(), batch_size=4, shuffle=True, seed=3, num_workers=num_workers)
        return [torch.cat(collect(loader, face)).tolist() for _ in range(3)]

    torch.manual_seed(1)
    first = epochs()
    torch.manual_seed(2)
    assert first == epochs()
    assert len({tuple(epoch) for epoch in first}) == 3


# -- sources that can be iterated once, and those that can be iterated again


def generator() -> Iterator[int]:
    yield from range(3)


async def async_generator() -> AsyncIterator[int]:
    for key in range(3):
        yield key


@on_both_faces
@pytest.mark.parametrize("function", [generator, async_generator, lambda: [0, 1, 2], lambda: iter(range(3))])
def test_a_function_is_called_anew_each_epoch(face: Face, function: Any) -> None:
    """A generator function is re-iterable, a generator is not."""
    loader = Pipeline(function)
    assert [collect(loader, face) for _ in range(3)] == [[0, 1, 2]] * 3


@on_both_faces
@pytest.mark.parametrize("make", [generator, async_generator])
def test_a_generator_is_good_for_one_epoch(face: Face, make: Any) -> None:
    """The second one raises an error that names the way out, rather than an empty epoch."""
    loader = Pipeline(make())
    assert collect(loader, face) == [0, 1, 2]
    with pytest.raises(SourceUsedUpError, match="generator") as caught:
        collect(loader, face)
    assert "function" in str(caught.value)


@on_both_faces
@pytest.mark.parametrize("make", [generator, async_generator])
def test_a_half_used_generator_does_not_begin_again(face: Face, make: Any) -> None:
    """Not even after a `break`: the samples in between would be missing in silence."""
    loader = Pipeline(make()).batch(1)
    collect(loader, face, limit=1)
    join_loader_threads()
    with pytest.raises(SourceUsedUpError):
        collect(loader, face)


@on_both_faces
def test_a_generator_is_not_shared_by_two_pipelines(face: Face) -> None:
    """Two pipelines over one generator would steal from each other; the second is told so."""
    samples = generator()
    assert collect(Pipeline(samples), face) == [0, 1, 2]
    with pytest.raises(SourceUsedUpError):
        collect(Pipeline(samples), face)
