"""Bad input gets a clear error at once: the rule, the value found, the way out."""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

import aioloader
from aioloader.errors import AioloaderError, DeviceError, LeakedContextError, SourceUsedUpError
from aioloader.testing import RecordingSource
from tests._support import Face, Steps, collect, notes, on_both_faces

# Wrong on purpose: a type checker would refuse most of what follows.
Pipeline: Any = aioloader.Pipeline
DataLoader: Any = aioloader.DataLoader

WAY_OUT = re.compile(r"\b(pass|use|give|choose|install|leave|wrap|make|add|call|set|see|write|must|needs)\b")

SAMPLES = [1, 2, 3]


async def stream() -> AsyncIterator[int]:
    yield 1


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(SAMPLES)


def pieces(sample: Any) -> Iterator[Any]:
    yield sample


async def pieces_later(sample: Any) -> AsyncIterator[Any]:
    yield sample


class Pieces:
    def __call__(self, sample: Any) -> Iterator[Any]:
        yield sample


def finished() -> Iterator[int]:
    """A generator that has given all."""
    generator = (number for number in SAMPLES)
    list(generator)
    return generator


def finished_async() -> AsyncIterator[int]:
    generator = stream()

    async def read() -> None:
        async for _ in generator:
            pass

    asyncio.run(read())
    return generator


BAD: list[Any] = []


def bad(make: Any, error: type[Exception], *found: str) -> None:
    """`make` must raise `error`, whose message contains each of `found`."""
    BAD.append((make, error, found))


for size in (0, -3):
    bad(lambda size=size: Pipeline(SAMPLES).batch(size), ValueError, "batch_size", str(size))
bad(lambda: Pipeline(SAMPLES).batch("4"), TypeError, "batch_size", "'4'")
bad(lambda: Pipeline(SAMPLES).batch(2.5), TypeError, "batch_size", "2.5")
bad(lambda: Pipeline(SAMPLES).batch(None), TypeError, "batch_size", "None")
for concurrency in (-1, 0):
    bad(lambda n=concurrency: Pipeline(SAMPLES).map(abs, concurrency=n), ValueError, "concurrency", str(concurrency))
    bad(lambda n=concurrency: DataLoader(SAMPLES, concurrency=n), ValueError, "concurrency", str(concurrency))
bad(lambda: Pipeline(SAMPLES).map(abs, concurrency="all"), TypeError, "concurrency", "'all'")
bad(lambda: Pipeline(SAMPLES).prefetch(-1), ValueError, "prefetch", "-1")
bad(lambda: Pipeline(SAMPLES).prefetch(1.5), TypeError, "prefetch", "1.5")
bad(lambda: DataLoader(SAMPLES, worker_type="fibre"), ValueError, "worker_type", "fibre")

bad(lambda: Pipeline(42), TypeError, "42", "Dataset", "iterable")
bad(lambda: Pipeline(None), TypeError, "None", "Dataset", "iterable")
bad(lambda: Pipeline(object()), TypeError, "object", "Dataset", "iterable")
bad(lambda: Pipeline(lambda key: [key]), TypeError, "argument")
bad(lambda: Pipeline.merge(range(3), 42), TypeError, "42")
bad(lambda: Pipeline.zip(range(3), 42), TypeError, "42")
bad(lambda: Pipeline.mix([range(3), 42], [1, 1]), TypeError, "42")
bad(lambda: Pipeline.mix(Pipeline(SAMPLES), Pipeline(SAMPLES)), TypeError, "list of weights", "mix([a, b], [3, 1])")
bad(lambda: Pipeline.mix(range(3), [1]), TypeError, "list of sources", "range", "mix([a, b], [3, 1])")
bad(lambda: Pipeline.mix([SAMPLES, SAMPLES], Pipeline([3, 1])), TypeError, "list of weights", "mix([a, b], [3, 1])")
for combine in ("merge", "interleave", "zip"):
    bad(
        lambda how=combine: getattr(Pipeline, how)([Pipeline(SAMPLES), Pipeline(SAMPLES)]),
        TypeError,
        "list of 2",
        f"{combine}(*sources)",
    )
bad(lambda: Pipeline(SAMPLES, sampler=42), TypeError, "42")

