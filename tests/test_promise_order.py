"""Promise 1: ordered stages give what a plain loop gives, for any concurrency and any order of completion."""

import itertools
import threading
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, IterableDataset

from aioloader import DataLoader, Pipeline
from aioloader.testing import Gate, virtual_order
from tests._support import Face, collect, on_both_faces


def digest(sample: object, salt: int) -> int:
    """An integer that depends on everything in `sample`; every step of a random pipeline begins with it."""
    return zlib.crc32(repr((sample, salt)).encode())


def mixed(sample: object) -> int:
    return digest(sample, 1)


def kept(sample: object) -> bool:
    return digest(sample, 2) % 3 != 0


def several(sample: object) -> list[int]:
    return [digest(sample, 3 + part) for part in range(digest(sample, 3) % 4)]


@dataclass
class Step:
    """One random step of a pipeline, and what it means in plain Python.

    `plain` takes a function that gives the samples before it, because `repeat` reads them more than once.
    """

    name: str
    apply: Callable[[Any], Any] = field(repr=False)
    plain: Callable[[Callable[[], Iterable[Any]]], Iterator[Any]] = field(repr=False)


def batches(samples: Iterable[Any], size: int, drop_last: bool) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for sample in samples:
        batch.append(sample)
        if len(batch) == size:
            yield batch
            batch = []
    if batch and not drop_last:
        yield batch


async def later(samples: Iterable[Any]) -> AsyncIterator[Any]:
    for sample in samples:
        yield sample


def joined(parts: Iterable[Iterable[Any]]) -> Iterator[Any]:
    return itertools.chain.from_iterable(parts)


@st.composite
def steps(draw: st.DrawFn) -> Step:
    """Any stage with any arguments, sync or async."""
    n = draw(st.integers(0, 12))
    size = draw(st.integers(1, 5))
    width = draw(st.none() | st.integers(1, 7))
    drop_last = draw(st.booleans())
    order = virtual_order(draw(st.integers(0, 2**16)))
    kind, apply, plain = draw(
        st.sampled_from(
            [
                ("map", lambda p: p.map(mixed, concurrency=width), lambda up: map(mixed, up())),
                ("async map", lambda p: p.map(order(mixed), concurrency=width), lambda up: map(mixed, up())),
                ("filter", lambda p: p.filter(kept), lambda up: filter(kept, up())),
                ("async filter", lambda p: p.filter(order(kept)), lambda up: filter(kept, up())),
                ("flat_map", lambda p: p.flat_map(several), lambda up: joined(map(several, up()))),
                (
                    "async flat_map",
                    lambda p: p.flat_map(lambda sample: later(several(sample))),
                    lambda up: joined(map(several, up())),
                ),
                (
                    "batch",
                    lambda p: p.batch(size, drop_last=drop_last, collate_fn=list),
                    lambda up: batches(up(), size, drop_last),
                ),
                (
                    "batch, unbatch",
                    lambda p: p.batch(size, drop_last=drop_last, collate_fn=list).unbatch(),
                    lambda up: joined(batches(up(), size, drop_last)),
                ),
                ("take", lambda p: p.take(n), lambda up: itertools.islice(up(), n)),
                ("skip", lambda p: p.skip(n), lambda up: itertools.islice(up(), n, None)),
                ("enumerate", lambda p: p.enumerate(), lambda up: enumerate(up())),
                ("repeat", lambda p: p.repeat(1 + n % 3), lambda up: joined(up() for _ in range(1 + n % 3))),
                (
                    "zip",
                    lambda p: Pipeline.zip(p, Pipeline(range(n)).map(order(mixed))),
                    lambda up: zip(up(), map(mixed, range(n)), strict=False),
                ),
                ("prefetch", lambda p: p.prefetch(n), lambda up: iter(up())),
            ]
        )
    )
    return Step(f"{kind} ({n=}, {size=}, {width=}, {drop_last=})", apply, plain)


