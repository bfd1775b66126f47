"""The device stage without a GPU: the transfer over a fake device whose streams run as late as they like."""

import ast
import collections
import copy
import dataclasses
import gc
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import aioloader.device
from aioloader import DataLoader, Pipeline
from aioloader.device import (
    Backend,
    CudaBackend,
    HostBackend,
    Transfer,
    Transferred,
    can_pin,
    check_device,
    open_backend,
    pin_batch,
)
from aioloader.device._tree import is_dense, memory_of, rebuild, tensors_in
from aioloader.errors import DeviceError
from aioloader.testing import FakeBackend, FakeStream, Launch
from tests._support import Face, Steps, on_both_faces

SEEDS = 120
"""Schedules per property: some with late copies, some with late kernels, some with a device that is never late."""

no_cuda = pytest.mark.skipif(torch.cuda.device_count() > 0, reason="says what happens without CUDA")


# --- the promise: safe on the consumer's stream, however long kept and however early dropped


class WithoutWait(Transfer):
    """Forgets that the copy may be late."""

    def _wait(self, stream: Any, transferred: Transferred) -> None:
        pass


class WithoutRecord(Transfer):
    """Forgets that the consumer's kernels may be late."""

    def _record(self, stream: Any, transferred: Transferred) -> None:
        pass


class WithoutHold(Transfer):
    """Forgets that a source is read later than it is dropped."""

    def send(self, batch: Any) -> Transferred:
        transferred = super().send(batch)
        self._held.clear()
        return transferred


class Scenario(Protocol):
    """Uses a transfer as a consumer may; says whether all its kernels saw what was sent."""

    def __call__(self, backend: FakeBackend, transfer: Transfer) -> bool: ...


def batch_of(number: int) -> dict[str, Any]:
    """A batch that tells its number in each byte that matters."""
    return {"x": torch.full((8, 16), number), "rest": [torch.full((5,), float(number)), torch.full((3, 7), number)]}


def look(backend: FakeBackend, batch: dict[str, Any], stream: FakeStream | None = None) -> list[Launch]:
    """Queue kernels that read all of `batch`."""
    return [backend.launch(torch.clone, tensor, stream=stream) for tensor in tensors_in(batch)]


def saw(launches: list[Launch], number: int) -> bool:
    """Whether the kernels read the batch of that number."""
    return all(bool((launch.result == number).all()) for launch in launches)


def dropped_early(backend: FakeBackend, transfer: Transfer) -> bool:
    """Queue kernels and drop the batch at once, as a training step does."""
    seen = []
    with backend.stream(backend.new_stream()):
        for number in range(10):
            batch = transfer.receive(transfer.send(batch_of(number)))
            seen.append(look(backend, batch))
            del batch
    backend.synchronize()
    return all(saw(launches, number) for number, launches in enumerate(seen))


def sent_ahead(backend: FakeBackend, transfer: Transfer) -> bool:
    """Two batches wait, finished, while the consumer works on a third: prefetch."""
    seen = []
    ahead = collections.deque(transfer.send(batch_of(number)) for number in range(2))
    with backend.stream(backend.new_stream()):
        for number in range(10):
            ahead.append(transfer.send(batch_of(number + 2)))
            seen.append(look(backend, transfer.receive(ahead.popleft())))
    backend.synchronize()
    return all(saw(launches, number) for number, launches in enumerate(seen))


def kept(backend: FakeBackend, transfer: Transfer) -> bool:
    """Keep every batch, and look at it twice: when it comes and at the end."""
    batches = []
    seen = []
    stream = backend.new_stream()
    with backend.stream(stream):
        for number in range(10):
            batches.append(transfer.receive(transfer.send(batch_of(number))))
            seen.append(look(backend, batches[-1]))
        again = [look(backend, batch) for batch in batches]
    backend.synchronize()
    return all(saw(launches, number) for some in (seen, again) for number, launches in enumerate(some))


def many_streams(backend: FakeBackend, transfer: Transfer) -> bool:
    """Take each batch on another stream."""
    streams = [backend.new_stream() for _ in range(3)]
    seen = []
    for number in range(12):
        with backend.stream(streams[number % 3]):
            seen.append(look(backend, transfer.receive(transfer.send(batch_of(number)))))
    backend.synchronize()
    return all(saw(launches, number) for number, launches in enumerate(seen))