for not_callable in (None, 3, "decode", [abs]):
    bad(lambda fn=not_callable: Pipeline(SAMPLES).map(fn), TypeError, repr(not_callable))
    bad(lambda fn=not_callable: Pipeline(SAMPLES).filter(fn), TypeError, repr(not_callable))
    bad(lambda fn=not_callable: Pipeline(SAMPLES).flat_map(fn), TypeError, repr(not_callable))
for generator_function in (pieces, pieces_later, Pieces(), partial(pieces)):
    bad(lambda fn=generator_function: Pipeline(SAMPLES).map(fn), TypeError, "generator function", "flat_map")
    bad(lambda fn=generator_function: Pipeline(SAMPLES).filter(fn), TypeError, "generator function", "flat_map")
bad(lambda: Pipeline(finished()), SourceUsedUpError, "is over already", "generator function")
bad(lambda: Pipeline(finished_async()), SourceUsedUpError, "stream", "is over already", "generator function")
bad(lambda: DataLoader("/data/train"), TypeError, "'/data/train' of type str", "Dataset")
bad(lambda: DataLoader(b"/data/train"), TypeError, "of type bytes", "Dataset")
bad(lambda: DataLoader(Stream), TypeError, "class Stream", "instance")
bad(lambda: DataLoader(iter(SAMPLES)), TypeError, "list_iterator", "IterableDataset")
bad(lambda: DataLoader(finished()), TypeError, "generator", "IterableDataset")
bad(lambda: DataLoader(set(SAMPLES)), TypeError, "set", "IterableDataset", "Pipeline")
bad(lambda: DataLoader(stream), TypeError, "function stream", "what it returns")
bad(lambda: DataLoader(None), TypeError, "None", "__getitem__")
bad(lambda: Pipeline(SAMPLES).batch(2, collate_fn="stack"), TypeError, "collate_fn", "'stack'")
bad(lambda: Pipeline(SAMPLES).map(stream()), TypeError, "async_generator")
bad(lambda: Pipeline(SAMPLES).map(abs, executor="fibre"), ValueError, "executor", "fibre", "thread")
bad(lambda: Pipeline(SAMPLES).map(abs, executor=3), TypeError, "executor", "3")

bad(lambda: Pipeline(SAMPLES).to("quantum"), ValueError, "quantum", "cpu")
bad(lambda: Pipeline(SAMPLES).to(object()), TypeError, "object", "cuda")
bad(lambda: Pipeline(SAMPLES).to(None), TypeError, "None")
bad(lambda: DataLoader(SAMPLES, device="quantum"), ValueError, "quantum", "cpu")

for rank, world_size in ((4, 4), (-1, 4), (0, 0), (1, -2)):
    bad(
        lambda rank=rank, world_size=world_size: Pipeline(SAMPLES).shard(rank, world_size),
        ValueError,
        "world_size",
        str(world_size),
    )
bad(lambda: Pipeline(SAMPLES).shard("0", 2), TypeError, "rank", "'0'")
bad(lambda: Pipeline(SAMPLES).shard(0, 2.0), TypeError, "world_size", "2.0")

bad(lambda: Pipeline(stream).map(abs).filter(bool).shuffle(), ValueError, "shuffle", "buffer_size")
bad(lambda: Pipeline(RecordingSource(SAMPLES)).shuffle(), ValueError, "shuffle", "buffer_size")
bad(lambda: Pipeline(iter(SAMPLES)).shuffle(), ValueError, "shuffle", "buffer_size")
bad(lambda: Pipeline(Stream()).shuffle(), ValueError, "shuffle", "buffer_size")
bad(lambda: Pipeline(SAMPLES).filter(bool).shuffle(), ValueError, "shuffle", "buffer_size")
bad(lambda: Pipeline(SAMPLES).shuffle(0), ValueError, "buffer_size", "0")
bad(lambda: Pipeline(SAMPLES).shuffle(-5), ValueError, "buffer_size", "-5")
bad(lambda: Pipeline(SAMPLES).shuffle("8"), TypeError, "buffer_size", "'8'")
bad(lambda: Pipeline(SAMPLES).shuffle(seed="x"), TypeError, "seed", "'x'")

