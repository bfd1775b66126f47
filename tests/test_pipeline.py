"""What each method of Pipeline means."""

import asyncio
import dataclasses
import math
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, DistributedSampler, IterableDataset, TensorDataset

from aioloader import Pipeline
from aioloader.testing import RecordingSource, SyncRecordingSource, virtual_order
from tests._support import Face, Steps, collect, explained, on_both_faces


def double(key: int) -> int:
    return 2 * key


async def double_later(key: int) -> int:
    await asyncio.sleep(0)
    return 2 * key


async def later(samples: Any) -> AsyncIterator[Any]:
    for sample in samples:
        yield sample


# A pipeline is an immutable description


def every_method(loader: Any) -> list[Any]:
    return [
        loader.map(double),
        loader.flat_map(lambda key: [key]),
        loader.filter(bool),
        loader.shuffle(),
        loader.shuffle(8),
        loader.batch(2),
        loader.batch(2).unbatch(),
        loader.take(2),
        loader.skip(2),
        loader.repeat(2),
        loader.enumerate(),
        loader.shard(0, 2),
        loader.pin_memory(),
        loader.to("cpu"),
        loader.prefetch(3),
    ]


def test_each_method_gives_a_new_pipeline() -> None:
    """The one it is called on stays as it is, so that it may be the trunk of several."""
    loader = Pipeline(range(6))
    for other in every_method(loader):
        assert isinstance(other, Pipeline)
        assert other is not loader
    assert list(loader) == list(range(6))
    assert len(loader) == 6


def test_one_trunk_with_two_branches() -> None:
    """Two pipelines over one: each has its own stages and epochs."""
    trunk = Pipeline(range(6)).shuffle(seed=1)
    training, validation = trunk.map(double), trunk.batch(3, collate_fn=list)
    order = list(trunk)
    assert list(training) == [2 * key for key in order]
    assert list(validation) == [order[:3], order[3:]]
    assert list(training) != [2 * key for key in order]  # its second epoch


def test_attributes_cannot_be_set_by_accident() -> None:
    """There are no public fields to change."""
    assert [name for name in vars(Pipeline(range(3))) if not name.startswith("_")] == []


def test_repr_shows_the_stages() -> None:
    """What one sees in a notebook or a log."""
    text = repr(Pipeline(range(6)).map(double).batch(2))
    for word in ("Pipeline", "map(double", "batch(2"):
        assert word in text


# Sources


class Items(Dataset[int]):
    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < 5:
            raise IndexError(index)
        return 10 * index


class ManyItems(Items):
    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def __getitems__(self, indices: list[int]) -> list[int]:
        self.calls.append(indices)
        return [10 * index for index in indices]


class AsyncItems(Dataset[Any]):
    def __len__(self) -> int:
        return 5

    async def __getitem__(self, index: int) -> int:
        await asyncio.sleep(0)
        return 10 * index


class AsyncManyItems(AsyncItems):
    async def __getitems__(self, indices: list[int]) -> list[int]:
        await asyncio.sleep(0)
        return [10 * index for index in indices]


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(0, 50, 10))


class SizedStream(Stream):
    def __len__(self) -> int:
        return 5


class OnlyIter:
    def __iter__(self) -> Iterator[int]:
        return iter(range(0, 50, 10))


class OnlyAiter:
    def __aiter__(self) -> AsyncIterator[int]:
        return later(range(0, 50, 10))


SOURCES: dict[str, Any] = {
    "range": range(0, 50, 10),
    "list": [0, 10, 20, 30, 40],
    "tuple": (0, 10, 20, 30, 40),
    "Dataset": Items(),
    "Dataset with __getitems__": ManyItems(),
    "Dataset with async __getitem__": AsyncItems(),
    "Dataset with async __getitems__": AsyncManyItems(),
    "IterableDataset": Stream(),
    "iterable": OnlyIter(),
    "async iterable": OnlyAiter(),
    "set": {0},
    "function of a list": lambda: [0, 10, 20, 30, 40],
    "function of an iterator": lambda: iter([0, 10, 20, 30, 40]),
    "function of an async iterator": lambda: later([0, 10, 20, 30, 40]),
    "function of a Dataset": lambda: Items(),
}


