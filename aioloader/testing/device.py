"""A device made of CPU memory whose streams run as late as a test wants: shows wrong use of streams without a GPU.

It implements `aioloader.device.Backend` and behaves like CUDA and torch's allocators where that matters for the safety
of a transfer: streams run at any time; device memory is used again as soon as it is dropped, unless a use was recorded;
page-locked memory is used again when its copies are done. It proves that a *sequence of calls* is right under these
rules, not that CUDA follows them.
"""

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch

from aioloader.device._tree import is_dense, memory_of, takes_non_blocking
from aioloader.memory.mapping import Mapping
from aioloader.testing.device_memory import FakeMemory, address_of, checksum
from aioloader.testing.device_methods import DeviceMethods
from aioloader.testing.device_streams import FakeStream, Launch, Operation

__all__ = ["FakeBackend", "FakeEvent"]

DEADLINE_SECONDS: Final = 30.0
"""A wait fails after this time; waits of passing tests are much shorter."""


class FakeEvent:
    """A point in a stream."""

    def __init__(self, backend: "FakeBackend") -> None:
        self._backend = backend
        self.done = False

    def query(self) -> bool:
        """Whether all work before this point is done."""
        self._backend._progress()
        return self.done

    def synchronize(self) -> None:
        """Let the device work until this point is reached."""
        self._backend._run_until(lambda: self.done, "an event")


