"""What cannot leave this process with the stages before `in_process` or `in_ray`. Pure."""

from aioloader.plan.parts import limits_of, rates_of, samplers_of, streams_of
from aioloader.plan.plan import Combined, Plan, walk
from aioloader.sources.resolve import describe
from aioloader.sources.sampler_order import draws_globally, generators_of

__all__ = ["check_may_leave", "sends_what_it_collates"]


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


def sends_what_it_collates(plan: Plan) -> bool:
    """Whether the batches of the default collate are sent as they are: then they may be made in shared memory.

    No function sees them there, which might fork: what its child and the consumer write to, they would share.
    """
    inner = plan.source.plans if isinstance(plan.source, Combined) else ()
    if not plan.stages:
        return bool(inner) and all(map(sends_what_it_collates, inner))
    *before, last = plan.stages
    others = [stage for one in inner for part in walk(one) for stage in part.stages]
    return last.batches and not any(stage.batches for stage in (*before, *others))
