"""What a device must be able to do: the primitives, over which `Transfer` is written once.

`CudaBackend` is the real thing, `HostBackend` does nothing, and `aioloader.testing.FakeBackend` is a device made of
CPU memory whose copies happen as late as a test likes.
"""

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch

__all__ = ["Backend", "Event", "Stream"]

Stream: TypeAlias = Any
"""A queue of work on the device, done in order. Each backend has its own kind, and only the backend looks into it."""


class Event(Protocol):
    """A point in a stream."""

    def query(self) -> bool:
        """Whether all work up to this point is done; never waits."""
        ...

    def synchronize(self) -> None:
        """Wait, on the host, until all work up to this point is done. Never called on the consumer's path."""
        ...


@runtime_checkable
class Backend(Protocol):
    """The primitives of one device. All methods but `init_thread` leave the calling thread's settings as they were.

    Copies are made on one thread; `current_stream`, `wait_event` and `record_use` are called on the consumer's, and
    `alloc_pinned` and `pin` on any.
    """

    @property
    def device(self) -> torch.device:
        """The device, with its index where it has one."""
        ...

    @property
    def pins(self) -> bool:
        """Whether `pin` and `alloc_pinned` give page-locked memory here."""
        ...

    def init_thread(self) -> None:
        """Make `device` the current one of this thread. Called once, first, in a thread that is the loader's own."""
        ...

    def alloc_pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised, contiguous, page-locked host memory; plain memory where there is no other."""
        ...

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """A page-locked copy of `tensor` from which one asynchronous copy can be made: without gaps or overlap.

        The tensor itself when it is that already, is not in host memory, or cannot be page-locked.
        """
        ...

    def pin_object(self, value: Any) -> Any:
        """Call the object's own `pin_memory()`."""
        ...

    def owns(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is in this device's memory."""
        ...

    def new_stream(self) -> Stream:
        """A new stream of this device."""
        ...

    def current_stream(self) -> Stream:
        """The stream that is current in the calling thread."""
        ...

    def default_stream(self) -> Stream:
        """The stream that is current in a thread which never chose one."""
        ...

    def copy(self, tensor: torch.Tensor, stream: Stream) -> torch.Tensor:
        """Queue a copy of `tensor` on `stream`, into device memory that belongs to `stream`.

        The caller keeps `tensor` until an event recorded after it is done. From memory that is not page-locked this
        returns when the source has been read.
        """
        ...

    def move_object(self, value: Any, stream: Stream) -> Any:
        """Call the object's own `to(device, non_blocking=True)` with `stream` as the current one."""
        ...

    def record_event(self, stream: Stream) -> Event:
        """An event after all that is queued on `stream` now."""
        ...

    def wait_event(self, stream: Stream, event: Any) -> None:
        """What is queued on `stream` from now on starts after `event`, one of this backend. The host does not wait."""
        ...

    def record_use(self, tensor: torch.Tensor, stream: Stream) -> None:
        """When `tensor` is dropped, its memory is not used again before what `stream` had queued by then is done."""
        ...

    def close(self) -> None:
        """Give back what the backend holds. Idempotent."""
        ...
