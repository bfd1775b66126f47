"""A device made of CPU memory whose streams run as late as a test likes: shows wrong use of streams without a GPU.

It obeys `aioloader.device.Backend`, and does what CUDA and torch's allocators do, as far as it matters for the safety
of a transfer: streams that run whenever they like, device memory that is used again as soon as it is dropped unless a
use was recorded, page-locked memory that is used again when its copies are done. It proves that a *protocol of calls*
is right under these rules. It does not prove that CUDA follows them.
"""

import ctypes
import random
import threading
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch.overrides import TorchFunctionMode

from aioloader.device._tree import is_dense, memory_of, takes_non_blocking

__all__ = ["FakeBackend", "FakeEvent", "FakeStream", "Launch"]

DEADLINE_SECONDS: Final = 30.0
"""After so long a wait fails; no wait of a passing test comes near it."""

POISON: Final = 0xA5
"""What every byte of memory is set to before it is used again."""

_SMALLEST_BLOCK_BYTES: Final = 512


class FakeStream:
    """A queue of operations, which are done one after the other at times that only the device knows."""

    def __init__(self, name: str, speed: float) -> None:
        self.name = name
        self.speed = speed
        self.queued: deque[_Operation] = deque()
        self.enqueued = 0
        self.completed = 0

    def __repr__(self) -> str:
        return f"<FakeStream {self.name}: {self.completed} of {self.enqueued} done>"


class FakeEvent:
    """A point in a stream."""

    def __init__(self, backend: "FakeBackend") -> None:
        self._backend = backend
        self.done = False

    def query(self) -> bool:
        """Whether all work up to this point is done."""
        self._backend._breathe()
        return self.done

    def synchronize(self) -> None:
        """Let the device work until this point is reached."""
        self._backend._run_until(lambda: self.done, "an event")


class Launch:
    """A kernel on its way. `result` is what its function returned; it raises as long as that has not happened."""

    def __init__(self) -> None:
        self._results: list[Any] = []

    @property
    def done(self) -> bool:
        """Whether the kernel has run."""
        return bool(self._results)

    @property
    def result(self) -> Any:
        """What the kernel's function returned.

        Raises:
            RuntimeError: It has not run, or failed; call `synchronize` or `verify` first.
        """
        if not self._results:
            raise RuntimeError("the kernel has not run; call backend.synchronize() first, or backend.verify()")
        return self._results[0]