SCENARIOS: tuple[Scenario, ...] = (dropped_early, sent_ahead, kept, many_streams)
Memory = Literal["torch's", "registered", "pageable"]
MEMORY: tuple[Memory, ...] = ("torch's", "registered", "pageable")


def is_right(
    scenario: Scenario,
    seed: int,
    *,
    transfer: type[Transfer] = Transfer,
    memory: Memory = "torch's",
    threads: bool = False,
) -> bool:
    """Whether `scenario` goes well under one schedule: right values, and no source overwritten."""
    backend = FakeBackend(seed, threads=threads, registered=memory == "registered", pins=memory != "pageable")
    try:
        sender = transfer(backend)
        right = scenario(backend, sender)
        sender.close()
        return right and not backend.problems
    finally:
        backend.close()


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_batch_is_right_under_every_schedule(scenario: Scenario, memory: Memory) -> None:
    """Late copies, early drops and long keeping never show to the consumer's kernels."""
    wrong = [seed for seed in range(SEEDS) if not is_right(scenario, seed, memory=memory)]
    assert not wrong


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_batch_is_right_with_real_threads(scenario: Scenario) -> None:
    """The same with a thread per stream, interleaved by the operating system."""
    wrong = [seed for seed in range(10) if not is_right(scenario, seed, threads=True)]
    assert not wrong


@pytest.mark.parametrize(
    ("mutant", "scenario", "memory"),
    [
        (WithoutWait, dropped_early, "torch's"),
        (WithoutWait, sent_ahead, "torch's"),
        (WithoutWait, kept, "torch's"),
        (WithoutWait, many_streams, "torch's"),
        (WithoutRecord, dropped_early, "torch's"),
        (WithoutRecord, sent_ahead, "torch's"),
        (WithoutRecord, many_streams, "torch's"),
        (WithoutHold, dropped_early, "registered"),
        (WithoutHold, sent_ahead, "registered"),
    ],
)
def test_these_tests_see_a_step_that_is_left_out(mutant: type[Transfer], scenario: Scenario, memory: Memory) -> None:
    """Without the wait, the record or the hold, many schedules show wrong data: the tests above can fail."""
    wrong = [seed for seed in range(SEEDS) if not is_right(scenario, seed, transfer=mutant, memory=memory)]
    assert len(wrong) > SEEDS // 10


def test_torchs_pinned_memory_may_be_dropped_before_its_copy_has_run() -> None:
    """The hold is for the memory of others: torch's own allocator waits for the copies it knows of."""
    assert all(is_right(dropped_early, seed, transfer=WithoutHold) for seed in range(SEEDS))


# --- the same, one exact state each


@pytest.fixture(params=[False, True], ids=["scheduler", "threads"])
def backend(request: pytest.FixtureRequest) -> Iterator[FakeBackend]:
    """A fake device, driven by a scheduler and by threads."""
    backend = FakeBackend(threads=request.param)
    yield backend
    backend.close()


@pytest.fixture
def transfer(backend: FakeBackend) -> Iterator[Transfer]:
    transfer = Transfer(backend)
    yield transfer
    transfer.close()


def test_neither_sender_nor_consumer_waits_for_the_device(backend: FakeBackend, transfer: Transfer) -> None:
    """With a device that stands still, pinned batches are sent and received all the same."""
    backend.hold()
    batch = transfer.receive(transfer.send(torch.arange(6)))
    launch = backend.launch(torch.clone, batch)
    assert not launch.done
    backend.release()
    backend.synchronize()
    assert launch.result.tolist() == [0, 1, 2, 3, 4, 5]


def test_memory_that_a_queued_kernel_needs_is_not_used_again(backend: FakeBackend, transfer: Transfer) -> None:
    """A batch dropped while its kernel is queued keeps its memory; when the kernel has run it is used again."""
    consumer = backend.new_stream()
    backend.hold()
    with backend.stream(consumer):
        batch = transfer.receive(transfer.send(torch.arange(6)))
        launch = backend.launch(torch.clone, batch)
        del batch
        following = transfer.receive(transfer.send(torch.zeros(6, dtype=torch.int64)))
    assert (backend.device_blocks, backend.reused) == (2, 0)
    backend.release()
    backend.synchronize()
    assert launch.result.tolist() == [0, 1, 2, 3, 4, 5]
    third = transfer.send(torch.ones(6, dtype=torch.int64))
    assert (backend.device_blocks, backend.reused) == (2, 1)
    del following, third


