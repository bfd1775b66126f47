"""`pin_memory` and `to`: the last stages of a pipeline."""

from dataclasses import dataclass, replace
from typing import Any

from aioloader.stages.base import Stage
from aioloader.stages.flow import Flow

__all__ = ["PinMemory", "To"]


@dataclass(frozen=True)
class PinMemory(Stage):
    """Page-locked batches, for a consumer who copies them himself."""

    exact_in_any_order = True
    same_each_epoch = True

    @property
    def label(self) -> str:
        return "pin_memory()"

    def length(self, upstream: int) -> int:
        return upstream

    def shape(self) -> None:
        return None

    def flow(self, before: Flow) -> Flow:
        return replace(before, by_key=False)  # one more step of the window


@dataclass(frozen=True)
class To(Stage):
    """Batches on a device.

    Args:
        device: As given: `"cuda"` without an index is settled when iteration begins.
    """

    device: Any

    exact_in_any_order = True
    same_each_epoch = True

    @property
    def label(self) -> str:
        return f"to({self.device})"

    def length(self, upstream: int) -> int:
        return upstream

    def shape(self) -> None:
        return None

    def flow(self, before: Flow) -> Flow:
        return replace(before, by_key=False)  # one more step of the window
