"""Stages that leave ranks with different numbers of batches. Pure."""

from aioloader.plan.plan import Plan, walk
from aioloader.stages.base import Stage, UnknownLengthError
from aioloader.stages.select import Take
from aioloader.stages.shard import Shard
from aioloader.stages.skip_errors import SkipErrors

__all__ = ["uneven_stage"]


def uneven_stage(plan: Plan) -> str:
    """Why ranks may get different numbers of batches out of as many samples; empty: they do not."""
    for part in walk(plan):
        dealt = max((at for at, stage in enumerate(part.stages) if isinstance(stage, Shard)), default=None)
        if dealt is None:
            continue
        after = part.stages[dealt + 1 :]
        if any(isinstance(stage, Take) or (stage.encloses and not _counted(stage)) for stage in after):
            continue  # so many, or without end
        for stage in after:
            if not (_counted(stage) or isinstance(stage, SkipErrors)):  # which is for what should not happen
                return (
                    f"{stage.label} after shard() gives each rank as many samples as it turns out to: where ranks get "
                    f"different numbers of batches, DistributedDataParallel waits for ever. Put shard() after it, or "
                    f"take(n) after it, or train with torch's Join. Where it is meant, ignore aioloader.UnevenWarning"
                )
    return ""


def _counted(stage: Stage) -> bool:
    """Whether it is known how many entries it gives of so many."""
    try:
        stage.length(1)
    except UnknownLengthError:
        return False
    return True
