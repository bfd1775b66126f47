"""`aioloader.DataLoader` does what torch's DataLoader does: the same batches, random numbers, errors and attributes.

Each comparison builds both from the same arguments and the same `torch.manual_seed`. torch's runs with 0 workers, where
it is simplest; ours with 0 and 2, as threads must not change what comes out.
"""

import asyncio
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    RandomSampler,
    SequentialSampler,
    StackDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data.distributed import DistributedSampler

from aioloader import DataLoader
from aioloader.plan.plan import Single
from aioloader.sources.sampler_order import is_plain
from tests._datasets import (
    AsyncBroken,
    AsyncMade,
    AsyncMadeInBulk,
    AsyncStopping,
    Broken,
    BrokenSampler,
    BrokenStream,
    EvensThenOdds,
    Gated,
    Made,
    MadeInBulk,
    NotInBulk,
    SampleError,
    ShardingStream,
    SizedStream,
    Stopping,
    Stream,
    array,
    assert_same,
    join,
    noisy,
    pair,
    point,
    read_many,
    record,
)
from tests._support import Face, Steps, collect, notes, on_both_faces, run

SEED = 1234
WORKERS = (0, 2)

Arguments = dict[str, Any]


def generator(seed: int = 5) -> torch.Generator:
    made = torch.Generator()
    made.manual_seed(seed)
    return made


def pairs(size: int = 10) -> Made:
    return Made(size, pair)


