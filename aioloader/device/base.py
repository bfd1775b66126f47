"""The operations that a device must support; `Transfer` is written over them once for all devices.

`CudaBackend` is for CUDA and ROCm, `AcceleratorBackend` and `OneStreamBackend` for what else torch knows as an
accelerator, `HostBackend` does nothing, and `aioloader.testing.FakeBackend` is a device made of CPU memory whose copies
happen as late as a test wants.
"""

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch

from aioloader.memory.mapping import Mapping

__all__ = ["Backend", "Event", "Stream"]

Stream: TypeAlias = Any
"""A queue of work on the device, done in order. Each backend has its own type, which only the backend uses."""


class Event(Protocol):
    """A point in a stream."""

    def query(self) -> bool:
        """Whether all work before this point is done; never waits."""
        ...

    def synchronize(self) -> None:
        """Block the host until all work before this point is done. Never called on the consumer's path."""
        ...


@runtime_checkable
class Backend(Protocol):
    """The operations of one device. No method but `init_thread` changes settings of the calling thread.

    Copies are made in one thread; `current_stream`, `wait_event` and `record_use` are called in the consumer's thread,
    `alloc_pinned` and `pin` in any.
    """

    @property
    def device(self) -> torch.device:
        """The device, with its index if it has one."""
        ...

    @property
    def pins(self) -> bool:
        """Whether `pin` and `alloc_pinned` return page-locked memory."""
        ...

    def init_thread(self) -> None:
        """Make `device` the current device of this thread. Called first in each device thread of the loader."""
        ...

    def alloc_pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised, contiguous, page-locked host memory; pageable if it cannot be page-locked."""
        ...

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """A page-locked copy of `tensor` without gaps or overlap, from which one asynchronous copy can be made.

        The tensor itself if it is one already, is not in host memory, or cannot be page-locked.
        """
        ...

    def page_lock(self, mapping: Mapping) -> bool:
        """Page-lock shared memory of worker processes where it is, once, by `Mapping.page_lock`.

        False: it is not page-locked, and a tensor in it has to be pinned. May take long.
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
        """The current stream of the calling thread."""
        ...

    def default_stream(self) -> Stream:
        """The current stream of threads that have not set one."""
        ...

    def copy(self, tensor: torch.Tensor, stream: Stream) -> torch.Tensor:
        """Queue a copy of `tensor` on `stream`, into device memory that belongs to `stream`.

        The caller keeps `tensor` until an event recorded after the copy is done. If the memory is not page-locked, this
        returns only when the source has been read.
        """
        ...

    def move_object(self, value: Any, stream: Stream) -> Any:
        """Call the object's own `to(device, non_blocking=True)` with `stream` as the current one."""
        ...

    def record_event(self, stream: Stream) -> Event:
        """An event after everything that is queued on `stream` now."""
        ...

    def wait_event(self, stream: Stream, event: Any) -> None:
        """Let work that is queued on `stream` from now on start after `event`. The host does not wait."""
        ...

    def record_use(self, tensor: torch.Tensor, stream: Stream) -> None:
        """After `tensor` is dropped, keep its memory until the work that `stream` has queued by then is done."""
        ...

    def close(self) -> None:
        """Release what the backend holds. Idempotent."""
        ...
