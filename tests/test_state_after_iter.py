"""A user's object is asked for its state only once it has been iterated: some have none before."""

from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any

import pytest
from torch.utils.data import IterableDataset, Sampler

from aioloader import DataLoader, Pipeline
from tests._support import Face, Steps, collect, on_both_faces

COUNT = 20


class Calls:
    """Notes in which order it is called; there is no position before it is iterated."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.position: int

    def state_dict(self) -> dict[str, int]:
        self.calls.append("state_dict")
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.calls.append("load_state_dict")
        self.position = state["position"] + 0 * self.position

    def __len__(self) -> int:
        return COUNT


class IteratesItself(Calls, IterableDataset[int]):
    """It is its own iterator, as in torchdata's tests."""

    def __iter__(self) -> Iterator[int]:
        self.calls.append("iter")
        self.position = 0
        return self

    def __next__(self) -> int:
        if self.position == COUNT:
            raise StopIteration
        self.position += 1
        return self.position - 1


class Begins(Calls):
    """Its iterators have no state, so it is told before where they are to begin: as Hugging Face's are."""

    start = 0

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.calls.append("load_state_dict")
        self.start = state["position"]

    def begin(self) -> None:
        self.calls.append("iter")
        self.position, self.start = self.start, 0


class Generates(Begins, IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        self.begin()
        return self._rest()

    def _rest(self) -> Iterator[int]:
        while self.position < COUNT:
            self.position += 1
            yield self.position - 1


class AsyncGenerates(Begins):
    def __aiter__(self) -> AsyncIterator[int]:
        self.begin()
        return self._rest()

    async def _rest(self) -> AsyncIterator[int]:
        while self.position < COUNT:
            self.position += 1
            yield self.position - 1


class Samples(Begins, Sampler[int]):
    __iter__ = Generates.__iter__
    _rest = Generates._rest


THINGS: dict[str, Callable[[], Any]] = {
    "itself": IteratesItself,
    "generator": Generates,
    "async, generator": AsyncGenerates,
    "sampler": Samples,
}


def flat(batches: Iterable[list[int]]) -> list[int]:
    return [sample for batch in batches for sample in batch]


def loaders(thing: Any) -> dict[str, Callable[[], Any]]:
    if isinstance(thing, Sampler):
        return {
            "pipeline": lambda: Pipeline(range(COUNT), sampler=thing).batch(4, collate_fn=list),
            "loader": lambda: DataLoader(range(COUNT), 4, sampler=thing, collate_fn=list),
            "threads": lambda: DataLoader(range(COUNT), 4, sampler=thing, collate_fn=list, num_workers=2),
        }
    return {
        "pipeline": lambda: Pipeline(thing).batch(4, collate_fn=list),
        "loader": lambda: DataLoader(thing, 4, collate_fn=list),
        "threads": lambda: DataLoader(thing, 4, collate_fn=list, num_workers=2),
    }


@on_both_faces
@pytest.mark.parametrize("kind", ["pipeline", "loader", "threads"])
@pytest.mark.parametrize("name", THINGS)
def test_iterating_asks_for_no_state_before(name: str, kind: str, face: Face) -> None:
    """Nor is one loaded, where nobody resumes."""
    thing = THINGS[name]()
    loader = loaders(thing)[kind]()
    loader.state_dict()
    assert thing.calls == []
    for epoch in (1, 2):
        assert flat(collect(loader, face)) == list(range(COUNT))
        assert thing.calls.count("iter") == epoch
    if name != "sampler" or kind == "pipeline":  # torch's batch sampler iterates it at its first key
        assert thing.calls[0] == "iter"
    assert "load_state_dict" not in thing.calls


@on_both_faces
@pytest.mark.parametrize("kind", ["pipeline", "loader", "threads"])
@pytest.mark.parametrize("name", THINGS)
def test_a_resumed_one_is_exact(name: str, kind: str, face: Face) -> None:
    """In another object, which has not been iterated, and in the same one; then the next epoch."""
    thing = THINGS[name]()
    loader = loaders(thing)[kind]()
    with Steps(loader, face) as steps:
        steps.next()
        steps.next()
        state = loader.state_dict()
        assert state["guarantee"] == "exact"
        steps.rest()
    other = THINGS[name]()
    for dataset in (other, other, thing):
        resumed = loaders(dataset)[kind]()
        resumed.load_state_dict(state)
        assert flat(collect(resumed, face)) == list(range(8, COUNT))
        assert flat(collect(resumed, face)) == list(range(COUNT))
    if name == "itself":  # it goes on in an iterator, which must be there first
        assert other.calls[0] == "iter"


@on_both_faces
def test_a_sampler_that_is_its_own_iterator_gives_each_key_once(face: Face) -> None:
    """It is iterated once an epoch: to iterate it again would begin it anew. (torch's batch sampler does, for ever.)"""

    class Mine(Sampler[int]):
        def __iter__(self) -> Iterator[int]:
            self.keys = iter(range(COUNT))
            return self

        def __next__(self) -> int:
            return next(self.keys)

        def __len__(self) -> int:
            return COUNT

    for workers in (None, 0, 2):
        loader: Any = Pipeline(range(COUNT), sampler=Mine())
        if workers is not None:
            loader = DataLoader(range(COUNT), None, sampler=Mine(), num_workers=workers)
        for _ in range(2):
            assert [int(sample) for sample in collect(loader, face)] == list(range(COUNT))


def test_worker_processes_ask_for_none() -> None:
    """They read their parts again, and drop what was given."""
    loader: DataLoader[Any] = DataLoader(IteratesItself(), 4, collate_fn=list, num_workers=1, worker_type="process")
    with loader:
        batches = iter(loader)
        assert next(batches) == [0, 1, 2, 3]
        state = loader.state_dict()
        assert flat(batches) == list(range(4, COUNT))
        loader.load_state_dict(state)
        with pytest.warns(UserWarning, match="reads"):
            assert flat(loader) == list(range(4, COUNT))