# Arguments of both loaders. Made anew for each loader, as samplers and generators have a state.
CONFIGURATIONS: dict[str, Callable[[], Arguments]] = {
    # Batches
    "nothing but the dataset": lambda: {"dataset": pairs(3)},
    "batch_size": lambda: {"dataset": pairs(), "batch_size": 4},
    "batch_size that divides": lambda: {"dataset": pairs(8), "batch_size": 4},
    "batch_size beyond the dataset": lambda: {"dataset": pairs(3), "batch_size": 4},
    "drop_last": lambda: {"dataset": pairs(), "batch_size": 4, "drop_last": True},
    "drop_last drops all": lambda: {"dataset": pairs(3), "batch_size": 4, "drop_last": True},
    "collate_fn": lambda: {"dataset": pairs(), "batch_size": 4, "collate_fn": join},
    "many samples": lambda: {"dataset": pairs(500), "batch_size": 7, "shuffle": True},
    # Order
    "shuffle": lambda: {"dataset": pairs(), "batch_size": 4, "shuffle": True},
    "shuffle with drop_last": lambda: {"dataset": pairs(), "batch_size": 4, "shuffle": True, "drop_last": True},
    "shuffle with generator": lambda: {
        "dataset": pairs(),
        "batch_size": 4,
        "shuffle": True,
        "generator": generator(),
    },
    "generator without shuffle": lambda: {"dataset": pairs(), "batch_size": 4, "generator": generator()},
    "SequentialSampler": lambda: {"dataset": pairs(), "sampler": SequentialSampler(range(7)), "batch_size": 3},
    "RandomSampler with replacement": lambda: {
        "dataset": pairs(),
        "sampler": RandomSampler(range(10), replacement=True, num_samples=75),
        "batch_size": 4,
    },
    "RandomSampler with more samples than there are": lambda: {
        "dataset": pairs(),
        "sampler": RandomSampler(range(10), num_samples=25, generator=generator()),
        "batch_size": 4,
    },
    "RandomSampler that shares the loader's generator": lambda: (
        lambda shared: {
            "dataset": pairs(),
            "sampler": RandomSampler(range(10), generator=shared),
            "batch_size": 4,
            "generator": shared,
        }
    )(generator()),
    "WeightedRandomSampler": lambda: {
        "dataset": pairs(),
        "sampler": WeightedRandomSampler([0.1, 0.9, 0.4, 0.7, 3.0], 12),
        "batch_size": 5,
    },
    "SubsetRandomSampler": lambda: {
        "dataset": pairs(),
        "sampler": SubsetRandomSampler([1, 3, 5, 7, 9]),
        "batch_size": 2,
    },
    "a list as sampler": lambda: {"dataset": pairs(), "sampler": [3, 1, 4, 1, 5], "batch_size": 2, "drop_last": True},
    "a sampler of one's own": lambda: {"dataset": pairs(), "sampler": EvensThenOdds(9), "batch_size": 2},
    "keys that are no numbers": lambda: {"dataset": {"a": 1, "b": 2, "c": 3}, "sampler": ["c", "a"], "batch_size": 2},
    "BatchSampler": lambda: {
        "dataset": pairs(),
        "batch_sampler": BatchSampler(RandomSampler(range(10)), 3, drop_last=False),
    },
    "batch_sampler of unequal batches": lambda: {"dataset": pairs(), "batch_sampler": [[0], [3, 1, 2], [9, 9], [4]]},
    "batch_sampler of one's own": lambda: {
        "dataset": pairs(),
        "batch_sampler": BatchSampler(EvensThenOdds(9), 4, True),
    },
    "a generator as sampler, once": lambda: {
        "dataset": pairs(),
        "sampler": (index for index in range(5)),
        "batch_size": 2,
    },
    "tensors as keys": lambda: {"dataset": pairs(), "sampler": torch.tensor([3, 1, 2]), "batch_size": 2},
    "a tensor as batch_sampler": lambda: {"dataset": pairs(), "batch_sampler": torch.arange(6).reshape(3, 2)},
    "an empty batch": lambda: {"dataset": pairs(), "batch_sampler": [[1], [], [2]], "collate_fn": len},
    # Datasets
    "TensorDataset": lambda: {
        "dataset": TensorDataset(torch.arange(10.0).reshape(5, 2), torch.arange(5)),
        "batch_size": 2,
        "shuffle": True,
    },
    "Subset": lambda: {"dataset": Subset(pairs(), [9, 2, 5, 5, 0]), "batch_size": 2, "shuffle": True},
    "ConcatDataset": lambda: {"dataset": ConcatDataset([pairs(3), pairs(4)]), "batch_size": 2, "shuffle": True},
    "StackDataset": lambda: {"dataset": StackDataset(pairs(5), Made(5, record)), "batch_size": 2},
    "StackDataset of names": lambda: {"dataset": StackDataset(a=pairs(5), b=MadeInBulk(5, point)), "batch_size": 2},
    "list": lambda: {"dataset": [10, 20, 30, 40, 50], "batch_size": 2, "shuffle": True},
    "ndarray": lambda: {"dataset": np.arange(12.0).reshape(6, 2), "batch_size": 4, "shuffle": True},
    "tensor": lambda: {"dataset": torch.arange(12.0).reshape(6, 2), "batch_size": 4, "shuffle": True},
    "range": lambda: {"dataset": range(5), "batch_size": 2},
    "dict samples": lambda: {"dataset": Made(5, record), "batch_size": 2, "shuffle": True},
    "named tuple samples": lambda: {"dataset": Made(5, point), "batch_size": 2},
    "str samples": lambda: {"dataset": Made(5, str), "batch_size": 2},
    "__getitems__": lambda: {"dataset": MadeInBulk(10, pair), "batch_size": 4, "shuffle": True},
    "__getitems__ with batch_sampler": lambda: {"dataset": MadeInBulk(10, pair), "batch_sampler": [[5], [2, 7]]},
    "__getitems__ that is None": lambda: {"dataset": NotInBulk(10, pair), "batch_size": 4},
    "empty dataset": lambda: {"dataset": pairs(0), "batch_size": 2},
    # batch_size=None
    "no batches": lambda: {"dataset": Made(4, pair), "batch_size": None},
    "no batches, shuffle": lambda: {"dataset": Made(6, record), "batch_size": None, "shuffle": True},
    "no batches, arrays": lambda: {"dataset": Made(4, array), "batch_size": None},
    "no batches, named tuples": lambda: {"dataset": Made(4, point), "batch_size": None},
    "no batches, collate_fn": lambda: {"dataset": Made(4, pair), "batch_size": None, "collate_fn": repr},
    "no batches, lists as keys": lambda: {
        "dataset": Made(10, read_many),
        "batch_size": None,
        "sampler": BatchSampler(RandomSampler(range(10)), 4, drop_last=False),
    },
    "no batches, a dataset with __getitems__": lambda: {"dataset": Subset(pairs(), [4, 2, 3]), "batch_size": None},
    # Streams
    "stream": lambda: {"dataset": Stream(10, pair), "batch_size": 4},
    "stream, batch_size that divides": lambda: {"dataset": Stream(8, record), "batch_size": 4},
    "stream, drop_last": lambda: {"dataset": Stream(10, pair), "batch_size": 4, "drop_last": True},
    "stream, collate_fn": lambda: {"dataset": Stream(10, pair), "batch_size": 4, "collate_fn": join},
    "stream, shuffle=False": lambda: {"dataset": Stream(3, point), "shuffle": False},
    "stream, no batches": lambda: {"dataset": Stream(4, record), "batch_size": None},
    "stream, no batches, arrays": lambda: {"dataset": Stream(4, array), "batch_size": None},
    "stream, generator": lambda: {"dataset": Stream(4, pair), "generator": generator()},
    "stream, empty": lambda: {"dataset": Stream(0, pair), "batch_size": 2},
}


def epoch_of_torch(loader: TorchDataLoader[Any]) -> tuple[list[Any], torch.Tensor]:
    """The batches of one epoch, and the state of the global generator after it."""
    return list(loader), torch.get_rng_state()


