"""From a plan to the nodes that run it. Pure: starts nothing, calls no user code, changes no user object."""

from collections.abc import Callable

from aioloader.core.memory import Alloc
from aioloader.core.mix_control import Mixes
from aioloader.device import Transfer
from aioloader.engine.window import Window
from aioloader.executors.processes.worker_thread import WorkerThread
from aioloader.plan.admission import admission_of
from aioloader.plan.builder import NO_DRAWS, PlanBuilder, output_of
from aioloader.plan.plan import Plan, with_ranks
from aioloader.sources.sampler_order import Draws
from aioloader.stages.base import Pass

__all__ = ["build"]


def build(
    plan: Plan,
    this_pass: Pass,
    transfer: Transfer | None = None,
    alloc: Alloc | None = None,
    processes: Callable[[], WorkerThread] = WorkerThread,
    *,
    draws: Draws = NO_DRAWS,
    mixes: Mixes | None = None,
) -> Window:
    """The nodes of one epoch; the last is always a window, which holds what is made ahead.

    Args:
        plan: What to run.
        this_pass: Which epoch, for seeds.
        transfer: The loader's way to its device, when `plan` ends in `to` or `pin_memory` and there is such a device.
        alloc: Where the default collate puts batches; None: into fresh memory.
        processes: Gives the loader's worker processes; called when something runs there.
        draws: What samplers draw their order from.
        mixes: The weights of sources that are mixed by names; None: those of the plan.
    """
    plan = with_ranks(plan)
    admission = admission_of(plan)
    builder = PlanBuilder(
        plan,
        this_pass,
        transfer,
        alloc,
        processes,
        draws=draws,
        admission=admission,
        mixes=Mixes({}) if mixes is None else mixes,
    )
    window = output_of(builder)
    window.beginnings = builder.beginnings
    if builder.rule is not None:
        window.rule = builder.rule
    if admission is not None:
        admission.output = window
    return window
