"""Samples that worker processes stack before they travel, since they become a batch: it is what it would have been."""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.utils.data._utils import collate as torch_collate

from aioloader import Pipeline
from aioloader.core.sizes import rough_bytes
from aioloader.engine import op_steps
from aioloader.executors.chunk import Call
from aioloader.executors.processes.stacked import MOST_KEPT, StackedSample, plain_samples, stacked_batch
from aioloader.memory.mapping import mapping_of
from aioloader.stages import collate
from aioloader.stages.collate import Collate
from tests._played import PlayedPool, Worker
from tests._support import Face, collect, on_both_faces

pytestmark = pytest.mark.usefixtures("fork_server")

SIZE = 8
SHAPE = (3, 128, 128)  # 196,608 bytes: eight of them are more than 1 MiB


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


class Point(NamedTuple):
    image: torch.Tensor
    key: int


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


def the_same(one: Any, other: Any) -> bool:
    """Equal, and of the same types through and through."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return (
            one.dtype == other.dtype
            and one.shape == other.shape
            and one.stride() == other.stride()
            and one.equal(other)
        )
    if isinstance(one, np.ndarray):
        return bool(one.dtype == other.dtype and np.array_equal(one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(map(the_same, one.values(), other.values()))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(the_same, one, other))
    return bool(one == other)


SOLE = Collate(sole=True)


def test_samples_come_as_the_batch_that_they_become(worker: Worker) -> None:
    """It lies in the segment, and gives it back when its last view has died."""
    samples = worker.sends([image(key) for key in range(SIZE)], SIZE)
    batch = SOLE(samples)

    assert mapping_of(batch) is not None
    assert torch.equal(batch, torch.stack([image(key) for key in range(SIZE)]))
    assert batch.is_contiguous()
    assert batch._base is None
    assert not batch.requires_grad
    view = batch[3, 1]
    del samples, batch
    assert worker.mapped.freed() == []
    assert view.eq(3).all()
    del view
    assert worker.mapped.freed() == [1]


Sample = Callable[[int], Any]

PARTS: dict[str, Sample] = {
    "a large tensor": image,
    "a small tensor": lambda key: torch.full((2, 3), key),
    "a tensor without dimensions": lambda key: torch.tensor(key, dtype=torch.bfloat16),
    "an array": lambda key: np.full((200, 200), key, np.float64),
    "bools in an array": lambda key: np.full((4, 4), bool(key % 2)),
    "an array without dimensions": lambda key: np.array(key, np.int16),
    "a number": number,
    "a float": lambda key: key / 3,
    "a bool": lambda key: key % 2 == 0,
    "a scalar of numpy": lambda key: np.float32(key),
    "text": lambda key: f"sample {key}",
    "bytes": lambda key: bytes([key]) * 3000,
    "transposed": lambda key: torch.arange(key, key + 600).view(20, 30).t(),
    "a transposed array": lambda key: np.arange(key, key + 600).reshape(20, 30).T,
    "an array that is read only": lambda key: np.broadcast_to(np.float32(key), (3, 3)),
    "complex": lambda key: torch.full((3, 3), complex(0, key)).conj(),
    "a parameter": lambda key: torch.nn.Parameter(torch.full((2,), float(key)), requires_grad=False),
    "a buffer": lambda key: torch.nn.Buffer(torch.full((2,), float(key))),
    "nothing in a tensor": lambda _: torch.empty(0, 3),
    "a named tuple": lambda key: Point(image(key), key),
    "two dtypes": lambda key: torch.full((3,), key, dtype=torch.float32 if key % 2 else torch.float64),
    "a deep one": lambda key: [[[[[[torch.tensor([key])]]]]]],
    "many parts": lambda key: [torch.tensor([key])] * 100,
    "an empty tuple": lambda _: (),
}


def made_of(chosen: list[Sample], order: random.Random) -> Sample:
    """Samples that have these parts, or contain others that do."""
    if len(chosen) == 1:
        return chosen[0]
    cut = order.randint(1, len(chosen) - 1)
    halves = [made_of(half, order) for half in (chosen[:cut], chosen[cut:])]
    kind = order.choice([tuple, list, dict])
    if kind is dict:
        return lambda key: {"first": halves[0](key), 2: halves[1](key)}
    return lambda key: kind(half(key) for half in halves)


@pytest.mark.parametrize("seed", range(150))
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_the_batch_and_its_samples_are_what_they_would_be(worker: Worker, seed: int) -> None:
    """Of samples of any shape; also where they end in other batches than those in which they have come."""
    order = random.Random(seed)
    names = order.sample(sorted(PARTS), order.randint(1, 6)) if seed >= len(PARTS) else [sorted(PARTS)[seed]]
    sample = made_of([PARTS[name] for name in names], order)
    samples = [sample(key) for key in range(2 * SIZE)]
    one, two = (worker.sends(half, SIZE) for half in (samples[:SIZE], samples[SIZE:]))

    assert the_same(list(plain_samples(one)), samples[:SIZE])
    assert the_same(SOLE(one), torch_collate.default_collate(samples[:SIZE]))
    mixed = [*one[3:], *two[:3]]
    assert the_same(SOLE(mixed), torch_collate.default_collate(samples[3 : SIZE + 3]))


def test_what_cannot_be_stacked_fails_as_it_would(worker: Worker) -> None:
    """The error says which samples differ."""
    for samples in (
        [torch.zeros(30_000 + key) for key in range(SIZE)],
        [(image(key), None if key == 2 else key) for key in range(SIZE)],
        [{"image": image(key), **({"label": key} if key != 2 else {})} for key in range(SIZE)],
        [[image(key)] * (1 + (key == 2)) for key in range(SIZE)],
    ):
        errors = []
        for came in (samples, worker.sends(samples, SIZE)):
            with pytest.raises(Exception, match=r".") as caught:
                SOLE(came, list(range(SIZE)))
            errors.append((type(caught.value), str(caught.value), caught.value.__notes__))
        assert errors[0] == errors[1]


def test_a_small_part_that_is_kept_keeps_none_of_the_others(worker: Worker) -> None:
    """The labels of an epoch are not to keep its images."""

    def sample(key: int) -> dict[str, torch.Tensor]:
        return {"image": torch.full((200, 200), float(key)), "label": torch.tensor(key), "box": torch.full((500,), key)}

    count = 256  # eight bytes of a label come to more than what stays inside a pickle
    for whole in (count, count, 0):  # in the second result all is in one segment
        samples = worker.sends([sample(key) for key in range(count)], whole)
        kept = SOLE(samples)
        del samples
        for part in kept.values():
            segment = mapping_of(part)
            assert segment is None or segment.size <= MOST_KEPT * part.nbytes
        assert mapping_of(kept["label"]) is None
        assert kept["label"].tolist() == list(range(count))
        assert kept["box"][:, 7].tolist() == list(range(count))


def test_samples_of_many_parts_take_few_segments(worker: Worker) -> None:
    """A message takes sixteen descriptors; also where each result is larger than the one before."""
    for numel in (1 << 8, 1 << 12, 1 << 15):
        samples = [{f"x{part}": torch.full((numel,), key) for part in range(40)} for key in range(SIZE)]
        batch = SOLE(worker.sends(samples, SIZE))
        assert len(worker.new) <= 12
        assert all(batch[name].equal(torch.stack([sample[name] for sample in samples])) for name in samples[0])
        del batch
    worker.arena.take_back(worker.mapped.freed())
    assert not worker.arena._lent


def test_a_default_device_is_not_that_of_what_travels(worker: Worker) -> None:
    """A module that the worker has imported may have set one."""
    samples = [(image(key), torch.tensor(key)) for key in range(SIZE)]
    with torch.device("meta"):
        came = worker.sends(samples, SIZE)
    assert type(came[0]) is StackedSample
    assert the_same(SOLE(came), torch_collate.default_collate(samples))


def test_the_order_of_keys_is_that_of_the_first_sample_of_a_batch(worker: Worker) -> None:
    def sample(key: int) -> dict[Any, Any]:
        parts = [("image", image(key)), ("label", key)]
        return dict(parts if key % 2 else reversed(parts))

    samples = worker.sends([sample(key) for key in range(SIZE)], SIZE)
    assert list(SOLE(samples)) == ["label", "image"]
    assert list(SOLE(samples[1:])) == ["image", "label"]
    keys = [type(key) for key in SOLE(worker.sends([{bool(key) or 1: image(key)} for key in range(SIZE)], SIZE)[1:])]
    assert keys == [bool]


@pytest.mark.parametrize("kind", [list, np.ndarray, torch.Tensor])
def test_a_map_that_the_user_has_changed_is_followed(
    worker: Worker, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is one of torch's own functions that does another type now."""
    monkeypatch.setitem(torch_collate.default_collate_fn_map, kind, torch_collate.collate_str_fn)
    values = {list: lambda key: [image(key)], np.ndarray: lambda key: image(key).numpy(), torch.Tensor: image}
    samples = [{"x": values[kind](key)} for key in range(SIZE)]
    assert the_same(SOLE(worker.sends(samples, SIZE)), torch_collate.default_collate(samples))


