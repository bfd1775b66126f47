"""How statistics come to the steps of a window: each meter knows whom to ask."""

from collections.abc import Callable, Sequence

from aioloader.engine.steps import Step
from aioloader.insight.gauges import WaitMeter

__all__ = ["let_stamp", "show"]


def show(parts: Sequence[Step], *, queued: Callable[[], int] | None) -> WaitMeter | None:
    """Let the meters of a window that starts ask its steps.

    Args:
        parts: Those of its steps that have meters.
        queued: See `Window`.

    Returns:
        Where the window counts how long its entries wait; None: it has no steps. In a later round of a `repeat` it is
        that of the rounds before.
    """
    if not parts:
        return None
    waits = next((step.meter.waits for step in parts if step.meter.waits is not None), None) or WaitMeter()
    for step in parts:
        step.meter.gauge = step
        step.meter.waits = waits
        step.meter.queued = queued
        if step.meter.policies is not None:
            step.meter.policies.waiting = step.waiting
    return waits


def let_stamp(steps: Sequence[Step], *, fresh: bool) -> None:
    """Say which steps of a window are the first to be called with an entry.

    It is the first step; or one after a cache, which has the steps that it spares inside.

    Args:
        steps: Those of the window.
        fresh: No call has begun for any of its entries.
    """
    for step in steps:
        for part in step.parts:
            part.stamps = True
        if step.concurrency:
            step.fresh = fresh
            break