bad(lambda: Pipeline.mix([SAMPLES, SAMPLES], [1.0]), ValueError, "weights", "1", "2")
bad(lambda: Pipeline.mix([SAMPLES], [0.5, 0.5]), ValueError, "weights")
bad(lambda: Pipeline.mix([SAMPLES, SAMPLES], [1.0, -1.0]), ValueError, "weights", "-1.0")
bad(lambda: Pipeline.mix([SAMPLES, SAMPLES], [0.0, 0.0]), ValueError, "weights")
bad(lambda: Pipeline.mix([SAMPLES, SAMPLES], [1.0, float("nan")]), ValueError, "weights", "nan")
bad(lambda: Pipeline.mix([SAMPLES, SAMPLES], [1.0, float("inf")]), ValueError, "weights", "inf")
bad(lambda: Pipeline.mix([SAMPLES, SAMPLES], ["a", "b"]), TypeError, "weights")
bad(lambda: Pipeline.mix([], []), ValueError, "source")
bad(lambda: Pipeline.merge(), ValueError, "source")
bad(lambda: Pipeline.zip(), ValueError, "source")

bad(lambda: Pipeline(SAMPLES).take(-1), ValueError, "-1")
bad(lambda: Pipeline(SAMPLES).skip(-1), ValueError, "-1")
bad(lambda: Pipeline(SAMPLES).repeat(-1), ValueError, "-1")
bad(lambda: Pipeline(SAMPLES).take("all"), TypeError, "'all'")
bad(lambda: Pipeline(SAMPLES).set_epoch(-1), ValueError, "epoch", "-1")
bad(lambda: Pipeline(SAMPLES).set_epoch("last"), TypeError, "epoch", "'last'")


@pytest.mark.parametrize(("make", "error", "found"), BAD)
def test_a_wrong_argument_is_refused_at_once(make: Any, error: type[Exception], found: tuple[str, ...]) -> None:
    """TypeError for the wrong kind, ValueError for a wrong value; with what was found, and what to do."""
    with pytest.raises(error) as caught:
        make()
    message = str(caught.value)
    for part in found:
        assert part in message
    assert WAY_OUT.search(message), message


class OnlyItem:
    def __getitem__(self, key: int) -> int:
        return key


class OnlyItems:
    def __len__(self) -> int:
        return 3

    def __getitems__(self, keys: list[int]) -> list[int]:
        return keys


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: DataLoader(OnlyItem(), sampler=[0, 1]), id="an object with __getitem__"),
        pytest.param(lambda: DataLoader(OnlyItems(), batch_size=2), id="an object with __getitems__"),
        pytest.param(lambda: DataLoader({0: "a", 1: "b"}), id="a mapping"),
        pytest.param(lambda: DataLoader(stream()), id="an async iterable"),
        pytest.param(lambda: Pipeline.merge([range(3), range(3)]).map(list), id="a list of ranges as samples"),
        pytest.param(lambda: Pipeline.mix([SAMPLES, SAMPLES], np.array([0.5, 0.5])), id="weights of numpy"),
        pytest.param(lambda: Pipeline.mix((range(3), Stream()), (1, 2)), id="a tuple of sources"),
        pytest.param(lambda: Pipeline(SAMPLES).flat_map(pieces), id="flat_map of a generator function"),
    ],
)
def test_what_looks_wrong_and_is_not_is_taken(make: Any) -> None:
    """Torch takes any object with `__getitem__`; the checks refuse what could not work."""
    assert list(make())


def test_a_generator_that_is_at_work_is_no_source() -> None:
    """It would raise at the first sample: "generator already executing"."""

    def numbers() -> Iterator[Any]:
        with pytest.raises(SourceUsedUpError, match="being iterated now"):
            Pipeline(generator)
        yield 1

    generator = numbers()
    assert list(generator) == [1]


TORCHS: list[dict[str, Any]] = [
    {"batch_size": 0},
    {"batch_size": -3},
    {"num_workers": -1},
    {"num_workers": 2, "prefetch_factor": -1},
    {"prefetch_factor": 2},
    {"timeout": -1},
    {"persistent_workers": True},
    {"shuffle": True, "sampler": [0, 1]},
    {"batch_sampler": [[0]], "batch_size": 2},
    {"batch_sampler": [[0]], "shuffle": True},
    {"batch_size": None, "drop_last": True},
]


