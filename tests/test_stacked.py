"""Batches of what worker processes have put into shared memory sample after sample: no copy, and nobody else has it."""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data._utils import collate as torch_collate

from aioloader import Pipeline
from aioloader.engine import op_steps
from aioloader.executors.chunk import Call
from aioloader.executors.processes.stacked import MOST_KEPT, STACKED_FROM, stacked_in_place
from aioloader.stages import collate
from tests._played import PlayedPool, Worker
from tests._support import Face, collect, on_both_faces

SIZE = 8
SHAPE = (3, 128, 128)  # 196,608 bytes: eight of them are more than STACKED_FROM


def number(key: int) -> int:
    return key


def image(key: int) -> torch.Tensor:
    return torch.full(SHAPE, float(key))


def labelled(key: int) -> dict[str, Any]:
    return {"label": key, "image": image(key), "array": np.full((200, 200), key), "short": np.full(300, key)}


def twice(key: int) -> tuple[torch.Tensor, torch.Tensor]:
    sample = image(key)
    return sample, sample


@cache
def frame(key: int) -> torch.Tensor:
    return image(key)


def neighbours(key: int) -> dict[str, torch.Tensor]:
    return {"before": frame(key), "after": frame(key + 1)}


def one_of_eight(key: int) -> torch.Tensor:
    return frame(key % SIZE)


class Both:
    """A sample, and a batch of a user who keeps what it was made of."""

    def __init__(self, value: Any, samples: Any = None) -> None:
        self.value = value
        self.samples = samples


def both(key: int) -> Both:
    return Both(image(key))


def collate_both(samples: list[Both], *, collate_fn_map: Any) -> Both:
    values = [sample.value for sample in samples]
    return Both(torch_collate.collate(values, collate_fn_map=collate_fn_map), values)


def fails_at_20(key: int) -> torch.Tensor:
    if key == 20:
        raise ValueError("no image")
    return image(key)


@pytest.fixture(scope="module", autouse=True)
def fork_server() -> Iterator[None]:
    """The process that workers are forked from: made once, for it takes seconds to import torch."""
    with Pipeline(range(1)).map(number, executor="process", concurrency=1) as keeper:
        assert list(keeper) == [0]
        yield


# -- tensors in a segment ----------------------------------------------------------------------------------------------


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.arena.close()


def test_samples_side_by_side_become_a_batch_where_they_are(worker: Worker) -> None:
    """The batch is their memory; it keeps the segment, and gives it back when its last view has died."""
    samples = worker.sends([image(key) for key in range(SIZE)])
    expected = torch.stack(samples)
    address = samples[0].data_ptr()

    batch = stacked_in_place(samples, [])

    assert batch is not None
    assert batch.data_ptr() == address
    assert torch.equal(batch, expected)
    assert batch.is_contiguous()
    assert batch._base is None
    assert not batch.requires_grad
    view = batch[3, 1]
    del samples, batch
    assert worker.mapped.freed() == []
    assert view.eq(3).all()
    del view
    assert worker.mapped.freed() == [1]


def test_what_is_alike_lies_side_by_side_whatever_comes_between(worker: Worker) -> None:
    """The images and the arrays of samples that have several parts."""
    samples = worker.sends([labelled(key) for key in range(SIZE)])
    for name in ("image", "array"):
        parts = [torch.as_tensor(sample[name]) for sample in samples]
        batch = stacked_in_place(parts, [])
        assert batch is not None
        assert torch.equal(batch, torch.stack(parts))
    for key, sample in enumerate(samples):
        assert sample["label"] == key
        assert (sample["short"] == key).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32, torch.complex128])
def test_sizes_that_are_no_multiple_of_a_cache_line(worker: Worker, dtype: torch.dtype) -> None:
    """They are packed without gaps, and stay aligned to their elements."""
    samples = worker.sends([torch.full((3, 225, 223), key, dtype=dtype) for key in range(SIZE)])
    batch = stacked_in_place(samples, [])
    assert batch is not None
    assert [float(one.real.max()) for one in batch] == list(range(SIZE))