@on_both_faces
@pytest.mark.parametrize("name", sorted(SOURCES))
def test_every_kind_of_source(face: Face, name: str) -> None:
    """Each gives the same samples, epoch after epoch."""
    expected = [0] if name == "set" else [0, 10, 20, 30, 40]
    loader = Pipeline(SOURCES[name])
    assert collect(loader, face) == expected
    assert collect(loader, face) == expected


@on_both_faces
def test_samples_may_be_anything(face: Face) -> None:
    """None, exceptions, sentinels of Python, empty containers: a sample is a sample."""
    samples: list[Any] = [
        None,
        (),
        [],
        StopIteration(),
        ValueError("a value"),
        NotImplemented,
        ...,
        False,
        asyncio.CancelledError,
    ]
    same = virtual_order(1)(lambda sample: sample)
    loader = Pipeline(samples).map(same, concurrency=3).map(lambda sample: sample).flat_map(lambda sample: [sample])
    assert [id(sample) for sample in collect(loader, face)] == [id(sample) for sample in samples]


@on_both_faces
def test_a_tensor_dataset(face: Face) -> None:
    """torch's own datasets work as they are."""
    dataset = TensorDataset(torch.arange(6).float(), torch.arange(6))
    batches = collect(Pipeline(dataset).batch(4), face)
    assert [(x.tolist(), y.tolist()) for x, y in batches] == [
        ([0.0, 1.0, 2.0, 3.0], [0, 1, 2, 3]),
        ([4.0, 5.0], [4, 5]),
    ]


@on_both_faces
@pytest.mark.parametrize("source", [list("abcdef"), Items()])
def test_a_sampler_gives_the_keys(face: Face, source: Any) -> None:
    """`sampler=` chooses which items come, in which order, as often as it likes."""
    loader = Pipeline(source, sampler=[3, 1, 1, 0])
    assert collect(loader, face) == [source[key] for key in (3, 1, 1, 0)]
    assert len(loader) == 4


@on_both_faces
def test_a_sampler_is_told_the_epoch(face: Face) -> None:
    """torch's DistributedSampler gives the same order each epoch unless somebody calls `set_epoch`: we do."""
    sampler: Any = DistributedSampler(Items(), num_replicas=1, rank=0, shuffle=True, seed=3)
    loader = Pipeline(Items(), sampler=sampler)
    found = [collect(loader, face) for _ in range(3)]
    expected = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        expected.append([10 * key for key in sampler])
    assert found == expected


# Stages


class Doubler:
    def __call__(self, key: int) -> int:
        return 2 * key

    def double(self, key: int) -> int:
        return 2 * key

    async def double_later(self, key: int) -> int:
        return await double_later(key)

    @staticmethod
    async def static(key: int) -> int:
        return await double_later(key)


class AsyncDoubler:
    async def __call__(self, key: int) -> int:
        return await double_later(key)


class Twice(int):
    def __new__(cls, key: int) -> "Twice":
        return super().__new__(cls, 2 * key)


FUNCTIONS: dict[str, Any] = {
    "function": double,
    "async function": double_later,
    "lambda": lambda key: 2 * key,
    "partial": partial(lambda factor, key: factor * key, 2),
    "partial of async": partial(double_later),
    "partial of partial of async": partial(partial(double_later)),
    "partial of async callable object": partial(AsyncDoubler()),
    "bound method": Doubler().double,
    "async bound method": Doubler().double_later,
    "async static method": Doubler.static,
    "callable object": Doubler(),
    "async callable object": AsyncDoubler(),
    "builtin": (2).__mul__,
    "class": Twice,
}


@on_both_faces
@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_map_takes_every_kind_of_function(face: Face, name: str) -> None:
    """Sync or async is found out from the function, or from what it returns."""
    assert collect(Pipeline(range(5)).map(FUNCTIONS[name]), face) == [0, 2, 4, 6, 8]


