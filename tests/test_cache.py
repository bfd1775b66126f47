"""`cache`: what is kept is not made again, in memory and on disk, by key and by position, whatever happens."""

import asyncio
import contextlib
import errno
import json
import os
import random
import shutil
import signal
import threading
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aioloader import BrokenDataError, Pipeline, SourceUsedUpError, sample_rng
from aioloader.cache import segment as segment_files
from aioloader.cache.disk import DiskStore
from aioloader.cache.samples import copied, kept, size_of
from aioloader.core.keys import PartKey, SourceKey, key_text, read_key, source_of, written_key
from aioloader.sources import Lines
from aioloader.stages.cache import Cache
from tests import _work
from tests._support import Child, Face, Steps, collect, notes, on_both_faces

pytestmark = pytest.mark.usefixtures("fork_server")

Cached = Callable[[Pipeline], Pipeline]


@pytest.fixture(params=["memory", "disk"])
def cached(request: pytest.FixtureRequest, tmp_path: Path) -> Cached:
    """Adds a cache that is large enough, each time another one."""
    count = iter(range(100))
    if request.param == "memory":
        return lambda pipeline: pipeline.cache(memory_bytes=1 << 24)
    return lambda pipeline: pipeline.cache(disk=tmp_path / f"cache-{next(count)}")


class Calls:
    """A function that says what it was called with."""

    def __init__(self, fn: Callable[[Any], Any] = lambda sample: torch.full((3,), float(sample))) -> None:
        self._fn = fn
        self.made: list[Any] = []

    def __call__(self, sample: Any) -> Any:
        self.made.append(sample)
        return self._fn(sample)

    def take(self) -> list[Any]:
        """What it was called with since the last time."""
        made, self.made = self.made, []
        return sorted(made)


class Stream:
    """An iterable that says how often it was opened and how far it was read."""

    def __init__(self, samples: int) -> None:
        self._samples = samples
        self.opened = 0
        self.read = 0

    def __iter__(self) -> Iterator[int]:
        self.opened += 1
        for sample in range(self._samples):
            self.read += 1
            yield sample


def first_values(batches: list[Any]) -> list[int]:
    """Of each tensor the first number."""
    return [int(batch.flatten()[0]) for batch in batches]


def cache_stats(pipeline: Pipeline) -> tuple[int, int]:
    """Hits and misses of the newest epoch."""
    (stage,) = (stage for stage in pipeline.stats().stages if stage.name.startswith("cache("))
    return stage.hits, stage.misses


# -- by key ------------------------------------------------------------------------------------------------------------


@on_both_faces
def test_the_second_epoch_makes_nothing(cached: Cached, face: Face) -> None:
    """Each epoch in its own order, as without the cache."""
    make = Calls()
    plain = Pipeline(range(50)).shuffle(seed=3).map(lambda n: torch.full((3,), float(n))).batch(8)
    loader = cached(Pipeline(range(50)).shuffle(seed=3).map(make)).batch(8)
    for epoch in range(3):
        expected = collect(plain, face)
        assert [batch.tolist() for batch in collect(loader, face)] == [batch.tolist() for batch in expected]
        assert make.take() == (list(range(50)) if epoch == 0 else [])
        assert cache_stats(loader) == ((0, 50) if epoch == 0 else (50, 0))
    assert next(s for s in loader.stats().stages if s.name.startswith("cache(")).cached_bytes > 50 * 12


def test_a_shuffle_after_the_cache_is_a_permutation_too(cached: Cached) -> None:
    """The cache gives one sample for one, so the order of keys may be chosen after it."""
    make = Calls()
    loader = cached(Pipeline(range(20)).map(make)).shuffle(seed=1).shard(0, 2)
    first, second = collect(loader, "for"), collect(loader, "for")
    assert first_values(first) != first_values(second)
    assert make.take() == sorted(set(first_values(first + second)))


@on_both_faces
def test_partial_epochs_add_up(cached: Cached, face: Face) -> None:
    """What was made before a `break` is not made again."""
    make = Calls()
    loader = cached(Pipeline(range(40)).map(make, concurrency=1)).batch(4)
    collect(loader, face, limit=2)
    loader.close()
    made = make.take()
    assert len(made) >= 8
    assert len(collect(loader, face)) == 10
    assert set(make.take()).isdisjoint(made[:8])


def test_async_functions_and_results_as_they_come(cached: Cached) -> None:
    """A hit does not wait behind a request."""
    made: list[int] = []

    async def fetch(key: int) -> torch.Tensor:
        made.append(key)
        await asyncio.sleep(0)
        return torch.tensor([key])

    loader = cached(Pipeline(range(30)).map(fetch, ordered=False))
    for _ in range(2):
        assert sorted(first_values(collect(loader, "async for"))) == list(range(30))
    assert sorted(made) == list(range(30))


def test_errors_are_not_kept(cached: Cached) -> None:
    """They stand at their place, and are tried again in the next epoch."""
    broken = {3, 7}

    def make(sample: int) -> torch.Tensor:
        if sample in broken:
            raise OSError(f"no {sample}")
        return torch.tensor([sample])

    loader = cached(Pipeline(range(10)).map(make))
    with Steps(loader, "for") as steps:
        found = steps.outcomes()
    assert [str(found[3]), str(found[7])] == ["no 3", "no 7"]
    assert "stage map(make), key 3, epoch 0, position 3" in notes(found[3])
    broken.clear()
    assert first_values(collect(loader, "for")) == list(range(10))
    assert cache_stats(loader) == (8, 2)


class Server:
    """Answers, but for some requests while it is down."""

    def __init__(self, path: Path) -> None:
        self._down = path  # a file, so that worker processes see it too
        path.touch()

    def up(self) -> None:
        self._down.unlink()

    def get(self, key: int) -> int | None:
        """None: it is given up, as in the guide."""
        return None if key in (0, 3, 8) and self._down.exists() else key

    async def get_async(self, key: int) -> int | None:
        return self.get(key)

    def parts(self, key: int) -> list[tuple[int, int]]:
        """Raises while it is down."""
        if self.get(key) is None:
            raise OSError(f"no {key}")
        return [(key, 0), (key, 1)]

    def is_even(self, key: int) -> bool:
        """Likewise."""
        return self.parts(key)[0][0] % 2 == 0

    async def is_even_async(self, key: int) -> bool:
        return self.is_even(key)


def is_there(sample: Any) -> bool:
    return sample is not None


def pairs(sample: int) -> list[tuple[int, int]]:
    return [(sample, 0), (sample, 1)]


GIVEN_UP: dict[str, Callable[[Server, Cached], Pipeline]] = {
    "async": lambda server, cached: cached(Pipeline(range(9)).map(server.get_async).filter(is_there)),
    "sync": lambda server, cached: cached(Pipeline(range(9)).map(server.get).filter(is_there)),
    "shuffled": lambda server, cached: cached(Pipeline(range(9)).shuffle().map(server.get).filter(is_there)),
    "filter after": lambda server, cached: cached(Pipeline(range(9)).map(server.get_async)).filter(is_there),
    "stream": lambda server, cached: cached(Pipeline(Stream(9)).map(server.get_async).filter(is_there)),
    "stream, filter after": lambda server, cached: cached(Pipeline(Stream(9)).map(server.get)).filter(is_there),
    "batches": lambda server, cached: cached(
        Pipeline(range(9)).map(server.get).filter(is_there).batch(2, collate_fn=list)
    ).unbatch(),
    "processes": lambda server, cached: cached(
        Pipeline(range(9)).map(server.get, executor="process", concurrency=1).filter(is_there)
    ),
    "a process of its own": lambda server, cached: cached(
        Pipeline(range(9)).map(server.get).filter(is_there).in_process()
    ),
    "one part": lambda server, cached: cached(
        Pipeline.interleave(Pipeline(range(5)).map(server.get).filter(is_there), range(5, 8), [8])
    ),
    "rounds": lambda server, cached: cached(
        Pipeline(range(9)).map(server.get).filter(is_there).repeat(2).enumerate().map(tuple)
    ),
}