def test_anything_else_is_copied(worker: Worker) -> None:
    """A gap, another order, other shapes, dtypes and layouts, gradients, some of what came, and plain memory."""
    samples = worker.sends([image(key) for key in range(SIZE)])
    but_one, one = samples[:-1], samples[-1]

    def copied(tensors: list[torch.Tensor]) -> bool:
        return stacked_in_place(tensors, []) is None

    assert not copied(samples)
    assert copied([*samples[1:], one])
    assert copied(samples[::-1])
    assert copied([*but_one, one.view(-1)])
    assert copied([*but_one, one.view(torch.int32)])
    assert copied([sample.transpose(1, 2) for sample in samples])
    assert copied([*but_one, one.detach().requires_grad_()])
    assert copied([*but_one, one.to_sparse()])
    assert copied([*but_one, torch.nn.Parameter(one, requires_grad=False)])
    assert copied([sample.as_subclass(torch.nn.Buffer) for sample in samples])
    assert copied([sample.to("meta") for sample in samples])
    assert copied(samples[:-2])  # what is left may be the same tensors
    few = STACKED_FROM // one.nbytes
    assert copied(worker.sends([image(key) for key in range(few)]))  # smaller than that
    plain = torch.arange(SIZE * one.numel(), dtype=torch.float32).view(SIZE, *SHAPE)
    assert copied(list(plain))


def test_a_small_part_of_large_samples_is_copied(worker: Worker) -> None:
    """Who keeps only that would keep all the rest of them."""
    for rest, in_place in ((MOST_KEPT - 2, True), (MOST_KEPT, False)):
        samples = worker.sends([(image(key), torch.zeros(rest, *SHAPE)) for key in range(SIZE)])
        assert (stacked_in_place([part for part, _ in samples], []) is not None) == in_place


# -- pipelines ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> "Counter[bool]":
    """How many batches were made in place, and how many were not."""
    count: Counter[bool] = Counter()

    def counting(tensors: Any, taken: Any) -> Any:
        batch = stacked_in_place(tensors, taken)
        count[batch is not None] += 1
        return batch

    monkeypatch.setattr(collate, "stacked_in_place", counting)
    return count


def until_in_place(loader: Pipeline[Any], face: Face, counted: "Counter[bool]") -> list[Any]:
    """The batches of an epoch in which some were made in place: whether that pays is measured, and may take epochs."""
    for _ in range(200):
        counted.clear()
        batches = collect(loader, face)
        if counted[True]:
            return batches
    raise AssertionError("no batch was made in place")


@on_both_faces
def test_batches_of_process_samples_are_not_copied(face: Face, counted: "Counter[bool]") -> None:
    """They are what they would be otherwise; to write to one changes no other."""
    with Pipeline(range(100)).map(labelled, executor="process", concurrency=2).batch(SIZE) as loader:
        batches = until_in_place(loader, face, counted)
        for number, batch in enumerate(batches):
            keys = torch.arange(number * SIZE, min(100, (number + 1) * SIZE))
            assert torch.equal(batch["label"], keys)
            for name in ("image", "array", "short"):
                found = batch[name].flatten(1)
                assert torch.equal(found, keys.to(found.dtype)[:, None].expand_as(found))
                batch[name].add_(1000)


