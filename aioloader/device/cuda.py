"""CUDA: torch's page-locked memory, streams and events. Nothing outside this folder knows `torch.cuda`."""

import warnings
from contextlib import suppress
from typing import Any, Final

import torch

from aioloader.device._tree import takes_non_blocking
from aioloader.device.page_locked import PageLocking, is_pinned
from aioloader.memory.mapping import Mapping

__all__ = ["CudaBackend"]

_FOR_ALL_DEVICES: Final = 1  # cudaHostRegisterPortable


class CudaBackend(PageLocking):
    """One CUDA device, or one of ROCm, which torch calls by the same names.

    Args:
        device: With an index, or the calling thread's current device.
    """

    def __init__(self, device: torch.device) -> None:
        index: int | None = device.index  # torch's annotation leaves the None out
        if index is None:
            index = torch.cuda.current_device()
        super().__init__(torch.device("cuda", index))
        self._registers = True

    def init_thread(self) -> None:
        """Make this device the current one of this thread."""
        torch.cuda.set_device(self.device)

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

    def page_lock(self, mapping: Mapping) -> bool:
        """By `cudaHostRegister`; False once the driver has refused."""
        return self.pins and self._registers and mapping.page_lock(self)

    def register(self, address: int, nbytes: int) -> bool:
        """Page-lock memory where it is, for `Mapping`; the first time that the driver refuses, a warning says so."""
        if not self._registers:
            return False
        try:
            self._call_driver("cudaHostRegister", address, nbytes, _FOR_ALL_DEVICES)
        except RuntimeError as error:
            self._registers = False
            warnings.warn(
                f"aioloader: the shared memory of worker processes cannot be page-locked for {self.device}, so their "
                f"batches are copied once more: {error}; look at `ulimit -l` and at the free memory of the machine",
                RuntimeWarning,
                stacklevel=2,
            )
        return self._registers

    def unregister(self, address: int) -> None:
        """The reverse, before the memory is unmapped. A driver that fails here is broken, and has said so elsewhere."""
        with suppress(RuntimeError):
            self._call_driver("cudaHostUnregister", address)

    def _call_driver(self, name: str, *args: int) -> None:
        """Call a function of the CUDA runtime, which says by a number how it went.

        With our device as the current one: for another one, the runtime would make a context there, which takes some
        hundred MiB of its memory.
        """
        try:
            with torch.cuda.device(self.device):
                code = int(getattr(torch.cuda.cudart(), name)(*args))
        except (AssertionError, AttributeError) as error:  # a torch without the runtime, or without this call
            raise RuntimeError(f"{name} cannot be called: {error}") from error
        if code:
            failure = RuntimeError(f"{name} has failed with CUDA error {code}")
            self._forget(failure)
            raise failure

    def copy(self, tensor: torch.Tensor, stream: torch.cuda.Stream) -> torch.Tensor:
        """Queue a copy on `stream`, into memory from `stream`'s part of torch's caching allocator.

        From pageable memory this waits until the copy is done, because the dataset may write to the source again. With
        `non_blocking`, CUDA returns as soon as it has read the source into a buffer of its own, but guarantees this
        only on some platforms (CUDA Runtime API, "API synchronization behavior").
        """
        with torch.cuda.stream(stream):  # the current stream is thread-local: do not await or yield in here
            return tensor.to(self.device, non_blocking=is_pinned(tensor))

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

    def _refuses(self, error: RuntimeError, *, ours: bool) -> bool:
        """By its class or text. Since torch 2.8 driver errors have a class, AcceleratorError; before, only the text."""
        return isinstance(error, torch.OutOfMemoryError) or str(error).startswith(("CUDA error", "HIP error"))

    def _forget(self, error: RuntimeError) -> None:
        """Clear the error that CUDA remembers for this thread.

        A failed page-lock was observed to remain the thread's last error, which the *next kernel launch* reports. So
        one kernel is launched here, and its error is ignored.
        """
        with suppress(RuntimeError, AssertionError), torch.cuda.device(self.device):
            torch.zeros(1, device=self.device)