@pytest.mark.parametrize("pipeline", GIVEN_UP)
def test_what_came_to_nothing_is_tried_again(tmp_path: Path, cached: Cached, pipeline: str) -> None:
    """Neither None is kept, nor that a filter refused it, nor what stands in another place because of it."""
    server = Server(tmp_path / "down")
    loader = GIVEN_UP[pipeline](server, cached)
    with loader:
        down = list(loader)
        server.up()
        whole = [list(loader) for _ in range(3)]
    with GIVEN_UP[pipeline](server, lambda pipeline: pipeline) as uncached:
        expected = list(uncached)
    assert len(down) < len(expected)
    for epoch in whole:
        assert sorted(epoch) == sorted(expected)
    if pipeline != "shuffled":
        assert whole == [expected] * 3
    assert cache_stats(loader)[1] == 0  # and now all of it is kept


FAILED: dict[str, Callable[[Server, Cached], Pipeline]] = {
    "flat_map": lambda server, cached: cached(Pipeline(Stream(9)).flat_map(server.parts)),
    "flat_map of a failed sample": lambda server, cached: cached(
        Pipeline(range(9)).map(server.parts).flat_map(lambda parts: parts)
    ),
    "filter": lambda server, cached: cached(Pipeline(Stream(9)).filter(server.is_even)),
    "async filter": lambda server, cached: cached(Pipeline(Stream(9)).filter(server.is_even_async)),
    "filter of a failed sample": lambda server, cached: cached(
        Pipeline(Stream(9)).map(server.parts).filter(lambda parts: parts[0][0] != 3)
    ),
    "unbatch": lambda server, cached: cached(Pipeline(Stream(9)).map(server.parts).batch(2, collate_fn=list).unbatch()),
    "one part": lambda server, cached: cached(
        Pipeline.interleave(Pipeline(Stream(4)).flat_map(server.parts), Pipeline(Stream(9)).flat_map(pairs))
    ),
    "one source": lambda server, cached: cached(
        Pipeline.interleave(lambda: map(server.parts, range(4)), Pipeline(Stream(9)).map(pairs))
    ),
}


@on_both_faces
@pytest.mark.parametrize("pipeline", FAILED)
def test_what_a_failure_has_moved_is_not_kept(tmp_path: Path, cached: Cached, pipeline: str, face: Face) -> None:
    """Samples known by their positions: after an error that may stand for several they are not where they belong."""
    server = Server(tmp_path / "down")
    loader = FAILED[pipeline](server, cached)
    with Steps(loader, face) as steps:
        assert any(isinstance(outcome, OSError) for outcome in steps.outcomes())
    server.up()
    expected = collect(FAILED[pipeline](server, lambda pipeline: pipeline), face)
    for _ in range(3):
        assert collect(loader, face) == expected
    assert cache_stats(loader) == (len(expected), 0)


def test_cancelled_samples_are_not_kept(cached: Cached) -> None:
    """Whether the epoch was given up in the middle of them, or they were cancelled from inside."""
    made: list[int] = []

    async def make(sample: int) -> int:
        made.append(sample)
        if len(made) <= 6 and sample % 2:
            raise asyncio.CancelledError
        if len(made) <= 6:
            async with asyncio.timeout(0):
                await asyncio.Event().wait()
        return sample

    loader = cached(Pipeline(range(6)).map(make))
    with Steps(loader, "for") as steps:
        assert all(isinstance(outcome, Exception) for outcome in steps.outcomes())
    assert collect(loader, "for") == list(range(6))
    assert cache_stats(loader) == (0, 6)


def test_what_a_filter_refused_is_not_made_to_be_refused_again(cached: Cached) -> None:
    """That it was refused is kept too."""
    make = Calls()
    loader = cached(Pipeline(range(20)).map(make).filter(lambda t: bool(t[0] % 2))).batch(4)
    for _ in range(2):
        assert torch.cat(collect(loader, "for"))[:, 0].tolist() == list(range(1, 20, 2))
    assert make.take() == list(range(20))
    assert cache_stats(loader) == (20, 0)


def test_two_caches_in_a_row(tmp_path: Path) -> None:
    """The last one that has a sample gives it: here a small one in memory after one on disk."""
    first, second = Calls(), Calls(lambda t: t + 1)
    loader = (
        Pipeline(range(10))
        .map(first)
        .filter(lambda t: bool(t[0] != 4))
        .cache(disk=tmp_path / "cache")
        .map(second)
        .cache(memory_bytes=3000)
    )
    for epoch in range(3):
        assert first_values(collect(loader, "for")) == [n + 1 for n in range(10) if n != 4]
        made = second.made
        second.made = []
        assert len(made) == 9 if epoch == 0 else 0 < len(made) < 9
    assert first.take() == list(range(10))


def test_what_the_later_cache_has_lost_the_earlier_one_has(tmp_path: Path) -> None:
    """A lost sample goes through all that the cache spares, the other cache included."""
    first, second = Calls(), Calls(lambda t: t + 1)
    loader = Pipeline(range(10)).map(first).cache(memory_bytes=1 << 20).map(second).cache(disk=tmp_path / "c")
    collect(loader, "for")
    (victim,) = (tmp_path / "c").glob("*.samples")
    victim.write_bytes(bytes(victim.stat().st_size))
    first.take()
    second.made.clear()
    assert first_values(collect(loader, "for")) == list(range(1, 11))
    assert (first.take(), len(second.made)) == ([], 10)
    hits = {stage.name.partition("=")[0]: (stage.hits, stage.misses) for stage in loader.stats().stages}
    assert (hits["cache(memory_bytes"], hits["cache(disk"]) == ((10, 0), (0, 10))


@pytest.mark.parametrize("broken", ["first", "second"])
def test_an_error_names_the_cache_that_could_not_be_opened(tmp_path: Path, broken: str) -> None:
    """Of two on disk in a row."""
    loader = Pipeline(range(3)).map(str).cache(disk=tmp_path / "first").map(str).cache(disk=tmp_path / "second")
    (tmp_path / broken).write_text("")
    with Steps(loader, "for") as steps:
        found = steps.outcomes()
    assert [type(one) for one in found] == [NotADirectoryError] * 3
    assert all(f"stage cache(disk={str(tmp_path / broken)!r})" in notes(one) for one in found)


def test_functions_in_processes() -> None:
    """Hits do not go there."""
    made = Pipeline(range(8)).map(_work.filled, executor="process", concurrency=1)
    with made.cache(memory_bytes=1 << 24) as loader:
        for _ in range(2):
            assert first_values(collect(loader, "for")) == list(range(8))
        assert cache_stats(loader) == (8, 0)