@on_both_faces
def test_a_lambda_that_returns_a_coroutine_is_no_silent_mistake(face: Face) -> None:
    """`map(lambda key: fetch(client, key))`: awaited, or refused with a word on `async def`; never handed out."""
    with Steps(Pipeline(range(3)).map(lambda key: double_later(key)), face) as steps:
        found = steps.outcomes()
    for outcome, expected in zip(found, [0, 2, 4], strict=True):
        assert outcome == expected or (isinstance(outcome, TypeError) and "async def" in str(outcome))


@on_both_faces
@pytest.mark.parametrize("executor", [None, "thread"])
def test_map_in_threads(face: Face, executor: Any) -> None:
    """The default, and its name."""
    assert collect(Pipeline(range(20)).map(double, executor=executor, concurrency=3), face) == list(range(0, 40, 2))


@on_both_faces
def test_map_in_an_executor_of_the_user(face: Face) -> None:
    """The function runs in the user's own pool, which stays open."""
    threads: set[str] = set()

    def decode(key: int) -> int:
        threads.add(threading.current_thread().name)
        return 2 * key

    with ThreadPoolExecutor(2, thread_name_prefix="mine") as executor:
        loader = Pipeline(range(40)).map(decode, executor=executor, concurrency=4)
        assert collect(loader, face) == collect(loader, face) == list(range(0, 80, 2))
        assert executor.submit(double, 1).result() == 2
    assert all(name.startswith("mine") for name in threads)


@on_both_faces
def test_filter_keeps_what_is_true(face: Face) -> None:
    """Any truth value will do; order stays."""
    assert collect(Pipeline(range(10)).filter(lambda key: key % 3), face) == [1, 2, 4, 5, 7, 8]
    assert collect(Pipeline(range(10)).filter(lambda _: None), face) == []


@on_both_faces
def test_a_long_run_of_refused_samples(face: Face) -> None:
    """A filter that refuses nearly all gets to the one that it keeps."""
    assert collect(Pipeline(range(5000)).filter(lambda key: key == 4999).batch(2, collate_fn=list), face) == [[4999]]


@on_both_faces
def test_flat_map_takes_every_kind_of_iterable(face: Face) -> None:
    """Lists, generators, async generators, empty ones."""
    kinds: list[Any] = [[1, 2], (3,), iter([4]), later([5, 6]), [], later([]), range(7, 9)]
    assert collect(Pipeline(kinds).flat_map(lambda parts: parts), face) == [1, 2, 3, 4, 5, 6, 7, 8]


@on_both_faces
def test_flat_map_awaits_its_function(face: Face) -> None:
    """`async def` that returns the items."""

    async def listing(key: int) -> list[int]:
        await asyncio.sleep(0)
        return [key, key]

    assert collect(Pipeline(range(3)).flat_map(listing), face) == [0, 0, 1, 1, 2, 2]


@on_both_faces
def test_batch_collates_as_torch(face: Face) -> None:
    """Tensors, numbers, strings, nested; the short batch at the end unless `drop_last`."""
    samples = [{"x": torch.full((2,), float(key)), "y": key, "name": str(key)} for key in range(5)]
    first, second, last = collect(Pipeline(samples).batch(2), face)
    assert first["x"].tolist() == [[0.0, 0.0], [1.0, 1.0]]
    assert first["y"].tolist() == [0, 1]
    assert first["name"] == ["0", "1"]
    assert second["y"].dtype == torch.int64
    assert last["y"].tolist() == [4]
    assert len(collect(Pipeline(samples).batch(2, drop_last=True), face)) == 2
    assert collect(Pipeline([np.ones(2), np.ones(2)]).batch(2), face)[0].dtype == torch.float64


