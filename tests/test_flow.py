"""What is known of samples before anything runs: `Stage.flow`, from stage to stage."""

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from aioloader import Pipeline
from aioloader.engine.entry import Entry
from aioloader.engine.progress import cursor_parts, whole
from aioloader.plan import flow_of
from aioloader.stages.base import FoldStage, Pass
from aioloader.stages.flow import Flow, Shared
from tests._support import FACES, Face, Steps, collect


@dataclass(frozen=True)
class Each(FoldStage):
    """Each sample `n` times: a stage as CONTRIBUTING says, which says nothing of itself.

    Cursor: that before the sample, and how many of it are out.
    """

    n: int

    @property
    def label(self) -> str:
        return f"each({self.n})"

    def length(self, upstream: int) -> int:
        return upstream * self.n

    def fold(self, this_pass: Pass) -> "EachFold":
        return EachFold(self.n)


class EachFold:
    """The rule of `Each`."""

    full = False

    def __init__(self, n: int) -> None:
        self._n = n
        self._before: Any = None
        self._out = 0

    def resume(self, cursor: Any) -> Any:
        self._before, out = cursor_parts(cursor, 2)
        self._out = whole(out, self._n)
        return self._before

    def failed_at(self, cursor: Any) -> Any:
        return (cursor, 0)

    def wants(self, limit: int) -> int:
        return max(1, limit // self._n)

    def feed(self, run: list[Entry]) -> list[Entry]:
        given = []
        for entry in run:
            after = entry.cursor
            for out in range(self._out + 1, self._n + 1):
                cursor = (after, 0) if out == self._n else (self._before, out)
                given.append(entry.derived(entry.value, cursor, entry.key, entry.position))
            self._before, self._out = after, 0
        return given

    def flush(self) -> list[Entry]:
        return []


def each(pipeline: Pipeline, n: int) -> Pipeline:
    """`pipeline` and one `Each` more."""
    return pipeline._then(Each(n))


def add_one(sample: int) -> int:
    return sample + 1


def numbers() -> Any:
    yield from range(12)


def test_a_stage_that_says_nothing_promises_little() -> None:
    """The default is right for any stage: no keys, no other rank, and a resume that may repeat."""
    known = flow_of(each(Pipeline(range(8)).shard(0, 2), 2)._plan)
    assert not known.by_key
    assert known.ranks is not None
    assert known.ranks.shared is Shared.SAME_RANK
    assert known.guarantee == "exact"  # each sample comes in the same order each time
    assert flow_of(each(Pipeline(range(8)).map(add_one, ordered=False), 2)._plan).guarantee == "at-least-once"
    assert flow_of(each(Pipeline.merge(range(8), range(8)), 2)._plan).guarantee == "at-least-once"


async def later(sample: int) -> int:
    """The sample, each after another number of turns of the loop."""
    for _ in range(sample * 7 % 5):
        await asyncio.sleep(0)
    return sample


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("ordered", [True, False])
def test_what_a_new_stage_claims_it_keeps(ordered: bool, face: Face) -> None:
    """After a fixed order its cursors are exact; after any other it claims less, and loses nothing."""

    def make(concurrency: int) -> Pipeline:
        return each(Pipeline(range(12)).map(later, ordered=ordered, concurrency=concurrency), 3)

    for given in range(36):
        loader = make(3)
        with Steps(loader, face) as steps:
            first = [steps.next() for _ in range(given)]
            state = loader.state_dict()
        assert state["guarantee"] == ("exact" if ordered else "at-least-once")
        resumed = make(7)
        resumed.load_state_dict(state)
        counts = Counter([*first, *collect(resumed, face)])
        assert set(counts) == set(range(12))
        assert min(counts.values()) >= 3
        if ordered:
            assert max(counts.values()) == 3


DEALT: dict[str, Callable[[], Pipeline]] = {
    "permuted": lambda: Pipeline(range(12)).map(add_one, ordered=False).shuffle(seed=3),
    "skipped": lambda: Pipeline(range(12)).map(add_one, ordered=False).skip(2),
    "kept": lambda: Pipeline(range(12)).map(add_one, ordered=False).cache(memory_bytes=1 << 20),
}


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("name", DEALT)
def test_keys_are_dealt_before_maps_that_finish_in_any_order(name: str, face: Face) -> None:
    """Order stages of an indexable source go before its maps, so that all ranks see one order."""
    make = DEALT[name]
    dealt = [sample for rank in range(2) for sample in collect(make().shard(rank, 2), face)]
    assert sorted(dealt) == sorted(collect(make(), face))


REFUSED: dict[str, Callable[[], Pipeline]] = {
    "a filter between": lambda: Pipeline(range(12)).map(add_one, ordered=False).filter(bool),
    "a stream that is skipped": lambda: Pipeline(numbers).map(add_one, ordered=False).skip(1),
    "in the window of a filter": lambda: Pipeline(range(12)).filter(bool).pin_memory().map(add_one, ordered=False),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_order_that_each_rank_makes_for_itself_is_not_dealt(name: str) -> None:
    """Samples would come on several ranks, and others on none."""
    with pytest.raises(ValueError, match="another order"):
        REFUSED[name]().shard(0, 2)


def test_a_flow_is_as_weak_as_its_weakest_stage() -> None:
    """Nothing makes a guarantee stronger again."""
    weak = Flow().at_least("replayed")
    assert weak.at_least("exact") == weak
    assert replace(weak, guarantee_if_cut="at-least-once").cut().guarantee == "at-least-once"