def assert_two_epochs_as_torch(theirs: Arguments, ours: Arguments, face: Face) -> None:
    """Both give the same batches in two epochs, and draw the same random numbers."""
    torch.manual_seed(SEED)
    torch_loader = TorchDataLoader(**theirs)
    expected = [epoch_of_torch(torch_loader) for _ in range(2)]
    torch.manual_seed(SEED)
    loader: DataLoader[Any] = DataLoader(**ours)
    for batches, state in expected:
        assert_same(collect(loader, face), batches)
        assert torch.equal(torch.get_rng_state(), state), (
            "the global generator was drawn from more, or less, than torch does"
        )
    if theirs.get("generator") is not None:
        assert torch.equal(ours["generator"].get_state(), theirs["generator"].get_state())


@on_both_faces
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_gives_the_batches_of_torch(name: str, face: Face) -> None:
    """Two epochs in a row, with 0 and 2 workers: batches, their types, and the random numbers drawn."""
    make = CONFIGURATIONS[name]
    for workers in WORKERS:
        assert_two_epochs_as_torch(make(), make() | {"num_workers": workers}, face)


def test_has_the_length_and_attributes_of_torch() -> None:
    """`len()` and what trainers read, for every configuration; where torch raises TypeError, so do we."""
    for make in CONFIGURATIONS.values():
        theirs = TorchDataLoader(**make())
        ours: DataLoader[Any] = DataLoader(**make())
        try:
            expected = len(theirs)
        except TypeError:
            with pytest.raises(TypeError):
                len(ours)
        else:
            assert len(ours) == expected
        assert ours.batch_size == theirs.batch_size
        assert ours.drop_last == theirs.drop_last
        assert ours.num_workers == theirs.num_workers


@pytest.mark.parametrize(
    "arguments",
    [{"batch_size": 4}, {"batch_size": 4, "drop_last": True}, {"batch_size": None}],
    ids=["batches", "drop_last", "no batches"],
)
def test_a_stream_with_a_length_gives_the_length_of_torch(arguments: Arguments) -> None:
    """The length counts batches, rounded as drop_last says."""
    assert len(DataLoader(SizedStream(10, pair), **arguments)) == len(
        TorchDataLoader(SizedStream(10, pair), **arguments)
    )


@on_both_faces
@pytest.mark.parametrize(
    "extra",
    [
        {"prefetch_factor": 1},
        {"prefetch_factor": 5, "persistent_workers": True},
        {"in_order": True, "timeout": 60},
        {"multiprocessing_context": "spawn"},
    ],
    ids=["prefetch_factor", "persistent_workers", "in_order", "multiprocessing_context"],
)
def test_arguments_about_workers_change_no_batch(extra: Arguments, face: Face) -> None:
    """What says how workers work says nothing about what comes out."""
    arguments: Arguments = {"batch_size": 4, "shuffle": True}
    # torch's persistent workers have one base seed for all epochs: one draw less in the second.
    theirs: Arguments = {"num_workers": 1, **extra} if "persistent_workers" in extra else {}
    assert_two_epochs_as_torch(
        {"dataset": pairs(50), **arguments, **theirs},
        {"dataset": pairs(50), **arguments, "num_workers": 2, **extra},
        face,
    )


@on_both_faces
def test_without_workers_a_dataset_draws_what_it_draws_under_torch(face: Face) -> None:
    """Samples are made one after the other, between the same draws of the sampler: augmentation is the same."""
    for arguments in ({}, {"shuffle": True}, {"sampler": RandomSampler(range(50), replacement=True, num_samples=70)}):
        assert_two_epochs_as_torch(
            {"dataset": Made(50, noisy), "batch_size": 4, **arguments},
            {"dataset": Made(50, noisy), "batch_size": 4, **arguments},
            face,
        )


@on_both_faces
@pytest.mark.parametrize(
    "arguments",
    [
        {"batch_size": 4, "shuffle": True},
        {"batch_size": 4, "drop_last": True, "collate_fn": join},
        {"batch_sampler": [[0], [3, 1, 2], [9, 9]]},
        {"batch_sampler": [[1], [], [2]], "collate_fn": len},
        {"batch_size": None, "shuffle": True},
    ],
    ids=["shuffle", "collate_fn", "batch_sampler", "an empty batch", "no batches"],
)
def test_async_datasets_give_the_batches_of_their_sync_twins(arguments: Arguments, face: Face) -> None:
    """`async def __getitem__` and `async def __getitems__`, whatever the number of workers and samples at once."""
    twins: list[tuple[type[Made], type[Made]]] = [(AsyncMade, Made)]
    if arguments.get("batch_size", 1) is not None:  # without batches torch asks for single samples
        twins.append((AsyncMadeInBulk, MadeInBulk))
    for asynchronous, synchronous in twins:
        for ours in ({}, {"num_workers": 2}, {"concurrency": 1}, {"concurrency": 3}):
            assert_two_epochs_as_torch(
                {"dataset": synchronous(10, pair), **arguments},
                {"dataset": asynchronous(10, pair), **arguments, **ours},
                face,
            )