@on_both_faces
@pytest.mark.parametrize("kind", [list, tuple])
def test_batches_that_are_just_the_samples_need_no_thread(kind: Any, face: Face) -> None:
    """Nor does a predicate before them or a map behind them make a difference to what comes."""
    loader = Pipeline(later(range(5))).batch(2, collate_fn=kind)
    with Steps(loader, face) as steps:
        assert steps.next() == kind([0, 1])
        assert not [thread.name for thread in threading.enumerate() if "collate" in thread.name]
        assert steps.outcomes() == [kind([2, 3]), kind([4])]
    fresh = Pipeline(range(6)).drop_if(lambda sample: sample == 3).batch(2, collate_fn=kind).map(kind)
    assert collect(fresh, face) == [kind([0, 1]), kind([2, 4]), kind([5])]
    broken = Pipeline(range(6)).map(lambda sample: 6 // (sample - 2)).batch(2, collate_fn=kind)
    with Steps(broken, face) as steps:
        first, error, last = steps.outcomes()
    assert (first, last) == (kind([-3, -6]), kind([3, 2]))
    assert isinstance(error, ZeroDivisionError)


@on_both_faces
def test_batch_awaits_an_async_collate(face: Face) -> None:
    """`collate_fn` may be async."""

    async def collate(samples: list[int]) -> int:
        await asyncio.sleep(0)
        return sum(samples)

    assert collect(Pipeline(range(6)).batch(3, collate_fn=collate), face) == [3, 12]


@on_both_faces
def test_batches_are_the_callers(face: Face) -> None:
    """A batch that is kept is never written to again."""
    batches = collect(Pipeline(torch.arange(4000).reshape(1000, 4).float()).batch(10), face)
    assert torch.equal(torch.cat(batches), torch.arange(4000).reshape(1000, 4).float())


@on_both_faces
def test_unbatch_takes_batches_apart(face: Face) -> None:
    """Lists into their items; what `batch` made of tensors back into samples."""
    assert collect(Pipeline([[1, 2], [3]]).unbatch(), face) == [1, 2, 3]
    assert [int(sample) for sample in collect(Pipeline(range(5)).batch(2).unbatch(), face)] == [0, 1, 2, 3, 4]


@on_both_faces
def test_take_skip_enumerate(face: Face) -> None:
    """As itertools and enumerate have them."""
    assert collect(Pipeline(range(10)).skip(3).take(4), face) == [3, 4, 5, 6]
    assert collect(Pipeline(range(10)).take(4).skip(3), face) == [3]
    assert collect(Pipeline(range(3)).take(100), face) == [0, 1, 2]
    assert collect(Pipeline(range(3)).take(0), face) == []
    assert collect(Pipeline(range(3)).skip(100), face) == []
    assert collect(Pipeline("abc"[key] for key in range(3)).enumerate(), face) == [(0, "a"), (1, "b"), (2, "c")]


@on_both_faces
def test_repeat(face: Face) -> None:
    """The pipeline before it, again and again; batches do not cross the seam when they are made before it."""
    assert collect(Pipeline(range(3)).repeat(2), face) == [0, 1, 2, 0, 1, 2]
    assert collect(Pipeline(range(3)).repeat(2).batch(2, collate_fn=list), face) == [[0, 1], [2, 0], [1, 2]]
    assert collect(Pipeline(range(3)).batch(2, collate_fn=list).repeat(2), face) == [[0, 1], [2], [0, 1], [2]]
    assert collect(Pipeline(range(3)).repeat(), face, limit=7) == [0, 1, 2, 0, 1, 2, 0]
    assert collect(Pipeline(range(3)).repeat(0), face) == []
    assert collect(Pipeline(range(3)).map(double_later).repeat(3).enumerate(), face) == list(enumerate([0, 2, 4] * 3))


@on_both_faces
def test_repeat_of_a_stream_reads_it_again(face: Face) -> None:
    """Each repetition is an iteration of the source, and closes it."""
    source = RecordingSource(range(3))
    assert collect(Pipeline(source).repeat(3), face) == [0, 1, 2] * 3
    assert source.opened == source.closed == 3


@on_both_faces
def test_repeat_shuffles_each_repetition_anew(face: Face) -> None:
    """Each is a permutation, and not twice the same."""
    found = collect(Pipeline(range(40)).shuffle(seed=1).repeat(3), face)
    parts = [tuple(found[start : start + 40]) for start in range(0, 120, 40)]
    assert [sorted(part) for part in parts] == [list(range(40))] * 3
    assert len(set(parts)) == 3


# Shuffle


@on_both_faces
def test_shuffle_is_a_permutation_of_the_whole_epoch(face: Face) -> None:
    """Without `buffer_size`, on an indexable source: samples come from anywhere."""
    found = collect(Pipeline(range(1000)).shuffle(seed=0), face)
    assert sorted(found) == list(range(1000))
    assert sum(abs(position - key) for position, key in enumerate(found)) > 200_000  # 333,000 on average


@on_both_faces
def test_shuffle_behind_a_map_is_the_same_permutation(face: Face) -> None:
    """A map gives one sample for one: it does not matter on which side of it the order is drawn."""
    before = Pipeline(range(50)).shuffle(seed=4).map(double)
    behind = Pipeline(range(50)).map(double).shuffle(seed=4)
    assert collect(before, face) == collect(behind, face)


@on_both_faces
@pytest.mark.parametrize("make", [RecordingSource, SyncRecordingSource])
def test_a_shuffle_buffer_mixes_a_stream(face: Face, make: Any) -> None:
    """Deterministic by seed and epoch; a sample comes out at most `buffer_size` places early."""

    def epochs(seed: int) -> list[list[int]]:
        loader = Pipeline(make(range(100))).shuffle(10, seed=seed)
        return [collect(loader, face) for _ in range(2)]

    first, second = epochs(1)
    assert [first, second] == epochs(1)
    assert first != second
    assert first != epochs(2)[0]
    assert sorted(first) == sorted(second) == list(range(100))
    assert first != list(range(100))
    assert all(key - position < 10 for position, key in enumerate(first))


@on_both_faces
def test_a_buffer_of_one_changes_nothing(face: Face) -> None:
    """There is nothing to draw from."""
    assert collect(Pipeline(later(range(10))).shuffle(1), face) == list(range(10))


# Shard


@on_both_faces
@settings(max_examples=25)
@given(n=st.integers(1, 40), world_size=st.integers(1, 9))
def test_shard_is_torchs_distributed_sampler(face: Face, n: int, world_size: int) -> None:
    """The same samples on the same rank, filled from the beginning so that all ranks have the same number."""
    for rank in range(world_size):
        sampler: Any = DistributedSampler(range(n), num_replicas=world_size, rank=rank, shuffle=False)  # type: ignore[arg-type]
        loader = Pipeline(range(n)).shard(rank, world_size)
        assert collect(loader, face) == list(sampler)
        assert len(loader) == len(sampler)


@on_both_faces
@settings(max_examples=25)
@given(n=st.integers(1, 40), world_size=st.integers(1, 9))
def test_shard_of_a_stream_is_the_same(face: Face, n: int, world_size: int) -> None:
    """A stream whose end is not known before it comes is shared out as an indexable source is."""
    for rank in range(world_size):
        indexable = Pipeline(range(n)).shard(rank, world_size)
        stream = Pipeline(lambda: later(range(n))).shard(rank, world_size)
        assert collect(stream, face) == collect(indexable, face)


@on_both_faces
def test_shards_of_a_shuffle_are_one_permutation(face: Face) -> None:
    """The ranks draw the same order and share it out."""
    parts = [collect(Pipeline(range(40)).shuffle(seed=2).shard(rank, 4), face) for rank in range(4)]
    assert sorted(sum(parts, [])) == list(range(40))  # noqa: RUF017
    assert [sample for group in zip(*parts, strict=True) for sample in group] == collect(
        Pipeline(range(40)).shuffle(seed=2), face
    )


@on_both_faces
def test_every_rank_has_the_same_number_of_batches(face: Face) -> None:
    """Or a collective would wait for ever."""
    counts = {len(collect(Pipeline(range(37)).shard(rank, 8).batch(2), face)) for rank in range(8)}
    assert counts == {math.ceil(math.ceil(37 / 8) / 2)}


def test_shard_reads_the_environment_at_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun sets RANK and WORLD_SIZE; a pipeline may be described before they are there."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    loader = Pipeline(range(10)).shard()
    assert list(loader) == list(range(10))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert list(loader) == [1, 3, 5, 7, 9]
    assert len(loader) == 5
    monkeypatch.setenv("RANK", "0")
    assert list(loader) == [0, 2, 4, 6, 8]


# Several sources


@on_both_faces
def test_zip_pairs_up(face: Face) -> None:
    """Tuples, as long as the shortest; pipelines and plain sources alike."""
    loader = Pipeline.zip(range(5), Pipeline(range(4)).map(double_later), lambda: later("abcdef"))
    assert collect(loader, face) == [(0, 0, "a"), (1, 2, "b"), (2, 4, "c"), (3, 6, "d")]
    assert collect(loader.map(lambda parts: parts[2]).batch(3, collate_fn="".join), face) == ["abc", "d"]


@on_both_faces
def test_merge_gives_everything_once(face: Face) -> None:
    """As they come; each source keeps its own order."""
    loader = Pipeline.merge(range(50), Pipeline(range(100, 150)).map(double_later), lambda: later(range(1000, 1050)))
    found = collect(loader, face)
    assert Counter(found) == Counter([*range(50), *range(200, 300, 2), *range(1000, 1050)])
    for low, high in ((0, 100), (100, 500), (1000, 2000)):
        part = [sample for sample in found if low <= sample < high]
        assert part == sorted(part)


@pytest.mark.asyncio
async def test_merge_does_not_wait_for_the_slow_one() -> None:
    """What is there comes, however long another source takes."""
    free = asyncio.Event()

    async def slow() -> AsyncIterator[str]:
        await free.wait()
        yield "slow"

    found = []
    async with asyncio.timeout(30):
        async for sample in Pipeline.merge(slow, lambda: later("abc")):
            found.append(sample)
            if sample == "c":
                free.set()
    assert found == ["a", "b", "c", "slow"]


@on_both_faces
def test_mix_draws_by_weight(face: Face) -> None:
    """About as often as the weights say, the same for the same seed, each source in its order."""

    def draws(seed: int) -> list[str]:
        loader = Pipeline.mix([Pipeline(["a"]).repeat(), Pipeline(["b"]).repeat()], [3, 1], seed=seed)
        return collect(loader, face, limit=2000)

    first = draws(1)
    assert first == draws(1)
    assert first != draws(2)
    assert 1400 < first.count("a") < 1600


@on_both_faces
def test_mix_goes_on_when_a_source_ends(face: Face) -> None:
    """Nothing is lost: the others give what they have."""
    loader = Pipeline.mix([range(5), Pipeline(range(100, 130)).map(double_later)], [10, 1], seed=3)
    found = collect(loader, face)
    assert [sample for sample in found if sample < 100] == list(range(5))
    assert [sample for sample in found if sample >= 100] == list(range(200, 260, 2))


@on_both_faces
def test_a_mix_is_drawn_anew_each_epoch(face: Face) -> None:
    """The epoch is part of the draw."""
    loader = Pipeline.mix([range(50), range(100, 150)], [1, 1], seed=3)
    first, second = collect(loader, face), collect(loader, face)
    assert Counter(first) == Counter(second)
    assert first != second


# len


LENGTHS: list[tuple[Any, int]] = [
    (lambda: Pipeline(range(10)), 10),
    (lambda: Pipeline(Items()), 5),
    (lambda: Pipeline(AsyncItems()), 5),
    (lambda: Pipeline(SizedStream()), 5),
    (lambda: Pipeline(range(10)).map(double), 10),
    (lambda: Pipeline(range(10)).shuffle(), 10),
    (lambda: Pipeline(range(10)).shuffle(3), 10),
    (lambda: Pipeline(range(10)).batch(3), 4),
    (lambda: Pipeline(range(10)).batch(3, drop_last=True), 3),
    (lambda: Pipeline(range(9)).batch(3), 3),
    (lambda: Pipeline(range(10)).take(4), 4),
    (lambda: Pipeline(range(10)).take(40), 10),
    (lambda: Pipeline(range(10)).skip(4), 6),
    (lambda: Pipeline(range(10)).skip(40), 0),
    (lambda: Pipeline(range(10)).repeat(3), 30),
    (lambda: Pipeline(range(10)).repeat(3).batch(4), 8),
    (lambda: Pipeline(range(10)).enumerate(), 10),
    (lambda: Pipeline(range(10)).shard(3, 4), 3),
    (lambda: Pipeline(range(10)).pin_memory().to("cpu").prefetch(4), 10),
    (lambda: Pipeline.zip(range(10), range(7)), 7),
    (lambda: Pipeline.merge(range(10), range(7)), 17),
    (lambda: Pipeline.mix([range(10), range(7)], [1, 2]), 17),
]


@on_both_faces
@pytest.mark.parametrize(("make", "length"), LENGTHS)
@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_len_is_the_number_of_batches(face: Face, make: Any, length: int) -> None:
    """Known without reading anything, and true."""
    loader = make()
    assert len(loader) == length
    assert len(collect(loader, face)) == length


@pytest.mark.parametrize(
    "make",
    [
        lambda: Pipeline(later(range(3))),
        lambda: Pipeline(Stream()),
        lambda: Pipeline(iter(range(3))),
        lambda: Pipeline(lambda: range(3)),
        lambda: Pipeline(range(3)).filter(bool),
        lambda: Pipeline(range(3)).flat_map(lambda key: [key]),
        lambda: Pipeline(range(3)).filter(bool).batch(2),
        lambda: Pipeline(range(3)).repeat(),
        lambda: Pipeline.zip(range(3), later(range(3))),
    ],
)
def test_an_unknown_len_is_a_type_error(make: Any) -> None:
    """As for any object without a length: `list` and progress bars know what to do."""
    with pytest.raises(TypeError):
        len(make())


def test_a_loader_is_true() -> None:
    """`if loader:` must neither be False for an empty epoch's length nor fail for an unknown one."""
    assert Pipeline(later(range(3)))
    assert Pipeline([])


# stats and explain


@on_both_faces
def test_stats_count_what_happened(face: Face) -> None:
    """A frozen snapshot: samples and batches of the newest epoch."""
    loader = Pipeline(range(20)).map(double_later, concurrency=4).map(double).batch(4, collate_fn=list)
    assert loader.stats().batches == 0
    collect(loader, face)
    stats = loader.stats()
    assert stats.batches == 5
    assert stats.epoch == 0
    assert 0 <= stats.waited_fraction <= 1
    by_name = {stage.name: stage for stage in stats.stages}
    assert by_name["map(double_later)"].samples == 20
    assert by_name["map(double_later)"].concurrency == 4
    assert by_name["map(double)"].samples == 20
    assert all(stage.busy_seconds >= 0 for stage in stats.stages)
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.batches = 7  # type: ignore[misc]
    assert loader.stats() == stats


@on_both_faces
def test_stats_count_errors(face: Face) -> None:
    """A failed sample is counted at the stage that failed."""

    def broken(key: int) -> int:
        if key == 3:
            raise ValueError(key)
        return key

    loader = Pipeline(range(6)).map(broken)
    with pytest.raises(ValueError, match="3"):
        collect(loader, face)
    assert sum(stage.errors for stage in loader.stats().stages) == 1


@on_both_faces
def test_explain_is_a_sentence(face: Face) -> None:
    """At any time: before, in the middle of, and after an epoch."""
    loader = Pipeline(range(20)).map(double_later, concurrency=4).batch(2, collate_fn=list)
    for _ in range(2):
        sentence = explained(loader)
        assert sentence.endswith(".")
        assert "\n" not in sentence
        collect(loader, face)


@pytest.mark.asyncio
async def test_stats_while_it_runs() -> None:
    """From the loop body, as a progress bar does."""
    loader = Pipeline(range(20)).map(double_later, concurrency=4).batch(2, collate_fn=list)
    seen = [loader.stats().batches async for _ in loader]
    assert seen == list(range(1, 11))


def test_explain_names_the_stage_that_limits() -> None:
    """A function that computes while the consumer does nothing else."""

    def slow(key: int) -> int:
        return sum(range(30_000)) + key

    loader = Pipeline(range(200)).map(double).map(slow, concurrency=1).batch(10, collate_fn=list)
    list(loader)
    assert "map(slow)" in explained(loader)


# The device stage without a device


@on_both_faces
def test_to_cpu_gives_cpu_batches(face: Face) -> None:
    """The same code runs where there is no accelerator."""
    batches = collect(Pipeline(range(6)).batch(4).to("cpu"), face)
    assert [batch.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5]]
    assert {batch.device.type for batch in batches} == {"cpu"}


