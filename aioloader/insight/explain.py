"""One sentence on what limits a loader, drawn from its numbers."""

from typing import Final

from aioloader.insight.stats import StageStats, Stats

__all__ = ["explain"]

KEEPS_UP: Final = 0.05  # a consumer that waits less than this fraction of its time has no problem with its loader
SATURATED: Final = 0.7  # a stage busier than this has no place free when a sample comes


def explain(stats: Stats) -> str:
    """Name the stage that limits, or say that the consumer does."""
    if stats.batches < 2:
        return f"Nothing to explain yet: {stats.batches} batches were handed out; ask again after a few."
    waited = f"the consumer waited {stats.waited_fraction:.0%} of its time for batches"
    limit = _limit(stats)
    numbers = f"({stats.batches} batches in {stats.seconds:.2f} s, the first after {stats.first_batch_seconds:.3f} s)"
    if stats.waited_fraction < KEEPS_UP:
        return f"The loader keeps up: {waited}; the consumer is the limit {numbers}."
    if limit is None:
        return f"No stage is busy all the time, though {waited}: the epoch is short, or the machine is busy {numbers}."
    return f"{limit.name} is the limit: {waited}; {_reason(limit)} {numbers}."


def _limit(stats: Stats) -> StageStats | None:
    """The busiest stage; the source, where all others wait for it."""
    working = [stage for stage in stats.stages if stage.concurrency and stage.samples]
    if not working:
        return None
    busiest = max(working, key=lambda stage: stage.utilization)
    return busiest if busiest.utilization >= 0.1 else None


def _reason(stage: StageStats) -> str:
    per_sample = stage.busy_seconds / stage.samples
    cost = f"{per_sample * 1e3:.3g} ms each" if per_sample >= 1e-5 else f"{per_sample * 1e6:.2g} µs each"
    used = f"its {stage.concurrency} places were busy {stage.utilization:.0%} of the time, {cost}"
    if stage.concurrency == 1:
        used = f"it was busy {stage.utilization:.0%} of the time, {cost}"
    if stage.kind == "source":
        return f"{used}; a source is read by one task: move work from it into map(fn, concurrency=...)"
    if stage.kind == "async":
        if stage.utilization < SATURATED:
            return f"{used}; its input or its consumer comes in bursts: more prefetch helps"
        return f"{used}; if its server and network can bear more, raise its concurrency"
    cores = stage.cpu_seconds / max(stage.busy_seconds, 1e-9)
    if stage.cpu_seconds and cores > 0.5:
        return f"{used}, {cores:.0%} of it computing; more cores help, more threads do not"
    if stage.utilization < SATURATED:
        return f"{used}; its input or its consumer comes in bursts: more prefetch helps"
    return f"{used}, {cores:.0%} of it computing: it waits for I/O or for the GIL; raise its concurrency"