async def join_async(samples: Any) -> Any:
    """As `join`, with a turn of the loop in between."""
    await asyncio.sleep(0)
    return join(samples) if isinstance(samples, list) else samples


@on_both_faces
@pytest.mark.parametrize(
    "arguments",
    [
        {"dataset": Made(10, pair), "batch_size": 4, "shuffle": True},
        {"dataset": MadeInBulk(10, pair), "batch_size": 4, "drop_last": True},
        {"dataset": Made(10, pair), "batch_sampler": [[0], [3, 1, 2], [], [9, 9]]},
        {"dataset": Made(10, pair), "batch_size": None},
        {"dataset": Stream(10, pair), "batch_size": 4},
        {"dataset": Stream(10, pair), "batch_size": None},
    ],
    ids=["shuffle", "in bulk", "batch_sampler", "no batches", "a stream", "a stream, no batches"],
)
def test_an_async_collate_fn_gives_the_batches_of_its_sync_twin(arguments: Arguments, face: Face) -> None:
    """Over sync datasets too: they are read where they always are, and the function is awaited on the loop."""
    twin = join if arguments.get("batch_size", 1) is not None else (lambda sample: sample)
    for ours in ({"num_workers": 0}, {"num_workers": 2}):
        assert_two_epochs_as_torch(
            {**arguments, "collate_fn": twin}, {**arguments, "collate_fn": join_async, **ours}, face
        )
    asynchronous = {Made: AsyncMade, MadeInBulk: AsyncMadeInBulk}.get(type(arguments["dataset"]))
    if asynchronous is not None and (asynchronous is AsyncMade or arguments.get("batch_size", 1) is not None):
        assert_two_epochs_as_torch(
            {**arguments, "collate_fn": twin},
            {**arguments, "dataset": asynchronous(10, pair), "collate_fn": join_async},
            face,
        )


def test_an_async_collate_fn_runs_on_the_consumers_loop_and_the_dataset_does_not() -> None:
    """Under `async for`, whatever the number of workers."""
    places: set[tuple[str, object]] = set()

    def make(index: int) -> int:
        assert asyncio._get_running_loop() is None
        return index

    async def collate(samples: list[int]) -> int:
        places.add((threading.current_thread().name, asyncio.get_running_loop()))
        return len(samples)

    async def main() -> None:
        for workers in (0, 2):
            loader: DataLoader[Any] = DataLoader(Made(6, make), 4, collate_fn=collate, num_workers=workers)
            assert [batch async for batch in loader] == [4, 2]
        assert places == {(threading.current_thread().name, asyncio.get_running_loop())}

    run(main)


@on_both_faces
def test_nothing_is_made_ahead_of_an_async_collate_fn_without_workers(face: Face) -> None:
    """`num_workers=0` means that for every sync dataset."""
    loaded: list[int] = []

    def make(index: int) -> tuple[int, int]:
        loaded.append(index)
        return index, index

    loader: DataLoader[Any] = DataLoader(Made(6, make), 2, collate_fn=join_async)
    with Steps(loader, face) as steps:
        for count in (1, 2, 3):
            steps.next()
            assert loaded == list(range(2 * count))
        assert steps.rest() == []


@on_both_faces
def test_a_failed_async_collate_fn_raises_at_the_place_of_its_batch(face: Face) -> None:
    """With the keys of its samples in the note."""
    error = SampleError(5, "does not fit")

    async def collate(samples: list[Any]) -> int:
        if samples[0][1] == 16:
            raise error
        return len(samples)

    for workers in WORKERS:
        loader: DataLoader[Any] = DataLoader(pairs(), batch_size=4, collate_fn=collate, num_workers=workers)
        assert outcomes(loader, face) == [4, error, 2]
        assert "cannot collate: samples with keys [4, 5, 6, 7]" in notes(error)


@on_both_faces
def test_a_stream_is_read_once_whatever_the_workers(face: Face) -> None:
    """Differs from torch on purpose: there, each of 2 workers reads a copy of the stream, and all comes twice."""
    stream = Stream(10, pair)
    assert_same(
        collect(DataLoader(stream, batch_size=4, num_workers=2), face),
        list(TorchDataLoader(Stream(10, pair), batch_size=4)),
    )
    assert stream.reads == 1


@on_both_faces
def test_a_stream_that_shards_itself_by_worker_gives_everything(face: Face) -> None:
    """What torch's documentation tells streams to do: there is one reader, so it has it all to itself."""
    found = collect(DataLoader(ShardingStream(10, pair), batch_size=4, num_workers=2), face)
    assert_same(found, list(TorchDataLoader(ShardingStream(10, pair), batch_size=4)))