def test_repeat_of_a_generator_is_refused_at_once() -> None:
    """It can be iterated once; the way out is the generator function."""
    generator = (key for key in range(3))
    with pytest.raises(ValueError, match="pass the generator function itself"):
        Pipeline(generator).repeat(2)
    with pytest.raises(ValueError, match="pass the generator function itself"):
        Pipeline(generator).map(double).repeat()
    assert list(Pipeline(generator).repeat(1)) == [0, 1, 2]


@on_both_faces
def test_a_repetition_that_cannot_begin_fails_at_its_place(face: Face) -> None:
    """As a failed source does: everything before it comes, the error comes once, then the epoch is over."""
    opened: list[int] = []

    def stream() -> Iterator[int]:
        opened.append(len(opened))
        if len(opened) == 2:
            raise OSError("the disk is gone")
        return iter(range(5))

    with Steps(Pipeline(stream).repeat(3).map(double, concurrency=2).batch(2, collate_fn=list), face) as steps:
        found = steps.outcomes()
    assert found[:3] == [[0, 2], [4, 6], [8]]
    assert [type(one) for one in found[3:]] == [OSError]


@on_both_faces
def test_nested_repeats_repeat_no_order(face: Face) -> None:
    """Each of the four passes is shuffled anew, and the first as without `repeat`."""
    found = collect(Pipeline(range(50)).shuffle(seed=1).repeat(2).repeat(2), face)
    passes = [tuple(found[at : at + 50]) for at in range(0, 200, 50)]
    assert len(set(passes)) == 4
    assert list(passes[0]) == collect(Pipeline(range(50)).shuffle(seed=1), face)


