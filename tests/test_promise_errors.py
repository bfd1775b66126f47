"""Promise 2: errors stand at their place, as the user's own objects, and nothing is dropped in silence."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator
from queue import Empty, Queue
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, IterableDataset

from aioloader import DataLoader, Pipeline
from aioloader.errors import SampleCancelledError
from aioloader.testing import FaultySource, SyncFaultySource, virtual_order
from tests._support import Face, Steps, collect, join_loader_threads, notes, on_both_faces, run

pytestmark = pytest.mark.usefixtures("fork_server")


class BrokenSampleError(Exception):
    """What the user's code raises."""

    def __init__(self, key: int) -> None:
        super().__init__(key, "broken")  # not rebuilt by `type(error)(str(error))`, as wrappers do
        self.key = key


class Broken:
    """A function that fails for some keys, always with the same object for the same key."""

    def __init__(self, *keys: int) -> None:
        self.errors = {key: BrokenSampleError(key) for key in keys}

    def __call__(self, key: int) -> int:
        if key in self.errors:
            raise self.errors[key]
        return key


class AsyncBroken(Broken):
    async def __call__(self, key: int) -> int:  # type: ignore[override]
        await asyncio.sleep(0)
        return super().__call__(key)


def decode(broken: Broken) -> Callable[[int], int]:
    """A plain function named `decode`."""

    def decode(key: int) -> int:
        return Broken.__call__(broken, key)

    return decode


def async_decode(broken: Broken) -> Any:
    """An async function named `decode`."""

    async def decode(key: int) -> int:
        await asyncio.sleep(0)
        return Broken.__call__(broken, key)

    return decode


either_kind = pytest.mark.parametrize("make", [decode, async_decode], ids=["sync", "async"])


@on_both_faces
@either_kind
def test_a_failed_sample_raises_at_its_place(face: Face, make: Any) -> None:
    """The samples before it come, then its error, then those behind it."""
    broken = Broken(3, 4, 9)
    with Steps(Pipeline(range(10)).map(make(broken), concurrency=4), face) as steps:
        found = steps.outcomes()

    assert found == [0, 1, 2, broken.errors[3], broken.errors[4], 5, 6, 7, 8, broken.errors[9]]


@on_both_faces
@either_kind
def test_a_failed_sample_raises_in_place_of_its_batch(face: Face, make: Any) -> None:
    """The batch with the failed sample is the error; the next `next()` gives the following batch."""
    broken = Broken(4)
    with Steps(Pipeline(range(10)).map(make(broken), concurrency=4).batch(2, collate_fn=list), face) as steps:
        assert steps.rest(2) == [[0, 1], [2, 3]]
        with pytest.raises(BrokenSampleError) as caught:
            steps.next()
        assert steps.rest() == [[6, 7], [8, 9]]

    assert caught.value is broken.errors[4]


@on_both_faces
@either_kind
def test_a_failed_sample_is_named(face: Face, make: Any) -> None:
    """A note on the error names the stage, the key, the epoch and the position."""
    broken = Broken(7)
    loader = Pipeline(range(10)).map(make(broken), concurrency=4)
    for epoch in range(2):
        with Steps(loader, face) as steps:
            error = steps.outcomes()[7]
        text = notes(error)
        assert error is broken.errors[7]
        assert "map(decode)" in text
        assert re.search(r"\b(key|index) 7\b", text)
        assert f"epoch {epoch}" in text
        assert "position 7" in text


@on_both_faces
def test_a_shuffled_sample_is_named_by_key_and_position(face: Face) -> None:
    """The key says which sample it is, the position where in the epoch it stood."""
    broken = Broken(7)
    loader = Pipeline(range(10)).shuffle(seed=3)
    (expected,) = [position for position, key in enumerate(collect(loader, face)) if key == 7]

    failing = Pipeline(range(10)).shuffle(seed=3).map(decode(broken))
    with Steps(failing, face) as steps:
        found = steps.outcomes()

    assert found[expected] is broken.errors[7]
    assert f"position {expected}" in notes(broken.errors[7])
    assert re.search(r"\b(key|index) 7\b", notes(broken.errors[7]))