@on_both_faces
def test_out_of_order_gives_the_same_batches_in_some_order(face: Face) -> None:
    """`in_order=False`."""
    found = collect(DataLoader(Made(50, int), batch_size=4, num_workers=2, in_order=False), face)
    in_order = sorted(found, key=lambda batch: int(batch[0]))
    assert_same(in_order, list(TorchDataLoader(Made(50, int), batch_size=4)))


@on_both_faces
def test_more_workers_than_cores_need_no_warning(face: Face) -> None:
    """Threads are cheap; torch warns of so many processes."""
    assert_same(
        collect(DataLoader(pairs(), batch_size=4, num_workers=200), face), list(TorchDataLoader(pairs(), batch_size=4))
    )


@on_both_faces
def test_leaving_early_and_iterating_anew_starts_an_epoch(face: Face) -> None:
    """`break`, then another `for`: the draws are those of torch, where each `iter()` is an epoch."""
    torch.manual_seed(SEED)
    torch_loader = TorchDataLoader(pairs(), batch_size=4, shuffle=True)
    expected = [next(iter(torch_loader)), *torch_loader]
    for workers in WORKERS:
        torch.manual_seed(SEED)
        loader: DataLoader[Any] = DataLoader(pairs(), batch_size=4, shuffle=True, num_workers=workers)
        assert_same([*collect(loader, face, limit=1), *collect(loader, face)], expected)


@on_both_faces
def test_several_iterators_of_one_loader_are_epochs_of_their_own(face: Face) -> None:
    """Two that go in turns see what two of torch's see."""
    torch.manual_seed(SEED)
    torch_loader = TorchDataLoader(pairs(), batch_size=4, shuffle=True)
    torch_first = iter(torch_loader)
    expected = [next(torch_first)]
    torch_second = iter(torch_loader)
    for _ in range(2):
        expected += [next(torch_second), next(torch_first)]
    for workers in WORKERS:
        torch.manual_seed(SEED)
        loader: DataLoader[Any] = DataLoader(pairs(), batch_size=4, shuffle=True, num_workers=workers)
        with Steps(loader, face) as first:
            found = [first.next()]
            with Steps(loader, face) as second:
                for _ in range(2):
                    found += [second.next(), first.next()]
        assert_same(found, expected)


# Errors while it runs


def outcomes(loader: Any, face: Face) -> list[Any]:
    """One epoch: batches, and the exceptions in their places."""
    with Steps(loader, face) as steps:
        return steps.outcomes()


@on_both_faces
@pytest.mark.parametrize("broken", [(6,), (0, 11), tuple(range(12))], ids=["one", "first and last", "all"])
def test_a_failed_sample_raises_at_the_place_of_its_batch(broken: tuple[int, ...], face: Face) -> None:
    """As with torch the next batch follows; ours is the user's own object, with a note that names the index."""
    expected = outcomes(TorchDataLoader(Broken(12, *broken), batch_size=4), "for")
    for make in (Broken, AsyncBroken):
        for workers in WORKERS:
            dataset = make(12, *broken)
            found = outcomes(DataLoader(dataset, batch_size=4, num_workers=workers), face)
            assert [type(one) for one in found] == [type(one) for one in expected]
            for ours, theirs in zip(found, expected, strict=True):
                if isinstance(theirs, SampleError):
                    assert ours is dataset.errors[theirs.key]
                    assert str(theirs.key) in notes(ours)
                else:
                    assert_same(ours, theirs)


@on_both_faces
def test_a_failed_collate_fn_raises_at_the_place_of_its_batch(face: Face) -> None:
    """The user's own object there too."""
    error = SampleError(5, "does not fit")

    def collate(samples: list[Any]) -> int:
        if samples[0][1] == 16:
            raise error
        return len(samples)

    for workers in WORKERS:
        loader: DataLoader[Any] = DataLoader(pairs(), batch_size=4, collate_fn=collate, num_workers=workers)
        assert outcomes(loader, face) == [4, error, 2]
        assert "aioloader" in notes(error)


@on_both_faces
def test_samples_that_do_not_fit_are_named(face: Face) -> None:
    """The default collate raises torch's error at the place of the batch; the note has the keys."""
    sizes = [torch.zeros(2), torch.zeros(2), torch.zeros(2), torch.zeros(3), torch.zeros(2)]
    for workers in WORKERS:
        first, error, last = outcomes(DataLoader(sizes, batch_size=2, num_workers=workers), face)
        assert_same([first, last], [torch.zeros(2, 2), torch.zeros(1, 2)])
        assert isinstance(error, RuntimeError)
        assert str(error) == "stack expects each tensor to be equal size, but got [2] at entry 0 and [3] at entry 1"
        assert "sample 0 (key 2) has shape [2], sample 1 (key 3) has shape [3]" in notes(error)