def test_without_the_record_that_memory_is_overwritten() -> None:
    """The state of the test above with the step left out: the kernel, late, reads the next batch."""
    backend = FakeBackend(threads=True)
    transfer = WithoutRecord(backend)
    # The consumer's stream is late since it waits for an event of a stream on which a kernel takes its time.
    busy, consumer = backend.new_stream(), backend.new_stream()
    go = threading.Event()
    first = transfer.receive(transfer.send(torch.arange(6)))
    backend.synchronize()
    backend.launch(lambda _: go.wait(), first, stream=busy)
    backend.wait_event(consumer, backend.record_event(busy))
    launch = backend.launch(torch.clone, first, stream=consumer)
    address = first.data_ptr()
    del first
    following = transfer.send(torch.full((6,), 9))
    assert following.batch.data_ptr() == address
    following.event.synchronize()
    go.set()
    backend.synchronize()
    assert launch.result.tolist() == [9] * 6
    transfer.close()
    backend.close()


def test_without_the_wait_the_memory_is_read_as_it_was() -> None:
    """A copy that is late, and a kernel that does not wait for it."""
    backend = FakeBackend(threads=True)
    transfer = WithoutWait(backend)
    consumer = backend.new_stream()
    first = transfer.send(torch.arange(6))
    go = threading.Event()
    backend.launch(lambda _: go.wait(), first.batch, stream=transfer._stream)
    with backend.stream(consumer):
        batch = transfer.receive(transfer.send(torch.arange(6)))
        launch = backend.launch(torch.clone, batch)
        launched = backend.record_event(consumer)
    launched.synchronize()
    assert launch.result.tolist() != [0, 1, 2, 3, 4, 5]
    go.set()
    transfer.close()
    backend.close()


def test_the_stream_is_asked_for_at_each_receive(backend: FakeBackend, transfer: Transfer) -> None:
    """The consumer may change its stream between two batches; the one at `receive` counts."""
    first, second = backend.new_stream(), backend.new_stream()
    sent = [transfer.send(torch.arange(3)) for _ in range(2)]
    before = first.enqueued, second.enqueued
    with backend.stream(first):
        transfer.receive(sent[0])
    assert (first.enqueued, second.enqueued) == (before[0] + 1, before[1])
    with backend.stream(second):
        transfer.receive(sent[1])
    assert (first.enqueued, second.enqueued) == (before[0] + 1, before[1] + 1)


def test_batches_cross_from_the_device_thread_to_the_consumers() -> None:
    """Sent on one thread, received on another, on the consumer's own stream."""
    backend = FakeBackend(threads=True)
    transfer = Transfer(backend)
    ahead: collections.deque[Transferred] = collections.deque()
    room, ready = threading.Semaphore(2), threading.Semaphore(0)

    def send_all() -> None:
        backend.init_thread()
        for number in range(30):
            room.acquire()
            ahead.append(transfer.send(batch_of(number)))
            ready.release()

    thread = threading.Thread(target=send_all, name="aioloader-test-device")
    thread.start()
    seen = []
    with backend.stream(backend.new_stream()):
        for _ in range(30):
            assert ready.acquire(timeout=30)
            seen.append(look(backend, transfer.receive(ahead.popleft())))
            room.release()
    thread.join()
    backend.verify()
    assert all(saw(launches, number) for number, launches in enumerate(seen))
    transfer.close()
    backend.close()


def test_memory_stands_still_after_warm_up() -> None:
    """Blocks of the device and page-locked ones go round; a hundred batches need no more than ten."""
    backend = FakeBackend(seed=3)
    transfer = Transfer(backend)
    blocks = []
    for number in range(100):
        look(backend, transfer.receive(transfer.send(batch_of(number))))
        backend.synchronize()
        blocks.append((backend.device_blocks, backend.pinned_blocks))
    assert len(set(blocks[5:])) == 1
    transfer.close()
    assert (backend.tensors_alive, backend.pinned_alive) == (0, 0)
    backend.close()


def test_no_reference_cycle_keeps_a_batch() -> None:
    """Without the garbage collector: memory comes back as soon as nobody needs it, also after a failed batch."""
    backend = FakeBackend()
    transfer = Transfer(backend)
    gc.disable()
    try:
        received = transfer.receive(transfer.send(batch_of(1)))
        pinned = pin_batch(batch_of(2), backend)
        backend.fail_copy(3, RuntimeError("no"))
        with pytest.raises(DeviceError):
            transfer.send(batch_of(3))
        del received, pinned
        transfer.close()
        assert (backend.tensors_alive, backend.pinned_alive) == (0, 0)
    finally:
        gc.enable()
    backend.close()