@on_both_faces
def test_who_keeps_the_samples_keeps_them_as_they_were(face: Face, counted: "Counter[bool]") -> None:
    """A cache before `batch`, or a function of the user's: then batches are copies."""
    kept: dict[int, torch.Tensor] = {}

    def keep(sample: torch.Tensor) -> torch.Tensor:
        return kept.setdefault(int(sample[0, 0, 0]), sample)

    samples = Pipeline(range(64)).map(image, executor="process", concurrency=2)
    with samples.cache(memory_bytes=1 << 30).batch(SIZE) as cached, samples.map(keep).batch(SIZE) as own:
        for loader in (cached, own):
            for _ in range(3):
                for number, batch in enumerate(collect(loader, face)):
                    assert batch[:, 0, 0, 0].tolist() == list(range(number * SIZE, (number + 1) * SIZE))
                    batch.add_(1000)
    assert all(sample.eq(key).all() for key, sample in kept.items())
    assert not counted


@on_both_faces
def test_a_users_collate_fn_gets_samples(face: Face, counted: "Counter[bool]") -> None:
    """They are its own to write to."""
    with Pipeline(range(64)).map(image, executor="process", concurrency=2).batch(SIZE, collate_fn=list) as loader:
        for batch in collect(loader, face):
            assert [type(sample) for sample in batch] == [torch.Tensor] * SIZE
    assert not counted


@on_both_faces
@pytest.mark.parametrize("fn", [twice, neighbours])
def test_parts_of_a_batch_share_no_memory(fn: Callable[[int], Any], face: Face, counted: "Counter[bool]") -> None:
    """Where those of its samples do: they are one tensor, or tensors of the neighbours."""
    with Pipeline(range(64)).map(fn, executor="process", concurrency=2).batch(SIZE) as loader:
        for batch in until_in_place(loader, face, counted):
            first, second = batch.values() if isinstance(batch, dict) else batch
            expected = second.clone()
            first.add_(1000)
            assert torch.equal(second, expected)


@on_both_faces
def test_batches_share_no_memory_where_their_samples_do(face: Face, played: Callable[..., PlayedPool]) -> None:
    """A function gives the same tensor for several keys, and these travel together."""
    pool = played(one_of_eight, 1e-6)
    pool.worker = Worker()
    loader = Pipeline(range(256)).map(number, executor="process", concurrency=2, ahead=16 * SIZE).batch(SIZE)
    for _ in range(3):
        for batch in collect(loader, face):
            assert batch[:, 0, 0, 0].tolist() == list(range(SIZE))
            batch.add_(1000)
    assert max(size for _, size in pool.sizes) > SIZE
    loader.close()