@on_both_faces
def test_a_stop_iteration_of_a_dataset_does_not_end_the_epoch_in_silence(face: Face) -> None:
    """Differs from torch on purpose: there the loop just ends, and the rest of the data is never seen."""
    for make in (Stopping, AsyncStopping):
        for workers in WORKERS:
            found = outcomes(DataLoader(make(12), batch_size=4, num_workers=workers), face)
            assert len(found) == 3
            assert isinstance(found[1], RuntimeError)
            assert "StopIteration" in str(found[1])


@on_both_faces
def test_a_sampler_that_raises_ends_the_epoch(face: Face) -> None:
    """The batches before the error come first, as with torch."""
    expected = outcomes(TorchDataLoader(pairs(), batch_size=4, sampler=BrokenSampler(8)), "for")
    assert [isinstance(one, SampleError) for one in expected] == [False, False, True]
    for workers in WORKERS:
        sampler = BrokenSampler(8)
        found = outcomes(DataLoader(pairs(), batch_size=4, sampler=sampler, num_workers=workers), face)
        assert_same(found[:-1], expected[:-1])
        assert found[-1] is sampler.error


@on_both_faces
def test_a_stream_that_raises_ends_the_epoch(face: Face) -> None:
    """The batches before the error come first. Differs from torch on purpose: so do the samples of its own batch."""
    for workers in WORKERS:
        for size, drop_last, batches in [
            (8, False, [[0, 1, 2, 3], [4, 5, 6, 7]]),
            (6, False, [[0, 1, 2, 3], [4, 5]]),
            (6, True, [[0, 1, 2, 3]]),
        ]:
            stream = BrokenStream(size)
            loader: DataLoader[Any] = DataLoader(stream, batch_size=4, drop_last=drop_last, num_workers=workers)
            found = outcomes(loader, face)
            assert_same(found[:-1], [torch.tensor(batch) for batch in batches])
            assert found[-1] is stream.error


@on_both_faces
def test_a_timeout_is_torchs_error(face: Face) -> None:
    """A dataset that hangs for longer than `timeout` seconds."""
    dataset = Gated(4)
    loader: DataLoader[Any] = DataLoader(dataset, num_workers=2, timeout=0.05)
    with (
        Steps(loader, face) as steps,
        dataset.opened_at_the_end(),
        pytest.raises(RuntimeError, match=r"DataLoader timed out after 0\.05 seconds"),
    ):
        steps.next()


@on_both_faces
def test_worker_init_fn_is_called_once_in_each_worker(face: Face) -> None:
    """With ids from 0, on the thread that is the worker; without workers never."""
    calls: list[tuple[int, threading.Thread]] = []

    def init(worker_id: int) -> None:
        calls.append((worker_id, threading.current_thread()))

    collect(DataLoader(pairs(), worker_init_fn=init), face)
    assert calls == []
    collect(DataLoader(pairs(20), num_workers=2, worker_init_fn=init), face)
    assert sorted(worker_id for worker_id, _ in calls) == [0, 1]
    assert len({thread for _, thread in calls} - {threading.main_thread()}) == 2


@on_both_faces
def test_an_error_of_worker_init_fn_is_the_first_result(face: Face) -> None:
    """The user's own object."""
    error = SampleError(0, "no licence for this worker")

    def init(worker_id: int) -> None:
        raise error

    with Steps(DataLoader(pairs(), num_workers=2, worker_init_fn=init), face) as steps:
        with pytest.raises(SampleError, match="no licence") as caught:
            steps.next()
        assert caught.value is error
        del caught
        error.__traceback__ = None  # its frames hold the iterator, which then could not end here


@on_both_faces
@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator to pin memory for")
def test_pin_memory_without_an_accelerator_warns_and_goes_on(face: Face) -> None:
    """torch's warning, and plain batches."""
    with pytest.warns(UserWarning, match="'pin_memory' argument is set as true but no accelerator is found"):
        expected = list(TorchDataLoader(pairs(), batch_size=4, pin_memory=True))
    for workers in WORKERS:
        with pytest.warns(UserWarning, match="pin_memory"):
            found = collect(DataLoader(pairs(), batch_size=4, pin_memory=True, num_workers=workers), face)
        assert_same(found, expected)


# The constructor