def test_batches_nobody_takes_are_let_go(backend: FakeBackend) -> None:
    """Closing with batches under way waits for their copies and leaves nothing."""
    transfer = Transfer(backend)
    backend.hold()
    sent = [transfer.send(batch_of(number)) for number in range(3)]
    assert (backend.tensors_alive, backend.pinned_alive) == (9, 9)
    backend.release()
    transfer.close()
    transfer.close()
    del sent
    assert (backend.tensors_alive, backend.pinned_alive) == (0, 0)
    backend.verify()


def test_a_tensor_from_the_default_stream_is_ready_on_any(backend: FakeBackend, transfer: Transfer) -> None:
    """What was on the device already may still be in the making on the default stream: the consumer waits for that."""
    for _ in range(20):
        there = backend.copy(backend.pin(torch.arange(4)), backend.default_stream())
        with backend.stream(backend.new_stream()):
            batch = transfer.receive(transfer.send({"there": there, "new": torch.arange(2)}))
            launch = backend.launch(torch.clone, batch["there"])
        assert batch["there"] is there
        backend.synchronize()
        assert launch.result.tolist() == [0, 1, 2, 3]


# --- through a loader


class Counting:
    """Keys 0..n-1 whose samples tell their number."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: int) -> dict[str, torch.Tensor]:
        if not 0 <= key < self.length:
            raise IndexError(key)
        return {"x": torch.full((16,), key // 4)}


@on_both_faces
@pytest.mark.parametrize("threads", [False, True], ids=["scheduler", "threads"])
def test_a_pipeline_hands_over_batches_safely(face: Face, threads: bool) -> None:
    """Kernels queued for each batch see it, though it is dropped at once and the next ones are made ahead."""
    backend = FakeBackend(seed=11, threads=threads)
    loader = Pipeline(Counting(120)).batch(4).to(backend).prefetch(3)
    seen = []
    with backend.stream(backend.new_stream()), Steps(loader, face) as steps:
        for _ in range(30):
            seen.append(look(backend, steps.next()))
    loader.close()
    backend.verify()
    assert all(saw(launches, number) for number, launches in enumerate(seen))
    assert (backend.tensors_alive, backend.pinned_alive) == (0, 0)
    backend.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_drop_in_hands_over_batches_safely(num_workers: int) -> None:
    """`device=` of the DataLoader, with two iterators of one loader side by side."""
    backend = FakeBackend(seed=2, threads=True)
    loader: DataLoader[Any] = DataLoader(Counting(80), batch_size=4, num_workers=num_workers, device=backend)
    seen = []
    for number, (batch, other) in enumerate(zip(loader, loader, strict=True)):
        seen.append((number, look(backend, batch) + look(backend, other)))
        del batch, other
    loader.close()
    backend.verify()
    assert len(seen) == 20
    assert all(saw(launches, number) for number, launches in seen)
    backend.close()


@on_both_faces
def test_a_failed_copy_stands_at_its_batch(face: Face) -> None:
    """The batch that could not be copied raises in its place, and the next one follows."""
    backend = FakeBackend(seed=1)
    backend.fail_copy(2, RuntimeError("CUDA error: out of memory"))
    loader = Pipeline(Counting(12)).batch(4).to(backend).prefetch(1)  # so that the second copy is the second batch's
    with Steps(loader, face) as steps:
        assert steps.next() is not None
        with pytest.raises(DeviceError, match="out of memory"):
            steps.next()
        launches = look(backend, steps.next())
    loader.close()
    backend.verify()
    assert saw(launches, 2)
    backend.close()


# --- errors


def test_a_failed_copy_is_a_device_error_and_the_next_batch_comes(backend: FakeBackend, transfer: Transfer) -> None:
    """torch's error is the cause; a copy of the same batch that was queued before it ends well."""
    failure = RuntimeError("CUDA error: out of memory")
    backend.fail_copy(2, failure)
    with pytest.raises(DeviceError, match="could not be copied to cpu: CUDA error: out of memory") as caught:
        transfer.send(batch_of(0))
    assert caught.value.__cause__ is failure
    launches = look(backend, transfer.receive(transfer.send(batch_of(1))))
    backend.verify()
    assert saw(launches, 1)