def test_other_numbers_of_samples_and_other_orders_are_no_batch(worker: Worker) -> None:
    """Nor what comes without being told how many make one."""
    samples = worker.sends([image(key) for key in range(SIZE)], SIZE)
    expected = [image(key) for key in range(SIZE)]
    for part, of in (
        (samples[:-1], expected[:-1]),
        (samples[::-1], expected[::-1]),
        ([*samples, samples[0]], [*expected, expected[0]]),
        ([*samples[1:], expected[0]], [*expected[1:], expected[0]]),
        ([expected[0], *samples[1:]], expected),
    ):
        batch = SOLE(part)
        assert mapping_of(batch) is None
        assert torch.equal(batch, torch.stack(of))
    assert [type(sample) for sample in worker.sends(expected, SIZE + 1)] == [torch.Tensor] * SIZE


def test_a_sample_in_a_stack_weighs_what_it_would(worker: Worker) -> None:
    """Room in bytes is counted by it."""
    samples = [labelled(key) for key in range(SIZE)]
    assert rough_bytes(worker.sends(samples, SIZE)[0]) == pytest.approx(rough_bytes(samples[0]), rel=0.01)


# -- pipelines ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> "Counter[bool]":
    """How many batches came as such, and how many were made of samples."""
    count: Counter[bool] = Counter()

    def counting(samples: Any, collate: Any) -> Any:
        batch = stacked_batch(samples, collate)
        count[batch is not None] += 1
        return batch

    monkeypatch.setattr(collate, "stacked_batch", counting)
    return count


