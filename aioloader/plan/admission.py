"""Where `max_staleness` can hold, and for how many samples."""

from math import prod

from aioloader.engine.admission import ConsumerAdmission
from aioloader.plan.plan import Combined, Plan, flows_of, walk
from aioloader.sources.resolve import Indexable
from aioloader.stages.base import Stage

__all__ = ["admission_of", "check_admission"]


def admission_of(plan: Plan) -> ConsumerAdmission | None:
    """Who decides when samples of `plan` may begin; None: nobody but the rooms."""
    return None if plan.staleness is None else ConsumerAdmission(plan.staleness, size_of_entries(plan))


def size_of_entries(plan: Plan) -> int:
    """For how many of the samples that begin an entry stands that `plan` gives."""
    return prod(stage.gathers for stage in plan.stages[_first(plan) + 1 :])


def check_admission(plan: Plan) -> None:
    """Refuse `max_staleness` where the consumer cannot decide when samples begin.

    Raises:
        ValueError: Why.
    """
    if plan.staleness is None:
        return
    what = f"max_staleness({plan.staleness})"
    if isinstance(plan.source, Combined) and any(map(_works, (inner for inner in walk(plan) if inner is not plan))):
        raise ValueError(
            f"{what} decides when samples begin in the order of their batches, and a source that is not next could "
            f"take the places of the one that is; put map() and filter() after Pipeline.{plan.source.how}(...)"
        )
    first = _first(plan)
    after = plan.stages[first + 1 :]
    if not _loads(plan) and first < 0:
        raise ValueError(
            f"{what} decides when map() may begin, and there is none before batch(): leave it out, or add one"
        )
    if not any(stage.batches for stage in after):
        raise ValueError(
            f"{what} counts batches: it must come after map() and batch(), for instance map(f).batch(8).{what}"
        )
    flows = flows_of(plan)[first + 1 :]
    for stage, flow in zip(after, flows, strict=False):
        if not (stage.passes or (stage.reorders and flow.by_key)):
            raise ValueError(
                f"{what} cannot hold with {stage.label} after the first map(): it waits for more samples than may "
                f"begin, or makes others of them; put it before map(), or leave {what} out"
            )


def _first(plan: Plan) -> int:
    """The index of the stage in which samples begin; -1: the source loads them, or there is none."""
    if _loads(plan):
        return -1
    return next((at for at, stage in enumerate(plan.stages) if _begins(stage)), -1)


def _works(plan: Plan) -> bool:
    return _loads(plan) or any(map(_begins, plan.stages))


def _begins(stage: Stage) -> bool:
    return stage.makes_anew or stage.only_selects


def _loads(plan: Plan) -> bool:
    source = plan.source
    return not isinstance(source, Combined) and isinstance(source.data, Indexable) and source.data.load is not None