WRONG: dict[str, Callable[[], Arguments]] = {
    "batch_size 0": lambda: {"dataset": pairs(), "batch_size": 0},
    "batch_size -1": lambda: {"dataset": pairs(), "batch_size": -1},
    "batch_size True": lambda: {"dataset": pairs(), "batch_size": True},
    "batch_size 1.5": lambda: {"dataset": pairs(), "batch_size": 1.5},
    "batch_size 0 of a stream": lambda: {"dataset": Stream(4, pair), "batch_size": 0},
    "drop_last is no bool": lambda: {"dataset": pairs(), "drop_last": "yes"},
    "num_workers -1": lambda: {"dataset": pairs(), "num_workers": -1},
    "timeout -1": lambda: {"dataset": pairs(), "timeout": -1},
    "prefetch_factor without workers": lambda: {"dataset": pairs(), "prefetch_factor": 2},
    "prefetch_factor -1": lambda: {"dataset": pairs(), "num_workers": 2, "prefetch_factor": -1},
    "persistent_workers without workers": lambda: {"dataset": pairs(), "persistent_workers": True},
    "sampler and shuffle": lambda: {"dataset": pairs(), "sampler": [0], "shuffle": True},
    "batch_sampler and batch_size": lambda: {"dataset": pairs(), "batch_sampler": [[0]], "batch_size": 4},
    "batch_sampler and no batches": lambda: {"dataset": pairs(), "batch_sampler": [[0]], "batch_size": None},
    "batch_sampler and shuffle": lambda: {"dataset": pairs(), "batch_sampler": [[0]], "shuffle": True},
    "batch_sampler and sampler": lambda: {"dataset": pairs(), "batch_sampler": [[0]], "sampler": [0]},
    "batch_sampler and drop_last": lambda: {"dataset": pairs(), "batch_sampler": [[0]], "drop_last": True},
    "drop_last and no batches": lambda: {"dataset": pairs(), "batch_size": None, "drop_last": True},
    "drop_last and no batches of a stream": lambda: {"dataset": Stream(4, pair), "batch_size": None, "drop_last": True},
    "stream and shuffle": lambda: {"dataset": Stream(4, pair), "shuffle": True},
    "stream and sampler": lambda: {"dataset": Stream(4, pair), "sampler": [0]},
    "stream and batch_sampler": lambda: {"dataset": Stream(4, pair), "batch_sampler": [[0]]},
    "multiprocessing_context without workers": lambda: {"dataset": pairs(), "multiprocessing_context": "spawn"},
    "multiprocessing_context unknown": lambda: {
        "dataset": pairs(),
        "num_workers": 2,
        "multiprocessing_context": "teleport",
    },
    "multiprocessing_context of a wrong type": lambda: {
        "dataset": pairs(),
        "num_workers": 2,
        "multiprocessing_context": 3,
    },
    "shuffle of an empty dataset": lambda: {"dataset": pairs(0), "shuffle": True},
    "shuffle of a dataset without length": lambda: {"dataset": iter([1, 2]), "shuffle": True},
    "unknown argument": lambda: {"dataset": pairs(), "number_of_workers": 2},
    "no dataset": lambda: {"batch_size": 4},
}


def error_of(make: Callable[[], object]) -> Exception:
    try:
        make()
    except Exception as error:
        return error
    pytest.fail("no error was raised")


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_raise_what_torch_raises(name: str) -> None:
    """The same type at the same time: in the constructor."""
    make = WRONG[name]
    theirs = error_of(lambda: TorchDataLoader(**make()))
    ours = error_of(lambda: DataLoader(**make()))
    assert isinstance(ours, type(theirs)), f"{ours!r} where torch raises {theirs!r}"
    assert str(ours)


def test_the_signature_begins_as_torchs() -> None:
    """Names, order, kinds and defaults; what is ours comes after, by keyword only."""
    theirs = list(inspect.signature(TorchDataLoader).parameters.values())
    ours = inspect.signature(DataLoader).parameters
    assert list(ours)[:13] == [parameter.name for parameter in theirs[:13]]
    for parameter in theirs:
        assert ours[parameter.name].kind == parameter.kind
        assert ours[parameter.name].default == parameter.default
    extra = {name: ours[name] for name in ours if name not in {parameter.name for parameter in theirs}}
    assert {name: parameter.default for name, parameter in extra.items()} == {
        "device": None,
        "concurrency": None,
        "ahead": None,
        "ahead_bytes": None,
        "worker_type": "thread",
        "worker_method": None,
        "seed": None,
        "skip_errors": None,
        "retry": None,
        "sample_timeout": None,
        "hedge": None,
        "rate": None,
        "shard": False,
    }
    assert {parameter.kind for parameter in extra.values()} == {inspect.Parameter.KEYWORD_ONLY}


def test_the_worker_method_of_newer_torch_is_understood() -> None:
    """By torch's words, where torch's own constructor may not know them yet."""
    assert DataLoader(pairs(), worker_method="thread").worker_type == "thread"
    assert DataLoader(pairs(), worker_method="multiprocessing").worker_type == "process"
    assert DataLoader(pairs(), worker_method="multiprocessing", worker_type="process").worker_type == "process"
    assert DataLoader(pairs()).worker_type == "thread"
    with pytest.raises(ValueError, match=r"worker_method must be .*, got 'process'"):
        DataLoader(pairs(), worker_method="process")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="got 'thread' and 'process'; pass one of them"):
        DataLoader(pairs(), worker_method="thread", worker_type="process")