@on_both_faces
def test_the_traceback_shows_the_users_line(face: Face) -> None:
    """A traceback of the error leads to the line of the user's function that raised it."""
    broken = Broken(1)
    with Steps(Pipeline(range(3)).map(decode(broken)), face) as steps:
        steps.next()
        with pytest.raises(BrokenSampleError) as caught:
            steps.next()
    assert any(entry.name == "decode" for entry in caught.traceback)


@on_both_faces
@settings(max_examples=80)
@given(
    n=st.integers(0, 30),
    failing=st.sets(st.integers(0, 29), max_size=6),
    size=st.integers(1, 5),
    drop_last=st.booleans(),
    width=st.integers(1, 8),
    seed=st.integers(0, 2**16),
)
def test_batches_around_errors_stay_as_they_are(
    face: Face, n: int, failing: set[int], size: int, drop_last: bool, width: int, seed: int
) -> None:
    """An error takes the place of its own batch and moves no sample to another one."""
    broken = Broken(*failing)
    expected: list[Any] = []
    for start in range(0, n, size):
        keys = range(start, min(start + size, n))
        bad = sorted(failing.intersection(keys))
        if bad:  # in a short last batch under `drop_last` too: nothing is dropped in silence
            expected.append(broken.errors[bad[0]])
        elif len(keys) == size or not drop_last:
            expected.append(list(keys))
    loader = Pipeline(range(n)).map(virtual_order(seed)(broken), concurrency=width)

    with Steps(loader.batch(size, drop_last=drop_last, collate_fn=list), face) as steps:
        found = steps.outcomes()

    assert found == expected


@on_both_faces
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_failing_predicate_stands_at_its_place(face: Face, asynchronous: bool) -> None:
    """`filter`: the sample is neither kept nor dropped, it is the error."""
    error = BrokenSampleError(4)

    def even(key: int) -> bool:
        if key == 4:
            raise error
        return key % 2 == 0

    async def async_even(key: int) -> bool:
        await asyncio.sleep(0)
        return even(key)

    with Steps(Pipeline(range(10)).filter(async_even if asynchronous else even), face) as steps:
        assert steps.outcomes() == [0, 2, error, 6, 8]
    assert "filter" in notes(error)


@on_both_faces
@pytest.mark.parametrize("how", ["sync", "async", "in place of a chunk", "in a process"])
def test_a_predicate_without_a_truth_value_fails_at_its_place(face: Face, how: str) -> None:
    """A tensor of two elements is neither true nor false: it says so when it is asked, outside the function."""

    def keep(key: int) -> Any:
        return torch.ones(2) if key == 4 else key % 2 == 0

    async def async_keep(key: int) -> Any:
        await asyncio.sleep(0)
        return keep(key)

    pipeline = Pipeline(range(10))
    if how == "in place of a chunk":
        pipeline = pipeline.cache(memory_bytes=1 << 20)
    pipeline = pipeline.filter(async_keep if how == "async" else keep)
    with pipeline.in_process() if how == "in a process" else pipeline as loader, Steps(loader, face) as steps:
        outcomes = steps.outcomes()
    assert [outcome for outcome in outcomes if isinstance(outcome, int)] == [0, 2, 6, 8]
    assert isinstance(outcomes[2], RuntimeError)
    assert "key 4" in notes(outcomes[2])


class UnspeakableError(Exception):
    """Nothing of it can be asked for."""

    def __repr__(self) -> str:
        raise AttributeError("no response")

    __str__ = __repr__

    def add_note(self, note: str) -> None:
        raise AttributeError("no notes")