class FakeBackend:
    """A `Backend` over CPU memory, for tests of what uses streams; `Pipeline.to` takes it as a device.

    Streams make progress in one of two ways. Without threads, each call into the backend runs a number of operations
    that a random generator picks from all streams that could go on: the same seed gives the same interleaving, and a
    hundred seeds give a hundred, some of them with copies that are later than anything else, or kernels. With
    `threads=True` each stream has a thread, and interleaving is the operating system's; `hold` and `release` steer it.

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
        threads: A real thread per stream, named `aioloader-fake-stream-...`.
        pins: Whether memory can be page-locked. If not, copies are from pageable memory, for which `copy` waits.
        registered: Page-locked memory is not torch's but somebody's slab, which comes back to its owner, and is
            overwritten, when the last reference is dropped, whether or not a copy still has to read it.

    Attributes:
        problems: What `verify` will complain about.
        device_blocks: How many blocks of device memory were ever made; stands still when they are used again.
        pinned_blocks: Likewise for page-locked memory.
        reused: How often a block of device memory was used again.
    """

    def __init__(self, seed: int = 0, *, threads: bool = False, pins: bool = True, registered: bool = False) -> None:
        self.device: Final = torch.device("cpu")
        self.pins: Final = pins
        self.problems: list[str] = []
        self.device_blocks = 0
        self.pinned_blocks = 0
        self.reused = 0
        self._random = random.Random(seed)
        # How much of the time the device works, compared with the host.
        self._progress = self._random.choice((0.0, 0.2, 0.5, 0.9))
        self._threaded = threads
        self._registered = registered
        self._changed = threading.Condition(threading.RLock())
        self._held = False
        self._closed = False
        self._failures: dict[int, BaseException] = {}
        self._copies = 0
        self._current = threading.local()
        self._streams: list[FakeStream] = []
        self._threads: list[threading.Thread] = []
        self._on_device: dict[int, _Block] = {}
        self._pinned: dict[int, _Block] = {}
        # Finalizers run anywhere, also inside our own locked code: they may do no more than this one append.
        self._dropped: deque[_Block] = deque()
        self._returning: list[tuple[_Block, dict[FakeStream, int]]] = []
        self._free: list[_Block] = []
        self._default = self._open_stream("default")

    # --- the Backend protocol

    def init_thread(self) -> None:
        """Nothing: there is one fake device."""

    def alloc_pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory that counts as page-locked, full of what was there before."""
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

    def pin_object(self, value: Any) -> Any:
        """Call the object's own `pin_memory()`; tensors in it that are asked for theirs are pinned here."""
        with _Calls(self, None):
            return value.pin_memory()

    def owns(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is in the memory of this device."""
        return all(_address(part) in self._on_device for part in memory_of(tensor))

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is in page-locked memory of this backend."""
        return all(_address(part) in self._pinned for part in memory_of(tensor))

    def new_stream(self) -> FakeStream:
        """A new stream, with a thread of its own if there are threads."""
        return self._open_stream(str(len(self._streams)))

    def current_stream(self) -> FakeStream:
        """The calling thread's stream, see `stream`."""
        found: FakeStream = getattr(self._current, "stream", self._default)
        return found

    def default_stream(self) -> FakeStream:
        """The stream of threads that did not choose one."""
        return self._default

    def copy(self, tensor: torch.Tensor, stream: FakeStream) -> torch.Tensor:
        """Queue a copy. From memory that is not page-locked: return when it is done."""
        with self._changed:
            self._breathe()
            self._copies += 1
            if self._copies in self._failures:
                raise self._failures.pop(self._copies)
            tensor = tensor.detach()
            block, poisoned = self._take(self._on_device, tensor, stream)
            copied = block.hand_out(tensor, self._dropped)
            if poisoned:
                self._enqueue(stream, block.poison)
            # What is queued knows addresses, as on a real device, and keeps nothing alive.
            target = block.alias(copied)
            origin = self._pinned.get(_address(tensor))
            source = tensor if origin is None else origin.alias(tensor)
            if origin is not None and not self._registered:
                origin.uses.add(stream)
            before = _checksum(source)

            def run() -> None:
                if _checksum(source) != before:
                    self.problems.append(f"a source was overwritten before its copy on {stream.name} had run")
                target.copy_(source)

            last = self._enqueue(stream, run)
        if origin is None:
            self._run_until(lambda: stream.completed >= last, "a copy from pageable memory")
        return copied

    def move_object(self, value: Any, stream: FakeStream) -> Any:
        """Call the object's own `to`; tensors in it that are moved come to this device."""
        with _Calls(self, stream):
            if takes_non_blocking(value.to):
                return value.to(self.device, non_blocking=True)
            return value.to(self.device)

    def record_event(self, stream: FakeStream) -> FakeEvent:
        """An event that is done when all is that `stream` has queued now."""
        event = FakeEvent(self)

        def run() -> None:
            event.done = True

        with self._changed:
            self._breathe()
            self._enqueue(stream, run)
        return event

    def wait_event(self, stream: FakeStream, event: FakeEvent) -> None:
        """What `stream` gets from now on waits for `event`."""
        with self._changed:
            self._breathe()
            self._enqueue(stream, _nothing, ready=lambda: event.done)

    def record_use(self, tensor: torch.Tensor, stream: FakeStream) -> None:
        """When `tensor` is dropped, its memory waits for what `stream` has queued by then."""
        with self._changed:
            self._breathe()
            for part in memory_of(tensor):
                if block := self._on_device.get(_address(part)):
                    block.uses.add(stream)

    def close(self) -> None:
        """Run what is queued, end the threads, let go of the memory. Idempotent; `verify` works afterwards too."""
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
            self._free.clear()
            self._returning.clear()

    # --- what a test does with the device

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        """Make `stream` the calling thread's current one."""
        before = self.current_stream()
        self._current.stream = stream
        try:
            yield
        finally:
            self._current.stream = before

    def launch(self, kernel: Callable[..., Any], *tensors: torch.Tensor, stream: FakeStream | None = None) -> Launch:
        """Queue `kernel(*tensors)` on `stream`, by default the current one.

        As on a real device, the kernel gets the memory of the tensors and keeps nothing alive: tensors that are dropped
        before it runs may have lost their memory to others.

        Args:
            kernel: Called when its turn comes; must copy what it wants to keep (for instance `torch.clone`).
            tensors: On this device.
            stream: Where to queue it.

        Raises:
            ValueError: A tensor is not on this device.
        """
        launch = Launch()
        with self._changed:
            self._breathe()
            target = self.current_stream() if stream is None else stream
            for tensor in tensors:
                if not self.owns(tensor):
                    raise ValueError(f"a kernel needs tensors of the fake device, got {tensor!r}; send it there first")
            aliases = [self._on_device[_address(tensor)].alias(tensor) for tensor in tensors]
            self._enqueue(target, lambda: launch._results.append(kernel(*aliases)))
        return launch

    def fail_copy(self, number: int, error: BaseException) -> None:
        """Let the `number`-th copy from now on, 1 or more, raise `error`."""
        self._failures[self._copies + number] = error

    def hold(self) -> None:
        """No stream does anything any more, until `release`."""
        with self._changed:
            self._held = True

    def release(self) -> None:
        """Let the streams go on."""
        with self._changed:
            self._held = False
            self._changed.notify_all()

    def synchronize(self) -> None:
        """Let the device work until nothing is queued."""
        self._run_until(lambda: not any(stream.queued for stream in self._streams), "all streams")

    def verify(self) -> None:
        """Run what is queued, and complain.

        Raises:
            AssertionError: A source was overwritten before it was read, or a kernel failed.
        """
        if not self._closed:
            self.synchronize()
        assert not self.problems, "\n".join(self.problems)

    @property
    def tensors_alive(self) -> int:
        """How many pieces of device memory are in somebody's hands."""
        with self._changed:
            self._collect()
            return sum(block.handed_out for block in self._on_device.values())

    @property
    def pinned_alive(self) -> int:
        """How many pieces of page-locked memory are in somebody's hands."""
        with self._changed:
            self._collect()
            return sum(block.handed_out for block in self._pinned.values())

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
        stream.queued.append(_Operation(run, ready))
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

    def _run(self, operation: "_Operation") -> None:
        try:
            operation.run()
        except Exception as error:
            self.problems.append(f"an operation failed: {error!r}")

    def _finish_first(self, stream: FakeStream) -> None:
        stream.queued.popleft()
        stream.completed += 1
        self._changed.notify_all()

    def _breathe(self) -> None:
        """The device does something, or nothing, while the host comes by. Also the moment when drops are noticed."""
        with self._changed:
            self._collect()
            if not self._threaded:
                while self._random.random() < self._progress and self._step():
                    pass

    def _step(self) -> bool:
        """Without threads: run one operation, of a stream that the generator picks; False when none can go on."""
        ready = [stream for stream in self._streams if self._can_go_on(stream)]
        if not ready:
            return False
        (stream,) = self._random.choices(ready, [stream.speed for stream in ready])
        self._run(stream.queued[0])
        self._finish_first(stream)
        return True

    def _run_until(self, reached: Callable[[], bool], what: str) -> None:
        with self._changed:
            self._collect()
            if self._threaded:
                if not self._changed.wait_for(reached, DEADLINE_SECONDS):
                    raise TimeoutError(f"the fake device did not get to the end of {what}: {self._streams}")
                return
            while not reached():
                if not self._step():
                    raise RuntimeError(f"the fake device stands still before the end of {what}: {self._streams}")

    # --- memory

    def _alloc_pinned(self, like: torch.Tensor) -> torch.Tensor:
        with self._changed:
            self._breathe()
            block, poisoned = self._take(self._pinned, like, None)
            if poisoned:
                block.poison()
            return block.hand_out(like, self._dropped)

    def _take(self, pool: "dict[int, _Block]", like: torch.Tensor, stream: FakeStream | None) -> "tuple[_Block, bool]":
        """A block for a tensor like `like`, used before if there is one, and whether it was."""
        size_bytes = 1 << (max(like.numel() * like.element_size(), _SMALLEST_BLOCK_BYTES) - 1).bit_length()
        for position in reversed(range(len(self._free))):  # the one dropped last, as the most likely to be in use
            block = self._free[position]
            if block.pool is pool and block.stream is stream and block.size_bytes == size_bytes:
                del self._free[position]
                self.reused += pool is self._on_device
                return block, True
        block = _Block(pool, stream, size_bytes)
        pool[block.address] = block
        if pool is self._on_device:
            self.device_blocks += 1
        else:
            self.pinned_blocks += 1
        return block, False

    def _collect(self) -> None:
        """Take back what was dropped: at once, or when what its streams had queued by then is done."""
        while self._dropped:
            block = self._dropped.popleft()
            block.handed_out = False
            if self._registered and block.pool is self._pinned:
                block.poison()  # its owner writes to it again
            self._returning.append((block, {stream: stream.enqueued for stream in block.uses}))
            block.uses = set()
        waiting = []
        for block, until in self._returning:
            if all(stream.completed >= count for stream, count in until.items()):
                self._free.append(block)
            else:
                waiting.append((block, until))
        self._returning = waiting


class _Operation:
    def __init__(self, run: Callable[[], object], ready: Callable[[], bool]) -> None:
        self.run = run
        self.ready = ready


class _Block:
    """A piece of memory that goes from hand to hand."""

    def __init__(self, pool: "dict[int, _Block]", stream: FakeStream | None, size_bytes: int) -> None:
        self.pool = pool
        self.stream = stream
        self.size_bytes = size_bytes
        self._memory = (ctypes.c_uint8 * size_bytes)()
        self.address = ctypes.addressof(self._memory)
        self.uses: set[FakeStream] = set()
        self.handed_out = False

    def hand_out(self, like: torch.Tensor, dropped: "deque[_Block]") -> torch.Tensor:
        """A tensor of the shape, dtype and order of dimensions of `like`; `dropped` is told when its storage dies."""
        # torch keeps this very object, a new one over the same memory, as long as any tensor uses the storage.
        owner = (ctypes.c_uint8 * self.size_bytes).from_buffer(self._memory)
        weakref.finalize(owner, dropped.append, self).atexit = False
        self.handed_out = True
        stride = torch.empty_like(like, device="meta").stride()
        return torch.frombuffer(owner, dtype=torch.uint8).view(like.dtype).as_strided(like.shape, stride)

    def alias(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same memory as `tensor`, a part of this block, without keeping anything in anybody's hands."""
        flat = torch.frombuffer(self._memory, dtype=torch.uint8).view(tensor.dtype)
        return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def poison(self) -> None:
        ctypes.memset(self.address, POISON, self.size_bytes)


class _Calls(TorchFunctionMode):
    """While an object's own method runs, its tensors' `to` and `pin_memory` are those of the fake device."""

    def __init__(self, backend: FakeBackend, stream: FakeStream | None) -> None:
        super().__init__()
        self._backend = backend
        self._stream = stream

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.pin_memory:
            return self._backend.pin(args[0])
        if func is torch.Tensor.to and self._stream is not None:
            return args[0] if self._backend.owns(args[0]) else self._backend.copy(args[0], self._stream)
        return func(*args, **(kwargs or {}))


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _checksum(tensor: torch.Tensor) -> int:
    dense = tensor.contiguous()
    return zlib.crc32((ctypes.c_uint8 * (dense.numel() * dense.element_size())).from_address(dense.data_ptr()))


def _nothing() -> None:
    pass