@on_both_faces
def test_repeating_nothing_for_ever_ends(face: Face) -> None:
    """It would be a silent hang."""
    assert collect(Pipeline(range(0)).repeat(), face) == []
    assert collect(Pipeline(range(10)).filter(lambda key: key > 10).repeat(), face) == []


@on_both_faces
def test_merge_starves_no_source(face: Face) -> None:
    """Of endless sources that are always ready each has its turn."""

    async def endless(name: str) -> AsyncIterator[str]:
        while True:
            yield name

    loader = Pipeline.merge(partial(endless, "a"), partial(endless, "b"), partial(endless, "c")).take(300)
    counts = Counter(collect(loader, face))
    assert min(counts.values()) >= 50


def test_a_with_block_keeps_one_loop_for_all_epochs() -> None:
    """Clients made on it in the first epoch are of use in the second; without the block each epoch has its own."""
    loops: list[asyncio.AbstractEventLoop] = []

    async def fetch(key: int) -> int:
        loops.append(asyncio.get_running_loop())
        return key

    loader = Pipeline(range(2)).map(fetch)
    with loader:
        assert list(loader) == list(loader) == [0, 1]
        assert len({id(loop) for loop in loops}) == 1
        assert not loops[0].is_closed()
    assert loops[0].is_closed()
    list(loader)
    assert loops[-1] is not loops[0]
