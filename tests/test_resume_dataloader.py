"""`DataLoader` resumes exactly: with any number and kind of workers, from torch's samplers and others' (promise 8)."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from aioloader import DataLoader, Pipeline, StateError
from aioloader.sources import Lines
from aioloader.testing import assert_resumes_exactly
from tests._states import contents_of, edited
from tests._support import Face, Steps, collect, on_both_faces
from tests.test_resume import AsyncStateful, Stateful, StatefulIterators

WORKERS: list[dict[str, Any]] = [{"num_workers": 0}, {"num_workers": 2}, {"num_workers": 8}]
PROCESSES: list[dict[str, Any]] = [{"num_workers": 0}, {"num_workers": 2, "worker_type": "process"}]


class Numbers:
    """Ten samples; one of them is broken."""

    def __init__(self, length: int = 10, *, broken: int | None = None) -> None:
        self.length = length
        self.broken = broken

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        if index == self.broken:
            raise ValueError(f"sample {index} is broken")
        return index, torch.full((2,), float(index))


class Map(Numbers, Dataset[Any]):
    """As torch has them."""


class AsyncNumbers(Numbers):
    """Each sample takes another number of turns."""

    async def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:  # type: ignore[override]
        for _ in range(index % 4):
            await asyncio.sleep(0)
        return super().__getitem__(index)


class AsyncBatches(Numbers):
    """Whole batches at once."""

    async def __getitems__(self, indices: list[int]) -> list[tuple[int, torch.Tensor]]:
        for _ in range(indices[0] % 4):
            await asyncio.sleep(0)
        return [self[index] for index in indices]


class Stream(IterableDataset[int]):
    """Eleven numbers."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(11))


class AsyncStream:
    """The same, async."""

    async def __aiter__(self) -> AsyncIterator[int]:
        for number in range(11):
            await asyncio.sleep(0)
            yield number


class StatefulSampler(Sampler[int]):
    """Tells where it is; what it gives depends on that, so that skipping in it would show."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.given = 0
        self.start = 0

    def __iter__(self) -> Iterator[int]:
        self.given, self.start = self.start, 0
        while self.given < self.length:
            self.given += 1
            yield (self.given * 7) % self.length

    def __len__(self) -> int:
        return self.length

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["given"]


class SilentSampler(StatefulSampler):
    """It has the methods because a base class wants them."""

    def state_dict(self) -> dict[str, int]:
        raise NotImplementedError


class OddFirst(Sampler[int]):
    """Somebody's own, random sampler."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.length).tolist()
        yield from (index for index in order if index % 2)
        yield from (index for index in order if not index % 2)


async def collate_later(samples: Any) -> Any:
    await asyncio.sleep(0)
    return samples


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


