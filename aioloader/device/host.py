"""The host as a device: nothing is page-locked, copied or waited for."""

from collections.abc import Sequence
from typing import Any, Final

import torch

from aioloader.device.base import Event, Stream

__all__ = ["HostBackend"]


class HostBackend:
    """`.to("cpu")`: batches stay where they are; tensors that a dataset made on another device are fetched."""

    device: Final = torch.device("cpu")
    pins: Final = False

    def init_thread(self) -> None:
        """Nothing: the host is every thread's device."""

    def alloc_pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Plain memory, uninitialised."""
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself."""
        return tensor

    def pin_object(self, value: Any) -> Any:
        """The object itself: its `pin_memory()` would fail without an accelerator."""
        return value

    def owns(self, tensor: torch.Tensor) -> bool:
        """Whether it is a CPU tensor."""
        return tensor.device.type == "cpu"

    def new_stream(self) -> Stream:
        """There are no streams here: None."""
        return None

    def current_stream(self) -> Stream:
        """There are no streams here: None."""
        return None

    def default_stream(self) -> Stream:
        """There are no streams here: None."""
        return None

    def copy(self, tensor: torch.Tensor, stream: Stream) -> torch.Tensor:
        """Fetch `tensor` to the host; it is there when this returns (`non_blocking` would not wait for the device)."""
        return tensor.to(self.device)

    def move_object(self, value: Any, stream: Stream) -> Any:
        """Call the object's own `to("cpu")`."""
        return value.to(self.device)

    def record_event(self, stream: Stream) -> Event:
        """An event that has happened."""
        return _HAPPENED

    def wait_event(self, stream: Stream, event: Event) -> None:
        """Nothing: all events have happened."""

    def record_use(self, tensor: torch.Tensor, stream: Stream) -> None:
        """Nothing: host memory lives by its references."""

    def close(self) -> None:
        """Nothing is held."""


class _Happened:
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


_HAPPENED: Final = _Happened()
