"""Where `drop_if(requeue=True)` can begin samples again."""

from itertools import takewhile

from aioloader.plan.plan import Plan

__all__ = ["check_requeue"]


def check_requeue(plan: Plan) -> None:
    """Refuse a place after `plan` where a sample could not be made anew.

    Raises:
        ValueError: Why.
    """
    steps = list(takewhile(lambda stage: stage.makes_anew or stage.only_selects, reversed(plan.stages)))
    if not any(step.makes_anew for step in steps):
        last = f"{plan.stages[-1].label} is" if plan.stages else "the source is"
        raise ValueError(
            f"drop_if(requeue=True) begins samples again, so it must come right after map(), with nothing but filter() "
            f"in between, but {last} before it; put it after the map that makes the samples, or leave requeue out"
        )
    if any(step.logs_order for step in steps):
        raise ValueError(
            "drop_if(requeue=True) sends samples back, which has no place in an order that is recorded or replayed; "
            "leave record_order and replay_order out"
        )
