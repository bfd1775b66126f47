"""Around a resume: objects that tell their state, data that changes, states taken while an epoch begins, samplers."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from aioloader import DataLoader, Pipeline, StateError
from tests.test_resume import Stateful

# -- objects that tell their state, more than once ---------------------------------------------------------------------


class OtherOrderEachEpoch:
    """Draws each epoch's order from a generator of its own, which is part of its state; what is loaded counts once."""

    def __init__(self, length: int = 50) -> None:
        self.length = length
        self.random = random.Random(0)
        self.drawn_from = self.random.getstate()
        self.position = 0
        self.loaded: Any = None

    def __iter__(self) -> Iterator[int]:
        loaded, self.loaded = self.loaded, None
        if loaded is not None:
            version, internal, gauss = loaded["drawn_from"]
            self.random.setstate((version, tuple(internal), gauss))
        self.drawn_from = self.random.getstate()
        order = list(range(self.length))
        self.random.shuffle(order)
        self.position = 0 if loaded is None else loaded["position"]
        for sample in order[self.position :]:
            self.position += 1
            yield sample

    def state_dict(self) -> dict[str, Any]:
        return {"drawn_from": self.drawn_from, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state


@dataclass
class WithoutHash(Stateful):
    """A dataclass that compares by value has no hash."""

    length: int = 600

    def __post_init__(self) -> None:
        super().__init__(self.length)


class StatefulSet(Stateful, IterableDataset[int]):
    """As torch's loader wants it."""


KEEPING: dict[str, Callable[[], Any]] = {
    "pipeline": lambda: Pipeline(Stateful()).batch(100),
    "without a hash": lambda: Pipeline(WithoutHash()).batch(100),
    "inline": lambda: DataLoader(StatefulSet(), 100),
    "worker": lambda: DataLoader(StatefulSet(), 100, num_workers=2),
}


@pytest.mark.parametrize("name", KEEPING)
@pytest.mark.parametrize("done", [1, 4, 6])
def test_epochs_behind_a_resume_are_whole_in_the_same_process_too(name: str, done: int) -> None:
    """The object stands in the middle of an epoch when the state is loaded, and keeps it for all epochs to come."""
    loader = KEEPING[name]()
    batches = iter(loader)
    for _ in range(done):
        next(batches)
    state = json.loads(json.dumps(loader.state_dict()))
    loader.close()
    del batches
    loader.load_state_dict(state)
    firsts = [[int(batch[0]) for batch in loader] for _ in range(3)]
    whole = list(range(1, 600, 100))
    assert firsts == [whole[done:] or whole, whole, whole]


@pytest.mark.parametrize("drop_in", [False, True])
def test_an_order_that_an_object_drew_is_in_the_state_from_the_first_batch_on(drop_in: bool) -> None:
    """Also where it is another one each epoch; and the epochs behind go on from there."""

    class Set(OtherOrderEachEpoch, IterableDataset[int]):
        pass

    def make() -> Any:
        return DataLoader(Set(), 10) if drop_in else Pipeline(OtherOrderEachEpoch()).batch(10)

    loader = make()
    list(loader)
    for done in range(1, 5):
        batches = iter(loader)
        for _ in range(done):
            next(batches)
        state = json.loads(json.dumps(loader.state_dict()))
        expected = [[batch.tolist() for batch in batches], *([b.tolist() for b in loader] for _ in range(2))]
        resumed = make()
        resumed.load_state_dict(state)
        assert [[batch.tolist() for batch in resumed] for _ in range(3)] == expected


# -- data that changes while an epoch runs -----------------------------------------------------------------------------


@pytest.mark.parametrize("drop_in", [False, True])
@pytest.mark.parametrize("change", [4, -4])
def test_a_state_is_of_the_data_that_its_epoch_began_with(drop_in: bool, change: int) -> None:
    """A dataset that has grown or shrunk since has another order: it is refused, and the former one resumes."""
    data = list(range(10))

    def make(data: list[int]) -> Any:
        return DataLoader(data, 2, shuffle=True, seed=3) if drop_in else Pipeline(data).shuffle(seed=3).batch(2)

    expected = [batch.tolist() for batch in make(data)]
    loader = make(data)
    batches = iter(loader)
    for _ in range(2):
        next(batches)
    if change > 0:
        data.extend(range(10, 10 + change))
    else:
        del data[change:]
    state = json.loads(json.dumps(loader.state_dict()))
    assert (state["epoch"], state["batches"]) == (0, 2)
    loader.close()
    with pytest.raises(StateError, match="has grown" if change > 0 else "has shrunk"):
        make(data).load_state_dict(state)
    former = make(list(range(10)))
    former.load_state_dict(state)
    assert [batch.tolist() for batch in former] == expected[2:]


def test_data_that_grows_between_the_load_and_the_epoch_is_refused_then() -> None:
    """And the state is not lost: with the former data it goes on."""
    data = list(range(10))
    loader = Pipeline(data).shuffle(seed=3).batch(2)
    expected = [batch.tolist() for batch in loader]
    loader.set_epoch(0)
    next(iter(loader))
    state = loader.state_dict()
    loader.close()
    loader.load_state_dict(state)
    data.append(10)
    with pytest.raises(StateError, match="has grown"):
        next(iter(loader))
    assert loader.state_dict()["batches"] == 1
    data.pop()
    assert [batch.tolist() for batch in loader] == expected[1:]


# -- states that are taken while an epoch begins -----------------------------------------------------------------------


class Asks:
    """A dataset that has the state taken while its length is asked for, as a signal handler might."""

    def __init__(self) -> None:
        self.ask: Callable[[], Any] | None = None
        self.found: list[tuple[int, int]] = []

    def __len__(self) -> int:
        ask, self.ask = self.ask, None
        if ask is not None:
            state = ask()
            self.found.append((state["epoch"], state["batches"]))
            self.ask = ask
        return 8

    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize("drop_in", [False, True])
def test_a_state_that_is_taken_while_an_epoch_begins_is_its_beginning(drop_in: bool) -> None:
    """Not the next one's, and not that of a loader that has lost what was loaded."""
    data = Asks()
    loader: Any = DataLoader(data, 2, shuffle=True, seed=1) if drop_in else Pipeline(data).shuffle(seed=1).batch(2)
    data.ask = loader.state_dict
    batches = iter(loader)
    next(batches)
    assert data.found
    assert set(data.found) == {(0, 0)}
    data.ask = None
    state = loader.state_dict()
    del batches
    loader.close()
    loader.load_state_dict(state)
    data.found.clear()
    data.ask = loader.state_dict
    next(iter(loader))
    assert data.found
    assert set(data.found) == {(0, 1)}
    data.ask = None
    loader.close()


def test_an_epoch_that_cannot_begin_is_not_counted() -> None:
    """The first one that does is the first one."""

    class Unlisted(Asks):
        listed = False

        def __len__(self) -> int:
            if not self.listed:
                raise OSError("no listing yet")
            return 8

    data = Unlisted()
    loader = Pipeline(data).shuffle(seed=0).batch(8)
    for _ in range(2):
        with pytest.raises(OSError, match="no listing yet"):
            next(iter(loader))
    data.listed = True
    assert loader.state_dict()["epoch"] == 0
    (expected,) = Pipeline(range(8)).shuffle(seed=0).batch(8)
    assert next(iter(loader)).tolist() == expected.tolist()
    loader.close()


# -- samplers that share the global generator, and what samplers were made with ---------------------------------------


@pytest.mark.parametrize("how", ["zip", "mix", "interleave"])
def test_samplers_that_draw_from_the_global_generator_side_by_side_resume(how: str) -> None:
    """Each in the thread of its source: what is noted is what it drew from, whoever comes first."""

    def drawn(length: int) -> Pipeline:
        return Pipeline(range(length), sampler=RandomSampler(range(length)))

    def make() -> Pipeline:
        if how == "mix":
            return Pipeline.mix([drawn(50), drawn(60), drawn(40)], [1, 1, 1]).batch(5, collate_fn=list)
        return getattr(Pipeline, how)(drawn(50), drawn(60), drawn(40)).batch(5, collate_fn=list)  # type: ignore[no-any-return]

    for seed in range(30):
        torch.manual_seed(seed)
        loader = make()
        batches = iter(loader)
        for _ in range(3):
            next(batches)
        state = json.loads(json.dumps(loader.state_dict()))
        expected = list(batches)
        resumed = make()
        resumed.load_state_dict(state)
        assert list(resumed) == expected


TWELVE: Any = range(12)


def with_generator() -> Pipeline:
    sampler = RandomSampler(range(8), generator=torch.Generator().manual_seed(1))
    return Pipeline(range(8), sampler=sampler)


def test_a_buffer_behind_a_sampler_that_is_repeated_has_its_order_again() -> None:
    """All of a round are in the buffer, and none of them has gone: its order is drawn from where it was."""

    def make() -> Pipeline:
        return with_generator().shuffle(7).repeat(3)

    expected = list(make())
    for done in range(1, len(expected)):
        loader = make()
        samples = iter(loader)
        for _ in range(done):
            next(samples)
        state = json.loads(json.dumps(loader.state_dict()))
        loader.close()
        resumed = make()
        resumed.load_state_dict(state)
        assert list(resumed) == expected[done:]


@pytest.mark.parametrize(
    ("make", "guarantee"),
    [
        (lambda: with_generator().batch(3), "exact"),
        (lambda: with_generator().take(3), "replayed"),
        (lambda: with_generator().repeat(2), "replayed"),
        (lambda: with_generator().shard(0, 2), "replayed"),
        (lambda: Pipeline.zip(with_generator(), range(3)), "replayed"),
        (lambda: Pipeline(range(8), sampler=RandomSampler(range(8))).take(3), "exact"),
    ],
)
def test_a_generator_that_an_epoch_may_leave_early_is_told_of(make: Callable[[], Any], guarantee: str) -> None:
    """Where it is then, no state tells."""
    assert make().state_dict()["guarantee"] == guarantee


SAMPLERS: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
    "batch_size": (
        lambda: DataLoader(range(12), batch_sampler=BatchSampler(SequentialSampler(range(12)), 2, False)),
        lambda: DataLoader(range(12), batch_sampler=BatchSampler(SequentialSampler(range(12)), 4, False)),
        r"BatchSampler.batch_size=4, and had 2",
    ),
    "drop_last": (
        lambda: DataLoader(range(12), batch_sampler=BatchSampler(SequentialSampler(range(12)), 5, False)),
        lambda: DataLoader(range(12), batch_sampler=BatchSampler(SequentialSampler(range(12)), 5, True)),
        r"BatchSampler.drop_last=True, and had False",
    ),
    "ranks": (
        lambda: DataLoader(range(12), 2, sampler=DistributedSampler(TWELVE, 2, 0)),
        lambda: DataLoader(range(12), 2, sampler=DistributedSampler(TWELVE, 3, 0)),
        r"DistributedSampler.num_replicas=3, and had 2",
    ),
    "seed": (
        lambda: Pipeline(range(12), sampler=DistributedSampler(TWELVE, 2, 0)),
        lambda: Pipeline(range(12), sampler=DistributedSampler(TWELVE, 2, 0, seed=5)),
        r"DistributedSampler.seed=5, and had 0",
    ),
    "replacement": (
        lambda: DataLoader(range(12), 2, sampler=RandomSampler(range(12))),
        lambda: DataLoader(range(12), 2, sampler=RandomSampler(range(12), replacement=True)),
        r"RandomSampler.replacement=True, and had False",
    ),
    "subset": (
        lambda: DataLoader(range(12), 2, sampler=SubsetRandomSampler(range(8))),
        lambda: DataLoader(range(12), 2, sampler=SubsetRandomSampler(range(12))),
        r"SubsetRandomSampler.indices=12, and had 8",
    ),
    "weights": (
        lambda: DataLoader(range(12), 2, sampler=WeightedRandomSampler([1.0] * 12, 8)),
        lambda: DataLoader(range(12), 2, sampler=WeightedRandomSampler([1.0] * 12, 12)),
        r"WeightedRandomSampler.num_samples=12, and had 8",
    ),
    "kind": (
        lambda: Pipeline(range(12), sampler=SequentialSampler(range(12))),
        lambda: Pipeline(range(12), sampler=RandomSampler(range(12))),
        r"sampler='RandomSampler', and had 'SequentialSampler'",
    ),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_that_were_made_otherwise_are_refused(name: str) -> None:
    """With the argument named."""
    make, other, difference = SAMPLERS[name]
    loader = make()
    next(iter(loader))
    state = json.loads(json.dumps(loader.state_dict()))
    loader.close()
    with pytest.raises(StateError, match=difference):
        other().load_state_dict(state)
    make().load_state_dict(state)


def test_a_rank_goes_on_from_the_state_of_another_one() -> None:
    """`DistributedSampler` deals one order: at a step all ranks are at the same place in it."""

    def make(rank: int) -> Any:
        return DataLoader(range(12), 2, sampler=DistributedSampler(TWELVE, 2, rank))

    loader = make(0)
    next(iter(loader))
    state = loader.state_dict()
    loader.close()
    other = make(1)
    whole = [batch.tolist() for batch in make(1)]
    other.load_state_dict(state)
    assert [batch.tolist() for batch in other] == whole[1:]