@on_both_faces
@pytest.mark.parametrize("executor", [None, "process"])
def test_exceptions_that_cannot_be_shown_stand_at_their_place(face: Face, executor: Any) -> None:
    """Also two in one batch, where one tells of the other."""

    def fail(key: int) -> int:
        if key in (1, 2):
            raise UnspeakableError(key)
        return key

    async def outcomes(batches: AsyncIterator[Any]) -> list[Any]:  # in one task: asyncio shows those that fail
        found: list[Any] = []
        for _ in range(2):
            try:
                found.append(await anext(batches))
            except Exception as error:
                found.append(error)
        return found

    with Pipeline(range(6)).map(fail, executor=executor).batch(4) as loader:
        if face == "for":
            with Steps(loader, face) as steps:
                error, batch = steps.outcomes()
        else:

            async def both() -> list[Any]:
                async with loader:
                    return await outcomes(aiter(loader))

            error, batch = run(both)
    assert type(error).__name__ == "UnspeakableError"
    assert batch.tolist() == [4, 5]


@on_both_faces
def test_the_first_of_several_errors_names_the_others(face: Face) -> None:
    """Each with its key."""
    broken = Broken(1, 2)
    with Steps(Pipeline(range(4)).map(broken).batch(4), face) as steps:
        assert steps.outcomes() == [broken.errors[1]]
    assert "1 more samples of this batch failed: key 2: BrokenSampleError(2, 'broken')" in notes(broken.errors[1])


@on_both_faces
def test_a_failing_collate_fn_names_the_samples(face: Face) -> None:
    """By the keys that they were loaded by: in a pipeline, and in `DataLoader` in a worker and without."""
    error = ValueError("no batch of these")

    def collate(samples: list[int]) -> list[int]:
        if 3 in samples:
            raise error
        return samples

    async def async_collate(samples: list[int]) -> list[int]:
        return collate(samples)

    for loader in (
        Pipeline([1, 3, 5]).map(int).batch(2, collate_fn=collate),
        Pipeline([1, 3, 5]).map(int).batch(2, collate_fn=async_collate),
        DataLoader([1, 3, 5], 2, collate_fn=collate),
        DataLoader([1, 3, 5], 2, collate_fn=collate, num_workers=2),
    ):
        error.__notes__ = []
        with Steps(loader, face) as steps:
            assert steps.outcomes() == [error, [5]]
        assert re.search(r"cannot collate: samples with keys \[(1, 3|0, 1)\]", notes(error)), notes(error)


@on_both_faces
@pytest.mark.parametrize("asynchronous", [False, True])
def test_flat_map_fails_in_the_middle_and_goes_on(face: Face, asynchronous: bool) -> None:
    """What a sample gave before its failure comes first, then the error, then the next sample's."""
    error = BrokenSampleError(1)

    def parts(key: int) -> Iterator[tuple[int, int]]:
        yield key, 0
        if key == 1:
            raise error
        yield key, 1

    async def async_parts(key: int) -> AsyncIterator[tuple[int, int]]:
        for part in parts(key):
            yield part

    with Steps(Pipeline(range(3)).flat_map(async_parts if asynchronous else parts), face) as steps:
        assert steps.outcomes() == [(0, 0), (0, 1), (1, 0), error, (2, 0), (2, 1)]
    assert "flat_map" in notes(error)


@on_both_faces
def test_a_failing_collate_stands_at_its_batch(face: Face) -> None:
    """`collate_fn` fails for one batch: the user's error, then the following batches."""
    error = BrokenSampleError(2)

    def collate(samples: list[int]) -> list[int]:
        if 2 in samples:
            raise error
        return samples

    with Steps(Pipeline(range(6)).batch(2, collate_fn=collate), face) as steps:
        assert steps.outcomes() == [[0, 1], error, [4, 5]]


def failing_sources() -> list[Any]:
    """A source of each kind that gives 0 to 4 and then fails."""

    def generator(error: Exception) -> Iterator[int]:
        yield from range(5)
        raise error

    async def async_generator(error: Exception) -> AsyncIterator[int]:
        for sample in range(5):
            yield sample
        raise error

    return [
        pytest.param(lambda error: FaultySource(range(9), {5: error}), id="async"),
        pytest.param(lambda error: SyncFaultySource(range(9), {5: error}), id="sync"),
        pytest.param(lambda error: lambda: generator(error), id="generator"),
        pytest.param(lambda error: lambda: async_generator(error), id="async-generator"),
    ]


