"""CUDA: torch's page-locked memory, streams and events. Nothing outside this folder knows `torch.cuda`."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final, TypeVar

import torch

from aioloader.device._tree import is_dense, takes_non_blocking

__all__ = ["CudaBackend"]

T = TypeVar("T")


class CudaBackend:
    """One CUDA device.

    Page-locked memory comes from torch's caching host allocator. Its blocks are rounded up to powers of two, and go to
    a process-wide cache when they are dropped, where the next batch finds them. So after warm-up the driver page-locks
    nothing more, which would take locks of the whole machine.

    Args:
        device: With an index, or the calling thread's current device.

    Attributes:
        pins: Becomes False, permanently and with one warning, when the driver refuses to page-lock memory. Batches are
            then copied from pageable memory.
    """

    def __init__(self, device: torch.device) -> None:
        index: int | None = device.index  # torch's annotation leaves the None out
        if index is None:
            index = torch.cuda.current_device()
        self.device: Final = torch.device("cuda", index)
        self.pins = True

    def init_thread(self) -> None:
        """Make this device the current one of this thread."""
        torch.cuda.set_device(self.device)

    def alloc_pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised page-locked memory; pageable once the driver has refused."""

        def alloc(pin_memory: bool) -> torch.Tensor:
            # The device is given, since the thread may have another default.
            return torch.empty(tuple(shape), dtype=dtype, device="cpu", pin_memory=pin_memory)

        return self._try_to_pin(lambda: alloc(True), lambda: alloc(False))

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """A page-locked copy without gaps, in the tensor's order of dimensions (channels-last stays channels-last).

        `Tensor.pin_memory()` would keep the strides of any view: it page-locks the gaps of `x[:, ::2]`, refuses
        `x.expand(...)`, and turns a subclass into a plain tensor. A pinned tensor with gaps is copied too, since torch
        would make it dense in *pageable* memory for the copy.
        """
        if tensor.device.type != "cpu" or tensor.numel() == 0 or not self.pins:
            return tensor
        strided = tensor.layout is torch.strided and not tensor.is_nested
        if strided and _is_pinned(tensor) and is_dense(tensor):
            return tensor

        def pin() -> torch.Tensor:
            if not strided:
                return tensor.pin_memory()
            return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor)

        if strided and type(tensor) is torch.Tensor:
            return self._try_to_pin(pin, lambda: tensor)
        try:
            pinned = self._try_to_pin(pin, lambda: tensor)
        except (RuntimeError, TypeError):  # not every layout and subclass can be page-locked
            return tensor
        # Some subclasses get lost here, for instance torchvision's. They are copied from pageable memory.
        return pinned if type(pinned) is type(tensor) else tensor

    def pin_object(self, value: Any) -> Any:
        """Call the object's own `pin_memory()`; returns the object itself when the driver refuses."""
        return self._try_to_pin(value.pin_memory, lambda: value)

    def owns(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is on this CUDA device, not on another one."""
        return tensor.device == self.device

    def new_stream(self) -> torch.cuda.Stream:
        """A stream. Make one per loader: torch has 32 per device, and memory is only used again on its own stream."""
        return torch.cuda.Stream(self.device)

    def current_stream(self) -> torch.cuda.Stream:
        """The calling thread's current stream on this device, which need not be its current device."""
        return torch.cuda.current_stream(self.device)

    def default_stream(self) -> torch.cuda.Stream:
        """This device's default stream."""
        return torch.cuda.default_stream(self.device)

    def copy(self, tensor: torch.Tensor, stream: torch.cuda.Stream) -> torch.Tensor:
        """Queue a copy on `stream`, into memory from `stream`'s part of torch's caching allocator.

        From pageable memory this waits until the copy is done, because the dataset may write to the source again. With
        `non_blocking`, CUDA returns as soon as it has read the source into a buffer of its own, but guarantees this
        only on some platforms (CUDA Runtime API, "API synchronization behavior").
        """
        with torch.cuda.stream(stream):  # the current stream is thread-local: do not await or yield in here
            return tensor.to(self.device, non_blocking=_is_pinned(tensor))

    def move_object(self, value: Any, stream: torch.cuda.Stream) -> Any:
        """Call the object's own `to`, with `non_blocking=True` if it accepts that."""
        with torch.cuda.stream(stream):
            if takes_non_blocking(value.to):
                return value.to(self.device, non_blocking=True)
            return value.to(self.device)

    def record_event(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        """An event without timing, which is cheaper. Waiting for it, as `Transfer.close` does, does not spin."""
        event = torch.cuda.Event(enable_timing=False, blocking=True)
        event.record(stream)
        return event

    def wait_event(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        """`cudaStreamWaitEvent`: returns at once."""
        stream.wait_event(event)

    def record_use(self, tensor: torch.Tensor, stream: torch.cuda.Stream) -> None:
        """`Tensor.record_stream`; does nothing for a CPU tensor."""
        if tensor.is_cuda:
            tensor.record_stream(stream)

    def close(self) -> None:
        """Does nothing: streams and page-locked memory go back to torch with their last reference.

        torch's cache is not emptied: the whole process uses it, and freeing page-locked memory synchronizes the device.
        """

    def _try_to_pin(self, pin: Callable[[], T], instead: Callable[[], T]) -> T:
        if not self.pins:
            return instead()
        try:
            return pin()
        except RuntimeError as error:
            if not _is_driver_error(error):
                raise
            self._stop_pinning(error)
            return instead()

    def _stop_pinning(self, error: RuntimeError) -> None:
        """Use pageable memory from now on, and clear the error that CUDA remembers for this thread.

        A failed page-lock was observed to remain the thread's last error, which the *next kernel launch* reports. So
        one kernel is launched here, and its error is ignored.
        """
        first, self.pins = self.pins, False
        with suppress(RuntimeError, AssertionError), torch.cuda.device(self.device):
            torch.zeros(1, device=self.device)
        if first:
            warnings.warn(
                f"aioloader: no page-locked memory for {self.device}, so batches are copied from pageable memory, "
                f"which is slower: {error}; look at `ulimit -l` and at the free memory of the machine",
                RuntimeWarning,
                stacklevel=2,
            )


def _is_driver_error(error: RuntimeError) -> bool:
    """Whether `error` comes from CUDA, and not from torch or from a user's `pin_memory()`.

    Since torch 2.8 such errors have a class, AcceleratorError. In earlier versions only the message shows it.
    """
    return isinstance(error, torch.OutOfMemoryError) or str(error).startswith(("CUDA error", "HIP error"))


def _is_pinned(tensor: torch.Tensor) -> bool:
    try:
        return tensor.is_pinned()
    except RuntimeError:  # or its subclass NotImplementedError, for some layouts and tensor subclasses
        return False