@pytest.mark.parametrize("arguments", TORCHS, ids=repr)
def test_the_drop_in_refuses_what_torchs_dataloader_refuses(arguments: dict[str, Any]) -> None:
    """With the same exception type, and at the same moment."""
    with pytest.raises(ValueError, match=r".") as theirs:
        torch.utils.data.DataLoader(SAMPLES, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r".") as ours:
        DataLoader(SAMPLES, **arguments)
    assert type(ours.value) is type(theirs.value)


@pytest.mark.parametrize("make", [lambda: Pipeline(SAMPLES).to("cuda"), lambda: DataLoader(SAMPLES, device="cuda:7")])
def test_a_device_that_is_not_there(make: Any) -> None:
    """Refused when the pipeline is described, not at the first batch."""
    if torch.cuda.device_count() > 7:
        pytest.skip("it is there")
    if torch.cuda.is_available():
        make = lambda: Pipeline(SAMPLES).to("cuda:7")  # noqa: E731
    with pytest.raises(DeviceError, match="cuda") as caught:
        make()
    assert WAY_OUT.search(str(caught.value))


def test_our_errors_are_pythons_too() -> None:
    """Whoever catches RuntimeError catches ours; all are AioloaderErrors."""
    for kind in (SourceUsedUpError, LeakedContextError, DeviceError):
        assert issubclass(kind, AioloaderError)
        assert issubclass(kind, RuntimeError)


@pytest.mark.parametrize(("rank", "world_size"), [("4", "4"), ("-1", "2"), ("zero", "2"), ("0", "many"), ("0", "0")])
def test_a_wrong_rank_in_the_environment(monkeypatch: pytest.MonkeyPatch, rank: str, world_size: str) -> None:
    """RANK and WORLD_SIZE are read at iteration, and checked there."""
    loader = Pipeline(SAMPLES).shard()
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    with pytest.raises(ValueError, match=r"WORLD_SIZE|world_size") as caught:
        list(loader)
    assert rank in str(caught.value)
    assert world_size in str(caught.value)


@on_both_faces
def test_a_source_function_that_returns_no_source(face: Face) -> None:
    """Known only when it is called: then it says what was returned, and what is taken."""
    with pytest.raises(TypeError, match="iterable") as caught:
        collect(Pipeline(lambda: 42), face)
    assert "42" in str(caught.value) or "int" in str(caught.value)


@on_both_faces
def test_a_generator_used_for_a_second_epoch(face: Face) -> None:
    """It names the generator, and the way out: the function."""

    def numbers() -> Iterator[int]:
        yield 1

    loader = Pipeline(numbers())
    collect(loader, face)
    with pytest.raises(SourceUsedUpError) as caught:
        collect(loader, face)
    assert "numbers" in str(caught.value)
    assert "generator function" in str(caught.value)


# Samples that cannot be collated


class Pairs(IterableDataset[Any]):
    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Any]:
        return iter(self.samples)


UNEQUAL: list[Any] = [
    pytest.param([torch.ones(3), torch.ones(3), torch.ones(4), torch.ones(5)], ["3", "4"], id="tensors"),
    pytest.param([np.ones((2, 3)), np.ones((2, 3)), np.ones((3, 2))], ["2, 3", "3, 2"], id="arrays"),
    pytest.param([(torch.ones(3), 1), (torch.ones(3), 2), (torch.ones(7), 3)], ["3", "7"], id="tuples"),
    pytest.param([{"x": torch.ones(3)}, {"x": torch.ones(3)}, {"x": torch.ones(7)}], ["3", "7", "x"], id="mappings"),
    pytest.param([{"x": 1, "y": 1}, {"x": 1, "y": 1}, {"x": 1}], ["'y'"], id="missing-key"),
    pytest.param([[1, 2], [1, 2], [1, 2, 3]], ["2", "3"], id="lengths"),
]


@on_both_faces
@pytest.mark.parametrize(("samples", "shapes"), UNEQUAL)
def test_samples_that_differ_are_named(face: Face, samples: list[Any], shapes: list[str]) -> None:
    """Which two, and their shapes; the error is torch's own, and the epoch goes on behind it."""
    loader = Pipeline(samples).batch(len(samples))
    with pytest.raises((RuntimeError, KeyError)) as caught:
        collect(loader, face)
    note = notes(caught.value)
    assert "cannot collate" in note
    assert re.search(r"sample 0\b.*sample 2\b|sample 2\b.*sample 0\b", note), note
    for shape in shapes:
        assert shape in note
    assert WAY_OUT.search(note)


