"""`pin_memory` and `to`: the last stages of a pipeline."""

from dataclasses import dataclass
from typing import Any

from aioloader.stages.base import Stage

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