class LoadsMany(Dataset[int]):
    """Loads samples together; some cannot be loaded."""

    def __init__(self, length: int, *broken: int) -> None:
        self._length = length
        self._broken = broken
        self.asked: list[list[int]] = []

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> int:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[int]:
        self.asked.append(list(indices))
        if bad := [index for index in indices if index in self._broken]:
            raise ValueError(f"no {bad[0]}")
        return list(indices)


@on_both_faces
@pytest.mark.parametrize("collate_fn", [None, list, torch.tensor])
@pytest.mark.parametrize("before", ["nothing", "shuffle", "in_process"])
def test_an_error_in_what_drop_last_leaves_out_is_raised(face: Face, collate_fn: Any, before: str) -> None:
    """Where samples are loaded together, too; and no batch is made of them."""
    broken = 9
    loader = Pipeline(LoadsMany(10, *([broken] if before != "shuffle" else range(10))))
    if before == "shuffle":
        loader = loader.shuffle()
    loader = loader.batch(4, drop_last=True, collate_fn=collate_fn)
    if before == "in_process":
        loader = loader.in_process()
    with loader, Steps(loader, face) as steps:
        outcomes = steps.outcomes()
    assert len(outcomes) == 3
    assert isinstance(outcomes[-1], ValueError)
    assert str(outcomes[-1]).startswith("no ")
    assert "position 8" in notes(outcomes[-1])


@on_both_faces
def test_what_drop_last_leaves_out_is_left_out(face: Face) -> None:
    """When nothing is wrong with it; collate is not asked."""

    def collate(samples: list[int]) -> list[int]:
        assert len(samples) == 4
        return samples

    dataset = LoadsMany(10)
    loader = Pipeline(dataset).batch(4, drop_last=True, collate_fn=collate)
    assert collect(loader, face) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert dataset.asked[-1] == [8, 9]
    assert len(loader) == 2


@on_both_faces
@pytest.mark.parametrize("make", failing_sources())
@pytest.mark.parametrize("drop_last", [False, True])
def test_a_failed_source_gives_what_it_has_then_the_error_then_the_end(face: Face, make: Any, drop_last: bool) -> None:
    """In the middle of a batch: a short batch (with `drop_last` none), the error once, the end."""
    error = BrokenSampleError(5)
    with Steps(Pipeline(make(error)).batch(2, drop_last=drop_last, collate_fn=list), face) as steps:
        found = steps.outcomes()
        with pytest.raises(StopIteration):
            steps.next()

    short = [] if drop_last else [[4]]
    assert found == [[0, 1], [2, 3], *short, error]


@on_both_faces
def test_a_failed_source_is_not_asked_again(face: Face) -> None:
    """Even one that could go on is left alone after its failure."""
    source = FaultySource(range(9), {3: BrokenSampleError(3)})
    with Steps(Pipeline(source).map(virtual_order(0)(lambda key: key), concurrency=2), face) as steps:
        assert [type(outcome) for outcome in steps.outcomes()] == [int, int, int, BrokenSampleError]
    assert source.reads == 4


@on_both_faces
def test_a_source_that_fails_at_once_is_an_error_and_no_empty_epoch(face: Face) -> None:
    """No sample at all: the error comes first."""
    error = BrokenSampleError(0)
    with Steps(Pipeline(FaultySource(range(3), {0: error})).batch(2), face) as steps:
        assert steps.outcomes() == [error]


@on_both_faces
def test_a_source_function_that_fails_is_an_error(face: Face) -> None:
    """A function that should return the source raises: its own error, at `next()`."""
    error = BrokenSampleError(0)

    def listing() -> list[int]:
        raise error

    with Steps(Pipeline(listing).batch(2), face) as steps:
        assert steps.outcomes() == [error]


@on_both_faces
def test_one_missing_item_is_an_error_in_its_place(face: Face) -> None:
    """A map-style dataset fails for one index; the others come. (A stream ends, an index does not.)"""
    with Steps(Pipeline(Items(6, Broken(2))), face) as steps:
        found = steps.outcomes()
    assert [type(outcome) for outcome in found] == [int, int, BrokenSampleError, int, int, int]