def test_what_was_given_cannot_be_replaced_later() -> None:
    """Assigning to these raises ValueError as with torch, and changes nothing."""
    dataset = pairs()
    theirs = TorchDataLoader(dataset, batch_size=4)
    ours: DataLoader[Any] = DataLoader(dataset, batch_size=4)
    for name in ("dataset", "batch_size", "sampler", "batch_sampler", "drop_last", "persistent_workers"):
        with pytest.raises(ValueError, match=name):
            setattr(theirs, name, None)
        with pytest.raises(ValueError, match=name):
            setattr(ours, name, None)
    assert ours.dataset is dataset
    assert ours.batch_size == 4
    assert len(collect(ours, "for")) == 3


def test_is_no_subclass_of_torchs_and_lacks_what_trainers_act_on() -> None:
    """Accelerate, Lightning and Ray rebuild subclasses, and take `sampler` or `_iterator` apart."""
    assert not issubclass(DataLoader, TorchDataLoader)
    loader: DataLoader[Any] = DataLoader(pairs(), batch_size=4, shuffle=True)
    collect(loader, "for")
    assert not hasattr(loader, "sampler")
    assert not hasattr(loader, "_iterator")


def test_takes_a_type_in_brackets() -> None:
    """`DataLoader[int]` in an annotation that is evaluated."""
    assert list(DataLoader[int]([1, 2], batch_size=None)) == [1, 2]


@on_both_faces
def test_set_epoch_reaches_the_sampler_through_batch_sampler(face: Face) -> None:
    """`loader.batch_sampler.sampler.set_epoch(n)` is what trainers call; the order of epoch n is torch's."""
    dataset = pairs(20)

    def sampler() -> DistributedSampler[Any]:
        return DistributedSampler(dataset, num_replicas=2, rank=1, shuffle=True, seed=3)

    for workers in WORKERS:
        theirs, ours = sampler(), sampler()
        torch_loader = TorchDataLoader(dataset, batch_size=4, sampler=theirs)
        loader: DataLoader[Any] = DataLoader(dataset, batch_size=4, sampler=ours, num_workers=workers)
        assert len(loader) == len(torch_loader)
        for epoch in (0, 3, 1):
            theirs.set_epoch(epoch)
            loader.batch_sampler.sampler.set_epoch(epoch)
            assert ours.epoch == epoch
            assert_same(collect(loader, face), list(torch_loader))


class Counting(SequentialSampler):
    """A sampler of the user's, which may want to know what the training loop has done by now."""

    read = 0

    def __iter__(self) -> Iterator[int]:
        for index in super().__iter__():
            self.read += 1
            yield index


def test_a_sampler_of_the_users_is_read_no_further_than_asked() -> None:
    """Room for two batches, and one that is handed out. Keys of torch's samplers may be read ahead: nobody can tell."""
    sampler = Counting(range(1000))
    with Steps(DataLoader(range(1000), batch_size=1, sampler=sampler, num_workers=1), "for") as steps:
        for number in range(1, 100):
            steps.next()
            assert sampler.read <= number + 2


@pytest.mark.parametrize(
    ("sampler", "plain"),
    [
        (SequentialSampler(range(9)), True),
        (RandomSampler(range(9)), True),
        (BatchSampler(RandomSampler(range(9)), 2, drop_last=False), True),
        (DistributedSampler(pairs(), 2, 0), True),
        (BatchSampler([3, 1], 2, drop_last=False), True),
        (RandomSampler(range(9), generator=torch.Generator()), False),
        (BatchSampler(RandomSampler(range(9), generator=torch.Generator()), 2, drop_last=False), False),
        (Counting(range(9)), False),
        (BatchSampler(Counting(range(9)), 2, drop_last=False), False),
    ],
)
def test_keys_are_read_ahead_where_nobody_can_tell(sampler: Any, plain: bool) -> None:
    assert is_plain(sampler) is plain


@pytest.mark.parametrize(
    ("arguments", "ahead"),
    [
        ({"batch_size": 32}, 32),
        ({"batch_size": 256, "shuffle": True}, 16),
        ({"batch_size": 65536}, 8),
        ({"batch_size": None}, 32),
        ({"batch_sampler": BatchSampler(SequentialSampler(range(9)), 1024, drop_last=False)}, 8),
        ({"batch_size": 32, "sampler": Counting(range(9))}, 0),
    ],
)
def test_large_batches_have_fewer_keys_ahead(arguments: dict[str, Any], ahead: int) -> None:
    """Their lists of keys take memory."""
    source = DataLoader(range(9), **arguments)._plan.source
    assert isinstance(source, Single)
    assert source.ahead == ahead