class FakeBackend:
    """A `Backend` over CPU memory, for tests of code that uses streams; `Pipeline.to` takes it as a device.

    Streams make progress in one of two ways. Without threads, each call into the backend runs some operations, drawn at
    random from the streams that can go on. The same seed gives the same interleaving, and a hundred seeds give a
    hundred, some with copies or kernels that are later than everything else. With `threads=True`, each stream has a
    thread and the operating system chooses the interleaving; `hold` and `release` steer it.

    Example:
        ```python
        backend = FakeBackend(seed=7)
        transfer = Transfer(backend)
        batch = transfer.receive(transfer.send(torch.arange(4)))
        seen = backend.launch(torch.clone, batch)      # a kernel on the current stream
        del batch                                      # dropped while the kernel may still be queued
        backend.synchronize()
        assert seen.result.tolist() == [0, 1, 2, 3]
        backend.verify()
        backend.close()
        ```

    Args:
        seed: Of the interleaving.
        threads: Whether each stream has a thread, named `aioloader-fake-stream-...`.
        pins: Whether memory can be page-locked. If not, copies are from pageable memory, and `copy` waits for them.
        registered: Whether page-locked memory is not torch's but registered by another library. It goes back to its
            owner and is overwritten when its last reference is dropped, even if a copy still has to read it.
        locks_shared: Whether shared memory of worker processes can be page-locked where it is.

    Attributes:
        problems: The errors that `verify` will raise for.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        threads: bool = False,
        pins: bool = True,
        registered: bool = False,
        locks_shared: bool = True,
    ) -> None:
        self.device: Final = torch.device("cpu")
        self.pins: Final = pins
        self.problems: list[str] = []
        self._random = random.Random(seed)
        self._speed = self._random.choice((0.0, 0.2, 0.5, 0.9))  # of the device, compared with the host
        self._threaded = threads
        self._registered = registered
        self._locks_shared = locks_shared
        self._memory = FakeMemory(registered=registered)
        self._changed = threading.Condition(threading.RLock())
        self._held = False
        self._closed = False
        self._failures: dict[int, BaseException] = {}
        self._copies = 0
        self._current = threading.local()
        self._streams: list[FakeStream] = []
        self._threads: list[threading.Thread] = []
        self._default = self._open_stream("default")

    # --- the Backend protocol

    def init_thread(self) -> None:
        """Does nothing."""

    def alloc_pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised memory that counts as page-locked."""
        if not self.pins:
            return torch.empty(tuple(shape), dtype=dtype, device="cpu")
        return self._alloc_pinned(torch.empty(tuple(shape), dtype=dtype, device="meta"))

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """A page-locked, dense copy."""
        if not self.pins or self.owns(tensor) or (self.is_pinned(tensor) and is_dense(tensor)):
            return tensor
        if tensor.layout is not torch.strided or tensor.is_nested:
            return tensor
        return self._alloc_pinned(tensor).copy_(tensor.detach())

    def page_lock(self, mapping: Mapping) -> bool:
        """Page-lock shared memory where it is; copies from it are late then, as from other page-locked memory."""
        return self.pins and self._locks_shared and mapping.page_lock(self)

    def register(self, address: int, nbytes: int) -> bool:
        """For `Mapping`."""
        self._memory.shared[address] = nbytes
        return True

    def unregister(self, address: int) -> None:
        """For `Mapping`; a copy that comes later is a problem."""
        del self._memory.shared[address]

    def pin_object(self, value: Any) -> Any:
        """Call the object's own `pin_memory()`, in which `Tensor.pin_memory()` pins on this backend."""
        with DeviceMethods(pin=self.pin):
            return value.pin_memory()

    def owns(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is in the memory of this device."""
        return self._memory.holds(self._memory.device, tensor)

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is in page-locked memory of this backend."""
        return self._memory.holds(self._memory.pinned, tensor)

    def new_stream(self) -> FakeStream:
        """A new stream; it has a thread if there are threads."""
        return self._open_stream(str(len(self._streams)))

    def current_stream(self) -> FakeStream:
        """The calling thread's stream, see `stream`."""
        found: FakeStream = getattr(self._current, "stream", self._default)
        return found

    def default_stream(self) -> FakeStream:
        """The stream of threads that have not set one."""
        return self._default

    def copy(self, tensor: torch.Tensor, stream: FakeStream) -> torch.Tensor:
        """Queue a copy. If `tensor` is not page-locked, return only when the copy is done."""
        with self._changed:
            self._progress()
            self._copies += 1
            if self._copies in self._failures:
                raise self._failures.pop(self._copies)
            tensor = tensor.detach()
            block, used_before = self._memory.take(self._memory.device, tensor, stream)
            copied = self._memory.hand_out(block, tensor)
            if used_before:
                self._enqueue(stream, block.poison)
            # As on a real device, queued work knows addresses only, and keeps nothing alive.
            target = block.alias(copied)
            origin = self._memory.find(self._memory.pinned, tensor)
            locked = self._memory.alias_of_shared(tensor)
            source = tensor if origin is None else origin.alias(tensor)
            if origin is not None and not self._registered:
                origin.uses.add(stream)
            if locked is not None:
                source = locked
            before = checksum(source)

            def run() -> None:
                if locked is not None and not self._memory.in_shared(locked):
                    self.problems.append(f"a source was unlocked before its copy on {stream.name} had run")
                    return
                if checksum(source) != before:
                    self.problems.append(f"a source was overwritten before its copy on {stream.name} had run")
                target.copy_(source)

            last = self._enqueue(stream, run)
        if origin is None and locked is None:
            self._run_until(lambda: stream.completed >= last, "a copy from pageable memory")
        return copied

    def move_object(self, value: Any, stream: FakeStream) -> Any:
        """Call the object's own `to`, in which `Tensor.to` copies to this device."""
        with DeviceMethods(pin=self.pin, to=lambda tensor: tensor if self.owns(tensor) else self.copy(tensor, stream)):
            if takes_non_blocking(value.to):
                return value.to(self.device, non_blocking=True)
            return value.to(self.device)

    def record_event(self, stream: FakeStream) -> FakeEvent:
        """An event after everything that `stream` has queued now."""
        event = FakeEvent(self)

        def run() -> None:
            event.done = True

        with self._changed:
            self._progress()
            self._enqueue(stream, run)
        return event

    def wait_event(self, stream: FakeStream, event: FakeEvent) -> None:
        """Let work that is queued on `stream` from now on wait for `event`."""
        with self._changed:
            self._progress()
            self._enqueue(stream, _nothing, ready=lambda: event.done)

    def record_use(self, tensor: torch.Tensor, stream: FakeStream) -> None:
        """After `tensor` is dropped, keep its memory until the work that `stream` has queued by then is done."""
        with self._changed:
            self._progress()
            for part in memory_of(tensor):
                if block := self._memory.find(self._memory.device, part):
                    block.uses.add(stream)

    def close(self) -> None:
        """Run what is queued, end the threads, release the memory. Idempotent; `verify` still works."""
        with self._changed:
            if self._closed:
                return
            self._held = False
            self._changed.notify_all()
        try:
            self.synchronize()
        finally:
            with self._changed:
                self._closed = True
                self._changed.notify_all()
            for thread in self._threads:
                thread.join(DEADLINE_SECONDS)
            self._memory.clear()

    # --- for tests

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        """Make `stream` the current stream of the calling thread."""
        before = self.current_stream()
        self._current.stream = stream
        try:
            yield
        finally:
            self._current.stream = before

    def launch(self, kernel: Callable[..., Any], *tensors: torch.Tensor, stream: FakeStream | None = None) -> Launch:
        """Queue `kernel(*tensors)` on `stream`, by default the current one.

        As on a real device, the kernel gets the memory of the tensors and does not keep them alive: if a tensor is
        dropped before the kernel runs, its memory may be used for another one.

        Args:
            kernel: Called when its turn comes; must copy what it keeps (for instance with `torch.clone`).
            tensors: On this device.
            stream: Where to queue it.

        Raises:
            ValueError: A tensor is not on this device.
        """
        launch = Launch()
        with self._changed:
            self._progress()
            target = self.current_stream() if stream is None else stream
            for tensor in tensors:
                if not self.owns(tensor):
                    raise ValueError(f"a kernel needs tensors of the fake device, got {tensor!r}; send it there first")
            aliases = [self._memory.device[address_of(tensor)].alias(tensor) for tensor in tensors]
            self._enqueue(target, lambda: launch._results.append(kernel(*aliases)))
        return launch

    def fail_copy(self, number: int, error: BaseException) -> None:
        """Let the `number`-th copy from now on, counted from 1, raise `error`."""
        self._failures[self._copies + number] = error

    def hold(self) -> None:
        """Stop all streams until `release`."""
        with self._changed:
            self._held = True

    def release(self) -> None:
        """Let the streams go on."""
        with self._changed:
            self._held = False
            self._changed.notify_all()

    def synchronize(self) -> None:
        """Run everything that is queued."""
        self._run_until(lambda: not any(stream.queued for stream in self._streams), "all streams")

    def verify(self) -> None:
        """Run everything that is queued, and check for errors.

        Raises:
            AssertionError: A source was overwritten before it was read, or a kernel failed.
        """
        if not self._closed:
            self.synchronize()
        assert not self.problems, "\n".join(self.problems)

    @property
    def device_blocks(self) -> int:
        """How many blocks of device memory have been made; a block that is used again does not count."""
        return len(self._memory.device)

    @property
    def pinned_blocks(self) -> int:
        """How many blocks of page-locked memory have been made."""
        return len(self._memory.pinned)

    @property
    def shared_locked(self) -> int:
        """How many segments of shared memory are page-locked now."""
        return len(self._memory.shared)

    @property
    def reused(self) -> int:
        """How many times a block of device memory was used again."""
        return self._memory.reused

    @property
    def tensors_alive(self) -> int:
        """How many blocks of device memory are referenced by tensors."""
        with self._changed:
            return self._memory.handed_out(self._memory.device)

    @property
    def pinned_alive(self) -> int:
        """How many blocks of page-locked memory are referenced by tensors."""
        with self._changed:
            return self._memory.handed_out(self._memory.pinned)

    # --- streams

    def _open_stream(self, name: str) -> FakeStream:
        with self._changed:
            if self._closed:
                raise RuntimeError("the fake device is closed")
            stream = FakeStream(name, self._random.choice((0.05, 1.0, 20.0)))
            self._streams.append(stream)
        if self._threaded:
            thread = threading.Thread(
                target=self._main, args=(stream,), name=f"aioloader-fake-stream-{name}", daemon=True
            )
            self._threads.append(thread)
            thread.start()
        return stream

    def _enqueue(self, stream: FakeStream, run: Callable[[], object], ready: Callable[[], bool] = lambda: True) -> int:
        if self._closed:
            raise RuntimeError("the fake device is closed")
        stream.queued.append(Operation(run, ready))
        stream.enqueued += 1
        self._changed.notify_all()
        return stream.enqueued

    def _main(self, stream: FakeStream) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._can_go_on(stream))
                if self._closed:
                    return
                operation = stream.queued[0]
            self._run(operation)
            del operation
            with self._changed:
                self._finish_first(stream)

    def _can_go_on(self, stream: FakeStream) -> bool:
        return not self._held and bool(stream.queued) and stream.queued[0].ready()

    def _run(self, operation: Operation) -> None:
        try:
            operation.run()
        except Exception as error:
            self.problems.append(f"an operation failed: {error!r}")

    def _finish_first(self, stream: FakeStream) -> None:
        stream.queued.popleft()
        stream.completed += 1
        self._changed.notify_all()

    def _progress(self) -> None:
        """Collect dropped memory, and without threads run a random number of operations."""
        with self._changed:
            self._memory.collect()
            if not self._threaded:
                while self._random.random() < self._speed and self._step():
                    pass

    def _step(self) -> bool:
        """Without threads: run one operation of a random stream; False when no stream can go on."""
        ready = [stream for stream in self._streams if self._can_go_on(stream)]
        if not ready:
            return False
        (stream,) = self._random.choices(ready, [stream.speed for stream in ready])
        self._run(stream.queued[0])
        self._finish_first(stream)
        return True

    def _run_until(self, reached: Callable[[], bool], what: str) -> None:
        with self._changed:
            self._memory.collect()
            if self._threaded:
                if not self._changed.wait_for(reached, DEADLINE_SECONDS):
                    raise TimeoutError(f"the fake device did not reach the end of {what}: {self._streams}")
                return
            while not reached():
                if not self._step():
                    raise RuntimeError(f"the fake device cannot reach the end of {what}: {self._streams}")

    # --- memory

    def _alloc_pinned(self, like: torch.Tensor) -> torch.Tensor:
        with self._changed:
            self._progress()
            block, used_before = self._memory.take(self._memory.pinned, like, None)
            if used_before:
                block.poison()
            return self._memory.hand_out(block, like)


def _nothing() -> None:
    pass