@on_both_faces
def test_an_index_error_of_an_item_does_not_end_the_epoch(face: Face) -> None:
    """`__getitem__` raises IndexError within the length: an error like others, not the end of a sequence."""
    error = IndexError("no such file")

    class Listing(Dataset[int]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> int:
            if index == 1:
                raise error
            return index

    with Steps(Pipeline(Listing()), face) as steps:
        assert steps.outcomes() == [0, error, 2, 3]


class Items(Dataset[int]):
    """A map-style dataset, some of whose items are broken."""

    def __init__(self, n: int, broken: Broken) -> None:
        self.n = n
        self.broken = broken

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> int:
        return Broken.__call__(self.broken, index)


class AsyncItems(Items):
    async def __getitem__(self, index: int) -> int:  # type: ignore[override]
        await asyncio.sleep(0)
        return super().__getitem__(index)


@on_both_faces
@pytest.mark.parametrize("kind", [Items, AsyncItems])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_dataloader_raises_at_the_batch_and_goes_on(face: Face, kind: type[Items], num_workers: int) -> None:
    """The drop-in: the user's own object with a note, then the following batch."""
    broken = Broken(5)
    with Steps(DataLoader(kind(8, broken), batch_size=2, num_workers=num_workers), face) as steps:
        found = steps.outcomes()

    assert [batch.tolist() if isinstance(batch, torch.Tensor) else batch for batch in found] == [
        [0, 1],
        [2, 3],
        broken.errors[5],
        [6, 7],
    ]
    assert re.search(r"\b(key|index) 5\b", notes(broken.errors[5]))
    assert "epoch 0" in notes(broken.errors[5])
    assert re.search(r"\b(position 5|batch 2)$", notes(broken.errors[5]))


class BrokenStream(IterableDataset[int]):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __iter__(self) -> Iterator[int]:
        yield from range(3)
        raise self.error


@on_both_faces
@pytest.mark.parametrize("num_workers", [0, 2])
def test_dataloader_gives_the_short_batch_before_a_failed_stream(face: Face, num_workers: int) -> None:
    """An `IterableDataset` that fails: what was read comes, then the error, then the end."""
    error = BrokenSampleError(3)
    with Steps(DataLoader(BrokenStream(error), batch_size=2, num_workers=num_workers), face) as steps:
        found = steps.outcomes()
    assert [batch.tolist() if isinstance(batch, torch.Tensor) else batch for batch in found] == [[0, 1], [2], error]


@on_both_faces
@pytest.mark.parametrize("stop", [StopIteration, StopAsyncIteration])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_stop_from_user_code_does_not_end_the_epoch(face: Face, stop: type[Exception], asynchronous: bool) -> None:
    """A stray StopIteration in a map would end the loop in silence: it becomes a RuntimeError, as in generators."""

    def first(key: int) -> int:
        if key == 2:
            raise stop
        return key

    fn: Any = virtual_order(0)(first) if asynchronous else first
    with Steps(Pipeline(range(5)).map(fn, concurrency=2), face) as steps:
        found = steps.outcomes()

    assert found[:2] + found[3:] == [0, 1, 3, 4]
    assert isinstance(found[2], RuntimeError)
    assert isinstance(found[2].__cause__, stop)


@on_both_faces
def test_a_cancelled_sample_is_an_error_and_no_cancellation(face: Face) -> None:
    """User code raises CancelledError while nobody cancelled us: the consumer must not look cancelled."""

    async def fetch(key: int) -> int:
        await asyncio.sleep(0)
        if key == 2:
            raise asyncio.CancelledError("the client gave up")
        return key

    with Steps(Pipeline(range(5)).map(fetch, concurrency=2), face) as steps:
        found = steps.outcomes()

    assert found[:2] + found[3:] == [0, 1, 3, 4]
    assert isinstance(found[2], SampleCancelledError)


@on_both_faces
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_timeout_in_user_code_is_an_error_like_others(face: Face, asynchronous: bool) -> None:
    """TimeoutError of a sample is not a timeout of the loader."""

    async def fetch(key: int) -> int:
        if key == 1:
            async with asyncio.timeout(0):
                await asyncio.get_running_loop().create_future()
        return key

    def read(key: int) -> int:
        if key == 1:
            raise TimeoutError
        return key

    with Steps(Pipeline(range(3)).map(fetch if asynchronous else read), face) as steps:
        assert [type(outcome) for outcome in steps.outcomes()] == [int, TimeoutError, int]


@on_both_faces
@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_empty_queue_in_user_code_is_no_timeout(face: Face, num_workers: int) -> None:
    """`queue.Empty` of a sample is the user's, although the loader itself waits at a queue."""
    loader = DataLoader(Items(2, Broken()), collate_fn=lambda _: Queue().get_nowait(), num_workers=num_workers)
    with Steps(loader, face) as steps:
        assert [type(outcome) for outcome in steps.outcomes()] == [Empty, Empty]


@on_both_faces
@pytest.mark.parametrize("asynchronous", [False, True])
def test_system_exit_of_a_sample_reaches_the_consumer(face: Face, asynchronous: bool) -> None:
    """`sys.exit()` in user code is raised where the loop body is, not swallowed in a thread or a loop."""

    def read(key: int) -> int:
        if key == 1:
            raise SystemExit(3)
        return key

    fn: Any = virtual_order(0)(read) if asynchronous else read
    with Steps(Pipeline(range(3)).map(fn, concurrency=1), face) as steps:
        assert steps.next() == 0
        with pytest.raises(SystemExit) as caught:
            steps.next()
    assert caught.value.code == 3


@on_both_faces
def test_errors_reach_through_later_stages(face: Face) -> None:
    """A failed sample goes untouched through everything behind it, and is raised once."""
    broken = Broken(4)
    calls: list[int] = []

    def seen(sample: int) -> int:
        calls.append(sample)
        return sample

    loader = (
        Pipeline(range(8))
        .map(decode(broken))
        .map(seen, concurrency=1)
        .filter(lambda sample: sample != 1)
        .flat_map(lambda sample: [sample, sample])
        .enumerate()
    )
    with Steps(loader, face) as steps:
        found = steps.outcomes()

    assert [outcome for outcome in found if isinstance(outcome, Exception)] == [broken.errors[4]]
    assert [sample for outcome in found if isinstance(outcome, tuple) for sample in outcome[1:]] == [
        0, 0, 2, 2, 3, 3, 5, 5, 6, 6, 7, 7,
    ]  # fmt: skip
    assert found.index(broken.errors[4]) == 6
    assert calls == [0, 1, 2, 3, 5, 6, 7]


@on_both_faces
def test_an_unordered_map_gives_its_errors_too(face: Face) -> None:
    """`ordered=False`: each failed sample raises once, the others come once."""
    broken = Broken(3, 11, 12)
    loader = Pipeline(range(20)).map(virtual_order(4)(broken), concurrency=6, ordered=False)
    with Steps(loader, face) as steps:
        found = steps.outcomes()

    errors = [outcome for outcome in found if isinstance(outcome, Exception)]
    assert sorted(outcome for outcome in found if isinstance(outcome, int)) == sorted(set(range(20)) - {3, 11, 12})
    assert {id(error) for error in errors} == {id(error) for error in broken.errors.values()}
    assert len(errors) == 3


@on_both_faces
def test_an_error_that_is_kept_does_not_keep_the_loader_alive(face: Face) -> None:
    """A notebook remembers the last exception, and its traceback; the loop is over all the same."""
    broken = Broken(3)
    loader = Pipeline(range(1000)).map(decode(broken))
    kept: list[Exception] = []

    async def main() -> None:
        try:
            async for _ in loader:
                pass
        except BrokenSampleError as error:
            kept.append(error)

    if face == "async for":
        run(main)
    else:
        try:
            for _ in loader:
                pass
        except BrokenSampleError as error:
            kept.append(error)
        join_loader_threads()
    assert kept == [broken.errors[3]]
