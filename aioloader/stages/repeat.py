"""`repeat`: all that is before it, again and again."""

from dataclasses import dataclass
from typing import Any

from aioloader.engine.combine import RepeatNode
from aioloader.engine.fuse import FusedOps
from aioloader.stages.base import Builder, Stage, UnknownLengthError
from aioloader.stages.flow import Flow, Shared

__all__ = ["Repeat"]


@dataclass(frozen=True)
class Repeat(Stage):
    """All that is before it, again and again."""

    times: int | None

    exact_in_any_order = True
    same_each_epoch = True
    encloses = True

    @property
    def label(self) -> str:
        return f"repeat({'' if self.times is None else self.times})"

    def length(self, upstream: int) -> int:
        if self.times is None:
            raise UnknownLengthError("repeat() without a number is endless")
        return upstream * self.times

    def shape(self) -> dict[str, Any]:
        return {"stage": "repeat", "n": self.times}

    def flow(self, before: Flow) -> Flow:
        free = self.times is None or (before.batch_size is not None and before.steady)
        return (before if free else before.limited(Shared.SAME_WORLD, self.label)).cut().closed()

    def build(self, builder: Builder) -> None:
        builder.node = RepeatNode(builder.repetitions(), self.times)
        builder.fused = FusedOps()
