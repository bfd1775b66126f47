"""The epochs after a resumed one, where orders are drawn from torch's global generator, which no state may touch."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.data
from torch.utils.data import IterableDataset, RandomSampler, TensorDataset, WeightedRandomSampler

from aioloader import DataLoader, Pipeline, StateError
from aioloader.sources import stand_in as module
from aioloader.sources.stand_in import MOST_BLOCKS, StandIn, stand_in
from tests._states import contents_of, edited
from tests._support import Face, Steps, collect, on_both_faces

COUNT = 30

dataset = TensorDataset(torch.arange(COUNT))


def sampled() -> Pipeline:
    return Pipeline(dataset, sampler=RandomSampler(dataset))


KINDS: dict[str, Callable[[], Any]] = {
    "without workers": lambda: DataLoader(dataset, 4, shuffle=True),
    "threads": lambda: DataLoader(dataset, 4, shuffle=True, num_workers=2),
    "persistent": lambda: DataLoader(dataset, 4, shuffle=True, num_workers=2, persistent_workers=True),
    "weighted": lambda: DataLoader(dataset, 4, sampler=WeightedRandomSampler([1.0] * COUNT, COUNT)),
    "a pipeline": lambda: sampled().batch(4),
    "repeated": lambda: sampled().repeat(2).batch(4),
    "several samplers": lambda: Pipeline.mix([sampled(), sampled()], [1, 2]).batch(4),
}


def plain(batch: Any) -> Any:
    return batch[0].tolist()


class Program:
    """A training that validates after each epoch, and may draw noise in each step."""

    def __init__(self, loader: Any, face: Face, *, noise: bool) -> None:
        self.loader = loader
        self._face = face
        self._noise = noise

    def epoch(self, stop_after: int | None = None) -> tuple[list[Any], Any]:
        """The batches of an epoch, and the state after `stop_after` of them."""
        found: list[Any] = []
        state = None
        with Steps(self.loader, self._face) as steps:
            while True:
                if stop_after == len(found):
                    state = json.loads(json.dumps(self.loader.state_dict()))
                try:
                    found.append(plain(steps.next()))
                except StopIteration:
                    break
                if self._noise:
                    torch.rand(3)
        for _ in torch.utils.data.DataLoader(dataset, 10):  # which draws a seed for its workers
            pass
        return found, state


@on_both_faces
@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("name", KINDS)
def test_all_epochs_come_as_they_would_have_come(name: str, at: int, noise: bool, face: Face) -> None:
    """In a program of another seed, which draws as much; or of the same one, which has put its generator back."""
    torch.manual_seed(3)
    program = Program(KINDS[name](), face, noise=noise)
    program.epoch()
    first, state = program.epoch(stop_after=at)
    expected = [first[at:], program.epoch()[0], program.epoch()[0]]
    assert state["guarantee"] == ("replayed" if noise and at else "exact")

    torch.manual_seed(77)
    torch.rand(11)
    resumed = Program(KINDS[name](), face, noise=noise)
    resumed.loader.load_state_dict(state)
    torch.rand(5)  # it makes its model
    mine = torch.get_rng_state()
    found = [resumed.epoch()[0]]
    second, later = resumed.epoch(stop_after=at)  # once more from here
    assert [*found, second, resumed.epoch()[0]] == expected
    assert not torch.equal(torch.get_rng_state(), mine)  # validation has drawn

    torch.manual_seed(78)
    again = Program(KINDS[name](), face, noise=noise)
    again.loader.load_state_dict(later)
    assert [again.epoch()[0], again.epoch()[0]] == [expected[1][at:], expected[2]]


@on_both_faces
def test_a_generator_that_was_put_back_decides(face: Face) -> None:
    """Whatever the program draws from it then."""
    torch.manual_seed(3)
    loader = KINDS["threads"]()
    with Steps(loader, face) as steps:
        steps.next()
        state, rng = loader.state_dict(), torch.get_rng_state()
        steps.rest()
    torch.rand(1000)
    expected = [plain(batch) for batch in collect(loader, face)]
    torch.set_rng_state(rng)
    other = KINDS["threads"]()
    other.load_state_dict(state)
    collect(other, face)
    assert other._stand_in is None
    torch.rand(1000)
    assert [plain(batch) for batch in collect(other, face)] == expected


@pytest.mark.parametrize("seeds", [(5, 6), (5, 5)])
@on_both_faces
def test_a_program_that_seeds_each_epoch_decides(seeds: tuple[int, int], face: Face) -> None:
    """By another seed each time, or by one that makes all epochs alike."""

    def epochs(state: Any) -> list[Any]:
        loader = KINDS["threads"]()
        if state is not None:
            loader.load_state_dict(state)
        found: list[Any] = []
        for number, seed in enumerate(seeds):
            torch.manual_seed(seed)
            if not number:
                torch.rand(1)  # the model is made
            with Steps(loader, face) as steps:
                if state is None and not found:
                    steps.next()
                    states.append(loader.state_dict())
                found.append([plain(batch) for batch in steps.rest()])
            torch.rand(2)
        return found

    states: list[Any] = []
    expected = epochs(None)
    torch.manual_seed(9)
    assert epochs(states[0]) == expected


def test_the_callers_generator_is_not_touched() -> None:
    """Later epochs draw from it what an epoch always draws, and nothing else."""
    loader = KINDS["threads"]()
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    batches.close()
    torch.manual_seed(4)
    other = KINDS["threads"]()
    other.load_state_dict(state)
    collect(other, "for")
    assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(4).get_state())
    collect(other, "for")
    left = torch.get_rng_state()
    torch.manual_seed(4)
    collect(KINDS["threads"](), "for")
    assert torch.equal(torch.get_rng_state(), left)


def test_an_iterator_of_an_older_epoch_leads_to_the_newer_one() -> None:
    """That has drawn its order already."""
    loader = KINDS["threads"]()
    older = iter(loader)
    next(older)
    newer = iter(loader)
    expected = [plain(next(newer))]
    torch.rand(4)
    state = older.state_dict()
    rest = [plain(batch) for batch in older]
    expected += [plain(batch) for batch in newer]
    torch.manual_seed(2)
    other = KINDS["threads"]()
    other.load_state_dict(state)
    assert [plain(batch) for batch in other] == rest
    assert [plain(batch) for batch in other] == expected


class Numbers(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(COUNT))


@pytest.mark.parametrize("name", KINDS)
def test_a_state_without_its_next_epoch_still_resumes(name: str) -> None:
    """Of a release before it had one: the rest of the epoch is exact."""
    loader = KINDS[name]()
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    random = contents_of(state)["random"]
    old = edited(state, random={key: value for key, value in random.items() if key != "next"})
    assert "next" in random
    torch.manual_seed(6)
    other = KINDS[name]()
    other.load_state_dict(old)
    assert [plain(batch) for batch in other] == [plain(batch) for batch in batches]
    assert len(list(other)) == len(other)
    with pytest.raises(StateError, match="random"):
        other.load_state_dict(edited(state, random=random | {"next": "no state"}))


def test_what_draws_nothing_from_it_has_no_part_of_it_in_its_state() -> None:
    for loader in (DataLoader(dataset, 4), DataLoader(dataset, 4, shuffle=True, seed=1), DataLoader(Numbers(), 4)):
        batches = iter(loader)
        next(batches)
        torch.rand(1)
        state = loader.state_dict()
        assert not contents_of(state)["random"].keys() & {"drawn", "next"}
        assert state["guarantee"] == ("replayed" if isinstance(loader.dataset, Numbers) else "exact")
        batches.close()


# -- the generator that stands in --------------------------------------------------------------------------------------

DRAWS: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "a seed": lambda: torch.empty((), dtype=torch.int64).random_(),
    "a permutation": lambda: torch.randperm(10),
    "a block": lambda: torch.rand(624),
    "many": lambda: torch.rand(100_000),
    "normal": lambda: torch.randn(2001),
    "one normal": lambda: torch.randn(1),
}


@pytest.mark.parametrize("before", [0, 1, 623, 624, 1000])
@pytest.mark.parametrize("name", DRAWS)
def test_it_moves_as_the_global_one_does(name: str, before: int) -> None:
    """By whatever is drawn, from whatever place in a block on."""
    torch.manual_seed(8)
    torch.rand(before)
    there = torch.get_rng_state()
    DRAWS[name]()
    expected = torch.rand(5)
    torch.manual_seed(9)
    torch.rand(33)
    other = stand_in(there)
    assert other is not None
    DRAWS[name]()
    moved = other.moved()
    assert moved is not None
    generator = torch.Generator()
    generator.set_state(moved.instead)
    assert torch.equal(torch.rand(5, generator=generator), expected)
    assert moved.moved() == moved


def test_there_is_none_where_the_state_is_the_same() -> None:
    assert stand_in(torch.get_rng_state()) is None


def test_what_is_too_far_to_count_gives_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same one each time that it is asked for, and in each process."""
    assert MOST_BLOCKS * 624 > 5_000_000
    monkeypatch.setattr(module, "MOST_BLOCKS", 3)
    torch.manual_seed(1)
    other = StandIn(torch.get_rng_state(), torch.Generator().manual_seed(2).get_state())
    torch.rand(5 * 624)
    moved, again = other.moved(), other.moved()
    assert moved is not None
    assert again is not None
    assert torch.equal(moved.instead, again.instead)
    assert not torch.equal(moved.instead, other.instead)


def test_it_leaves_the_default_device_alone() -> None:
    """The states of generators of the host are in its memory."""
    torch.manual_seed(1)
    other = StandIn(torch.get_rng_state(), torch.Generator().manual_seed(2).get_state())
    torch.rand(1000)
    with torch.device("meta"):
        moved = other.moved()
    assert moved is not None
    assert not torch.equal(moved.instead, other.instead)
