"""What is known of samples before anything runs: `Stage.flow`, from stage to stage."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from aioloader import DataLoader, Pipeline
from aioloader.plan.plan import flow_of
from aioloader.stages.flow import Flow, Shared
from tests._support import FACES, Face, collect
from tests.test_new_stage import each


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


def test_where_samples_come_as_they_finish_is_said_as_the_user_knows_it() -> None:
    assert (
        flow_of(Pipeline(range(8)).map(add_one, ordered=False)._plan).completion_order == "map(add_one, ordered=False)"
    )
    loader = DataLoader(range(8), 2, num_workers=2, in_order=False)
    assert flow_of(loader._plan).completion_order == "fetch"


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
