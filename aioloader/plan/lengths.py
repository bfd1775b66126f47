"""How many batches an epoch has, and how many samples a batch: as far as it is known, or somebody said it. Pure."""

from contextlib import suppress
from dataclasses import replace

from aioloader.plan.parts import is_indexable, keeping_last, sampled_of
from aioloader.plan.plan import Combined, Plan, flow_of, flows_of, length_of

__all__ = ["batch_size_of", "sure_length", "with_told_length"]


def sure_length(plan: Plan, *, resumed: bool) -> int | None:
    """Batches of an epoch, where they can be counted or the user has said it; None: only its end tells.

    Args:
        plan: A pipeline.
        resumed: The epoch is resumed in its middle: it has more batches if samples may come again.
    """
    if (sampled := sampled_of(plan)) is not None:
        return sampled.batches
    told = plan.told_length is not None
    if not (told or is_indexable(plan)) or (resumed and flow_of(plan).guarantee == "at-least-once"):
        return None
    try:
        length = length_of(plan)
        # A short last batch in which a sample failed is not dropped: its error is one more.
        return length if told or (whole := keeping_last(plan)) is plan or length == length_of(whole) else None
    except TypeError:
        return None


def with_told_length(plan: Plan, n: int) -> Plan:
    """`plan`, of which the user says that an epoch has `n` batches (samples, without `batch`).

    Raises:
        ValueError: It is known to have another number.
    """
    known = None
    with suppress(TypeError, ValueError):  # not known, or a rank that is none yet
        known = length_of(replace(plan, told_length=None)) if is_indexable(plan) else None
    if known not in (None, n):
        raise ValueError(
            f"with_length says how many batches (without batch: samples) come where nobody can count, got {n=} for a "
            f"pipeline that gives {known}; leave it out, or use take({n}) or repeat()"
        )
    return replace(plan, told_length=(n, len(plan.stages)))


def batch_size_of(plan: Plan) -> int | None:
    """Samples in a batch, a short last one aside; None: they are not batched, or not by a fixed number."""
    if not isinstance(plan.source, Combined):
        return flow_of(plan).batch_size
    sizes = {batch_size_of(inner) for inner in plan.source.plans}
    flow = replace(flows_of(plan)[0], batch_size=sizes.pop() if len(sizes) == 1 else None)
    for stage in plan.stages:
        flow = stage.flow(flow)
    return flow.batch_size
