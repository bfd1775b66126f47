"""`explain` tells whether actors, the way to them, or the consumer is the limit."""

from typing import Any

import pytest

from aioloader.core.cores import usable_cores
from aioloader.insight.actors import ActorStats
from aioloader.insight.explain import explain
from aioloader.insight.stats import StageStats, Stats


def said(*actors: ActorStats, utilization: float, waited: float = 0.9, **known: Any) -> str:
    """Of ten seconds in which a stage in actors made a thousand samples."""
    stage = StageStats(
        name="map(decode)",
        kind="ray",
        concurrency=len(actors),
        samples=1000,
        errors=0,
        busy_seconds=10 * len(actors) * utilization,
        cpu_seconds=10 * len(actors) * utilization,
        utilization=utilization,
        waiting_for_input_seconds=known.pop("waiting_for_input_seconds", 0.0),
        waiting_for_room_seconds=0.0,
        finished_slots=0.0,
        room=8,
        actors=actors,
        **known,
    )
    return explain(Stats(0, 10.0, 0.1, 100, 9.0, waited, 0.05, (stage,)), "its concurrency")


def actor(number: int, *, node: str = "10.0.0.1", running: bool = True) -> ActorStats:
    return ActorStats(f"Ray worker {number}", node, 1, running, 500, 5.0, 10.0, 0, 500_000_000)


def test_busy_actors_are_the_limit() -> None:
    """More of them help, and threads of this process have nothing to do with it."""
    actors = [actor(number, node=f"10.0.0.{number % 2}") for number in range(2 * usable_cores())]
    text = said(*actors, utilization=0.97)
    assert text.startswith("map(decode) is the limit: ")
    assert f"raise its concurrency if the cluster has room for more than these {len(actors)} actors on 2 nodes" in text


def test_actors_that_have_no_room_are_named() -> None:
    """More of them would not help."""
    text = said(actor(0), actor(1, running=False), utilization=0.95)
    assert "1 of 2 actors run, and the cluster has no room for the others" in text


def test_the_way_is_the_limit() -> None:
    """Something is under way all the time, and the actors compute for a fifth of it."""
    text = said(actor(0), actor(1), utilization=0.2)
    assert "map(decode) waits for what crosses to its actors and back (100 MB/s came from them)" in text


@pytest.mark.parametrize("known", [{"waiting_for_input_seconds": 5.0}, {"waited": 0.01}])
def test_nobody_blames_the_way_for_others(known: dict[str, Any]) -> None:
    """Where samples are missing, or the consumer does not wait."""
    assert "crosses" not in said(actor(0), actor(1), utilization=0.2, **known)
