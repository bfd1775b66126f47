"""`in_process`: what is before it runs in a process of its own."""

from dataclasses import dataclass

from aioloader.stages.base import Builder, Stage
from aioloader.stages.flow import Flow, Shared

__all__ = ["OwnProcess"]


@dataclass(frozen=True)
class OwnProcess(Stage):
    """Everything before it runs in a process of its own, everything after it in the consumer's."""

    exact_in_any_order = True
    passes = True
    same_each_epoch = True
    encloses = True
    here_only = True

    @property
    def label(self) -> str:
        return "in_process()"

    def length(self, upstream: int) -> int:
        return upstream

    def shape(self) -> None:
        return None

    def flow(self, before: Flow) -> Flow:
        return before.limited(Shared.SAME_RANK, self.label).closed()

    def build(self, builder: Builder) -> None:
        builder.run_in_process()
