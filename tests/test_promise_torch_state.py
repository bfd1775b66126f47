"""Promise 10: the caller's thread count, RNG state, default device and grad mode are never changed."""

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    Dataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from aioloader import DataLoader, Pipeline
from aioloader.executors import threads
from aioloader.sources.sampler_order import _DrawnFrom
from tests._support import Face, Steps, collect, on_both_faces


class Items(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((2,), float(index))


async def fetch(key: int) -> torch.Tensor:
    await asyncio.sleep(0)
    return torch.full((2,), float(key), device="cpu")


def decode(sample: torch.Tensor) -> torch.Tensor:
    return sample + 1


def pipeline() -> Any:
    """Every kind of stage that could touch torch."""
    return Pipeline(range(30)).shuffle(seed=1).map(fetch, concurrency=4).map(decode).batch(4).to("cpu")


def random_states() -> list[Any]:
    return [random.getstate(), repr(np.random.get_state(legacy=False)), torch.get_rng_state().tolist()]


@on_both_faces
@pytest.mark.parametrize("seed", [0, 7])
def test_a_pipeline_draws_nothing_from_global_generators(face: Face, seed: int) -> None:
    """Python's, numpy's and torch's generators are the user's own."""
    loader = Pipeline(range(30)).shuffle(seed=seed).map(fetch).shuffle(5, seed=seed).batch(4)
    before = random_states()
    for _ in range(2):
        collect(loader, face)
    assert random_states() == before


@on_both_faces
def test_mix_draws_nothing_from_global_generators(face: Face) -> None:
    """Its draws come from its seed."""
    loader = Pipeline.mix([range(10), range(10)], [0.3, 0.7], seed=1)
    before = random_states()
    collect(loader, face)
    assert random_states() == before


@on_both_faces
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_dataloader_draws_what_torchs_draws(face: Face, shuffle: bool, num_workers: int) -> None:
    """After an epoch torch's generator is where torch's own DataLoader leaves it."""
    torch.manual_seed(3)
    list(torch.utils.data.DataLoader(Items(), batch_size=4, shuffle=shuffle))
    expected = torch.get_rng_state()
    torch.manual_seed(3)
    before = random_states()[:-1]

    collect(DataLoader(Items(), batch_size=4, shuffle=shuffle, num_workers=num_workers), face)

    assert torch.equal(torch.get_rng_state(), expected)
    assert random_states()[:-1] == before


class Halted(Sampler[int]):
    """Draws its order as people write it, and stands still in the middle of that when it is iterated again."""

    def __init__(self) -> None:
        self.rounds = 0
        self.drawing = threading.Event()
        self.go_on = threading.Event()

    def __iter__(self) -> Iterator[int]:
        self.rounds += 1
        order = torch.randperm(50).tolist()
        if self.rounds == 2:
            self.drawing.set()
            assert self.go_on.wait(10)
        yield from [key % 4 for key in order if key < 4]


def test_the_global_generator_is_the_consumers_while_a_later_round_draws() -> None:
    """It is drawn in a thread, at any time: what the consumer sees, keeps and draws meanwhile must not be its."""
    sampler = Halted()
    batches = iter(Pipeline(range(4), sampler=sampler).repeat(2))
    first = [next(batches) for _ in range(4)]
    mine = torch.get_rng_state()
    try:
        assert sampler.drawing.wait(10)
        assert torch.equal(torch.get_rng_state(), mine)
        drawn = torch.rand(3)
    finally:
        sampler.go_on.set()
    assert sorted(batches) == sorted(first) == [0, 1, 2, 3]
    after = torch.get_rng_state()
    torch.set_rng_state(mine)
    assert torch.equal(torch.rand(3), drawn)
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize(
    "sampler",
    [
        RandomSampler(range(20)),
        RandomSampler(range(20), replacement=True),
        SubsetRandomSampler(range(20)),
        WeightedRandomSampler([1.0, 2.0, 3.0], 20),
        BatchSampler(RandomSampler(range(20)), 3, drop_last=False),
        Halted(),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_what_is_drawn_again_is_what_the_global_generator_gave(sampler: Any) -> None:
    """From a generator in its state, which is another one."""
    mine = torch.get_rng_state()
    expected = list(sampler)
    after = torch.get_rng_state()
    if isinstance(sampler, Halted):
        sampler.go_on.set()
    with _DrawnFrom(mine):
        found = list(sampler)
    assert found == expected
    assert torch.equal(torch.get_rng_state(), after)


@on_both_faces
@pytest.mark.parametrize("enabled", [False, True])
def test_grad_mode_stays(face: Face, enabled: bool) -> None:
    """At every step of the loop, and after it."""
    with torch.set_grad_enabled(enabled), Steps(pipeline(), face) as steps:
        for _ in range(8):
            steps.next()
            assert torch.is_grad_enabled() == enabled
        assert steps.rest() == []
        assert torch.is_grad_enabled() == enabled
    assert torch.is_grad_enabled()


@on_both_faces
def test_a_loop_within_inference_mode(face: Face) -> None:
    """`with torch.inference_mode()` around the loop stays, and ends with it."""
    with torch.inference_mode():
        assert len(collect(pipeline(), face)) == 8
        assert torch.is_inference_mode_enabled()
    assert not torch.is_inference_mode_enabled()


@on_both_faces
def test_the_default_device_stays(face: Face) -> None:
    """A default device of the caller is the caller's, and batches do not end up on it."""
    with torch.device("meta"), Steps(pipeline(), face) as steps:
        batch = steps.next()
        assert torch.get_default_device() == torch.device("meta")
        steps.rest()
        assert torch.get_default_device() == torch.device("meta")
    assert torch.get_default_device() == torch.device("cpu")
    assert batch.shape == (4, 2)


@on_both_faces
def test_the_default_dtype_stays(face: Face) -> None:
    """It belongs to the process; nobody sets it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert collect(pipeline(), face)[0].dtype == torch.float64
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(before)


@on_both_faces
@pytest.mark.parametrize("number", [1, 3])
def test_the_number_of_threads_stays(face: Face, number: int) -> None:
    """The consumer's thread and every thread of the user keep their number of intra-op threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        with Steps(pipeline(), face) as steps:
            while steps.rest(1):
                assert torch.get_num_threads() == number
                assert threads_elsewhere() == number
        collect(DataLoader(Items(), batch_size=4, num_workers=2), face)
        assert torch.get_num_threads() == number
        assert threads_elsewhere() == number
    finally:
        torch.set_num_threads(before)


def threads_elsewhere() -> int:
    """The number that a new thread of the user sees."""
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return seen[0]


@pytest.mark.skipif(not threads._libraries_of_torch(), reason="this build of torch has them elsewhere")
def test_the_default_of_new_threads_is_never_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even for the moment in which a thread of ours begins: one of the user's may begin in that, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    seen: list[tuple[int, int]] = []

    def refuse(_: int) -> None:
        raise AssertionError("it sets the default as well")

    def ours() -> None:
        threads.limit_intraop_threads()
        seen.append((torch.get_num_threads(), threads_elsewhere()))
        square = torch.ones(300, 300) @ torch.ones(300, 300)  # whatever torch looks at first here, it stays one
        seen.append((torch.get_num_threads(), threads_elsewhere()))
        assert square[0, 0] == 300

    try:
        with monkeypatch.context() as patched:
            patched.setattr(torch, "set_num_threads", refuse)
            thread = threading.Thread(target=ours)
            thread.start()
            thread.join()
        assert seen == [(1, 3), (1, 3)]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_where_the_libraries_are_not_found_the_default_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a thread that ends at once."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    monkeypatch.setattr(threads, "_libraries_of_torch", lambda: [])
    seen: list[int] = []

    def ours() -> None:
        threads.limit_intraop_threads()
        seen.append(torch.get_num_threads())

    try:
        thread = threading.Thread(target=ours)
        thread.start()
        thread.join()
        assert seen == [1]
        assert threads_elsewhere() == torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@on_both_faces
def test_our_threads_use_one_torch_thread_each(face: Face) -> None:
    """Loader threads would fight for the same intra-op threads (DESIGN section 4)."""
    seen: list[int] = []

    def look(sample: Any) -> Any:
        seen.append(torch.get_num_threads())
        return sample

    collect(Pipeline(range(20)).map(look, concurrency=3).filter(look).batch(4, collate_fn=look), face)
    assert set(seen) == {1}


@on_both_faces
def test_grad_mode_of_a_sample_does_not_reach_the_next(face: Face) -> None:
    """A function that forgets `set_grad_enabled(False)` in a worker does so in its thread only."""

    def careless(key: int) -> int:
        torch.set_grad_enabled(False)
        return key

    collect(Pipeline(range(20)).map(careless, concurrency=2).batch(4), face)
    assert torch.is_grad_enabled()


@on_both_faces
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_context_within_one_sample_is_fine(face: Face, asynchronous: bool) -> None:
    """`no_grad` inside a generator, left again before its `yield`, is nobody's business."""

    def samples() -> Iterator[int]:
        for key in range(6):
            with torch.no_grad():
                torch.ones(1) + key
            yield key

    async def async_samples() -> AsyncIterator[int]:
        for key in samples():
            yield key

    assert collect(Pipeline(async_samples if asynchronous else samples), face) == list(range(6))
    assert torch.is_grad_enabled()
