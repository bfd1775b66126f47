"""What `explain` says of `map(executor="ray")`: whether the actors of a stage, or the way to them, are the limit."""

from typing import Final

from aioloader.insight.stats import StageStats

__all__ = ["actors_advice", "way_is_limit", "words_of_way"]

IDLE: Final = 0.2  # of the time, in which nothing was under way: then it was no limit
BUSY: Final = 0.7  # of the time, in which actors that are the limit compute


def actors_advice(stage: StageStats, knob: str) -> str:
    """What to do where actors compute all the time."""
    missing = [actor for actor in stage.actors if not actor.running]
    if missing:
        return (
            f"; {len(stage.actors) - len(missing)} of {len(stage.actors)} actors run, and the cluster has no room for "
            f"the others: add nodes, or ask for fewer cpus in RayWorkers"
        )
    nodes = len({actor.node for actor in stage.actors})
    where = f"{len(stage.actors)} actors on {nodes} node{'s' if nodes > 1 else ''}"
    return f"; raise {knob} if the cluster has room for more than these {where}"


def way_is_limit(stage: StageStats, seconds: float) -> bool:
    """Whether samples are under way in actors all the time, and these compute for a part of it only."""
    idle = stage.waiting_for_input_seconds + stage.waiting_for_room_seconds
    all_run = bool(stage.actors) and all(actor.running for actor in stage.actors)
    return stage.kind == "ray" and all_run and idle < IDLE * seconds and stage.utilization < BUSY


def words_of_way(stage: StageStats, seconds: float) -> str:
    """The same in words, with what may help."""
    each = sum(actor.received_bytes for actor in stage.actors) / max(1, sum(actor.samples for actor in stage.actors))
    rate = each * stage.samples / seconds / 1e6  # of this epoch: the actors count all of their lives
    return (
        f"{stage.name} waits for what crosses to its actors and back ({rate:.0f} MB/s came from them): send less (keys "
        f"instead of bytes, uint8 instead of float32), do more in one function, or use executor='process' where this "
        f"machine has the cores"
    )
