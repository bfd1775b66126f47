"""One sentence on what limits a loader, derived from its statistics."""

from typing import Final

from aioloader.core.cores import usable_cores
from aioloader.insight.explain_in_ray import limit_of_actors
from aioloader.insight.explain_policies import (
    rate_that_limits,
    retries_that_hold_up,
    said_of_calls,
    way_out_of_rate,
    way_out_of_waits,
)
from aioloader.insight.explain_ray_map import actors_advice, way_is_limit, words_of_way
from aioloader.insight.now import now, stands_still
from aioloader.insight.stats import StageStats, Stats
from aioloader.insight.units import duration

__all__ = ["explain"]

KEEPS_UP: Final = 0.05  # a consumer that waits for less than this fraction of its time is not limited by the loader
SATURATED: Final = 0.7  # a stage busier than this has no free place when a sample comes
COMPUTING: Final = 0.8  # threads that use this much of one core, or of all cores, are limited by the GIL, or the cores
LOOP_SATURATED: Final = 0.8  # an event loop busier than this delays everything on it
HELD: Final = 0.15  # a window with more finished samples than this waits for a slower one, or is not emptied
IDLE: Final = 0.5  # a stage that is idle for less than this has some samples under way all the time
ONE_AT_A_TIME: Final = (0.7, 1.15)  # of the time: the range in which concurrent calls add up to one place
ONE_BY_ONE_SECONDS: Final = 1e-3  # cheaper calls of sync functions run, and finish, in chunks
NOTICEABLE: Final = 0.01  # errors that are left out, as a share of what came
SHORT_SECONDS: Final = 3.0  # in a shorter epoch, start and end have an influence
STARVED: Final = 0.8  # a consumer that waits for more of its time is short of samples, not waiting for bursts


def explain(stats: Stats, knob: str = "its concurrency") -> str:
    """Say what limits the loader (the consumer, the event loop, the cores, or a stage), and what to do about it.

    Before the second batch, and when the consumer has been waiting for long, averages say nothing: then what is under
    way now, and since when.

    Args:
        stats: Of one epoch.
        knob: What the loader calls the number of its threads: `num_workers` in the drop-in.
    """
    if (stats.batches < 2 or stands_still(stats)) and (sentence := now(stats)) is not None:
        return sentence
    sentence, limit = _limit(stats, knob)
    calls = "" if limit is None else said_of_calls(limit, drop_in=_is_drop_in(knob))
    return sentence + calls + "".join(map(_left_out, stats.stages))


def _left_out(stage: StageStats) -> str:
    """A sentence more, if a stage has left out a noticeable share."""
    came = stage.samples + stage.skipped
    if not stage.skipped or stage.skipped < NOTICEABLE * came:
        return ""
    return f" {stage.name} has left out {stage.skipped} of {came} ({stage.skipped / came:.1%}), since they failed."


def _limit(stats: Stats, knob: str) -> tuple[str, StageStats | None]:
    """What the limit is, and the stage whose calls are to be looked at more closely; None: nobody's."""
    if stats.batches < 2:
        return f"Nothing to explain yet: {stats.batches} batches were handed out; ask again after a few.", None
    waited = f"the consumer waited {stats.waited_fraction:.0%} of its time for batches"
    numbers = f"({stats.batches} batches in {stats.seconds:.2f} s, the first after {stats.first_batch_seconds:.3f} s)"
    if stats.waited_fraction < KEEPS_UP:
        return f"The loader keeps up: {waited}; the consumer is the limit {numbers}.", None
    blocking = next((stage for stage in stats.stages if _blocks_loop(stage, stats)), None)
    if stats.loop_cpu_fraction >= LOOP_SATURATED:
        whose = "async functions" if blocking is None else f"async {blocking.name}"
        return (
            f"The event loop is the limit: {waited}; the loop's thread computes {stats.loop_cpu_fraction:.0%} of the "
            f"time; move computing out of {whose} into sync ones (def), which run in threads {numbers}."
        ), None
    if (words := limit_of_actors(stats, waited)) is not None:
        return f"{words} {numbers}.", None
    if (throttled := rate_that_limits(stats.stages, stats.seconds)) is not None:
        way_out = way_out_of_rate(throttled, stats.seconds)
        return f"The rate of {throttled.name} is the limit: {waited}; {way_out} {numbers}.", throttled
    busiest = max(
        (stage for stage in stats.stages if stage.concurrency and stage.samples and not stage.live),
        key=lambda stage: stage.utilization,
        default=None,
    )
    idle = next((stage for stage in stats.stages if stage.live and stage.utilization >= SATURATED), None)
    if idle is not None and (busiest is None or busiest.utilization < SATURATED):
        return (
            f"The source is idle {idle.utilization:.0%} of the time: {waited}; samples come more slowly than they are "
            f"used, and nothing in the loader is the limit {numbers}."
        ), None
    if busiest is None:
        return f"No stage has done anything measurable, though {waited} {numbers}.", None
    sentence, limit = _limiting_stage(stats, knob, busiest, blocking, waited)
    return f"{sentence} {numbers}.", limit