LOADERS: dict[str, Callable[..., DataLoader[Any]]] = {
    "sequential": lambda **w: DataLoader(Numbers(), 3, **w),
    "drop_last": lambda **w: DataLoader(Numbers(), 3, drop_last=True, **w),
    "batch_size=None": lambda **w: DataLoader(Numbers(), None, **w),
    "batch_size=None, shuffle": lambda **w: DataLoader(Numbers(), None, shuffle=True, **w),
    "shuffle, global generator": lambda **w: DataLoader(Numbers(), 3, shuffle=True, **w),
    "shuffle, generator=": lambda **w: DataLoader(Numbers(), 3, shuffle=True, generator=seeded(), **w),
    "shuffle, seed=": lambda **w: DataLoader(Numbers(), 3, shuffle=True, seed=7, **w),
    "sequential, generator=": lambda **w: DataLoader(Numbers(), 3, generator=seeded(), **w),
    "an error": lambda **w: DataLoader(Numbers(broken=7), 3, shuffle=True, **w),
    "with replacement": lambda **w: DataLoader(
        Numbers(), 9, sampler=RandomSampler(range(10), replacement=True, num_samples=75), **w
    ),
    "with replacement, own generator": lambda **w: DataLoader(
        Numbers(), 9, sampler=RandomSampler(range(10), replacement=True, num_samples=75, generator=seeded()), **w
    ),
    "more than there are": lambda **w: DataLoader(Numbers(), 4, sampler=RandomSampler(range(10), num_samples=25), **w),
    "a subset": lambda **w: DataLoader(Numbers(), 2, sampler=SubsetRandomSampler([1, 3, 5, 7, 9]), **w),
    "weights": lambda **w: DataLoader(Numbers(), 2, sampler=WeightedRandomSampler([1.0] * 10, 9), **w),
    "weights, own generator": lambda **w: DataLoader(
        Numbers(), 2, sampler=WeightedRandomSampler([1.0] * 10, 9, generator=seeded()), **w
    ),
    "batch_sampler": lambda **w: DataLoader(
        Numbers(), batch_sampler=BatchSampler(RandomSampler(range(10)), 4, drop_last=False), **w
    ),
    "a list of batches": lambda **w: DataLoader(Numbers(), batch_sampler=[[3, 1], [2], [0, 5, 9]], **w),
    "a stateful sampler": lambda **w: DataLoader(Numbers(260), 1, sampler=StatefulSampler(260), **w),
    "somebody's sampler": lambda **w: DataLoader(Numbers(), 3, sampler=OddFirst(10), **w),
    "distributed": lambda **w: DataLoader(
        Numbers(), 2, sampler=DistributedSampler(Map(), num_replicas=2, rank=1, seed=3), **w
    ),
    "async samples": lambda **w: DataLoader(AsyncNumbers(), 3, shuffle=True, **w),
    "async samples, one by one": lambda **w: DataLoader(AsyncNumbers(), None, shuffle=True, **w),
    "async samples, an error": lambda **w: DataLoader(AsyncNumbers(broken=4), 3, shuffle=True, generator=seeded(), **w),
    "async batches": lambda **w: DataLoader(AsyncBatches(), 3, shuffle=True, **w),
    "a stream": lambda **w: DataLoader(Stream(), 3, **w),
    "a stream, drop_last": lambda **w: DataLoader(Stream(), 3, drop_last=True, **w),
    "a stream, one by one": lambda **w: DataLoader(Stream(), None, **w),
    "a stream, generator=": lambda **w: DataLoader(Stream(), 3, generator=seeded(), **w),
    "an async stream": lambda **w: DataLoader(AsyncStream(), 3, **w),
    "async collate": lambda **w: DataLoader(Numbers(), 3, shuffle=True, collate_fn=collate_later, **w),
    "async collate, a stream": lambda **w: DataLoader(Stream(), 3, collate_fn=collate_later, **w),
    "async collate, one by one": lambda **w: DataLoader(Numbers(broken=7), None, collate_fn=collate_later, **w),
}

MOST_STATES = 12


