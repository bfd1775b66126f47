"""Devices that torch knows by `torch.accelerator` alone: XPU, HPU, NPU and others, and MPS, which has one stream.

Written against the documentation and source of torch; none of it has run on such a device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

from aioloader.device._tree import takes_non_blocking
from aioloader.device.host import HostBackend
from aioloader.device.page_locked import PageLocking, is_pinned

__all__ = ["AcceleratorBackend", "OneStreamBackend", "one_stream"]

_DRIVER_ERRORS = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))  # torch >= 2.8


def one_stream(kind: str) -> bool:
    """Whether devices of this type queue the work of all threads on one stream, and page-lock nothing.

    On MPS, `torch.Stream` gives the one stream again, `record_stream` is missing, and from torch 2.7 on
    `torch.empty(pin_memory=True)` returns memory *of the device*: it must never be asked for.
    """
    return kind == "mps"


class AcceleratorBackend(PageLocking):
    """One device of the accelerator that this torch was built for, by the calls that all accelerators have.

    The same steps as for CUDA: a stream of the loader's own, an event after the copies, a wait for it on the consumer's
    stream, and each tensor's use recorded there.

    Args:
        device: With an index, or the calling thread's current device.

    Attributes:
        pins: As in `PageLocking`; False from the start, without a warning, where torch has no page-locked memory for
            this device.

    Source: torch documentation of `torch.accelerator`, `torch.Stream` and `torch.Event`.
    """

    def __init__(self, device: torch.device) -> None:
        index: int | None = device.index
        super().__init__(torch.device(device.type, _current_index() if index is None else index))
        self.pins = _has_page_locked_memory()
        self._default: torch.Stream | None = None

    def init_thread(self) -> None:
        """Make this device the current one of this thread, and remember the stream of a thread that has set none."""
        _set_index(self.device.index)
        self._default = torch.accelerator.current_stream(self.device)

    def owns(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is on this very device."""
        return tensor.device == self.device

    def new_stream(self) -> torch.Stream:
        """A stream. Make one per loader: memory is only used again on its own stream."""
        return torch.Stream(self.device)

    def current_stream(self) -> torch.Stream:
        """The calling thread's current stream on this device, which need not be its current device."""
        return torch.accelerator.current_stream(self.device)

    def default_stream(self) -> torch.Stream:
        """The stream that `init_thread` found; `torch.accelerator` has no call for it."""
        return self.current_stream() if self._default is None else self._default

    def copy(self, tensor: torch.Tensor, stream: torch.Stream) -> torch.Tensor:
        """Queue a copy on `stream`; from pageable memory, wait until it is done, as the dataset may write there."""
        with self._on(stream):
            return tensor.to(self.device, non_blocking=is_pinned(tensor))

    def move_object(self, value: Any, stream: torch.Stream) -> Any:
        """Call the object's own `to`.

        With `non_blocking=True` if it accepts that and memory is page-locked: from pageable memory, not every driver
        has read the source when the call returns.
        """
        with self._on(stream):
            if self.pins and takes_non_blocking(value.to):
                return value.to(self.device, non_blocking=True)
            return value.to(self.device)

    def record_event(self, stream: torch.Stream) -> torch.Event:
        """An event after everything that is queued on `stream` now."""
        return stream.record_event()

    def wait_event(self, stream: torch.Stream, event: torch.Event) -> None:
        """Let `stream` wait; returns at once."""
        stream.wait_event(event)

    def record_use(self, tensor: torch.Tensor, stream: torch.Stream) -> None:
        """`Tensor.record_stream`; does nothing for a tensor that is not on this device."""
        if self.owns(tensor):
            tensor.record_stream(stream)

    def close(self) -> None:
        """Does nothing: streams and page-locked memory go back to torch with their last reference."""

    @contextmanager
    def _on(self, stream: torch.Stream) -> Iterator[None]:
        """Make `stream` the current one of this thread, and give the thread its stream and device back.

        Not `with stream:`, which torch 2.6 lacks. To set a stream makes its device the current one too, so that device
        is given back by itself. Both are thread-local: do not await or yield in here.
        """
        index, before = _current_index(), self.current_stream()
        torch.accelerator.set_stream(stream)
        try:
            yield
        finally:
            torch.accelerator.set_stream(before)
            if index != self.device.index:
                _set_index(index)

    def _refuses(self, error: RuntimeError, *, ours: bool) -> bool:
        """Each driver has its own texts, so where only torch was called, any error counts."""
        return ours or isinstance(error, _DRIVER_ERRORS)


class OneStreamBackend(HostBackend):
    """A device with one stream for all threads, and without page-locked memory: MPS.

    A copy is waited for in the device thread. It is queued behind the consumer's work, so less of it overlaps with that
    than on other devices. What is queued later on the one stream finds the copy done, and reads memory before the next
    copy can get it, so no event is waited for and no use is recorded.

    Args:
        device: Its index is 0 if it has none.
    """

    pins: ClassVar[bool] = False

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device(device.type, device.index or 0)

    def owns(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is on this device."""
        return tensor.device == self.device


def _current_index() -> int:
    get = getattr(torch.accelerator, "current_device_index", None)
    return int(torch.accelerator.current_device_idx() if get is None else get())  # its name in torch 2.6


def _set_index(index: int) -> None:
    set_index = getattr(torch.accelerator, "set_device_index", None) or torch.accelerator.set_device_idx  # torch 2.6
    set_index(index)


def _has_page_locked_memory() -> bool:
    """Whether torch gives page-locked memory of the host for its accelerator."""
    try:
        probe = torch.empty(1, dtype=torch.uint8, device="cpu", pin_memory=True)
    except RuntimeError:  # a backend without an allocator for it
        return False
    return probe.device.type == "cpu" and is_pinned(probe)
