"""One sentence on what limits a loader, drawn from its numbers."""

from typing import Final

from aioloader.cores import usable_cores
from aioloader.insight.stats import StageStats, Stats

__all__ = ["explain"]

KEEPS_UP: Final = 0.05  # a consumer that waits less than this fraction of its time has no problem with its loader
SATURATED: Final = 0.7  # a stage busier than this has no place free when a sample comes
COMPUTING: Final = 0.8  # threads that compute this much of one core, or of all, are limited by the GIL, or by the cores
LOOP_SATURATED: Final = 0.8  # an event loop busier than this delays everything that it drives


def explain(stats: Stats, knob: str = "its concurrency") -> str:
    """Name what limits: the consumer, the event loop, the cores, or a stage; and say what to do about it.

    Args:
        stats: Of one epoch.
        knob: What the loader calls the number of its threads.
    """
    if stats.batches < 2:
        return f"Nothing to explain yet: {stats.batches} batches were handed out; ask again after a few."
    waited = f"the consumer waited {stats.waited_fraction:.0%} of its time for batches"
    numbers = f"({stats.batches} batches in {stats.seconds:.2f} s, the first after {stats.first_batch_seconds:.3f} s)"
    if stats.waited_fraction < KEEPS_UP:
        return f"The loader keeps up: {waited}; the consumer is the limit {numbers}."
    if stats.loop_cpu_fraction >= LOOP_SATURATED:
        return (
            f"The event loop is the limit: {waited}; the loop's thread computes {stats.loop_cpu_fraction:.0%} of the "
            f"time; move computing out of async functions into sync ones, which run in threads {numbers}."
        )
    busiest = max(
        (stage for stage in stats.stages if stage.concurrency and stage.samples),
        key=lambda stage: stage.utilization,
        default=None,
    )
    threads = [stage for stage in stats.stages if stage.kind != "process"]  # which have a GIL each
    computing = sum(stage.cpu_seconds for stage in threads) / stats.seconds
    if busiest is not None and computing >= COMPUTING:
        most = max(threads, key=lambda stage: stage.cpu_seconds)
        return (
            f"{most.name} is the limit: {waited}; the loader's threads compute, {computing:.1f} cores' worth of the "
            f"{usable_cores()} there are: {_cores_advice(computing)} {numbers}."
        )
    if busiest is None:
        return f"No stage has done anything measurable, though {waited} {numbers}."
    if busiest.utilization < SATURATED:
        return (
            f"No stage is busy all the time, though {waited}: {busiest.name}, the busiest, was {_use(busiest)}; "
            f"the epoch is short, or work comes in bursts, which a larger prefetch evens out {numbers}."
        )
    return f"{busiest.name} is the limit: {waited}; it was {_use(busiest)}{_advice(busiest, knob)} {numbers}."


def _use(stage: StageStats) -> str:
    each = stage.busy_seconds / stage.samples
    cost = f"{each * 1e3:.3g} ms each" if each >= 1e-5 else f"{each * 1e6:.2g} µs each"
    places = f" in its {stage.concurrency} places" if stage.concurrency > 1 else ""
    return f"busy {stage.utilization:.0%} of the time{places}, {cost}"


def _cores_advice(computing: float) -> str:
    if computing >= COMPUTING * usable_cores():
        return "more cores help, more threads do not"
    return 'Python code holds the GIL, and more threads do not help; worker processes may: executor="process"'


def _advice(stage: StageStats, knob: str) -> str:
    if stage.kind == "source":
        return "; one task reads it: move work from it into map(fn, concurrency=...)"
    if stage.kind == "async":
        return "; if its server and network can bear more, raise its concurrency"
    if stage.kind == "process" or not stage.cpu_seconds:  # in another process
        return f"; raise {knob}, if there are cores for it"
    computing = stage.cpu_seconds / stage.busy_seconds
    return f", {computing:.0%} of it computing, the rest waiting: raise {knob}"