@pytest.mark.parametrize("name", LOADERS)
def test_a_loader_resumes_from_every_state(name: str) -> None:
    """With other numbers of workers and by both faces; the next epoch too."""
    epochs = 1 if name == "a stateful sampler" else 2
    assert_resumes_exactly(LOADERS[name], variants=WORKERS, limit=MOST_STATES // (3 - epochs), epochs=epochs)


def outcomes_of(batches: Iterator[Any]) -> list[str]:
    """Batches and errors, as text."""
    found: list[str] = []
    while len(found) < 100:
        try:
            found.append(str(next(batches)))
        except StopIteration:
            break
        except ValueError as error:
            found.append(str(error))
    return found


@pytest.mark.usefixtures("fork_server")
def test_a_loader_resumes_with_worker_processes() -> None:
    """From a state without workers, and back again."""
    for way, other in (PROCESSES, PROCESSES[::-1]):
        torch.manual_seed(2)
        loader = LOADERS["an error"](**way)
        iterator = iter(loader)
        next(iterator)
        state = json.loads(json.dumps(loader.state_dict()))
        resumed = LOADERS["an error"](**other)
        resumed.load_state_dict(state)
        assert outcomes_of(iter(resumed)) == outcomes_of(iterator)
        assert loader.state_dict() == resumed.state_dict()
        loader.close()
        resumed.close()


class StatefulDataset(Stateful, IterableDataset[int]):
    pass


class StatefulIteratorsDataset(StatefulIterators, IterableDataset[int]):
    pass


@pytest.mark.parametrize("make_stream", [StatefulDataset, StatefulIteratorsDataset, AsyncStateful])
def test_a_stream_that_tells_its_state_is_asked_by_all_kinds_of_workers(make_stream: Any) -> None:
    """Inline as well."""

    def make(**workers: Any) -> DataLoader[Any]:
        return DataLoader(make_stream(), 50, **workers)

    states = assert_resumes_exactly(make, variants=WORKERS[:2], limit=MOST_STATES)
    assert contents_of(states[9])["cursor"][0]["at"] == 256


def test_a_source_that_seeks_does_so_under_a_loader(tmp_path: Path) -> None:
    """`Lines` as a dataset: exact."""
    path = tmp_path / "lines.txt"
    path.write_text("".join(f"line {number}\n" for number in range(10)))
    states = assert_resumes_exactly(lambda **w: DataLoader(Lines(path), 3, **w), variants=WORKERS[:2])
    assert {state["guarantee"] for state in states} == {"exact"}


@pytest.mark.parametrize("dataset", [Numbers(40), AsyncBatches(40)])
def test_in_order_false_gives_each_sample_once(dataset: Any) -> None:
    """Also from a state without workers to one with them, and back."""

    def samples(batch: Any) -> list[int]:
        found: list[int] = batch[0].tolist()
        return found

    def make(**workers: Any) -> DataLoader[Any]:
        return DataLoader(dataset, 2, in_order=False, shuffle=True, **workers)

    for variants in (WORKERS, WORKERS[::-1]):
        assert_resumes_exactly(make, variants=variants, samples=samples, limit=MOST_STATES, epochs=1)


def test_the_caller_does_not_notice_that_an_order_is_drawn_again() -> None:
    """The global generator is left alone by a resumed epoch: it was drawn from when the epoch began."""
    for workers in (0, 2):
        loader: DataLoader[Any] = DataLoader(Numbers(), 3, shuffle=True, num_workers=workers)
        iterator = iter(loader)
        next(iterator)
        state = loader.state_dict()
        expected = [batch[0].tolist() for batch in iterator]
        resumed: DataLoader[Any] = DataLoader(Numbers(), 3, shuffle=True, num_workers=workers)
        resumed.load_state_dict(state)
        torch.manual_seed(123)
        before = torch.get_rng_state()
        assert [batch[0].tolist() for batch in resumed] == expected
        assert torch.equal(torch.get_rng_state(), before)


def test_a_generator_is_left_where_the_epoch_leaves_it() -> None:
    """So that all later epochs are those that were to come."""
    generator = seeded()
    loader: DataLoader[Any] = DataLoader(Numbers(), 3, shuffle=True, generator=generator)
    epochs: list[list[Any]] = []
    states: list[dict[str, Any]] = []
    for _ in range(3):
        epochs.append([])
        for batch in loader:
            epochs[-1].append(batch[0].tolist())
            states.append(loader.state_dict())
    other = seeded(99)
    resumed: DataLoader[Any] = DataLoader(Numbers(), 3, shuffle=True, generator=other)
    resumed.load_state_dict(states[1])
    assert [batch[0].tolist() for batch in resumed] == epochs[0][2:]
    assert [batch[0].tolist() for batch in resumed] == epochs[1]
    assert [batch[0].tolist() for batch in resumed] == epochs[2]
    assert torch.equal(other.get_state(), generator.get_state())


def test_persistent_workers_keep_their_base_seed() -> None:
    """It is drawn once: in later epochs nothing is drawn for it, after a resume neither."""

    def make(**_: Any) -> DataLoader[Any]:
        return DataLoader(Numbers(), 3, shuffle=True, num_workers=2, persistent_workers=True)

    assert_resumes_exactly(make, epochs=3)


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("persistent", [False, True])
def test_whether_workers_are_persistent_may_be_another(seed: int | None, persistent: bool) -> None:
    """As in torch their epochs draw less, so the orders are others; a loader goes on as the one that it comes from."""

    def make(persistent: bool) -> DataLoader[Any]:
        return DataLoader(
            Numbers(), 3, shuffle=True, num_workers=2 * persistent, persistent_workers=persistent, seed=seed
        )

    def epochs(loader: DataLoader[Any], count: int) -> list[list[Any]]:
        return [[batch[0].tolist() for batch in loader] for _ in range(count)]

    for done in range(1, 3):  # whole epochs before the one that is left
        torch.manual_seed(1)
        loader = make(persistent)
        epochs(loader, done)
        batches = iter(loader)
        next(batches)
        state = json.loads(json.dumps(loader.state_dict()))
        randomly = torch.get_rng_state()
        expected = [[batch[0].tolist() for batch in batches], *epochs(loader, 2)]
        torch.set_rng_state(randomly)
        other = make(not persistent)
        other.load_state_dict(state)
        assert epochs(other, 3) == expected


def test_with_a_seed_an_epoch_has_one_order() -> None:
    """Whatever came before it, and whichever workers there are."""
    orders = []
    for persistent in (False, True):
        loader: DataLoader[Any] = DataLoader(
            Numbers(), 3, shuffle=True, num_workers=2, persistent_workers=persistent, seed=3
        )
        for before in (0, 1):
            loader.set_epoch(5 - before)
            for _ in range(before):
                list(loader)
            orders.append([batch[0].tolist() for batch in loader])
    assert all(order == orders[0] for order in orders)


def epoch_sampler() -> "DistributedSampler[int]":
    return DistributedSampler(Map(), num_replicas=2, rank=0)


@on_both_faces
@pytest.mark.parametrize("how", ["nobody tells", "the loader is told", "the sampler is told"])
def test_a_sampler_that_was_told_its_epoch_directly_has_it_again(face: Face, how: str) -> None:
    """The loader's own count is another one then."""
    sampler = epoch_sampler()
    loader: DataLoader[Any] = DataLoader(Numbers(), 2, sampler=sampler)
    sampler.set_epoch(6)
    list(loader)
    sampler.set_epoch(7)
    with Steps(loader, face) as steps:
        steps.next()
        state = json.loads(json.dumps(loader.state_dict()))
        expected = [batch[0].tolist() for batch in steps.rest()]
    other = epoch_sampler()
    resumed: DataLoader[Any] = DataLoader(Numbers(), 2, sampler=other)
    resumed.load_state_dict(state)
    if how == "the loader is told":
        resumed.set_epoch(state["epoch"])
    elif how == "the sampler is told":
        other.set_epoch(7)
    assert [batch[0].tolist() for batch in collect(resumed, face)] == expected
    assert other.epoch == 7


def test_a_sampler_that_is_told_its_next_epoch_after_a_load_has_that() -> None:
    """The state is of the end of an epoch; it says which one the sampler was in."""
    sampler = epoch_sampler()
    loader: DataLoader[Any] = DataLoader(Numbers(), 2, sampler=sampler)
    sampler.set_epoch(6)
    list(loader)
    state = loader.state_dict()
    other = epoch_sampler()
    resumed: DataLoader[Any] = DataLoader(Numbers(), 2, sampler=other)
    resumed.load_state_dict(state)
    assert other.epoch == 6
    other.set_epoch(7)
    sampler.set_epoch(7)
    assert [batch[0].tolist() for batch in resumed] == [batch[0].tolist() for batch in loader]


@on_both_faces
def test_a_sampler_is_told_the_epoch_that_it_was_told(face: Face) -> None:
    """A resumed program that has not called `set_epoch` yet has the order of the state."""

    def make() -> DataLoader[Any]:
        sampler: DistributedSampler[int] = DistributedSampler(Map(), num_replicas=2, rank=0)
        return DataLoader(Numbers(), 2, sampler=sampler)

    loader = make()
    loader.set_epoch(4)
    with Steps(loader, face) as steps:
        steps.next()
        state = json.loads(json.dumps(loader.state_dict()))
        expected = [batch[0].tolist() for batch in steps.rest()]
    resumed = make()
    resumed.load_state_dict(state)
    assert [batch[0].tolist() for batch in collect(resumed, face)] == expected


@pytest.mark.usefixtures("fork_server")
def test_worker_processes_that_read_their_own_copies_in_any_order_begin_again() -> None:
    """Nobody knows where they are: the state says "at-least-once", and one from the middle is refused with words."""
    loader: DataLoader[Any] = DataLoader(Stream(), 3, num_workers=1, worker_type="process", in_order=False)
    iterator = iter(loader)
    assert next(iterator).tolist() == [0, 1, 2]
    state = loader.state_dict()
    loader.close()
    assert (state["guarantee"], state["epoch"], contents_of(state)["cursor"]) == ("at-least-once", 0, None)
    loader.load_state_dict(state)
    assert len(list(loader)) == 4
    threads: DataLoader[Any] = DataLoader(Stream(), 3, num_workers=1)
    iterator = iter(threads)
    next(iterator)
    with pytest.raises(StateError, match="worker_type='thread'"):
        loader.load_state_dict(threads.state_dict())
    threads.close()


def test_guarantees() -> None:
    """What is known to repeat, and what only may."""
    for name, expected in {
        "shuffle, global generator": "exact",
        "weights": "exact",
        "a stateful sampler": "exact",
        "somebody's sampler": "replayed",
        "a stream": "replayed",
        "an async stream": "replayed",
    }.items():
        assert LOADERS[name]().state_dict()["guarantee"] == expected, name


@pytest.mark.parametrize("workers", WORKERS[:2])
def test_a_sampler_that_does_not_tell_its_state_is_read_all_the_same(workers: dict[str, Any]) -> None:
    """Nobody has asked for it; the state does not say that it is exact."""

    def make(**_: Any) -> DataLoader[Any]:
        return DataLoader(Numbers(), 3, sampler=SilentSampler(10), **workers)

    loader = make()
    assert len(list(loader)) == 4
    assert loader.state_dict()["guarantee"] == "replayed"
    assert_resumes_exactly(make, states=False)


def the_pipeline(**workers: Any) -> Any:
    return Pipeline(range(10), sampler=RandomSampler(range(10))).batch(3, collate_fn=lambda keys: [torch.tensor(keys)])


UNSEEDED: dict[str, Callable[..., Any]] = {
    name: LOADERS[name]
    for name in (
        *("shuffle, global generator", "shuffle, generator=", "with replacement", "more than there are", "a subset"),
        *("weights", "weights, own generator", "batch_sampler", "somebody's sampler", "async samples", "async batches"),
    )
} | {"a pipeline": the_pipeline}


def keys_of(loader: Any) -> list[list[int]]:
    """Of all batches of an epoch."""
    return [batch[0].tolist() for batch in loader]


@on_both_faces
@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("workers", WORKERS[:2])
@pytest.mark.parametrize("name", UNSEEDED)
def test_a_state_of_the_beginning_settles_the_order(name: str, workers: dict[str, int], epoch: int, face: Face) -> None:
    """Whatever is drawn between the state and the first batch: here and where it is loaded, it is the same order."""
    torch.manual_seed(4)
    loader = UNSEEDED[name](**workers)
    for _ in range(epoch):
        keys_of(loader)
    state = json.loads(json.dumps(loader.state_dict()))
    torch.manual_seed(5)
    assert loader.state_dict() == state
    with Steps(loader, face) as steps:
        expected = [str(outcome) for outcome in steps.outcomes()]
    torch.manual_seed(6)
    other = UNSEEDED[name](**workers)
    other.load_state_dict(state)
    torch.manual_seed(7)
    with Steps(other, face) as steps:
        assert [str(outcome) for outcome in steps.outcomes()] == expected


@pytest.mark.parametrize("workers", WORKERS[:2])
@pytest.mark.parametrize("name", [name for name in UNSEEDED if not name.startswith("async")])
def test_a_state_changes_no_random_number(name: str, workers: dict[str, int]) -> None:
    """Orders, and all that the program draws, are the same with a state before each epoch and without."""

    def numbers(how: str) -> list[Any]:
        torch.manual_seed(4)
        loader = UNSEEDED[name](**workers)
        found: list[Any] = []
        for _ in range(3):
            if how != "no state":
                state = loader.state_dict()
            if how == "loaded":
                loader = UNSEEDED[name](**workers)
                loader.load_state_dict(state)
            if how != "no state":
                loader.state_dict()
            found += [keys_of(loader), torch.rand(1).item()]
        return found

    assert numbers("a state") == numbers("no state")
    assert numbers("loaded") == numbers("no state")


@pytest.mark.parametrize("name", ["shuffle, global generator", "weights", "somebody's sampler"])
@pytest.mark.parametrize("epoch", [0, 1])
def test_what_is_drawn_for_a_settled_order_is_what_torch_draws(name: str, epoch: int) -> None:
    """The program drew between the state and the epoch: its generator goes on as if there had been no state."""
    left = []
    for asks in (False, True):
        torch.manual_seed(4)
        loader = UNSEEDED[name]()
        for _ in range(epoch):
            keys_of(loader)
        if asks:
            loader.state_dict()
        torch.rand(3)
        keys_of(loader)
        left.append(torch.get_rng_state())
    assert torch.equal(*left)


@pytest.mark.parametrize("name", UNSEEDED)
def test_a_state_without_what_its_order_was_drawn_from_is_refused(name: str) -> None:
    """It would go on in another order, and some samples would come twice and others never."""
    for batches in (0, 1):
        loader = UNSEEDED[name]()
        iterator = iter(loader)
        for _ in range(batches):
            next(iterator)
        state = loader.state_dict()
        random = contents_of(state)["random"]
        for missing in {"drawn", "generators"} & random.keys():
            less = {key: value for key, value in random.items() if key != missing}
            with pytest.raises(StateError, match="'random' of the state does not fit this loader, or is broken"):
                UNSEEDED[name]().load_state_dict(edited(state, random=less))
        assert {"drawn", "generators"} & random.keys()
        loader.close()


@on_both_faces
def test_samplers_that_draw_side_by_side_have_one_order_for_one_seed(face: Face) -> None:
    """In whatever order their keys are asked for; and not the same one for all of them."""

    def make() -> Pipeline:
        sampled = [Pipeline(range(9), sampler=RandomSampler(range(9))) for _ in range(3)]
        return Pipeline.merge(Pipeline.zip(*sampled), Pipeline(range(0)))

    orders = []
    for _ in range(3):
        torch.manual_seed(4)
        orders.append(collect(make(), face))
    assert orders[0] == orders[1] == orders[2]
    assert len({tuple(column) for column in zip(*orders[0], strict=True)}) == 3
    loader = make()
    assert collect(loader, face) != collect(loader, face)
