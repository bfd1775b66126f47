"""Page-locked host memory from torch's own allocator, until the driver refuses: the same for CUDA and other devices."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from aioloader.device._tree import is_dense
from aioloader.memory.mapping import Mapping

__all__ = ["PageLocking", "is_pinned"]

T = TypeVar("T")


class PageLocking:
    """The part of a backend that page-locks.

    Page-locked memory comes from torch's caching host allocator. Its blocks are rounded up to powers of two, and go to
    a process-wide cache when they are dropped, where the next batch finds them. So after warm-up the driver page-locks
    nothing more, which would take locks of the whole machine.

    Attributes:
        device: With its index.
        pins: Becomes False, permanently and with one warning, when the driver refuses to page-lock memory. Batches are
            then copied from pageable memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pins = True

    def alloc_pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised page-locked memory; pageable once the driver has refused."""

        def alloc(pin_memory: bool) -> torch.Tensor:
            # The device is given, since the thread may have another default.
            return torch.empty(tuple(shape), dtype=dtype, device="cpu", pin_memory=pin_memory)

        return self._try_to_pin(lambda: alloc(True), lambda: alloc(False), ours=True)

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """A page-locked copy without gaps, in the tensor's order of dimensions (channels-last stays channels-last).

        `Tensor.pin_memory()` would keep the strides of any view: it page-locks the gaps of `x[:, ::2]`, refuses
        `x.expand(...)`, and turns a subclass into a plain tensor. A pinned tensor with gaps is copied too, since torch
        would make it dense in *pageable* memory for the copy.
        """
        if tensor.device.type != "cpu" or tensor.numel() == 0 or not self.pins:
            return tensor
        strided = tensor.layout is torch.strided and not tensor.is_nested
        if strided and is_pinned(tensor) and is_dense(tensor):
            return tensor

        def pin() -> torch.Tensor:
            if not strided:
                return tensor.pin_memory()
            return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor)

        if strided and type(tensor) is torch.Tensor:
            return self._try_to_pin(pin, lambda: tensor, ours=True)
        try:
            pinned = self._try_to_pin(pin, lambda: tensor, ours=False)
        except (RuntimeError, TypeError):  # not every layout and subclass can be page-locked
            return tensor
        # Some subclasses get lost here, for instance torchvision's. They are copied from pageable memory.
        return pinned if type(pinned) is type(tensor) else tensor

    def page_lock(self, mapping: Mapping) -> bool:
        """False: torch offers this for CUDA and ROCm alone."""
        return False

    def pin_object(self, value: Any) -> Any:
        """Call the object's own `pin_memory()`; returns the object itself when the driver refuses."""
        return self._try_to_pin(value.pin_memory, lambda: value, ours=False)

    def _refuses(self, error: RuntimeError, *, ours: bool) -> bool:
        """Whether `error` comes from the driver, and not from torch or from a user's `pin_memory()`.

        `ours`: only torch was called, and with right arguments if pageable memory can be had with them.
        """
        raise NotImplementedError

    def _forget(self, error: RuntimeError) -> None:
        """Clear what the driver remembers of an error that it has refused with."""

    def _try_to_pin(self, pin: Callable[[], T], instead: Callable[[], T], *, ours: bool) -> T:
        if not self.pins:
            return instead()
        try:
            return pin()
        except RuntimeError as error:
            if not self._refuses(error, ours=ours):
                raise
            result = instead()  # raises where the arguments are wrong, and the driver is not to blame
            self._stop_pinning(error)
            return result

    def _stop_pinning(self, error: RuntimeError) -> None:
        """Use pageable memory from now on."""
        first, self.pins = self.pins, False
        self._forget(error)
        if first:
            warnings.warn(
                f"aioloader: no page-locked memory for {self.device}, so batches are copied from pageable memory, "
                f"which is slower: {error}; look at `ulimit -l` and at the free memory of the machine",
                RuntimeWarning,
                stacklevel=2,
            )


def is_pinned(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is in page-locked memory; False where torch cannot tell."""
    try:
        return tensor.is_pinned()
    except RuntimeError:  # or its subclass NotImplementedError, for some layouts and tensor subclasses
        return False
