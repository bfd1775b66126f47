"""What `explain` says of `in_ray`: whether its actors, or the way from them, are the limit."""

from typing import Final

from aioloader.insight.stats import StageStats, Stats

__all__ = ["limit_of_actors"]

SATURATED: Final = 0.7  # of what they could compute, or of a stage's places
HELD_UP: Final = 0.5  # of the time in which what is finished in the actors waits to be fetched


def limit_of_actors(stats: Stats, waited: str) -> str | None:
    """In words, for a consumer that waits; None: there are no actors of `in_ray`, or they are not the limit.

    Args:
        stats: Of one epoch.
        waited: How much the consumer waits, for the sentence.
    """
    at = next((at for at, stage in enumerate(stats.stages) if stage.actors and stage.name.startswith("in_ray(")), None)
    if at is None:
        return None
    stage, inside = stats.stages[at], stats.stages[:at]
    running = [actor for actor in stage.actors if actor.running]
    where = f"{len(running)} of {len(stage.actors)} actors run, on {len({actor.node for actor in running})} nodes"
    if lost := sum(actor.restarts for actor in stage.actors):
        where += f", and {lost} were lost"
    if not running:
        return f"No actor of {stage.name} runs: {waited}; the cluster has no room for them, or they are just starting"
    computing = sum(one.cpu_seconds for one in inside) / stats.seconds
    if computing >= SATURATED * len(running):
        return (
            f"The actors are the limit: {waited}; {where}, and compute, {computing:.1f} cores' worth; more of them "
            f"help: loader.scale(actors={2 * len(stage.actors)}), if the cluster has CPUs for them"
        )
    busiest = max((one for one in inside if one.concurrency), key=_utilization, default=None)
    if busiest is not None and busiest.utilization >= SATURATED:
        return (
            f"{busiest.name} is the limit: {waited}; it was busy {busiest.utilization:.0%} of the time in its "
            f"{busiest.concurrency} places in actors; {where}; raise its concurrency, or the number of actors"
        )
    last = inside[-1] if inside else None
    if last is not None and last.waiting_for_room_seconds >= HELD_UP * stats.seconds:
        rate = sum(actor.received_bytes for actor in stage.actors) / stats.seconds / 1e6
        return (
            f"The way from the actors is the limit: {waited}; finished samples wait there to be fetched, {rate:.0f} "
            f"MB/s come; {where}; move fewer bytes, for instance uint8 instead of float32, or raise ahead"
        )
    return None


def _utilization(stage: StageStats) -> float:
    return stage.utilization