def test_sources_of_a_failed_batch_are_kept_until_they_are_read() -> None:
    """The first copy is queued, the second fails: the first still has its source."""
    backend = FakeBackend(registered=True)
    transfer = Transfer(backend)
    backend.hold()
    backend.fail_copy(2, RuntimeError("no"))
    with pytest.raises(DeviceError):
        transfer.send([torch.arange(3), torch.arange(3)])
    assert backend.pinned_alive == 2
    backend.release()
    transfer.close()
    assert backend.pinned_alive == 0
    backend.verify()
    backend.close()


class BrokenWhileReceiving(FakeBackend):
    def wait_event(self, stream: FakeStream, event: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_an_error_at_receive_is_a_device_error() -> None:
    """A device that broke in the meantime is reported in our words, with torch's as the cause."""
    backend = BrokenWhileReceiving()
    transfer = Transfer(backend)
    with pytest.raises(DeviceError, match="could not be taken over") as caught:
        transfer.receive(transfer.send(torch.arange(2)))
    assert "illegal memory access" in str(caught.value.__cause__)
    transfer.close()
    backend.close()


def test_the_fake_tells_of_kernels_that_failed() -> None:
    """Errors of a stream come up at `verify`, and a kernel that has not run has no result."""
    backend = FakeBackend()
    tensor = Transfer(backend).send(torch.arange(2)).batch
    launch = backend.launch(lambda _: 1 / 0, tensor)
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        backend.verify()
    with pytest.raises(RuntimeError, match="has not run"):
        _ = launch.result
    with pytest.raises(ValueError, match="send it there first"):
        backend.launch(torch.clone, torch.arange(2))
    backend.close()


# --- what a batch may be


class Point(NamedTuple):
    x: torch.Tensor
    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    x: torch.Tensor
    parts: list[torch.Tensor]
    name: str = "frozen"


@dataclasses.dataclass
class Computed:
    x: torch.Tensor
    scale: dataclasses.InitVar[int]
    y: torch.Tensor = dataclasses.field(init=False)

    def __post_init__(self, scale: int) -> None:
        self.y = self.x * scale


class Output(collections.OrderedDict[str, Any]):
    """A mapping that refuses `update`, as the outputs of Hugging Face models do."""

    def update(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError


class Wrapping(collections.abc.MutableMapping[str, Any]):
    """A mapping around a dict which its shallow copies share."""

    def __init__(self, entries: dict[str, Any]) -> None:
        self.entries = entries

    def __getitem__(self, key: str) -> Any:
        return self.entries[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.entries[key] = value

    def __delitem__(self, key: str) -> None:
        del self.entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


class Encoding(collections.UserDict[str, Any]):
    """A mapping with `to`, and no `pin_memory`, as the batches of Hugging Face tokenizers."""

    encodings = "kept"

    def to(self, device: Any) -> "Encoding":
        raise AssertionError("taken apart, so that its tensors are page-locked")


class Graph:
    """An object that moves itself, as the batches of graph libraries do."""

    def __init__(self, x: torch.Tensor) -> None:
        self.store = {"x": x}

    def pin_memory(self) -> "Graph":
        return Graph(self.store["x"].pin_memory())

    def to(self, device: torch.device, non_blocking: bool = False) -> "Graph":
        return Graph(self.store["x"].to(device, non_blocking=non_blocking))


class Image:
    """An object with `to` only."""

    __slots__ = ("pixels",)

    def __init__(self, pixels: torch.Tensor) -> None:
        self.pixels = pixels

    def to(self, device: torch.device) -> "Image":
        return Image(self.pixels.to(device))


class Length:
    """`to` that speaks of units."""

    def to(self, unit: str) -> "Length":
        raise AssertionError(f"not a device: {unit}")


def x() -> torch.Tensor:
    return torch.arange(6).reshape(2, 3)


BATCHES: dict[str, Callable[[], Any]] = {
    "tensor": x,
    "tuple": lambda: (x(), "a", (x(),)),
    "list": lambda: [x(), [x(), None]],
    "named tuple": lambda: Point(x(), "a"),
    "dict": lambda: {"x": x(), "n": 3},
    "ordered dict": lambda: collections.OrderedDict(b=x(), a=x()),
    "default dict": lambda: collections.defaultdict(list, {"x": [x()]}),
    "read-only mapping": lambda: types.MappingProxyType({"x": x()}),
    "user dict": lambda: Encoding({"x": x(), "words": ["a", "b"]}),
    "deque": lambda: collections.deque([x(), x()], maxlen=5),
    "dataclass": lambda: Frozen(x(), [x()]),
    "dataclass with more": lambda: Computed(x(), 2),
    "graph": lambda: {"g": Graph(x())},
    "slots": lambda: [Image(x())],
    "packed sequence": lambda: pack_sequence([torch.arange(3), torch.arange(2)]),
    "structseq": lambda: torch.max(x(), dim=0),
    "transposed": lambda: x().t(),
    "gaps": lambda: x()[:, ::2],
    "expanded": lambda: torch.arange(3).expand(4, 3),
    "channels last": lambda: torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "a number": lambda: torch.tensor(3.5),
    "no elements": lambda: [torch.empty(0), torch.empty(3, 0, 2)],
    "bool": lambda: torch.tensor([True, False, True]),
    "bfloat16": lambda: torch.rand(5).to(torch.bfloat16),
    "complex": lambda: torch.rand(3, dtype=torch.complex64).conj(),
    "views of one storage": lambda: (lambda base: (base[1:], base[:-1], base[::3]))(torch.arange(9)),
    "with gradient": lambda: torch.rand(3, requires_grad=True),
}


def as_lists(value: Any) -> Any:
    """The structure with its types, values, shapes and strides, to compare."""
    if isinstance(value, torch.Tensor):
        dense = torch.empty_like(value, device="meta").stride()
        return value.dtype, tuple(value.shape), dense, value.detach().resolve_conj().to(torch.complex128).tolist()
    if dataclasses.is_dataclass(value):
        return type(value), [as_lists(getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(value, Mapping):
        return type(value), {key: as_lists(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, collections.deque)):
        return type(value), [as_lists(entry) for entry in value]
    if isinstance(value, (Graph, Image)):
        return type(value), [as_lists(tensor) for tensor in tensors_in(value)]
    return value


@pytest.mark.parametrize("name", BATCHES)
def test_a_structure_arrives_as_it_was_sent(name: str) -> None:
    """Types, values, shapes and order of dimensions are kept, all is on the device, and the original is untouched."""
    for pins in (True, False):
        backend = FakeBackend(seed=5, pins=pins)
        transfer = Transfer(backend)
        batch = BATCHES[name]()
        expected = as_lists(batch)
        sent = transfer.send(batch)
        received = transfer.receive(sent)
        backend.synchronize()
        assert as_lists(received) == expected
        assert as_lists(batch) == expected
        assert not any(backend.owns(tensor) for tensor in tensors_in(batch))
        # The lengths of a packed sequence stay on the host: torch wants them there.
        lengths = received.batch_sizes if isinstance(received, PackedSequence) else None
        moved = [tensor for tensor in tensors_in(received) if tensor is not lengths]
        assert moved
        assert all(backend.owns(tensor) for tensor in moved)
        addresses = {tensor.untyped_storage().data_ptr() for tensor in moved}
        assert addresses <= {tensor.untyped_storage().data_ptr() for tensor in sent.tensors}
        transfer.close()
        backend.verify()
        backend.close()


@pytest.mark.parametrize(
    "batch", [None, "text", b"bytes", 3, 2.5, (), [], {}, [[], {}, ((),)], ["a"] * 3, range(4), bytearray(3), Length()]
)
def test_what_holds_no_tensor_passes_as_it_is(batch: Any) -> None:
    """The very same object comes out."""
    for backend in (FakeBackend(), HostBackend()):
        transfer = Transfer(backend)
        assert transfer.receive(transfer.send(batch)) is batch
        assert pin_batch(batch, backend) is batch


def test_attributes_of_a_mapping_are_kept(backend: FakeBackend, transfer: Transfer) -> None:
    """A mutable mapping is copied and changed, not made anew."""
    batch = Encoding({"x": x()})
    batch.encodings = "its own"
    assert transfer.receive(transfer.send(batch)).encodings == "its own"


def test_a_mapping_that_cannot_be_rebuilt_becomes_a_dict(backend: FakeBackend, transfer: Transfer) -> None:
    """One refuses updates, one shares its entries with its copy; both originals stay as they were."""
    for batch in (Output(x=x()), Wrapping({"x": x(), "n": 1})):
        original = batch["x"]
        received = transfer.receive(transfer.send(batch))
        assert type(received) is dict
        assert backend.owns(received["x"])
        assert batch["x"] is original


def test_the_same_tensor_twice_is_copied_once(backend: FakeBackend, transfer: Transfer) -> None:
    """What is one object in the batch is one on the device."""
    tensor = x()
    first, second, other = transfer.receive(transfer.send((tensor, [tensor], tensor.clone())))
    assert second[0] is first
    assert other is not first
    assert backend.device_blocks == 2


def test_pinned_batches_are_not_copied_on_the_host(backend: FakeBackend, transfer: Transfer) -> None:
    """What collate put into page-locked memory goes straight to the device."""
    batch = backend.alloc_pinned((2, 3), torch.int64).copy_(x())
    assert backend.pinned_blocks == 1
    received = transfer.receive(transfer.send(batch))
    assert backend.pinned_blocks == 1
    launch = backend.launch(torch.clone, received)
    backend.synchronize()
    assert launch.result.tolist() == x().tolist()


def test_a_tensor_nobody_can_move_is_told_of_once() -> None:
    """An object of an unknown class passes, with one warning per class and none when it holds no tensor."""

    class Box:
        def __init__(self, content: Any) -> None:
            self.content = content

    class Empty(Box):
        pass

    backend = FakeBackend()
    transfer = Transfer(backend)
    box = Box([x()])
    with pytest.warns(UserWarning, match=r"Box in the batch holds tensors .* no to\(device, non_blocking=...\)"):
        assert transfer.send({"box": box}).batch["box"] is box
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transfer.send([Box([x()]), Empty(3)])
    transfer.close()
    backend.close()


nested = st.recursive(
    st.one_of(
        st.none(),
        st.integers(),
        st.text(max_size=3),
        st.lists(st.integers(0, 9), max_size=4).map(lambda values: torch.tensor(values)),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=2), inner, max_size=3),
    ),
)


@given(nested)
def test_rebuilding_changes_tensors_and_nothing_else(batch: Any) -> None:
    """Any nesting comes out equal, with new tensors, from containers that were not touched."""
    before = copy.deepcopy(batch)
    rebuilt = rebuild(batch, torch.clone, lambda _: False, lambda value: value)
    assert as_lists(rebuilt) == as_lists(batch) == as_lists(before)
    assert {id(tensor) for tensor in tensors_in(rebuilt)}.isdisjoint({id(tensor) for tensor in tensors_in(batch)})


def test_dense_means_no_gaps_and_no_overlap() -> None:
    """Of any order of dimensions."""
    base = torch.rand(2, 3, 4)
    assert all(map(is_dense, (base, base.permute(2, 0, 1), base[:1], base[:0], torch.tensor(1.0), base.mT)))
    assert not any(map(is_dense, (base[:, ::2], base[:, :, :1], torch.rand(3).expand(2, 3))))


def test_memory_of_sparse_and_nested_tensors_is_found() -> None:
    """Uses are recorded on the parts: torch has no record_stream for the whole."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls these layouts beta
        sparse = torch.eye(3).to_sparse()
        compressed = torch.eye(4).to_sparse_csr()
        columns = torch.eye(4).to_sparse_csc()
        ragged = torch.nested.nested_tensor([torch.rand(2), torch.rand(3)], layout=torch.jagged)
        padded = torch.nested.nested_tensor([torch.rand(2), torch.rand(3)])
        assert [part.shape for part in memory_of(sparse)] == [(2, 3), (3,)]
        assert [len(list(memory_of(tensor))) for tensor in (compressed, columns, padded)] == [3, 3, 1]
        assert ragged.values().data_ptr() in {part.data_ptr() for part in memory_of(ragged)}


# --- page-locking


def test_pin_batch_page_locks_every_tensor() -> None:
    """Structures, and objects that pin themselves; what is pinned already and what is on the device stay."""
    backend = FakeBackend()
    pinned = backend.pin(x())
    there = Transfer(backend).send(x()).batch
    batch = {"x": x(), "pinned": pinned, "there": there, "graph": Graph(x()), "name": "a"}
    result = pin_batch(batch, backend)
    assert backend.is_pinned(result["x"])
    assert result["pinned"] is pinned
    assert result["there"] is there
    assert backend.is_pinned(result["graph"].store["x"])
    assert result["x"].tolist() == x().tolist()
    backend.close()


def test_without_an_accelerator_nothing_is_page_locked() -> None:
    """The host leaves batches alone, objects with `pin_memory` too, which would fail."""
    batch = {"x": x(), "graph": Graph(x())}
    assert pin_batch(batch, HostBackend()) is batch


# --- which device


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_the_host_is_a_device_that_does_nothing(device: Any) -> None:
    """`.to("cpu")` gives the batch itself."""
    backend = open_backend(device)
    assert isinstance(backend, HostBackend)
    transfer = Transfer(backend)
    batch = {"x": x(), "graph": [x()]}
    assert transfer.receive(transfer.send(batch)) is batch
    assert backend.alloc_pinned((2, 3), torch.bfloat16).shape == (2, 3)
    transfer.close()
    backend.close()


def test_backends_obey_the_protocol() -> None:
    """All three have every primitive, and a backend is accepted where a device is."""
    fake = FakeBackend()
    assert open_backend(fake) is fake
    assert check_device(fake) == fake.device
    assert isinstance(HostBackend(), Backend)
    assert all(
        hasattr(CudaBackend, name)
        for name in Backend.__dict__
        if not name.startswith("_") and name not in ("device", "pins")
    )
    fake.close()


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "npu", "meta", -1, torch.device("meta")])
def test_a_device_we_cannot_copy_to_is_a_value_error(device: Any) -> None:
    """The rule, the value and the way out, at once."""
    with pytest.raises(ValueError, match=r"device .*must be .* got .*"):
        open_backend(device)


@pytest.mark.parametrize("device", [None, True, 1.0, ["cuda"]])
def test_what_is_no_device_at_all_is_a_type_error(device: Any) -> None:
    """Named with its value."""
    with pytest.raises(TypeError, match="device must be a str"):
        open_backend(device)


@no_cuda
@pytest.mark.parametrize("device", ["cuda", "cuda:0", 0, torch.device("cuda", 3)])
def test_cuda_without_cuda_says_what_is_there(device: Any) -> None:
    """Before any work starts."""
    with pytest.raises(DeviceError, match="needs a CUDA device, but none was found"):
        open_backend(device)
    assert not can_pin()


def test_an_index_beyond_the_last_device_says_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked against the number of devices, which torch can tell without starting CUDA."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DeviceError, match="'cuda:7' is not there, there is cuda:0, cuda:1"):
        check_device("cuda:7")
    assert check_device("cuda:1") == torch.device("cuda", 1)
    assert check_device(1) == torch.device("cuda", 1)
    assert check_device("cuda").index is None
    assert can_pin()


def refusing(make: Callable[..., torch.Tensor], message: str) -> Callable[..., torch.Tensor]:
    """`torch.empty` of a machine whose driver page-locks nothing."""

    def refused(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError(message)
        return make(*args, **kwargs)

    return refused


def test_a_driver_that_refuses_to_page_lock_is_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches go on in pageable memory."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, refusing(getattr(torch, name), "CUDA error: out of memory"))
    for first in ("alloc", "pin"):
        backend = CudaBackend(torch.device("cuda", 0))
        batch = x()
        with pytest.warns(RuntimeWarning, match=r"copied from pageable memory.*CUDA error: out of memory"):
            tensor = backend.alloc_pinned((2, 3), torch.int64) if first == "alloc" else backend.pin(batch)
        assert (tensor.shape, tensor.dtype, tensor.is_pinned()) == ((2, 3), torch.int64, False)
        assert not backend.pins
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert backend.pin(batch) is batch
            assert backend.alloc_pinned((1,), torch.bool).shape == (1,)
            graph = Graph(x())
            assert backend.pin_object(graph) is graph


def test_errors_that_are_not_the_drivers_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong shape, or a `pin_memory()` of the user that fails, does not end page-locking in silence."""

    class Broken(Graph):
        def pin_memory(self) -> "Graph":
            raise RuntimeError("my own")

    monkeypatch.setattr(torch, "empty", refusing(torch.empty, "negative dimension"))
    backend = CudaBackend(torch.device("cuda", 0))
    with pytest.raises(RuntimeError, match="negative dimension"):
        backend.alloc_pinned((-1,), torch.bool)
    with pytest.raises(RuntimeError, match="my own"):
        backend.pin_object(Broken(x()))
    assert backend.pins


def test_only_the_device_folder_knows_torch_cuda() -> None:
    """So that another device is one file more."""
    package = Path(aioloader.device.__file__).parent.parent
    knows = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr == "cuda" and ast.unparse(node.value) == "torch":
                knows.add(path.relative_to(package).parts[0])
    assert knows <= {"device"}