@on_both_faces
def test_a_users_function_for_a_type_keeps_the_samples_as_they_were(
    face: Face, counted: "Counter[bool]", monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may put them into the batch beside the tensor that is made of them."""
    monkeypatch.setitem(torch_collate.default_collate_fn_map, Both, collate_both)
    with Pipeline(range(32)).map(both, executor="process", concurrency=2).batch(SIZE) as loader:
        for _ in range(3):
            for number, batch in enumerate(collect(loader, face)):
                batch.value.add_(1000)
                assert [int(one[0, 0, 0]) for one in batch.samples] == [*range(number * SIZE, (number + 1) * SIZE)]
    assert not counted


@on_both_faces
def test_errors_and_what_is_left_out_are_where_they_were(face: Face, counted: "Counter[bool]") -> None:
    """A sample that fails fails its batch; one that is skipped moves the others up."""
    samples = Pipeline(range(100)).map(fails_at_20, executor="process", concurrency=2)
    with samples.skip_errors().batch(SIZE) as skipping:
        batches = until_in_place(skipping, face, counted)
        keys = [key for key in range(100) if key != 20]
        assert [int(sample[0, 0, 0]) for batch in batches for sample in batch] == keys
    with samples.batch(SIZE) as failing, pytest.raises(ValueError, match="no image"):
        collect(failing, face)


@on_both_faces
def test_a_resume_in_the_middle_gives_the_rest(face: Face, counted: "Counter[bool]") -> None:
    """Batches begin where they would have begun."""
    with Pipeline(range(100)).map(image, executor="process", concurrency=2).batch(SIZE) as loader:
        until_in_place(loader, face, counted)
        assert len(collect(loader, face, limit=5)) == 5
        state = loader.state_dict()
        loader.load_state_dict(state)
        rest = collect(loader, face)
        assert [int(sample[0, 0, 0]) for batch in rest for sample in batch] == list(range(5 * SIZE, 100))


# -- how large chunks are ----------------------------------------------------------------------------------------------


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., PlayedPool]]:
    pools = []

    def play(fn: Callable[[int], Any], seconds_each: float, seed: int = 0) -> PlayedPool:
        pool = PlayedPool(2, (Call(fn, False, "fn", None),), lambda: seconds_each, random.Random(seed))
        pools.append(pool)
        monkeypatch.setattr(op_steps, "_worker_pool", lambda *_: pool)
        return pool

    yield play
    for pool in pools:
        pool.end()


@on_both_faces
@pytest.mark.parametrize("seed", range(8))
def test_a_chunk_waits_for_company_while_all_workers_have_something(
    face: Face, seed: int, played: Callable[..., PlayedPool]
) -> None:
    """Batches of 10 are taken from a window of 512: no chunk is as small as what comes in at once."""
    pool = played(number, 1e-6, seed)
    loader = Pipeline(range(6_000)).map(number, executor="process", concurrency=2).batch(10)
    assert [key for batch in collect(loader, face) for key in batch.tolist()] == list(range(6_000))
    settled = pool.sizes[20:]
    assert min((size for under_way, size in settled if under_way >= 2), default=512) >= 512 // 4 // 2
    loader.close()


@on_both_faces
@pytest.mark.parametrize("seed", range(5))
def test_samples_of_large_batches_travel_by_batches(face: Face, seed: int, played: Callable[..., PlayedPool]) -> None:
    """As soon as it is known how large they are and what they cost; from the first one on in the next epoch."""
    pool = played(image, 1e-5, seed)
    loader = Pipeline(range(200)).map(image, executor="process", concurrency=2).batch(SIZE)
    for epoch in range(3):
        pool.sizes.clear()
        keys = [int(sample[0, 0, 0]) for batch in collect(loader, face) for sample in batch]
        assert keys == list(range(200))
        if epoch:
            assert [size for _, size in pool.sizes] == [SIZE] * (200 // SIZE)
    loader.close()


@pytest.mark.parametrize(("seconds_each", "size"), [(0.4, 1), (0.012, 1), (0.0025, 2)])
def test_samples_that_take_long_travel_by_what_they_cost(
    seconds_each: float, size: int, played: Callable[..., PlayedPool]
) -> None:
    """And there is room for one chunk more for each worker where these are quick."""
    pool = played(image, seconds_each)
    loader = Pipeline(range(64)).map(image, executor="process", concurrency=2).batch(SIZE)
    for _ in range(2):
        pool.sizes.clear()
        assert [int(sample[0, 0, 0]) for batch in loader for sample in batch] == list(range(64))
    assert max(size for _, size in pool.sizes) == size
    assert max(under_way for under_way, _ in pool.sizes) == (1 if seconds_each > 0.1 else 3)
    assert loader.stats().stages[1].room == (3 if seconds_each > 0.1 else 4 * size + 1)
    loader.close()


def test_with_a_timeout_samples_travel_alone_and_workers_have_the_next_one(played: Callable[..., PlayedPool]) -> None:
    """Each is timed by itself; which is no reason to wait for the next one, nor to have less room."""
    pool = played(image, 1e-5)
    loader = Pipeline(range(200)).map(image, executor="process", concurrency=2, timeout=600.0).batch(SIZE)
    for _ in range(2):
        pool.sizes.clear()
        assert [int(sample[0, 0, 0]) for batch in loader for sample in batch] == list(range(200))
    assert {size for _, size in pool.sizes} == {1}
    assert max(under_way for under_way, _ in pool.sizes) == 3
    assert loader.stats().stages[1].room == 5
    loader.close()
