"""How statistics come to the steps of a window: each meter knows whom to ask."""

from collections.abc import Callable, Sequence

from aioloader.engine.steps import Step
from aioloader.insight.gauges import WaitMeter

__all__ = ["show"]


def show(
    steps: Sequence[Step], parts: Sequence[Step], *, stamps: bool, queued: Callable[[], int] | None
) -> WaitMeter | None:
    """Let the meters of a window that starts ask its steps.

    Args:
        steps: Those of the window.
        parts: Those of them that have meters.
        stamps: The first call for an entry may be one of theirs.
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
    if stamps:
        _let_stamp(steps)
    return waits


def _let_stamp(steps: Sequence[Step]) -> None:
    """The first call is that of the first step; or of one after a cache, which has the steps that it spares inside."""
    for step in steps:
        for part in step.parts:
            part.stamps = True
        if step.concurrency:
            break
