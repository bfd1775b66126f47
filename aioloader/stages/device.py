"""`pin_memory` and `to`: the last stages of a pipeline."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from aioloader.device import Transfer, open_transfer, pin_batch, why_not_pinned
from aioloader.engine.ops import Op
from aioloader.executors.partial import over_partial
from aioloader.stages.base import Builder, Stage
from aioloader.stages.flow import Flow

__all__ = ["PinMemory", "To"]


@dataclass(frozen=True)
class PinMemory(Stage):
    """Page-locked batches, for a consumer who copies them himself."""

    exact_in_any_order = True
    passes = True
    same_each_epoch = True
    here_only = True
    on_device = True

    @property
    def label(self) -> str:
        return "pin_memory()"

    def length(self, upstream: int) -> int:
        return upstream

    def shape(self) -> None:
        return None

    def flow(self, before: Flow) -> Flow:
        return replace(before, by_key=False, keyed=False)  # one more step of the window

    def open_transfer(self) -> Transfer | None:
        if (reason := why_not_pinned()) is not None:
            warnings.warn(f"pin_memory() does nothing, because {reason}: batches stay in plain memory", stacklevel=5)
            return None
        return open_transfer(None)

    def build(self, builder: Builder) -> None:
        _build(builder, self.label, lambda transfer: partial(pin_batch, backend=transfer.backend))


@dataclass(frozen=True)
class To(Stage):
    """Batches on a device.

    Args:
        device: As given: `"cuda"` without an index is settled when iteration begins.
    """

    device: Any

    exact_in_any_order = True
    passes = True
    same_each_epoch = True
    on_device = True
    must_be_last = True

    @property
    def label(self) -> str:
        return f"to({self.device})"

    def length(self, upstream: int) -> int:
        return upstream

    def shape(self) -> None:
        return None

    def flow(self, before: Flow) -> Flow:
        return replace(before, by_key=False, keyed=False)  # one more step of the window

    def open_transfer(self) -> Transfer | None:
        return open_transfer(self.device)

    def build(self, builder: Builder) -> None:
        _build(builder, self.label, lambda transfer: transfer.send)


def _build(builder: Builder, label: str, function: Callable[[Transfer], Callable[[Any], Any]]) -> None:
    """A step on the one device thread."""
    builder.fused.batches = True  # whatever it is made of, it is held as batches are
    builder.fused.checks = []
    transfer = builder.transfer
    if transfer is not None:
        initializer = transfer.backend.init_thread
        builder.fused.add(
            Op(
                over_partial(function(transfer)),
                label,
                concurrency=1,
                initializer=lambda _: initializer(),
                thread_name="aioloader-device",
            )
        )