def test_iterators_side_by_side(cached: Cached) -> None:
    """They share what is kept."""
    make = Calls()
    loader = cached(Pipeline(range(20)).map(make)).batch(4)
    pairs = list(zip(loader, loader, strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert set(make.take()) == set(range(20))
    assert len(collect(loader, "for")) == 5
    assert make.take() == []


def test_pipelines_that_go_on_from_one_cache_share_it(cached: Cached) -> None:
    """For instance with and without augmentation."""
    make = Calls()
    base = cached(Pipeline(range(10)).map(make))
    collect(base.batch(2), "for")
    assert first_values(collect(base.map(lambda t: t * 2), "for")) == [2 * n for n in range(10)]
    assert first_values(collect(base.take(3).repeat(2), "for")) == [0, 1, 2] * 2
    assert make.take() == list(range(10))


def test_samples_are_known_by_what_they_are_named(tmp_path: Path) -> None:
    """A list may be sorted, cut and extended between runs; each name keeps its sample."""
    make = Calls(lambda name: f"content of {name}")
    first = Pipeline(["a", "b", "c"]).map(make).cache(disk=tmp_path / "c")
    assert collect(first, "for") == ["content of a", "content of b", "content of c"]
    make.take()
    second = Pipeline(["d", "c", "a"]).map(make).cache(disk=tmp_path / "c")
    assert collect(second, "for") == ["content of d", "content of c", "content of a"]
    assert make.take() == ["d"]


def test_names_that_only_look_alike(cached: Cached) -> None:
    """One is not True, nor "1", nor a path of that name, nor what has no name and stands at place 1."""
    names = [1, object, True, "1", PurePosixPath("1"), 0, False, 3.5, np.int64(1)]
    loader = cached(Pipeline(names).map(repr))
    for _ in range(2):
        assert collect(loader, "for") == list(map(repr, names))
    assert cache_stats(loader) == (9, 0)


def test_a_sampler_gives_the_keys(cached: Cached) -> None:
    """Samples are known by them."""
    make = Calls()

    class Data:
        def __len__(self) -> int:
            return 10

        def __getitem__(self, index: int) -> torch.Tensor:
            result: torch.Tensor = make(index)
            return result

    loader = cached(Pipeline(Data(), sampler=[4, 2, 4, 8]))
    for _ in range(2):
        assert first_values(collect(loader, "for")) == [4, 2, 4, 8]
    assert set(make.take()) == {2, 4, 8}


# -- in memory ---------------------------------------------------------------------------------------------------------


def test_a_budget_keeps_what_came_first() -> None:
    """Nothing is thrown out for what comes later, so a part of each epoch is spared whatever its order."""
    make = Calls(lambda n: torch.full((1000,), float(n)))
    loader = Pipeline(range(20)).map(make).shuffle(seed=0).cache(memory_bytes=10 * 5000)
    collect(loader, "for")
    make.take()
    for _ in range(3):
        assert sorted(first_values(collect(loader, "for"))) == list(range(20))
        assert len(make.take()) == 10
        assert cache_stats(loader) == (10, 10)
        (stage,) = (s for s in loader.stats().stages if s.name.startswith("cache("))
        assert 40_000 < stage.cached_bytes <= 50_000


@on_both_faces
def test_functions_after_it_may_change_what_they_get(cached: Cached, face: Face) -> None:
    """In place, and in every epoch: the cache keeps what it was given."""

    def augment(sample: dict[str, Any]) -> dict[str, Any]:
        sample["x"].mul_(2)
        sample["list"].append(1)
        sample["array"] += 1
        return sample

    def make(n: int) -> dict[str, Any]:
        return {"x": torch.tensor([float(n)]), "list": [], "array": np.zeros(2)}

    loader = cached(Pipeline(range(5)).map(make)).map(augment)
    for _ in range(3):
        found = collect(loader, face)
        assert [(s["x"].item(), s["list"], s["array"].tolist()) for s in found] == [
            (2.0 * n, [1], [1.0, 1.0]) for n in range(5)
        ]


def test_consumers_and_collate_functions_may_change_what_they_get() -> None:
    """Samples that are not batched, and those in lists."""
    base = Pipeline(range(4)).map(lambda n: torch.tensor([n])).cache(memory_bytes=1 << 20)
    for _ in range(2):
        for sample in base:
            assert sample.item() < 4
            sample.fill_(9)
        for batch in base.batch(2, collate_fn=list):
            assert all(sample.item() < 4 for sample in batch)
            for sample in batch:
                sample.fill_(9)
        for tensor in base.batch(2):
            tensor.fill_(9)
    assert first_values(list(base)) == list(range(4))


def test_the_default_collate_gets_samples_uncopied() -> None:
    """It only reads: the copy into the batch is the only one."""
    base = Pipeline(range(4)).map(lambda n: torch.tensor([n])).cache(memory_bytes=1 << 20)
    for loader, copies in ((base.batch(2), False), (base.shuffle().take(3).batch(2), False), (base.unbatch(), True)):
        list(loader)
        assert any(stage.name.startswith("copy") for stage in loader.stats().stages) == copies


def test_a_row_does_not_keep_its_whole_table() -> None:
    """A view of larger memory gets memory of its own."""
    table = torch.zeros(1000, 10)
    array = np.zeros((1000, 10))
    row, other = kept((table[3], {"a": array[4]}))
    assert row.untyped_storage().nbytes() == 40
    assert other["a"].base is None
    whole = torch.zeros(3)
    assert kept(whole) is whole


def test_sizes_count_content() -> None:
    """Tensors, arrays and strings exactly, containers with what is in them, others as their pickles."""
    for sample in (torch.zeros(1000), np.zeros(500), b"x" * 4000, ["y" * 2000, "z" * 2000], {"a": b"x" * 4000}):
        assert 4000 <= size_of(sample) <= 4700
    assert 4000 <= size_of(_Custom(b"x" * 4000)) <= 4700
    assert size_of(lambda: 0) > 0


class _Custom:
    def __init__(self, content: bytes) -> None:
        self.content = content


def test_copies_share_nothing_that_can_be_written_to() -> None:
    """Whatever a sample is made of."""
    parameter = torch.nn.Parameter(torch.ones(2))
    sample = (torch.ones(2), [np.ones(2)], {"a": _Custom(b"b")}, "text", None, parameter)
    copy = copied(sample)
    assert type(copy[5]) is torch.nn.Parameter
    copy[0].zero_()
    copy[1][0][:] = 0
    copy[2]["a"].content = b""
    assert sample[0].sum() == 2
    assert sample[1][0].sum() == 2
    assert sample[2]["a"].content == b"b"


# -- by position -------------------------------------------------------------------------------------------------------


@on_both_faces
def test_a_stream_that_is_kept_is_not_opened_again(cached: Cached, face: Face) -> None:
    """Nor does anything else before the cache run again."""
    stream, make = Stream(10), Calls()
    loader = cached(Pipeline(stream).map(make).flat_map(lambda t: [t, t + 100]).batch(3)).map(lambda b: b[:, 0])
    expected = [[0, 100, 1], [101, 2, 102], [3, 103, 4], [104, 5, 105], [6, 106, 7], [107, 8, 108], [9, 109]]
    for _ in range(3):
        assert [batch.tolist() for batch in collect(loader, face)] == expected
    assert (stream.opened, make.take()) == (1, list(range(10)))
    assert cache_stats(loader) == (7, 0)


def test_an_empty_stream_is_kept_too(cached: Cached) -> None:
    """That it has nothing."""
    stream = Stream(0)
    loader = cached(Pipeline(stream))
    assert [collect(loader, "for") for _ in range(2)] == [[], []]
    assert stream.opened == 1


@on_both_faces
def test_a_stream_goes_on_after_what_is_kept(cached: Cached, face: Face, tmp_path: Path) -> None:
    """After a partial epoch it is opened at the cursor of the last sample that is kept."""
    path = tmp_path / "lines.txt"
    path.write_text("".join(f"{n}\n" for n in range(30)))
    decode = Calls(int)
    loader = cached(Pipeline(Lines(path)).map(decode, concurrency=1))
    assert collect(loader, face, limit=10) == list(range(10))
    loader.close()
    made = len(decode.take())
    assert collect(loader, face) == list(range(30))
    again = decode.made
    assert 10 <= 30 - len(again) <= made  # what was handed out is kept, and maybe more
    decode.take()
    path.unlink()
    assert collect(loader, face) == list(range(30))
    assert decode.take() == []


def test_a_stream_beyond_the_budget_is_read_on(tmp_path: Path) -> None:
    """What is kept comes from the cache, the rest from the source."""
    make = Calls(lambda n: torch.full((1000,), float(n)))
    loader = Pipeline(Stream(20)).map(make).cache(memory_bytes=10 * 5000)
    for epoch in range(3):
        assert first_values(collect(loader, "for")) == list(range(20))
        assert make.take() == list(range(0 if epoch == 0 else 10, 20))


def test_a_sample_of_a_stream_that_failed_is_tried_again(cached: Cached) -> None:
    """From it on the stream is read again, until it has come."""
    broken = {3}

    def make(sample: int) -> int:
        if sample in broken:
            raise OSError(f"no {sample}")
        return sample

    stream = Stream(6)
    loader = cached(Pipeline(stream).map(make))
    for _ in range(2):
        with Steps(loader, "for") as steps:
            assert list(map(str, steps.outcomes())) == ["0", "1", "2", "no 3", "4", "5"]
    broken.clear()
    for _ in range(2):
        assert collect(loader, "for") == list(range(6))
    assert stream.opened == 3


def test_a_stream_that_broke_off_is_not_taken_for_whole(cached: Cached) -> None:
    """Its failure is no end."""

    def stream() -> Iterator[int]:
        yield 1
        raise OSError("gone")

    loader = cached(Pipeline(stream))
    for _ in range(2):
        with Steps(loader, "for") as steps:
            assert list(map(str, steps.outcomes())) == ["1", "gone"]


@pytest.mark.parametrize("keyed", [True, False])
def test_cursors_pass_through(cached: Cached, keyed: bool) -> None:
    """They are those of a pipeline without the cache, hit or miss, and it goes on at each of them."""
    source = list(range(12)) if keyed else Stream(12)
    plain = Pipeline(source).map(lambda n: torch.tensor([n])).batch(2)
    loader = cached(Pipeline(source).map(lambda n: torch.tensor([n]))).batch(2)

    def outcomes(pipeline: Pipeline, cursor: Any = None) -> list[tuple[list[int], Any]]:
        if cursor is not None:
            build = pipeline._build

            def resumed(*args: Any, **how: Any) -> Any:
                window = build(*args, **how)
                window.resume(json.loads(json.dumps(cursor)))
                return window

            pipeline = pipeline.prefetch(2)
            pipeline._build = resumed  # type: ignore[method-assign]
        with Steps(pipeline, "for") as steps:
            found = []
            for batch in _each(steps):
                found.append((batch.flatten().tolist(), steps._iterator.cursor))
            return found

    expected = outcomes(plain)
    fresh = cached(Pipeline(source).map(lambda n: torch.tensor([n]))).batch(2)
    for place, (_, cursor) in enumerate(expected):
        assert outcomes(fresh, cursor) == expected[place + 1 :]  # nothing of it is kept, or some
    assert outcomes(loader) == outcomes(loader) == expected
    for place, (_, cursor) in enumerate(expected):
        assert outcomes(loader, cursor) == expected[place + 1 :]


def _each(steps: Steps) -> Iterator[Any]:
    while True:
        try:
            batch = steps.next()
        except StopIteration:
            return
        yield batch


@pytest.mark.parametrize(
    ("pipeline", "what"),
    [
        (Pipeline(Stream(5)).shuffle(3), r"after shuffle\(3\)"),
        (Pipeline(range(5)).shuffle().batch(2), r"after shuffle\(\)"),
        (Pipeline(Stream(5)).map(str, ordered=False), r"after map\(str\)"),
        (Pipeline.merge([1], [2]), r"after merge\(\)"),
        (Pipeline.mix([[1], [2]], [1, 1]), r"after mix\(\)"),
        (Pipeline(range(5), sampler=[1, 2]).batch(2), "the sampler"),
        (Pipeline(range(5)).drop_if(bool), r"after drop_if\(bool\)"),
        (Pipeline(Stream(5)).batch(2, max_wait=1), r"after batch\(2, max_wait=1\)"),
    ],
)
def test_streams_that_change_are_refused(pipeline: Pipeline, what: str) -> None:
    """By position, samples of two epochs would be mixed up."""
    with pytest.raises(ValueError, match=what):
        pipeline.cache(memory_bytes=1000)


@settings(max_examples=40)
@given(
    data=st.data(),
    samples=st.integers(0, 12),
    budget=st.sampled_from([1, 2500, 1 << 20]),
    epochs=st.lists(st.integers(0, 14), max_size=5),
)
def test_any_history_of_epochs_gives_the_same_samples(
    data: st.DataObject, samples: int, budget: int, epochs: list[int]
) -> None:
    """Epochs given up anywhere, with any budget, with failures that pass."""
    kept_numbers = [n for n in range(12) if n % 5 != 4]
    failing = data.draw(st.lists(st.sets(st.sampled_from(kept_numbers)), min_size=len(epochs), max_size=len(epochs)))
    broken: set[int] = set()

    def make(n: int) -> int:
        if n in broken:
            raise OSError(n)
        return n

    for source in (range(samples), Stream(samples)):
        broken.clear()
        loader = Pipeline(source).map(make, concurrency=2).filter(lambda n: n % 5 != 4).cache(memory_bytes=budget)
        for limit, now in zip(epochs, failing, strict=True):
            broken |= now
            broken &= now
            with Steps(loader, "for") as steps:
                for n in [n for n in kept_numbers if n < samples][:limit]:
                    try:
                        found = steps.next()
                    except OSError as error:
                        (found,) = error.args
                    assert found == n
            loader.close()
        broken.clear()
        assert collect(loader, "for") == [n for n in kept_numbers if n < samples]


# -- on disk -----------------------------------------------------------------------------------------------------------


def test_another_process_finds_what_was_kept(tmp_path: Path) -> None:
    """Of samples of any kind."""
    samples: list[Any] = [
        torch.randn(40, 50),
        torch.randn(4, 6).t(),
        np.arange(3000),
        {"a": [torch.tensor(1), None], "b": (b"x" * 5000, "é")},
        torch.empty(0, 3),
        torch.zeros(2000, dtype=torch.bool),
        _Custom(b"c"),
    ]
    loader = Pipeline(range(7)).map(samples.__getitem__).cache(disk=tmp_path / "c", version=1)
    collect(loader, "for")
    again = Pipeline(range(7)).map(samples.__getitem__).cache(disk=tmp_path / "c", version=1)
    found = collect(again, "for")
    assert cache_stats(again) == (7, 0)
    assert torch.equal(found[0], samples[0])
    assert torch.equal(found[1], samples[1])
    assert found[1].stride() == samples[1].stride()
    assert found[2].tolist() == samples[2].tolist()
    assert found[3] == samples[3]
    assert found[4].shape == (0, 3)
    assert torch.equal(found[5], samples[5])
    assert found[6].content == b"c"
    found[0].zero_()  # its memory is its own
    assert torch.equal(collect(again, "for")[0], samples[0])


KEEPS = """
import sys
from aioloader import Pipeline
import torch

def make(n):
    return torch.full((3000,), float(n))

loader = Pipeline(range(int(sys.argv[2]))).map(make, concurrency=2).cache(disk=sys.argv[1])
for number, sample in enumerate(loader):
    assert sample[0] == sample[-1] == number
    if number == int(sys.argv[3]):
        print("there", flush=True)
        if sys.argv[4] == "kill":
            sys.stdin.read() or __import__("time").sleep(60)
print("done", flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no kill")
@pytest.mark.parametrize("after", [0, 300])
def test_a_kill_leaves_what_was_whole(tmp_path: Path, after: int) -> None:
    """A process that is killed while it writes: the next one reads what is complete, makes the rest, and is right."""
    with Child(KEEPS, str(tmp_path / "c"), "2000", str(after), "go") as child:
        child.until_line("there")
        child.process.kill()
        child.process.wait()
    make = Calls(lambda n: torch.full((3000,), float(n)))
    loader = Pipeline(range(2000)).map(_named_make(make), concurrency=2).cache(disk=tmp_path / "c")
    found = collect(loader, "for")
    assert [(int(sample[0]), int(sample[-1])) for sample in found] == [(n, n) for n in range(2000)]
    hits, misses = cache_stats(loader)
    assert hits >= after / 2  # what was handed out had been written, but for a few on their way
    assert hits + misses == 2000
    assert len(make.take()) == misses
    collect(loader, "for")
    assert cache_stats(loader) == (2000, 0)


def _named_make(fn: Any) -> Any:
    def make(n: int) -> Any:
        return fn(n)

    return make


def test_two_processes_may_use_one_directory(tmp_path: Path) -> None:
    """At the same time; neither waits for the other, and later each reads what both have kept."""
    with Child(KEEPS, str(tmp_path / "c"), "500", "3", "go") as child:
        child.until_line("there")
        make = Calls(lambda n: torch.full((3000,), float(n)))
        loader = Pipeline(range(500)).map(_named_make(make)).cache(disk=tmp_path / "c")
        assert first_values(collect(loader, "for")) == list(range(500))
        code, _, err = child.finish()
        assert code == 0, err
    assert first_values(collect(loader, "for")) == list(range(500))
    assert cache_stats(loader) == (500, 0)


def test_any_cut_and_any_flipped_byte_is_found_out(tmp_path: Path) -> None:
    """Of the index and of the samples: what is not whole is made again, and nothing wrong is given."""
    draw = random.Random(0)
    for trial in range(30):
        folder = tmp_path / str(trial)
        loader = Pipeline(range(20)).map(lambda n: torch.full((300,), float(n))).cache(disk=folder)
        collect(loader, "for")
        (victim,) = folder.glob("*.index" if trial % 2 else "*.samples")
        data = bytearray(victim.read_bytes())
        place = draw.randrange(len(data))
        if trial % 3:
            data[place] ^= 1 << draw.randrange(8)
        else:
            del data[place:]
        victim.write_bytes(data)
        again = Pipeline(range(20)).map(lambda n: torch.full((300,), float(n))).cache(disk=folder)
        for _ in range(2):
            found = collect(again, "for")
            assert [sample.tolist() for sample in found] == [[float(n)] * 300 for n in range(20)]
        assert cache_stats(again) == (20, 0)


def test_two_threads_that_open_a_file_at_once_both_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both find it closed and open it; the later one is kept, and the other must stay open until it has been read."""
    store = DiskStore(tmp_path / "cache", "")
    store.open("any")
    for key in range(2):
        store.put(key, torch.full((1000,), key), None)
    both_open, both_read = threading.Barrier(2), threading.Barrier(2)

    class Opened(segment_files._SharedFile):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            both_open.wait(10)

    def read(*args: Any) -> Any:
        both_read.wait(10)
        return read_now(*args)

    read_now = segment_files._read
    monkeypatch.setattr(segment_files, "_SharedFile", Opened)
    monkeypatch.setattr(segment_files, "_read", read)
    with ThreadPoolExecutor(2) as threads:
        samples = list(threads.map(store.load, [store.find(0), store.find(1)]))
    assert [int(sample[0]) for sample in samples] == [0, 1]
    store.close()


# -- files that go bad -------------------------------------------------------------------------------------------------


def _gone(path: Path) -> None:
    path.unlink()


def _cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _empty(path: Path) -> None:
    os.truncate(path, 0)


def _flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for at in range(len(data) // 3, len(data), 97):
        data[at] ^= 1
    path.write_bytes(data)


def _a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _a_link_to_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent / "nowhere")


Damage = Callable[[Path], None]
DAMAGES: list[Damage] = [_gone, _cut_off, _empty, _flipped, _a_folder, _a_link_to_nowhere]


def make_tensor(sample: int) -> torch.Tensor:
    return torch.full((100,), float(sample))


def _source(keyed: bool, samples: int = 20) -> Any:
    return range(samples) if keyed else partial(range, samples)


def _victim(folder: Path, suffix: str) -> Path:
    return folder / "cache.json" if suffix == ".json" else next(folder.glob(f"*{suffix}"))


@on_both_faces
@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        *product([".samples", ".index"], DAMAGES),
        *product([".json"], [_gone, _cut_off, _empty, _flipped]),
    ],
)
def test_a_file_that_went_bad_between_epochs_is_made_again(
    tmp_path: Path, suffix: str, damage: Damage, face: Face
) -> None:
    """All samples come, without an error, to the same loader and to another; and then nothing is made any more."""
    for keyed, same in product([True, False], repeat=2):
        folder = tmp_path / f"{keyed} {same}"
        loaders = [Pipeline(_source(keyed)).map(make_tensor).cache(disk=folder) for _ in range(3)]
        first, second, third = [loaders[0]] * 3 if same else loaders
        collect(first, face)
        damage(_victim(folder, suffix))
        for loader in (second, third):
            assert first_values(collect(loader, face)) == list(range(20))
        assert cache_stats(third) == (20, 0)


