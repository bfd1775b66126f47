"""What cannot leave this process with the stages before `in_process` or `in_ray`. Pure."""

from aioloader.plan.parts import limits_of, rates_of, samplers_of, streams_of
from aioloader.plan.plan import Plan
from aioloader.sources.resolve import describe
from aioloader.sources.sampler_order import draws_globally, generators_of

__all__ = ["check_may_leave"]


def check_may_leave(plan: Plan, stage: str, where: str) -> None:
    """Refuse a plan with something in it that is at work here, or that others here share.

    Args:
        plan: What is before the stage.
        stage: It, as it is called: `in_ray()`.
        where: Where that runs: `another process`.

    Raises:
        ValueError: What that is, and the way out.
    """
    for stream in streams_of(plan):
        if stream.single_use:
            raise ValueError(
                f"{stage} sends its source to {where}, but {describe(stream.make)} is at work here; pass the generator "
                f"function itself (without calling it)"
            )
    for label, limit in limits_of(plan):
        raise ValueError(
            f"{stage} sends {label} to {where}, which cannot share its {limit!r} with this one; pass "
            f"concurrency={limit.value}, or put that stage after {stage}"
        )
    for label, rate in rates_of(plan):
        raise ValueError(
            f"{stage} sends {label} to {where}, which cannot share its {rate!r} with this one; put that stage after "
            f"{stage}, or leave the rate out"
        )
    for sampler in samplers_of(plan):
        if draws_globally(sampler) or generators_of(sampler):
            raise ValueError(
                f"{stage} leaves this process's random generators behind, but {describe(sampler)} draws from one; use "
                f"shuffle(seed=...) instead of it"
            )