def until_stacked(loader: Pipeline[Any], face: Face, counted: "Counter[bool]") -> list[Any]:
    """The batches of an epoch in which some came as such: whether that pays is measured, and may take epochs."""
    for _ in range(200):
        counted.clear()
        batches = collect(loader, face)
        if counted[True]:
            return batches
    raise AssertionError("no batch came as such")


@on_both_faces
def test_batches_of_process_samples_are_not_copied(face: Face, counted: "Counter[bool]") -> None:
    """They are what they would be otherwise; to write to one changes no other."""
    with Pipeline(range(100)).map(labelled, executor="process", concurrency=2).batch(SIZE) as loader:
        batches = until_stacked(loader, face, counted)
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
        for batch in until_stacked(loader, face, counted):
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
        batches = until_stacked(skipping, face, counted)
        keys = [key for key in range(100) if key != 20]
        assert [int(sample[0, 0, 0]) for batch in batches for sample in batch] == keys
    with samples.batch(SIZE) as failing, pytest.raises(ValueError, match="no image"):
        collect(failing, face)


@on_both_faces
@pytest.mark.parametrize("again", [True, False])
def test_after_an_error_chunks_are_batches_again(
    face: Face, again: bool, counted: "Counter[bool]", played: Callable[..., PlayedPool]
) -> None:
    """Of those that have been sent before it is known, samples are copied."""
    failing = {20}

    def fn(key: int) -> torch.Tensor:
        if key in failing:
            failing.discard(key)
            raise ValueError("no image")
        return image(key)

    pool = played(fn, 1e-5)
    pool.worker = Worker()
    samples = Pipeline(range(400)).map(fn, executor="process", concurrency=2, retry=4 if again else None)
    loader = (samples if again else samples.skip_errors()).batch(SIZE)
    collect(loader, face)
    counted.clear()
    failing.add(20)
    found = [int(sample[0, 0, 0]) for batch in collect(loader, face) for sample in batch]
    assert found == [key for key in range(400) if key != 20 or again]
    assert counted[False] <= 8
    assert counted[True] >= 400 // SIZE - 8
    loader.close()


@on_both_faces
def test_a_resume_in_the_middle_gives_the_rest(face: Face, counted: "Counter[bool]") -> None:
    """Batches begin where they would have begun."""
    with Pipeline(range(100)).map(image, executor="process", concurrency=2).batch(SIZE) as loader:
        until_stacked(loader, face, counted)
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


@pytest.mark.parametrize(("seconds_each", "size"), [(0.4, 1), (0.012, 1), (0.004, 2)])
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


class CannotTravel:
    """Nothing that can be pickled."""

    def __reduce__(self) -> Any:
        raise TypeError("it stays where it is")


@pytest.mark.parametrize("before", [1, 2, 3])
def test_samples_that_are_sent_again_are_as_they_were(before: int) -> None:
    """One of a chunk cannot be pickled, so the others are sent without it; they lie in the memory of the first try."""

    def made(worker: Worker, count: int) -> list[torch.Tensor]:
        return [worker.arena.alloc((25_000,), torch.float32).fill_(number) for number in range(count)]

    for count in range(1, 14):
        for bad in range(count):
            worker = Worker()
            for _ in range(2):
                worker.sends(made(worker, before))  # segments of a size that is not that of what follows
            samples: list[Any] = made(worker, count)
            with pytest.raises(TypeError, match="it stays"):
                worker.sends([*samples[:bad], (samples[bad], CannotTravel()), *samples[bad + 1 :]])
            received = worker.sends([*samples[:bad], None, *samples[bad + 1 :]])
            numbers = [None if sample is None else sample[0].item() for sample in received]
            assert numbers == [*range(bad), None, *range(bad + 1, count)], (count, bad)
            worker.arena.close()