@on_both_faces
@pytest.mark.parametrize("keyed", [True, False], ids=["keyed", "stream"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_goes_bad_in_an_epoch_is_made_again(
    tmp_path: Path, damage: Damage, keyed: bool, face: Face
) -> None:
    """While samples are read, and while some of them are still made."""
    folder = tmp_path / "c"

    def loader() -> Pipeline:
        return Pipeline(_source(keyed, 1000)).map(make_tensor).cache(disk=folder).batch(20).prefetch(1)

    def numbers(batches: list[torch.Tensor]) -> list[int]:
        return [int(number) for batch in batches for number in batch[:, 0]]

    collect(loader(), face, limit=30)
    for _ in range(2):
        with Steps(loader(), face) as steps:
            found = steps.rest(5)
            for victim in list(folder.glob("*.samples")):
                if victim.is_file():
                    damage(victim)
            found += steps.rest()
        assert numbers(found) == list(range(1000))
    assert numbers(collect(loader(), face)) == list(range(1000))


def test_a_stream_is_opened_once_for_all_that_was_lost_of_it(tmp_path: Path) -> None:
    """And read not much further than that."""
    count = 10_000
    stream = Stream(count)
    loader = Pipeline(stream).map(float).cache(disk=tmp_path / "c")
    collect(loader, "for")
    _lose(tmp_path / "c", range(50, 60))
    stream.opened = stream.read = 0
    assert collect(loader, "for") == list(range(count))
    assert stream.opened == 1
    assert stream.read < count // 2
    assert cache_stats(loader) == (count - 10, 10)
    collect(loader, "for")
    assert cache_stats(loader) == (count, 0)
    assert stream.opened == 1


def _lose(folder: Path, numbers: Iterable[int]) -> None:
    """Break the samples of a stream with these numbers."""
    (index,) = folder.glob("*.index")
    segment = segment_files.StoredSegment(folder, index.stem)
    seed = zlib.crc32((folder / "cache.json").read_bytes())
    data = bytearray(segment.samples.read_bytes())
    for key, location in segment.new_entries(seed):
        if key[0] == "@" and key[1] in numbers:
            data[location.offset + location.length // 2] ^= 1
    segment.samples.write_bytes(data)


@on_both_faces
def test_what_was_lost_of_a_stream_and_fails_now_raises_at_its_place(tmp_path: Path, face: Face) -> None:
    """With the note of the stage that made it; what was lost after it comes."""
    fails: set[int] = set()

    def make(number: int) -> torch.Tensor:
        if number in fails:
            raise OSError(f"no {number}")
        return make_tensor(number)

    loader = Pipeline(partial(range, 20)).map(make, concurrency=1).cache(disk=tmp_path / "c")
    collect(loader, face)
    _lose(tmp_path / "c", [3, 4, 9])
    fails |= {3, 9}
    with Steps(loader, face) as steps:
        found = steps.outcomes()
    assert [str(one) if isinstance(one, OSError) else int(one[0]) for one in found] == [
        *range(3),
        "no 3",
        *range(4, 9),
        "no 9",
        *range(10, 20),
    ]
    assert "stage map(" in notes(found[3])
    assert "stage cache(" not in notes(found[3])
    fails.clear()
    assert first_values(collect(loader, face)) == list(range(20))


@on_both_faces
def test_what_was_lost_of_a_stream_that_has_changed_says_so(tmp_path: Path, face: Face) -> None:
    """A stream that is shorter now, and one that fails before."""
    length = 20
    broken: list[Exception] = []

    def stream() -> Iterator[int]:
        yield from range(length)
        if broken:
            raise broken[0]

    loader = Pipeline(stream).map(make_tensor).cache(disk=tmp_path / "c")
    collect(loader, face)
    _lose(tmp_path / "c", [15])
    length = 10
    with Steps(loader, face) as steps:
        found = steps.outcomes()
    assert isinstance(found[15], BrokenDataError)
    assert "has fewer samples than it had" in str(found[15])
    assert first_values(found[:15] + found[16:]) == [*range(15), *range(16, 20)]

    loader = Pipeline(stream).map(make_tensor).cache(disk=tmp_path / "d")
    length = 20
    collect(loader, face)
    _lose(tmp_path / "d", [5, 15])
    length = 10
    broken.append(OSError("the line is down"))
    with Steps(loader, face) as steps:
        found = steps.outcomes()
    assert found[15] is broken[0]
    assert first_values(found[:15] + found[16:]) == [*range(15), *range(16, 20)]


def test_a_lost_sample_of_a_generator_says_that_it_cannot_be_made_again(tmp_path: Path) -> None:
    def numbers() -> Iterator[int]:
        yield from range(20)

    collect(Pipeline(numbers()).map(make_tensor).cache(disk=tmp_path / "c"), "for")
    _lose(tmp_path / "c", [5])
    with Steps(Pipeline(numbers()).map(make_tensor).cache(disk=tmp_path / "c"), "for") as steps:
        found = steps.outcomes()
    assert isinstance(found[5], SourceUsedUpError)
    assert "was kept on disk, has been lost since, and cannot be made again" in notes(found[5])
    assert first_values(found[:5] + found[6:]) == [*range(5), *range(6, 20)]


@on_both_faces
@pytest.mark.parametrize("way", ["filter", "flat_map", "batch", "in_process", "repeat"])
def test_whatever_made_it_makes_it_again(tmp_path: Path, way: str, face: Face) -> None:
    """Each kind of stage before a cache of a stream."""
    numbers = Pipeline(partial(range, 40))
    before = {
        "filter": numbers.filter(is_even),
        "flat_map": numbers.flat_map(three_times),
        "batch": numbers.batch(2),
        "in_process": numbers.map(make_tensor).in_process(),
        "repeat": Pipeline(partial(range, 4)).map(make_tensor).repeat(10),
    }[way]
    loader = before.cache(disk=tmp_path / "c")
    expected = [torch.as_tensor(sample).tolist() for sample in collect(before, face)]
    for flips in (None, 1, 3):
        if flips is not None:
            victim = next((tmp_path / "c").glob("*.samples"))
            data = bytearray(victim.read_bytes())
            for place in range(flips * len(data) // 7, len(data), len(data) // flips):
                data[place] ^= 1
            victim.write_bytes(data)
        for _ in range(2):
            assert [torch.as_tensor(sample).tolist() for sample in collect(loader, face)] == expected
    assert cache_stats(loader) == (len(expected), 0)


def is_even(number: int) -> bool:
    return number % 2 == 0


def three_times(number: int) -> list[int]:
    return [number] * 3


@pytest.mark.parametrize("keyed", [True, False], ids=["keyed", "stream"])
def test_a_state_goes_on_where_the_cache_has_lost_what_came_before(tmp_path: Path, keyed: bool) -> None:
    def loader() -> Pipeline:
        return Pipeline(_source(keyed)).map(make_tensor).cache(disk=tmp_path / "c")

    collect(loader(), "for")
    with Steps(taken := loader(), "for") as steps:
        steps.rest(7)
        state = json.loads(json.dumps(taken.state_dict()))
    for damage in (_flipped, _cut_off, _gone):
        damage(_victim(tmp_path / "c", ".samples"))
        resumed = loader()
        resumed.load_state_dict(state)
        assert first_values(collect(resumed, "for")) == list(range(7, 20))
        collect(loader(), "for")


def test_a_cache_in_memory_after_one_on_disk_that_lost_a_file(tmp_path: Path) -> None:
    """Samples are looked up from the back: what one has lost the other may have."""
    for keyed in (True, False):
        folder = tmp_path / f"{keyed}"
        loader = Pipeline(_source(keyed)).map(make_tensor).cache(disk=folder).cache(memory_bytes=1 << 20)
        collect(loader, "for", limit=10)
        loader.close()
        _gone(_victim(folder, ".samples"))
        for _ in range(2):
            assert first_values(collect(loader, "for")) == list(range(20))


def test_a_directory_that_is_deleted_in_an_epoch_is_filled_anew(tmp_path: Path) -> None:
    """What is made from then on is kept, and there is no warning."""
    loader = Pipeline(range(500)).map(make_tensor).cache(disk=tmp_path / "c")
    with Steps(loader, "for") as steps:
        steps.rest(100)
        shutil.rmtree(tmp_path / "c")
        assert len(steps.rest()) == 400
    for _ in range(2):
        assert first_values(collect(loader, "for")) == list(range(500))
    assert cache_stats(loader) == (500, 0)
    other = Pipeline(range(500)).map(make_tensor).cache(disk=tmp_path / "c")
    collect(other, "for")
    assert cache_stats(other) == (500, 0)


LOSES = """
    import os, sys
    from contextlib import suppress
    from pathlib import Path

    from aioloader import Pipeline

    loader = Pipeline(range(1000)).map(float).cache(disk=sys.argv[1]).batch(10)
    for epoch in range(6):
        for number, batch in enumerate(loader):
            assert batch.tolist() == [10.0 * number + place for place in range(10)], batch
            if number == 10 * epoch:
                for path in sorted(Path(sys.argv[1]).glob("*.samples"))[: epoch + 1]:
                    with suppress(FileNotFoundError):  # another process was faster
                        path.unlink() if epoch % 2 else os.truncate(path, 1000)
"""


def test_processes_that_lose_each_others_files(tmp_path: Path) -> None:
    """Ranks that share a directory, in which each breaks and deletes what is there: all get their samples."""
    with contextlib.ExitStack() as stack:
        for child in [stack.enter_context(Child(LOSES, str(tmp_path / "c"))) for _ in range(2)]:
            code, _, err = child.finish()
            assert code == 0, err


@pytest.mark.parametrize("damage", [_gone, _empty, _cut_off])
def test_without_its_description_a_directory_gives_nobody_anothers_samples(tmp_path: Path, damage: Damage) -> None:
    """And the same pipeline finds its own."""
    folder = tmp_path / "c"
    upper = Pipeline(["a"]).map(str.upper).cache(disk=folder)
    collect(upper, "for")
    damage(folder / "cache.json")
    assert collect(Pipeline(["a"]).map(str.title, concurrency=1).map(str.lower).cache(disk=folder), "for") == ["a"]
    damage(folder / "cache.json")
    again = Pipeline(["a"]).map(str.upper).cache(disk=folder)
    assert collect(again, "for") == ["A"]
    assert cache_stats(again) == (1, 0)


def test_a_place_that_was_made_again_meanwhile_is_not_forgotten(tmp_path: Path) -> None:
    """Two epochs find the same sample lost; the one that comes later does not undo what the other has made."""
    store = DiskStore(tmp_path / "c", "")
    store.open("any")
    store.put(1, torch.zeros(10), None)
    lost = store.find(1)
    os.truncate(lost.segment.samples, 0)
    with pytest.raises(BrokenDataError, match="is not what was kept"):
        store.load(lost)
    store.put(1, torch.ones(10), None)
    for location in (lost, store.find(1)):
        assert store.load(location).tolist() == [1.0] * 10
    store.close()


def test_a_disk_that_takes_no_files_is_read_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that is mounted for reading: one warning when something is to be kept."""
    folder = tmp_path / "c"
    collect(Pipeline(range(10)).map(make_tensor).cache(disk=folder).take(6), "for")

    class ReadOnly(segment_files._SharedFile):
        def __init__(self, path: Path, flags: int) -> None:
            if flags & os.O_CREAT:
                raise OSError(errno.EROFS, "Read-only file system", str(path))
            super().__init__(path, flags)

    monkeypatch.setattr(segment_files, "_SharedFile", ReadOnly)
    loader = Pipeline(range(10)).map(make_tensor).cache(disk=folder)
    with pytest.warns(RuntimeWarning, match="cannot be written to, and keeps no more: .*Read-only file system"):
        assert first_values(collect(loader, "for")) == list(range(10))
    assert cache_stats(loader) == (6, 4)
    assert first_values(collect(loader, "for")) == list(range(10))


@on_both_faces
def test_a_disk_without_room_for_the_description_raises_at_the_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, face: Face
) -> None:
    """And leaves no draft; with room again, it is made."""
    folder = tmp_path / "c"

    def no_room(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    loader = Pipeline(range(3)).map(make_tensor).cache(disk=folder)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", no_room)
        with Steps(loader, face) as steps:
            found = steps.outcomes()
    assert [type(one) for one in found] == [OSError] * 3
    assert list(folder.iterdir()) == []
    assert first_values(collect(loader, face)) == list(range(3))


def test_a_directory_of_another_pipeline_is_refused(tmp_path: Path) -> None:
    """Says what it holds and what is asked for; a version makes two pipelines of the same names differ."""
    folder = tmp_path / "c"
    collect(Pipeline(["a"]).map(str.upper).cache(disk=folder, version="v1"), "for")
    with pytest.raises(ValueError, match=r"another pipeline, 'samples by name > map\(str.upper\)', and this one is"):
        Pipeline(["a"]).map(str.lower).cache(disk=folder, version="v1")
    with pytest.raises(ValueError, match="another version, 'v1', and this one is 'v2'; pass a directory for each"):
        Pipeline(["a"]).map(str.upper).cache(disk=folder, version="v2")
    with pytest.raises(ValueError, match=r"index of ndarray\(3\)"):
        Pipeline(np.zeros(3)).map(str.upper).cache(disk=folder, version="v1")  # type: ignore[arg-type]


def test_what_a_source_of_ours_reads_is_part_of_the_pipeline(tmp_path: Path) -> None:
    """Other files are other samples."""
    for name in "ab":
        (tmp_path / name).write_text(f"{name}\n")
    assert collect(Pipeline(Lines(tmp_path / "a")).cache(disk=tmp_path / "c"), "for") == ["a"]
    with pytest.raises(ValueError, match="another pipeline"):
        Pipeline(Lines(tmp_path / "b")).cache(disk=tmp_path / "c")


def test_a_directory_that_became_another_pipelines_meanwhile(tmp_path: Path) -> None:
    """Is refused when the epoch begins."""
    mine = Pipeline(["a"]).map(str.upper).cache(disk=tmp_path / "c")
    collect(Pipeline(["a"]).map(str.lower).cache(disk=tmp_path / "c"), "for")
    with Steps(mine, "for") as steps:
        (error,) = steps.outcomes()
    assert "another pipeline" in str(error)


def test_directories_that_are_none(tmp_path: Path) -> None:
    """A file, a folder of other things, a description that is broken or newer."""
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="disk must be a directory"):
        Pipeline([1]).cache(disk=tmp_path / "file")
    with pytest.raises(ValueError, match="holds 'file' and is no cache"):
        Pipeline([1]).cache(disk=tmp_path)
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / "cache.json").write_text("{")
    with pytest.raises(ValueError, match="does not describe a cache"):
        Pipeline([1]).cache(disk=folder)
    (folder / "cache.json").write_text(json.dumps({"format": 9, "pipeline": "", "version": ""}))
    with pytest.raises(ValueError, match="a cache of format 9"):
        Pipeline([1]).cache(disk=folder)


def test_a_full_disk_ends_keeping_and_not_the_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It warns once; what was kept before is read on."""
    real = segment_files._write
    written: list[int] = []

    def write(fd: int, parts: list[memoryview]) -> None:
        written.append(fd)
        if len(written) > 6:
            raise OSError(28, "No space left on device")
        real(fd, parts)

    monkeypatch.setattr(segment_files, "_write", write)
    loader = Pipeline(range(10)).map(str, concurrency=1).cache(disk=tmp_path / "c")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert collect(loader, "for") == list(map(str, range(10)))
    (warning,) = caught
    assert "cannot be written to, and keeps no more" in str(warning.message)
    assert cache_stats(loader) == (3, 7)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    """Permission is denied at the place of the samples."""
    (tmp_path / "locked").mkdir(mode=0o500)
    loader = Pipeline([1]).cache(disk=tmp_path / "locked" / "c")
    with pytest.raises(PermissionError):
        collect(loader, "for")


def test_a_sample_that_cannot_be_pickled(tmp_path: Path) -> None:
    """Raises at its place; the others come."""
    loader = Pipeline([1, 2]).map(lambda n: n if n == 1 else iter_of(n)).cache(disk=tmp_path / "c")
    with Steps(loader, "for") as steps:
        one, error = steps.outcomes()
    assert one == 1
    assert isinstance(error, TypeError)
    assert "stage cache(disk=" in notes(error)


def iter_of(n: int) -> Iterator[int]:
    yield n


def test_no_file_is_open_between_epochs(tmp_path: Path) -> None:
    """The check of every test says so; segments of epochs that added something lie side by side."""
    loader = Pipeline(range(20)).map(str, concurrency=1).cache(disk=tmp_path / "c").batch(2)
    for limit in (1, 4, None):
        collect(loader, "for", limit=limit)
        loader.close()
    assert {path.suffix for path in (tmp_path / "c").iterdir()} == {".json", ".index", ".samples"}


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, TypeError, r"either memory_bytes or disk, got memory_bytes=None and disk=None"),
        ({"memory_bytes": 1, "disk": "d"}, TypeError, "either memory_bytes or disk"),
        ({"memory_bytes": 0}, ValueError, "memory_bytes must be at least 1"),
        ({"memory_bytes": "4 GB"}, TypeError, "memory_bytes must be an integer"),
    ],
)
def test_arguments_that_do_not_fit(arguments: Any, error: type[Exception], message: str) -> None:
    """At once."""
    with pytest.raises(error, match=message):
        Pipeline([1]).cache(**arguments)


def test_a_pickled_pipeline_begins_with_an_empty_cache() -> None:
    """What is kept stays behind."""
    import pickle

    loader = Pipeline(range(3)).map(float).cache(memory_bytes=1000)
    collect(loader, "for")
    copy = pickle.loads(pickle.dumps(loader))
    assert collect(copy, "for") == [0.0, 1.0, 2.0]
    assert cache_stats(copy) == (0, 3)


def test_the_stage_is_shown_as_it_was_written(tmp_path: Path) -> None:
    """In `repr` and in statistics; it changes no length."""
    loader = Pipeline(range(3)).cache(memory_bytes=1000).batch(2)
    assert repr(loader).endswith(".cache(memory_bytes=1000).batch(2)")
    assert len(loader) == 2
    stage = Pipeline(range(3)).cache(disk=tmp_path / "c")._plan.stages[0]
    assert isinstance(stage, Cache)
    assert stage.label == f"cache(disk={str(tmp_path / 'c')!r})"


@on_both_faces
def test_a_state_goes_on_in_a_pipeline_with_a_cache(cached: Cached, face: Face) -> None:
    """From the middle of an epoch: empty, full, or not there at all, the cache makes no difference."""
    for source in (list(range(20)), Stream(20)):
        keyed = isinstance(source, list)

        def stages(pipeline: Pipeline, keyed: bool = keyed) -> Pipeline:
            return (pipeline.shuffle(seed=1) if keyed else pipeline).map(lambda n: torch.tensor([n]))

        loader = cached(stages(Pipeline(source))).batch(3)
        expected = first_values([torch.cat(collect(loader, face)[3:])])
        loader.set_epoch(0)
        with Steps(loader, face) as steps:
            done = [steps.next() for _ in range(3)]
            state = json.loads(json.dumps(loader.state_dict()))
        loader.close()
        for other in (loader, cached(stages(Pipeline(source))).batch(3)):
            other.load_state_dict(state)
            rest = collect(other, face)
            assert sorted(torch.cat(done + rest).flatten().tolist()) == list(range(20))
            assert first_values(rest[:1]) == expected


def test_files_are_known_by_their_paths(tmp_path: Path) -> None:
    """One that is added later is read, the others are not read again."""
    from aioloader.sources import Files

    for name in "ac":
        (tmp_path / name).write_text(name)
    decode = Calls(lambda content: bytes(content).decode())

    def loader() -> Pipeline:
        return Pipeline(Files([tmp_path / name for name in "abc" if (tmp_path / name).exists()])).map(decode)

    assert collect(loader().cache(disk=tmp_path / "cache"), "for") == ["a", "c"]
    decode.take()
    (tmp_path / "b").write_text("b")
    again = loader().cache(disk=tmp_path / "cache")
    assert collect(again, "for") == ["a", "b", "c"]
    assert [bytes(content) for content in decode.take()] == [b"b"]


def test_a_fixed_turn_is_an_order(cached: Cached) -> None:
    """`interleave` and `zip` give the same samples in each epoch."""
    first, second = Stream(3), Stream(3)
    loader = cached(Pipeline.interleave(first, second)).batch(2, collate_fn=list)
    for _ in range(2):
        assert collect(loader, "for") == [[0, 0], [1, 1], [2, 2]]
    assert (first.opened, second.opened) == (1, 1)


def test_a_cache_changes_no_random_numbers_after_it(cached: Cached) -> None:
    """Those of a sample depend on the stage that draws them, and the cache is none of these."""

    def augment(n: float) -> float:
        return n + sample_rng().random().random()

    plain = Pipeline(range(5)).with_seed(3).map(float)
    loader, expected = cached(plain).map(augment), plain.map(augment)
    for _ in range(2):
        assert collect(loader, "for") == collect(expected, "for")


@pytest.mark.parametrize(
    "make",
    [
        lambda: Pipeline(lambda: ([n] for n in range(4))),
        lambda: Pipeline(lambda: iter([Path("a"), Path("b")])),
        lambda: Pipeline(range(3)).flat_map(lambda n: [n, n]),
        lambda: Pipeline(lambda: ([n] for n in range(3))).repeat(2),
        lambda: Pipeline.zip(range(3), list("abc")),
        lambda: Pipeline.interleave(list("ab"), list("ab")),
        lambda: Pipeline(range(6)).batch(2, collate_fn=list),
        lambda: Pipeline(range(6)).batch(2, collate_fn=list).unbatch(),
    ],
    ids=["stream", "paths", "flat_map", "repeat", "zip", "interleave", "batches", "unbatch"],
)
def test_a_cache_on_disk_gives_keys_back_as_they_were(make: Callable[[], Pipeline], tmp_path: Path) -> None:
    """In another process, too: a resumed run has the random numbers of the one that filled the cache."""

    def augment(sample: Any) -> Any:
        return sample, sample_rng().random().random()

    def run(pipeline: Pipeline) -> Any:
        return [(sample, info.keys, info.positions) for sample, info in pipeline.with_seed(1).map(augment).with_info()]

    expected = run(make())
    for _ in range(2):  # the second store finds what the first one wrote
        assert run(make().cache(disk=tmp_path / "cache")) == expected


class Odd:
    """A key that is the user's own type."""

    def __repr__(self) -> str:
        return "odd"


keys = st.recursive(
    st.none() | st.integers() | st.text() | st.builds(Path, st.text("ab/.")) | st.builds(Odd) | st.floats(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.builds(PartKey, inner, st.integers(1, 9))
        | st.builds(SourceKey, st.integers(0, 9), inner)
    ),
    max_leaves=8,
)


@given(keys)
def test_a_key_that_was_written_down_says_the_same(key: Any) -> None:
    read = read_key(json.loads(json.dumps(written_key(key))))
    assert key_text(read) == key_text(key)
    assert source_of(read) == source_of(key)


@on_both_faces
def test_that_flat_map_gave_nothing_is_kept_and_its_error_is_not(face: Face) -> None:
    """Nobody can tell an empty answer from an outage; an error is one."""
    down = {3}

    def empty(key: int) -> list[int]:
        return [] if key in down else [key]

    def failing(key: int) -> list[int]:
        if key in down:
            raise OSError("down")
        return [key]

    kept = Pipeline(range(6)).flat_map(empty).cache(memory_bytes=1 << 20)
    again = Pipeline(range(6)).flat_map(failing).cache(memory_bytes=1 << 20)
    assert collect(kept, face) == [0, 1, 2, 4, 5]
    with Steps(again, face) as steps:
        assert [str(outcome) for outcome in steps.outcomes()] == ["0", "1", "2", "down", "4", "5"]
    down.clear()
    assert collect(kept, face) == [0, 1, 2, 4, 5]
    assert collect(again, face) == [0, 1, 2, 3, 4, 5]