@on_both_faces
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_dataloader_names_the_keys_that_differ(face: Face, num_workers: int) -> None:
    """The keys say more than the places in the batch."""
    samples = [torch.ones(3), torch.ones(3), torch.ones(3), torch.ones(4), torch.ones(2), torch.ones(2)]
    with Steps(DataLoader(samples, batch_size=2, num_workers=num_workers), face) as steps:
        found = steps.outcomes()
    assert [type(outcome) for outcome in found] == [torch.Tensor, RuntimeError, torch.Tensor]
    note = notes(found[1])
    assert re.search(r"key 2\b", note), note
    assert re.search(r"key 3\b", note), note


@on_both_faces
def test_a_type_without_a_collate_function(face: Face) -> None:
    """TypeError, as torch's; the note says which type and what to do."""

    class Image:
        pass

    with pytest.raises(TypeError) as caught:
        collect(Pipeline([Image(), Image()]).batch(2), face)
    assert "Image" in notes(caught.value)
    assert "collate_fn" in notes(caught.value)


@on_both_faces
def test_flat_map_of_what_is_no_iterable(face: Face) -> None:
    """It says what the function returned; the other samples come."""
    with Steps(Pipeline([[1], 2, [3]]).flat_map(lambda sample: sample), face) as steps:
        first, error, last = steps.outcomes()
    assert (first, last) == (1, 3)
    assert isinstance(error, TypeError)
    assert "2" in str(error) or "int" in str(error)
    assert "flat_map" in str(error) + notes(error)


# A torch context held across a `yield`


def forgets_grad() -> Iterator[int]:
    with torch.no_grad():
        yield 1
        yield 2


async def forgets_grad_async() -> AsyncIterator[int]:
    with torch.no_grad():
        yield 1
        yield 2


def forgets_device() -> Iterator[int]:
    with torch.device("meta"):
        yield 1
        yield 2


async def forgets_device_async() -> AsyncIterator[int]:
    with torch.device("meta"):
        yield 1
        yield 2


LEAKS = [
    (forgets_grad, "grad"),
    (forgets_grad_async, "grad"),
    (forgets_device, "device"),
    (forgets_device_async, "device"),
]


@on_both_faces
@pytest.mark.parametrize(("generator", "word"), LEAKS)
def test_a_torch_context_held_across_a_yield_of_a_source(face: Face, generator: Any, word: str) -> None:
    """It would be in force in the loop body, or in whatever task comes next: an error, and no trace of it is left."""
    with pytest.raises(LeakedContextError, match=word) as caught:
        collect(Pipeline(generator), face)
    assert generator.__name__ in str(caught.value) + notes(caught.value)
    assert "yield" in str(caught.value)
    assert torch.is_grad_enabled()
    assert torch.get_default_device() == torch.device("cpu")


@on_both_faces
@pytest.mark.parametrize(("generator", "word"), LEAKS)
def test_a_torch_context_held_across_a_yield_in_flat_map(face: Face, generator: Any, word: str) -> None:
    """The generators that a `flat_map` function returns are watched too."""
    with pytest.raises(LeakedContextError, match=word):
        collect(Pipeline([0]).flat_map(lambda _: generator()), face)
    assert torch.is_grad_enabled()
    assert torch.get_default_device() == torch.device("cpu")


@pytest.mark.asyncio
async def test_a_leaking_generator_does_not_reach_other_tasks() -> None:
    """While it is being found out, no other task of the caller's loop sees its mode."""
    seen: list[bool] = []
    done = asyncio.Event()

    async def watch() -> None:
        while not done.is_set():
            seen.append(torch.is_grad_enabled())
            await asyncio.sleep(0)

    watcher = asyncio.create_task(watch())
    await asyncio.sleep(0)
    with pytest.raises(LeakedContextError):
        async for _ in Pipeline(forgets_grad_async).map(abs):
            pass
    done.set()
    await watcher
    assert set(seen) == {True}
