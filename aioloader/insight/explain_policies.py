"""What `explain` says of retries, timeouts, second calls and rates, when they are what limits."""

from typing import Final

from aioloader.insight.policies import PolicyStats
from aioloader.insight.stats import StageStats
from aioloader.insight.units import duration

__all__ = [
    "per_second",
    "rate_that_limits",
    "retries_that_hold_up",
    "said_of_calls",
    "way_out_of_rate",
    "way_out_of_waits",
]

THROTTLED: Final = 0.5  # of the time: calls that wait longer for their rate are limited by it
NOTICEABLE: Final = 0.01  # of the calls of a stage
HELD: Final = 0.15  # of a window, that waits for next attempts, or for those that do
WAITING: Final = 0.5  # samples that wait for their next attempt, on average
SATURATED: Final = 0.7  # of the places of a stage: retries take some that others need
MANY: Final = 0.1  # of the calls, or of the time
TIGHT: Final = 3.0  # a time limit of less than so many average calls cuts off some that are no worse than slow


def rate_that_limits(stages: tuple[StageStats, ...], seconds: float) -> StageStats | None:
    """The stage whose calls have waited for its rate for most of the time; None: there is none."""
    throttled = max(stages, key=_rate_wait_seconds, default=None)
    return throttled if throttled is not None and _rate_wait_seconds(throttled) >= THROTTLED * seconds > 0 else None


def way_out_of_rate(stage: StageStats, seconds: float) -> str:
    """What the rate of a stage has done, and what to do about it."""
    policies = stage.policies or PolicyStats()
    share = min(1.0, policies.rate_wait_seconds / seconds)
    waited = f"{share:.0%} of the time calls waited for their turn, at {per_second(policies)}"
    match policies.rate_bound:
        case "given":
            return f"{waited}: raise per_second of its Rate, if its server can bear more"
        case "most":
            return f"{waited}, the most that its adaptive Rate may be: raise most, if its server can bear more"
        case "growth":
            return f"{waited}, for its adaptive Rate is still growing: raise start"
        case "refusals":
            return f"{waited}: its adaptive Rate found that the server allows no more"


def retries_that_hold_up(stages: tuple[StageStats, ...], seconds: float) -> StageStats | None:
    """The stage whose window is held up by samples that wait for their next attempts; None: there is none."""
    for stage in stages:
        waiting = 0.0 if stage.policies is None else stage.policies.retry_wait_seconds / seconds
        behind = max(0.0, stage.finished_slots - 1) if stage.ordered else 0.0
        if waiting >= WAITING and waiting + behind >= HELD * stage.room > 0:
            return stage
    return None


def way_out_of_waits(stage: StageStats, *, drop_in: bool) -> str:
    """What to do about samples that wait for their next attempts; for `drop_in` see `said_of_calls`."""
    policies = stage.policies or PolicyStats()
    if 2 * policies.asked_waits > stage.retries:
        return "the server asks for waits that long (Retry-After): pass rate=Rate(...), so that it refuses fewer calls"
    order = ""
    if not drop_in and stage.ordered and stage.name.startswith("map("):  # a `DataLoader` batches them in their order
        order = ", or pass ordered=False"
    return (
        f"lower the waits of its Retry (wait_initial={policies.wait_initial or 0.0:g}, wait_max="
        f"{policies.wait_max or 0.0:g}, jitter={policies.jitter or 0.0:g}){order}"
    )


def said_of_calls(stage: StageStats, *, drop_in: bool) -> str:
    """Sentences more about the stage that limits: what of its time or places its policies take.

    Args:
        stage: It.
        drop_in: It is one of a `DataLoader`, whose arguments have other names.
    """
    calls = max(1, stage.samples + stage.retries)
    said = [_retried(stage, calls), _refused(stage, calls), _cut_off(stage, calls, drop_in=drop_in)]
    said.append(_second_calls(stage, calls))
    return "".join(f" {sentence}." for sentence in said if sentence)


def _retried(stage: StageStats, calls: int) -> str:
    if stage.retries < NOTICEABLE * calls:
        return ""
    said = f"{stage.retries / calls:.0%} of the calls of {stage.name} were retries"
    after = "" if stage.policies is None else stage.policies.retried_after
    if after:
        said += f", mostly after {after}"
    if wait := _wait(stage):
        said += f"; a sample waited {_brief(wait)} for its next attempt, on average"
    if stage.utilization >= SATURATED and after != "TimeoutError":  # of which `_cut_off` speaks
        said += "; if they fail because the server is asked too much, a rate or less concurrency helps"
    return said


def _refused(stage: StageStats, calls: int) -> str:
    policies = stage.policies
    if policies is None or policies.refused_retries < NOTICEABLE * calls or policies.retry_budget is None:
        return ""
    return (
        f"{policies.refused_retries:,} of its errors were final only because the retries are at their "
        f"budget={policies.retry_budget:g} of all calls"
    )


def _cut_off(stage: StageStats, calls: int, *, drop_in: bool) -> str:
    policies = stage.policies
    if policies is None or policies.timeout is None or stage.timeouts < NOTICEABLE * calls:
        return ""
    word, limit = "sample_timeout" if drop_in else "timeout", policies.timeout
    lost = min(stage.timeouts * limit, stage.busy_seconds)
    others = (stage.busy_seconds - lost) / max(1, calls - stage.timeouts)
    share = lost / stage.busy_seconds if stage.busy_seconds else 0.0
    advice = (
        f"raise {word}, or ask less of the server at once"
        if limit < TIGHT * others
        else f"a lower {word} would free their places sooner"
    )
    return (
        f"{word}={limit:g} cut off {stage.timeouts / calls:.0%} of the calls, which took {share:.0%} of the time of "
        f"all; the others took {_brief(others)} on average: {advice}"
    )


def _second_calls(stage: StageStats, calls: int) -> str:
    policies = stage.policies
    if policies is None or policies.hedge_budget is None:
        return ""
    if policies.refused_hedges >= NOTICEABLE * calls:
        after = "" if policies.hedge_after is None else f" ({_brief(policies.hedge_after)})"
        return (
            f"{policies.refused_hedges:,} calls that took more than twice as long as after{after} of its Hedge had no "
            f"second one, since budget={policies.hedge_budget:g} of all calls is used up: raise it, if its server can "
            f"bear more"
        )
    if stage.hedges >= MANY * calls:
        return (
            f"{stage.hedges / calls:.0%} as many calls again are second ones, which take its places, too: hedge later, "
            f"or lower budget={policies.hedge_budget:g} of its Hedge"
        )
    return ""


def _wait(stage: StageStats) -> float:
    """Seconds that a sample waited for its next attempt, on average."""
    policies = stage.policies
    return (
        0.0 if policies is None else policies.retry_wait_seconds / max(1, stage.retries - policies.waiting_for_attempt)
    )


def _brief(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 9.95 else duration(seconds)


def per_second(policies: PolicyStats) -> str:
    """The rate of a stage."""
    rate = policies.per_second or 0.0
    return f"{rate:,.0f} a second" if rate >= 10 else f"{rate:.2g} a second"


def _rate_wait_seconds(stage: StageStats) -> float:
    return 0.0 if stage.policies is None else stage.policies.rate_wait_seconds
