"""The transfer of batches to a device, written once over the `Backend` protocol."""

import os
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

import torch

from aioloader.device._tree import (
    has_method,
    is_dense,
    memory_of,
    names_non_blocking,
    rebuild,
    tensors_in,
    warn_if_it_holds_tensors,
)
from aioloader.device.base import Backend, Event, Stream
from aioloader.errors import DeviceError
from aioloader.memory.mapping import mapping_of

__all__ = ["Transfer", "Transferred", "pin_batch"]


class Transferred:
    """A batch whose copies are queued, until the consumer takes it with `Transfer.receive`.

    Attributes:
        batch: The structure on the device. Do not use it before `receive`.
        event: Done when all copies are.
        others: Further events to wait for, when some tensors were on the device already.
        tensors: The tensors whose device memory the batch uses.
    """

    __slots__ = ("batch", "event", "others", "tensors")

    def __init__(self, batch: Any, event: Event, others: tuple[Event, ...], tensors: tuple[torch.Tensor, ...]) -> None:
        self.batch = batch
        self.event = event
        self.others = others
        self.tensors = tensors


class Transfer:
    """Copies batches to a device on one stream, and hands them over safely to the consumer's stream.

    Two things can go wrong when memory is filled on one stream and read on another, and neither raises an error:

    - The consumer's kernel runs before the copy has ended, and reads what was there before. So the consumer's stream
      *waits for an event* after the copies. The host does not wait.
    - The consumer queues a kernel and drops the batch (`loss = step(batch)`, next batch) before the kernel has run.
      torch's allocator knows only the stream on which the memory was allocated, the transfer's. The next copy gets this
      memory at once and overwrites it. So each tensor's *use is recorded* on the consumer's stream.

    The first costs nothing when the copy was early enough. The second delays reuse of the memory until the consumer's
    queued work is done, which takes about one batch more of device memory.

    A source must live as long as its copy is queued. torch's own page-locked memory may be dropped at once, since torch
    knows of the copy. Other page-locked memory (`cudaHostRegister`, an array over another library's buffer) must be
    kept, and cannot be distinguished from torch's. So all sources are kept until a later `send` finds their event done.

    The shared memory of worker processes is page-locked where it is, once, and copied from there. Each segment goes
    back to its worker when its sources are let go of; see `aioloader.memory.mapping.Mapping` for what may happen
    meanwhile.

    Args:
        backend: The device. Closing the transfer does not close it.

    Source: torch documentation of `Tensor.record_stream`; torch 2.13 `ATen/core/CachingHostAllocator.h`.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend: Final = backend
        self._stream: Final[Stream] = backend.new_stream()
        # Sources with the event after which they are not needed. Each iterator has a device thread, hence the lock.
        self._lock = threading.Lock()
        self._held: deque[tuple[Event, list[Any]]] = deque()
        self._stranded: list[list[Any]] = []
        self._pid: Final = os.getpid()

    def __del__(self) -> None:
        """Wait for copies that are under way: memory of others must not be taken away from under them."""
        if hasattr(self, "_pid") and self._pid == os.getpid() and not sys.is_finalizing():
            self.close()

    def send(self, batch: Any) -> Transferred:
        """Page-lock the tensors of `batch`, queue their copies, and return without waiting.

        Called in a device thread, one per iterator of the loader, which calls `backend.init_thread()` first.

        Args:
            batch: CPU tensors of any shape, strides and dtype, in tuples, lists, mappings, dataclasses and objects with
                their own `to(device, non_blocking=...)`. Everything else is passed on unchanged, and so are tensors
                that are already on the device; they must be ready once the device's default stream has done what it has
                queued now. A tensor that occurs twice is copied once; two views of one storage become two tensors.

        Returns:
            The same structure on the device, for `receive`.

        Raises:
            DeviceError: Page-locking or copying failed; `__cause__` is the error.
        """
        sending = _Sending(self.backend, self._stream)
        try:
            self._drop_done()
            moved = rebuild(batch, sending.tensor, _moves_itself, sending.other)
            event = self.backend.record_event(self._stream)
            others = (self.backend.record_event(self.backend.default_stream()),) if sending.found_on_device else ()
        except Exception as error:
            self._hold_after_failure(sending.sources)
            raise DeviceError(f"a batch could not be copied to {self.backend.device}: {error}") from error
        with self._lock:
            self._held.append((event, sending.sources))
        return Transferred(moved, event, others, tuple(sending.tensors))

    def receive(self, transferred: Transferred) -> Any:
        """The batch, safe to use on the current stream of the calling thread, which is the consumer's.

        The host does not wait for the device.

        Raises:
            DeviceError: The device is broken; `__cause__` is the error.
        """
        try:
            stream = self.backend.current_stream()
            self._wait(stream, transferred)
            self._record(stream, transferred)
        except Exception as error:
            raise DeviceError(f"a batch could not be taken over on {self.backend.device}: {error}") from error
        return transferred.batch

    def close(self) -> None:
        """Wait for all copies and release the sources. Do not call `send` any more. Idempotent."""
        with self._lock:
            held, self._held = self._held, deque()
        for event, _ in held:
            with suppress(RuntimeError):  # a broken device does not read them any more
                event.synchronize()
        self._stranded.clear()

    def _wait(self, stream: Stream, transferred: Transferred) -> None:
        for event in (transferred.event, *transferred.others):
            self.backend.wait_event(stream, event)

    def _record(self, stream: Stream, transferred: Transferred) -> None:
        for tensor in transferred.tensors:
            self.backend.record_use(tensor, stream)

    def _drop_done(self) -> None:
        done = []
        with self._lock:
            # Copies end in the order in which they were queued.
            while self._held and self._held[0][0].query():
                done.append(self._held.popleft())
        del done  # outside the lock, since freeing large memory is slow

    def _hold_after_failure(self, sources: list[Any]) -> None:
        """Keep the sources of copies that were queued before the failure."""
        try:
            event = self.backend.record_event(self._stream)
        except Exception:  # the device is broken, and cannot tell when it has read them; the first error is raised
            self._stranded.append(sources)
        else:
            with self._lock:
                self._held.append((event, sources))


class _Sending:
    """One call of `send`: moves each leaf of the batch, and collects what has to be kept."""

    def __init__(self, backend: Backend, stream: Stream) -> None:
        self._backend = backend
        self._stream = stream
        self._moved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.sources: list[Any] = []
        self.tensors: list[torch.Tensor] = []
        self.found_on_device = False

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in self._moved:
            # The tensor itself is kept too, since a later one could get its id.
            self._moved[id(tensor)] = (tensor, self._move(tensor))
        return self._moved[id(tensor)][1]

    def _move(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._backend.owns(tensor):
            moved = tensor
            self.found_on_device = True
        else:
            source = tensor if self._is_page_locked_in_place(tensor) else self._backend.pin(tensor)
            # Kept before the copy, since a copy that raises may have been queued.
            self.sources.append(source)
            moved = self._backend.copy(source, self._stream)
        self.tensors.extend(memory_of(moved))
        return moved

    def _is_page_locked_in_place(self, tensor: torch.Tensor) -> bool:
        """Whether it lies in shared memory of a worker that is page-locked now.

        Not done in `pin`, which also serves consumers that copy for themselves: torch does not know of their copies
        from this memory, and they would drop it too early.
        """
        if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided or tensor.is_nested:
            return False
        if tensor.device.type != "cpu" or not is_dense(tensor):
            return False
        mapping = mapping_of(tensor)
        return mapping is not None and self._backend.page_lock(mapping)

    def other(self, value: Any) -> Any:
        if not _moves_itself(value):
            warn_if_it_holds_tensors(value, "to(device, non_blocking=...)")
            return value
        if has_method(value, "pin_memory"):
            value = self._backend.pin_object(value)
        self.sources.append(value)
        moved = self._backend.move_object(value, self._stream)
        for tensor in tensors_in(moved):
            self.tensors.extend(part for part in memory_of(tensor) if self._backend.owns(part))
        return moved


def pin_batch(batch: Any, backend: Backend) -> Any:
    """`batch` with all its tensors page-locked, for a training loop that copies to the device itself.

    As in torch, objects with their own `pin_memory()` pin themselves. A backend that cannot page-lock returns the batch
    itself.

    Raises:
        Exception: What an object's own `pin_memory()` raises.
    """
    if not backend.pins:
        return batch

    def other(value: Any) -> Any:
        if has_method(value, "pin_memory"):
            return backend.pin_object(value)
        warn_if_it_holds_tensors(value, "pin_memory()")
        return value

    return rebuild(batch, backend.pin, lambda value: has_method(value, "pin_memory"), other)


def _moves_itself(value: Any) -> bool:
    """Whether the object's own `to` is used.

    A packed sequence is a named tuple whose lengths must stay on the CPU, and a TensorDict is a mapping that moves as a
    whole; both have `pin_memory` too. Hugging Face's batches are mappings with only `to`: they are rebuilt, so that
    their tensors are page-locked. For other objects, `to` must be about devices; a physical quantity's is about units.
    """
    if not has_method(value, "to"):
        return False
    if has_method(value, "pin_memory"):
        return True
    if isinstance(value, (Mapping, Sequence)):
        return False
    return names_non_blocking(value.to) or next(tensors_in(value, attribute_steps=1), None) is not None