class Stream(IterableDataset[int]):
    """torch's kind of stream."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.n))


class AsyncItems(Dataset[Any]):
    """A dataset whose `__getitem__` is async."""

    def __init__(self, n: int, seed: int) -> None:
        self.n = n
        self._get = virtual_order(seed)(lambda index: index)

    def __len__(self) -> int:
        return self.n

    async def __getitem__(self, index: int) -> Any:
        return await self._get(index)


SOURCES: dict[str, Callable[[int], Any]] = {
    "sequence": range,
    "list": lambda n: list(range(n)),
    "async items": lambda n: AsyncItems(n, seed=n),
    "torch stream": Stream,
    "generator": lambda n: (sample for sample in range(n)),
    "async generator": lambda n: later(range(n)),
    "generator function": lambda n: lambda: iter(range(n)),
    "async generator function": lambda n: lambda: later(range(n)),
}


@on_both_faces
@settings(max_examples=120)
@given(source=st.sampled_from(sorted(SOURCES)), n=st.integers(0, 24), stages=st.lists(steps(), max_size=5))
@example(source="sequence", n=0, stages=[])
def test_any_pipeline_gives_what_a_plain_loop_gives(face: Face, source: str, n: int, stages: list[Step]) -> None:
    """Random stages over random sources, calls completing in random order."""
    if source in ("generator", "async generator") and any(step.name.startswith("repeat") for step in stages):
        source = "generator function"  # a generator cannot be repeated
    loader: Any = Pipeline(SOURCES[source](n))
    expected: Callable[[], Iterable[Any]] = partial(range, n)
    for step in stages:
        loader = step.apply(loader)
        expected = partial(step.plain, expected)

    assert collect(loader, face) == list(expected())


@on_both_faces
@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**16),
    n=st.integers(0, 40),
    buffer_size=st.none() | st.integers(1, 12),
    concurrency=st.integers(2, 9),
    epochs=st.integers(1, 2),
)
def test_shuffled_order_is_independent_of_concurrency(
    face: Face, seed: int, n: int, buffer_size: int | None, concurrency: int, epochs: int
) -> None:
    """What a shuffle draws depends on its seed and the epoch alone."""

    def loader(width: int, order: int) -> Any:
        shuffled = Pipeline(range(n)).shuffle(buffer_size, seed=seed)
        return shuffled.map(virtual_order(order)(mixed), concurrency=width).filter(kept).batch(3, collate_fn=list)

    one, many = loader(1, 0), loader(concurrency, seed + 1)
    for _ in range(epochs):
        assert collect(many, face) == collect(one, "for")


@on_both_faces
@pytest.mark.parametrize("seed", range(5))
def test_unordered_map_gives_the_same_samples(face: Face, seed: int) -> None:
    """`ordered=False` gives every sample once, in the order of completion."""
    loader = Pipeline(range(100)).map(virtual_order(seed)(mixed), concurrency=8, ordered=False)

    found = collect(loader, face)

    assert Counter(found) == Counter(map(mixed, range(100)))
    assert found != list(map(mixed, range(100)))


@on_both_faces
def test_unordered_map_gives_samples_as_completed(face: Face) -> None:
    """With `ordered=False` a slow sample does not hold up those behind it."""
    gate = Gate()
    gate.open(1, 2, 3, 4, 5, 6, 7)

    async def fetch(key: int) -> int:
        await gate.passing(key)
        if key == 7:
            gate.open(0)  # the first may end only when the others are through
        return key

    found = collect(Pipeline(range(8)).map(fetch, concurrency=2, ordered=False), face)

    assert sorted(found) == list(range(8))
    assert found.index(0) >= 6


@on_both_faces
def test_sync_calls_that_end_in_reverse_keep_their_order(face: Face) -> None:
    """Each even call ends only after its odd neighbour has begun; the order stays."""
    gate = Gate(deadline_seconds=10)

    def crossed(key: int) -> int:
        if key % 2 == 0:
            gate.pass_sync(key)
        else:
            gate.open(key - 1)
        return key

    assert collect(Pipeline(range(20)).map(crossed, concurrency=4), face) == list(range(20))


@on_both_faces
def test_slow_sync_calls_stand_side_by_side(face: Face) -> None:
    """`concurrency=4` of a sync function means that four calls really run at once."""
    together = threading.Barrier(4)

    def decode(key: int) -> int:
        together.wait(10)
        return key

    assert collect(Pipeline(range(16)).map(decode, concurrency=4), face) == list(range(16))


@on_both_faces
def test_maps_in_a_row_are_applied_in_their_order(face: Face) -> None:
    """Sync and async maps side by side: each sample goes through all of them, first to last."""
    order = virtual_order(3)
    loader = (
        Pipeline(range(50))
        .map(order(lambda key: f"{key}a"), concurrency=5)
        .map(lambda sample: sample + "b", concurrency=3)
        .map(order(lambda sample: f"{sample}c"), concurrency=2)
    )
    assert collect(loader, face) == [f"{key}abc" for key in range(50)]


class Items(Dataset[Any]):
    """A map-style dataset of tensors."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((2,), float(index)), index


@on_both_faces
@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_dataloader_gives_torchs_batches(face: Face, num_workers: int, shuffle: bool, drop_last: bool) -> None:
    """The same batches in the same order as torch's DataLoader, two epochs long."""
    arguments: dict[str, Any] = {"batch_size": 4, "shuffle": shuffle, "drop_last": drop_last}
    ours = DataLoader(Items(30), num_workers=num_workers, **arguments)
    torchs: Any = torch.utils.data.DataLoader(Items(30), **arguments)
    torch.manual_seed(5)
    expected = [[(x.tolist(), y.tolist()) for x, y in torchs] for _ in range(2)]
    torch.manual_seed(5)

    found = [[(x.tolist(), y.tolist()) for x, y in collect(ours, face)] for _ in range(2)]

    assert found == expected


@on_both_faces
def test_dataloader_awaits_an_async_dataset_in_order(face: Face) -> None:
    """`async def __getitem__` completes in any order; the batches do not show it."""
    loader = DataLoader(AsyncItems(30, seed=1), batch_size=4, concurrency=8)
    found = [batch.tolist() for batch in collect(loader, face)]
    assert found == [list(range(start, min(start + 4, 30))) for start in range(0, 30, 4)]
