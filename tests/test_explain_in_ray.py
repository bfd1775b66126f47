"""`explain()` of a loader whose samples are made in actors: they are the limit, or the way from them, or nobody."""

from typing import Any

import pytest

from aioloader.insight.actors import ActorStats
from aioloader.insight.explain import explain
from aioloader.insight.stats import StageStats, Stats

SECONDS = 10.0


def stage(name: str, **more: Any) -> StageStats:
    zero = {
        "concurrency": 4,
        "samples": 100,
        "errors": 0,
        "busy_seconds": 1.0,
        "cpu_seconds": 0.5,
        "utilization": 0.1,
        "waiting_for_input_seconds": 0.0,
        "waiting_for_room_seconds": 0.0,
        "finished_slots": 1.0,
        "room": 8,
    }
    return StageStats(name, "sync", **(zero | more))


def stats(*inside: StageStats, running: int = 2, restarts: int = 0) -> Stats:
    actors = tuple(
        ActorStats(f"Ray reader {number}", f"node {number}", number, number < running, 50, restarts=restarts,
                   received_bytes=100_000_000)
        for number in range(2)
    )  # fmt: skip
    outside = stage("in_ray(actors=2, parts=8)", concurrency=0, cpu_seconds=0.0, actors=actors)
    return Stats(0, SECONDS, 1.0, 50, 6.0, 0.6, 0.01, (*inside, outside))


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (stats(stage("map(f)", cpu_seconds=16.0)), "The actors are the limit"),
        (stats(stage("map(f)", cpu_seconds=16.0)), "1.6 cores' worth; more of them help: loader.scale(actors=4)"),
        (stats(stage("map(f)", utilization=0.9)), "map(f) is the limit"),
        (stats(stage("map(f)", waiting_for_room_seconds=8.0)), "The way from the actors is the limit"),
        (stats(stage("map(f)", waiting_for_room_seconds=8.0)), "20 MB/s come"),
        (stats(stage("map(f)"), running=0), "No actor of in_ray(actors=2, parts=8) runs"),
        (stats(stage("map(f)", utilization=0.9), restarts=1), "2 of 2 actors run, on 2 nodes, and 2 were lost"),
        (stats(stage("map(f)")), "No stage is busy all the time"),
    ],
)
def test_it_says_what_limits(found: Stats, words: str) -> None:
    """With what would help."""
    assert words in explain(found)
    assert "the consumer waited 60% of its time" in explain(found)
