"""The CPU as a device: nothing is page-locked, copied or waited for."""

from collections.abc import Sequence
from typing import Any, ClassVar, Final

import torch

from aioloader.device.base import Event, Stream
from aioloader.memory.mapping import Mapping

__all__ = ["HostBackend"]


class HostBackend:
    """The backend of `.to("cpu")`: CPU tensors stay where they are, tensors on other devices are copied to the CPU."""

    device: torch.device = torch.device("cpu")
    pins: ClassVar[bool] = False

    def init_thread(self) -> None:
        """Does nothing."""

    def alloc_pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised pageable memory."""
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself."""
        return tensor

    def page_lock(self, mapping: Mapping) -> bool:
        """False."""
        return False

    def pin_object(self, value: Any) -> Any:
        """The object itself, since its `pin_memory()` would fail without an accelerator."""
        return value

    def owns(self, tensor: torch.Tensor) -> bool:
        """Whether it is a CPU tensor."""
        return tensor.device.type == "cpu"

    def new_stream(self) -> Stream:
        """None: the CPU has no streams."""
        return None

    def current_stream(self) -> Stream:
        """None: the CPU has no streams."""
        return None

    def default_stream(self) -> Stream:
        """None: the CPU has no streams."""
        return None

    def copy(self, tensor: torch.Tensor, stream: Stream) -> torch.Tensor:
        """Copy `tensor` to this device, and wait for it: with `non_blocking` it might be read before that is done."""
        return tensor.to(self.device)

    def move_object(self, value: Any, stream: Stream) -> Any:
        """Call the object's own `to(device)`."""
        return value.to(self.device)

    def record_event(self, stream: Stream) -> Event:
        """An event that is done."""
        return _DONE

    def wait_event(self, stream: Stream, event: Event) -> None:
        """Does nothing: all events are done."""

    def record_use(self, tensor: torch.Tensor, stream: Stream) -> None:
        """Does nothing: references keep CPU memory alive."""

    def close(self) -> None:
        """Does nothing."""


class _DoneEvent:
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


_DONE: Final = _DoneEvent()