def _limiting_stage(
    stats: Stats, knob: str, busiest: StageStats, blocking: StageStats | None, waited: str
) -> tuple[str, StageStats]:
    threads = [stage for stage in stats.stages if stage.kind not in ("process", "ray")]  # these have their own GILs
    computing = sum(stage.cpu_seconds for stage in threads) / stats.seconds
    if computing >= COMPUTING:
        most = max(threads, key=lambda stage: stage.cpu_seconds)
        return (
            f"{most.name} is the limit: {waited}; the loader's threads compute, {computing:.1f} cores' worth of the "
            f"{usable_cores()} there are: {_cores_advice(most, computing, knob)}"
        ), most
    if busiest.utilization >= SATURATED:
        return f"{busiest.name} is the limit: {waited}; it was {_use(busiest)}{_advice(busiest, knob)}", busiest
    if blocking is not None:
        return (
            f"{blocking.name} blocks the event loop: {waited}; it was {_use(blocking)}, one after the other as if it "
            f"had one place: an async function that never awaits while it works or waits (time.sleep, a sync client) "
            f"stops all others; make it sync (def), then it runs in threads"
        ), blocking
    if (failing := retries_that_hold_up(stats.stages, stats.seconds)) is not None:
        return (
            f"{failing.name} is held up by samples that wait for their next attempts: {waited}; "
            f"{way_out_of_waits(failing, drop_in=_is_drop_in(knob))}"
        ), failing
    if (held_up := next((stage for stage in stats.stages if _held_up(stage, stats)), None)) is not None:
        return (
            f"{held_up.name} is held up by slow samples: {waited}; it was {_use(held_up)}, while "
            f"{held_up.finished_slots:.0f} finished samples on average, of the {held_up.room} it has room for, waited "
            f"for a slower one before them: {_order_advice(held_up, knob)}"
        ), held_up
    if way_is_limit(busiest, stats.seconds):
        return f"{words_of_way(busiest, stats.seconds)}; {waited}", busiest
    return (
        f"No stage is busy all the time, though {waited}: {busiest.name}, the busiest, was {_use(busiest)}; "
        f"{_no_limit_advice(stats, busiest, knob)}"
    ), busiest


def _blocks_loop(stage: StageStats, stats: Stats) -> bool:
    """Whether its async calls run one at a time, though there are samples and places for more.

    While code blocks the loop, nobody can take samples, so the window fills with finished ones.
    """
    least, most = ONE_AT_A_TIME
    return (
        stage.kind == "async"
        and stage.concurrency > 1
        and _is_full(stage, stats)
        and least <= stage.busy_seconds / stats.seconds <= most
    )


def _held_up(stage: StageStats, stats: Stats) -> bool:
    """Whether its finished samples wait for a slower one: few are under way, but always some."""
    return (
        stage.ordered
        and stage.concurrency > 1
        and _is_full(stage, stats)
        and stage.busy_seconds >= max(IDLE * stats.seconds, ONE_BY_ONE_SECONDS * stage.samples)
    )


def _is_full(stage: StageStats, stats: Stats) -> bool:
    """Whether its window holds many finished samples, although the stage is not idle.

    One finished sample is always there when samples are taken, and is not counted.
    """
    idle = stage.waiting_for_input_seconds + stage.waiting_for_room_seconds
    return stage.finished_slots - 1 >= HELD * stage.room > 0 and idle < IDLE * stats.seconds


