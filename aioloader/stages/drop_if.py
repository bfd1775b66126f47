"""`drop_if`: what has become worthless while it waited is left out when its turn comes."""

import threading
from collections.abc import Callable
from contextvars import copy_context
from dataclasses import dataclass, replace
from typing import Any

from aioloader.core.checks import callable_name
from aioloader.engine.again import AgainWindow, CheckWindow
from aioloader.engine.completion_order import CompletionOrder
from aioloader.engine.fuse import FusedOps, exactly
from aioloader.engine.op_steps import steps_of
from aioloader.engine.ops import Op
from aioloader.engine.steps import Step
from aioloader.engine.window import Window
from aioloader.insight.meters import StageMeter
from aioloader.stages.base import Builder, Stage, UnknownLengthError
from aioloader.stages.flow import Flow, Shared
from aioloader.stages.group import Group

__all__ = ["DropIf", "FreshGroup"]


@dataclass(frozen=True)
class DropIf(Stage):
    """Leaves out the samples for which `fn` is true at the moment when the next stage takes them.

    So it cannot be a step of the journeys before it: it has a window of its own, without room, in which nothing is
    begun before it is asked for. The predicate runs in a thread, like all sync functions of the user.

    What takes them may be a map: it begins samples ahead, and what it has made of them `fn` never sees. Samples that
    were taken for a batch wait there until it is full, so right after `drop_if` (or with nothing but `filter` and
    other `drop_if` in between) a batch is looked through once more before it is collated (`FreshGroup`).

    Args:
        fn: The user's predicate.
        requeue: What it refuses is begun again, see `engine/again.py`. It is not looked at once more before collate: by
            then it has been delivered, and could not come back.
    """

    fn: Callable[[Any], Any]
    requeue: bool = False

    exact_in_any_order = True
    passes = True
    here_only = True

    @property
    def functions(self) -> tuple[Any, ...]:  # type: ignore[override]  # a plain attribute where there are none
        return (self.fn,)

    @property
    def label(self) -> str:
        return f"drop_if({callable_name(self.fn)}{', requeue=True' if self.requeue else ''})"

    def length(self, upstream: int) -> int:
        if self.requeue:
            return upstream
        raise UnknownLengthError(f"{self.label} keeps as many samples as it turns out to")

    def shape(self) -> dict[str, Any]:
        return {"stage": "drop_if", "name": callable_name(self.fn)}

    def flow(self, before: Flow) -> Flow:
        after = before.limited(Shared.SAME_RANK, self.label).closed()
        return replace(after, timed=after.timed or self.label, rank_order=after.rank_order or self.label)

    def build(self, builder: Builder) -> None:
        """A window that begins what it is asked for, over one that holds what is made ahead."""
        checks = builder.fused.checks
        if self.requeue:
            self._build_again(builder)
            builder.fused = FusedOps(checks=checks)
            return
        if builder.fused.ops:
            node = builder.close(room=builder.prefetch if builder.fused.batches else None)
        elif builder.following:
            node = builder.close()
        else:
            node = builder.admitting(Window(builder.close(), (), room=exactly(builder.prefetch)))
        (step,) = self._steps(builder)
        builder.node = builder.admitting(Window(node, [step], room=None))
        again = Op(FreshGroup(self.fn, lambda: step.meter), self.label, predicate=True, flexible=True)
        builder.fused = FusedOps(checks=[*checks, again])

    def _steps(self, builder: Builder) -> list[Step]:
        check = Op(_Unless(self.fn), self.label, predicate=True, flexible=True)
        return steps_of([check], None, builder.processes)

    def _build_again(self, builder: Builder) -> None:
        room = max(1, builder.prefetch) if builder.fused.batches else None
        before = builder.close(room=room, again=True)
        assert isinstance(before, AgainWindow)
        numbering = before.numbering
        completion = None if numbering is None else CompletionOrder(numbering, numbers=False)
        window = CheckWindow(before, self._steps(builder), room=None, ordered=before.ordered, completion=completion)
        before.check = window
        builder.node = builder.admitting(window)


@dataclass(frozen=True)
class _Unless:
    fn: Callable[[Any], Any]

    def __call__(self, sample: Any) -> bool:
        return not self.fn(sample)


class FreshGroup:
    """A predicate of groups in collate's threads: takes out what is worthless by now, false when nothing is left.

    Args:
        fn: The user's predicate of samples.
        meter: Gives the meter that counts them.
    """

    def __init__(self, fn: Callable[[Any], Any], meter: Callable[[], StageMeter]) -> None:
        self._fn = fn
        self._meter = meter
        self._lock = threading.Lock()

    def __call__(self, group: Group) -> bool:
        stale = [bool(copy_context().run(self._fn, sample)) for sample in group.samples]
        if any(stale):
            with self._lock:
                self._meter().dropped_late += sum(stale)
            group.leave_out(stale)
        return bool(group.samples)
