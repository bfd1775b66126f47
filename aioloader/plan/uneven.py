"""Stages that leave ranks with different numbers of batches. Pure."""

from aioloader.plan.plan import Combined, Plan
from aioloader.stages.shard import UNCOUNTED, Shard

__all__ = ["uneven_stage"]


def uneven_stage(plan: Plan) -> str:
    """Why ranks may get different numbers of batches out of as many samples; empty: they do not."""
    _, label = _look(plan)
    if not label:
        return ""
    return (
        f"{label} after shard() gives each rank as many samples as it turns out to: where ranks get different numbers "
        f"of batches, DistributedDataParallel waits for ever. Put shard() after it, or take(n) after it, or pass "
        f"even='agree' and a gloo group to shard(), or train with torch's Join. Where it is meant, ignore "
        f"aioloader.UnevenWarning"
    )


def _look(plan: Plan) -> tuple[bool, str]:
    """Whether samples were dealt to ranks, and the stage after that which makes their numbers differ."""
    dealt, label = False, ""
    if isinstance(plan.source, Combined):
        inner = [_look(each) for each in plan.source.plans]
        dealt, label = any(each[0] for each in inner), next((each[1] for each in inner if each[1]), "")
    for stage in plan.stages:
        if isinstance(stage, Shard):
            # who has said "keep" knows, and with "agree" all end together
            dealt, label = stage.even not in UNCOUNTED, ""
        elif stage.evenness == "given":
            label = ""
        elif dealt and not label and stage.evenness == "lost":
            label = stage.label
    return dealt, label