def _use(stage: StageStats) -> str:
    each = stage.busy_seconds / stage.samples
    places = f" in its {stage.concurrency} places" if stage.concurrency > 1 else ""
    return f"busy {stage.utilization:.0%} of the time{places}, {duration(each)} each"


def _is_drop_in(knob: str) -> bool:
    return knob == "num_workers"


def _has_concurrency(stage: StageStats) -> bool:
    """Whether a pipeline's stage has this argument: `map`, alone or in one hop with others, and `Objects`."""
    return any(part.startswith("map(") or part.endswith(".fetch") for part in stage.name.split(" + "))


def _is_copy(stage: StageStats) -> bool:
    return stage.name == "pin_memory()" or stage.name.startswith("to(")


def _into_map(stage: StageStats, how: str) -> str:
    """What to do about a stage without `concurrency`."""
    if stage.name.startswith("collate"):
        return f"batch() has no concurrency: use batch(..., collate_fn=list).map(collate, {how})"
    return f"it has no concurrency: do its work in map(fn, {how}) before it"


def _cores_advice(stage: StageStats, computing: float, knob: str) -> str:
    if computing >= COMPUTING * usable_cores():
        return "more cores help, more threads do not"
    words = "Python code holds the GIL, and more threads do not help; worker processes may: "
    if _is_drop_in(knob):
        return f'{words}worker_type="process"'
    if _has_concurrency(stage):
        return f'{words}executor="process"'
    return f'{words}in_process() for all, or map(fn, executor="process")'


def _order_advice(stage: StageStats, knob: str) -> str:
    timeout = _timeout_advice(stage, knob)
    if _is_drop_in(knob):
        # Samples of an async `__getitem__` are batched in their order, even with in_order=False.
        return timeout if stage.name == "dataset[...]" else f"pass in_order=False, or {timeout}"
    return f"pass ordered=False, or {timeout}" if stage.name.startswith("map(") else timeout


def _timeout_advice(stage: StageStats, knob: str) -> str:
    """What a stage can do about calls that take long."""
    policies = stage.policies
    if policies is not None and policies.timeout is not None:
        limit = f"{'sample_timeout' if _is_drop_in(knob) else 'timeout'}={policies.timeout:g}"
        return f"lower {limit}" if policies.hedge_budget is not None else f"lower {limit} or pass hedge=Hedge(...)"
    if _is_drop_in(knob):
        asynchronous = stage.kind == "async" and stage.name == "dataset[...]"
        return "pass sample_timeout or hedge" if asynchronous else "give each call a timeout in the function"
    if stage.kind == "async" and stage.name.startswith("map("):
        return "pass timeout=... or hedge=Hedge(...)"
    return "give each call a timeout in the function"


def _no_limit_advice(stats: Stats, busiest: StageStats, knob: str) -> str:
    ways = []
    if stats.seconds < SHORT_SECONDS:
        ways.append("the epoch is short, so that its beginning and end count")
    if stats.waited_fraction < STARVED:
        ways.append("work comes in bursts, which a larger prefetch evens out")
    if not ways:
        slow = ""
        if busiest.ordered and busiest.kind != "source" and busiest.concurrency > 1:
            slow = f" (then {_order_advice(busiest, knob)})"
        return f"samples take very different times{slow}, or come in bursts: stats() says which stage waits for input"
    return ", or ".join(ways)


def _advice(stage: StageStats, knob: str) -> str:
    if stage.kind == "source":
        return "; one task reads it: move work from it into map(fn, concurrency=...)"
    if _is_copy(stage):
        return "; no setting makes copies faster: move fewer bytes, for instance uint8 instead of float32"
    if not _is_drop_in(knob) and not _has_concurrency(stage):
        return f"; {_into_map(stage, 'concurrency=...')}"
    if stage.kind == "async":
        limit = knob if stage.name.startswith("collate") else "its concurrency"
        return (
            f"; if its server and network can bear more, raise {limit}, or look for a limit in your client (its "
            f"connections, a semaphore) or for code that blocks"
        )
    if stage.kind == "ray":
        return actors_advice(stage, knob)
    if stage.kind == "process" or not stage.cpu_seconds:  # it runs in another process
        return f"; raise {knob}, if there are cores for it"
    computing = stage.cpu_seconds / stage.busy_seconds
    return f", {computing:.0%} of it computing, the rest waiting: raise {knob}"
