"""The device stage on CUDA: `pytest -m gpu`. Each promise has a test, and two tests show that these can fail."""

import collections
import itertools
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from aioloader import DataLoader, Pipeline
from aioloader.device import CudaBackend, Transfer, Transferred, open_backend, pin_batch
from aioloader.device._tree import tensors_in
from aioloader.errors import DeviceError
from tests._segment import LENGTH, Segment
from tests._support import Face, Steps, on_both_faces
from tests.test_device import BATCHES, WithoutHold, WithoutRecord, WithoutWait, as_lists

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() == 0, reason="needs a CUDA device"),
]

SHORT_CYCLES = 2_000_000
"""About a millisecond of a busy GPU (`torch.cuda._sleep`): kernels that are late, and no wait of the host."""

LONG_CYCLES = 400_000_000
"""About a fifth of a second: longer than whatever the host does meanwhile."""


@pytest.fixture
def backend() -> Iterator[CudaBackend]:
    backend = open_backend("cuda")
    assert isinstance(backend, CudaBackend)
    torch.cuda.synchronize()
    yield backend
    torch.cuda.synchronize()
    backend.close()


@pytest.fixture
def transfer(backend: CudaBackend) -> Iterator[Transfer]:
    transfer = Transfer(backend)
    yield transfer
    transfer.close()


def kernel(cycles: int) -> None:
    """Keep the current stream busy."""
    torch.cuda._sleep(cycles)


def numbered(number: int, length: int = 1 << 16) -> dict[str, torch.Tensor]:
    return {"x": torch.full((length,), number), "y": torch.full((3, 5), float(number))}


def test_the_device_has_its_index(backend: CudaBackend) -> None:
    """`cuda` is settled when the backend is opened, and one device too many is refused."""
    assert backend.device == torch.device("cuda", torch.cuda.current_device())
    with pytest.raises(DeviceError, match="is not there"):
        open_backend(f"cuda:{torch.cuda.device_count()}")


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_equals_that_of_the_host(transfer: Transfer, name: str) -> None:
    """Structure, values, shapes and order of dimensions, for all kinds of batches the fake device is tested with."""
    batch = BATCHES[name]()
    received = transfer.receive(transfer.send(batch))
    assert as_lists(received) == as_lists(batch)
    moved = [tensor for tensor in tensors_in(received) if tensor.is_cuda]
    assert moved
    assert all(tensor.stride() == torch.empty_like(tensor).stride() for tensor in moved)


def test_sparse_and_nested_tensors_arrive(transfer: Transfer) -> None:
    """Their parts are recorded one by one."""
    sparse = torch.eye(3).to_sparse()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls this layout a prototype
        ragged = torch.nested.nested_tensor([torch.rand(2), torch.rand(3)], layout=torch.jagged)
    received = transfer.receive(transfer.send([sparse, ragged]))
    assert torch.equal(received[0].to_dense().cpu(), torch.eye(3))
    assert torch.equal(received[1].values().cpu(), ragged.values())


def test_batches_dropped_while_kernels_are_queued_are_not_overwritten(transfer: Transfer) -> None:
    """A thousand batches of changing size; the consumer's stream is always late."""
    sums = torch.zeros(1000, dtype=torch.int64, device="cuda")
    lengths = [1 << 12, (1 << 12) + 8, 1 << 16, 100]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for number in range(1000):
            batch = transfer.receive(transfer.send(numbered(number, lengths[number % 4])))
            kernel(SHORT_CYCLES // 10)
            sums[number].copy_(batch["x"].sum())
            del batch
    torch.cuda.synchronize()
    assert sums.tolist() == [number * lengths[number % 4] for number in range(1000)]


fresh_numbers = itertools.count(1000, 100)
"""So that memory which still holds an earlier batch is never right by chance."""


def late_reader(transfer: Transfer) -> bool:
    """Whether a consumer reads what was sent in each of eight batches that it drops while its stream is busy."""
    begin = next(fresh_numbers)
    seen = torch.zeros(8, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for number in range(8):
            batch = transfer.receive(transfer.send(numbered(begin + number)))
            if number == 0:
                kernel(LONG_CYCLES)
            seen[number].copy_(batch["x"][-1])
            del batch
    torch.cuda.synchronize()
    return seen.tolist() == list(range(begin, begin + 8))


def late_copy(transfer: Transfer) -> bool:
    """Whether a consumer reads what was sent when the copies stand behind other work on their stream."""
    begin = next(fresh_numbers)
    seen = torch.zeros(8, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(transfer._stream):
        kernel(LONG_CYCLES)
    batches = []
    with torch.cuda.stream(torch.cuda.Stream()):
        for number in range(8):
            batches.append(transfer.receive(transfer.send(numbered(begin + number))))
            seen[number].copy_(batches[-1]["x"][-1])
    torch.cuda.synchronize()
    return seen.tolist() == list(range(begin, begin + 8))


def second_time(case: Callable[[Transfer], bool], transfer: Transfer) -> bool:
    """The first time memory is made and kernels are loaded, which may wait for the whole device and hide everything."""
    case(transfer)
    return case(transfer)


@pytest.mark.parametrize("case", [late_reader, late_copy])
def test_late_readers_and_late_copies_are_right(transfer: Transfer, case: Callable[[Transfer], bool]) -> None:
    """The two exact states in which the record and the wait matter."""
    assert case(transfer)
    assert case(transfer)


def test_without_the_record_late_readers_are_wrong(backend: CudaBackend) -> None:
    """The test above can fail: memory is used again under the consumer's queued kernels."""
    transfer = WithoutRecord(backend)
    assert not second_time(late_reader, transfer)
    transfer.close()


def test_without_the_wait_late_copies_are_missed(backend: CudaBackend) -> None:
    """The test above can fail: kernels run before their copies."""
    transfer = WithoutWait(backend)
    assert not second_time(late_copy, transfer)
    transfer.close()


def test_several_consumer_streams(transfer: Transfer) -> None:
    """Each batch is safe on the stream that was current when it was taken."""
    streams = [torch.cuda.Stream() for _ in range(4)]
    seen = torch.zeros(200, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    for number in range(200):
        with torch.cuda.stream(streams[number % 4]):
            batch = transfer.receive(transfer.send(numbered(number)))
            kernel(SHORT_CYCLES // (1 + number % 7))
            seen[number].copy_(batch["x"].max())
            del batch
    torch.cuda.synchronize()
    assert seen.tolist() == list(range(200))


def test_a_batch_kept_long_is_unchanged(transfer: Transfer) -> None:
    """Kept batches do not share memory with later ones."""
    batches = [transfer.receive(transfer.send(numbered(number))) for number in range(50)]
    assert all(bool((batch["x"] == number).all()) for number, batch in enumerate(batches))


def test_sent_on_a_thread_of_its_own(backend: CudaBackend, transfer: Transfer) -> None:
    """As in a loader: a device thread ahead of the consumer."""
    ahead: collections.deque[Transferred] = collections.deque()
    room, ready = threading.Semaphore(3), threading.Semaphore(0)

    def send_all() -> None:
        backend.init_thread()
        for number in range(200):
            room.acquire()
            ahead.append(transfer.send(numbered(number)))
            ready.release()

    thread = threading.Thread(target=send_all, name="aioloader-test-device")
    thread.start()
    seen = torch.zeros(200, dtype=torch.int64, device="cuda")
    for number in range(200):
        assert ready.acquire(timeout=30)
        batch = transfer.receive(ahead.popleft())
        room.release()
        kernel(SHORT_CYCLES // 4)
        seen[number].copy_(batch["x"].min())
        del batch
    thread.join()
    assert seen.tolist() == list(range(200))


def test_the_consumer_does_not_wait_for_the_copy(transfer: Transfer) -> None:
    """`receive` returns while the copy stream is busy, and torch sees no synchronizing call in it or in `send`."""
    batch = {"x": transfer.backend.alloc_pinned((1 << 20,), torch.float32).fill_(1.0)}
    transfer.receive(transfer.send(batch))  # whatever is made once
    torch.cuda.synchronize()
    with torch.cuda.stream(transfer._stream):
        kernel(LONG_CYCLES)
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls this mode a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        sent = transfer.send(batch)
        received = transfer.receive(sent)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert not sent.event.query()
    assert received["x"].sum().item() == 1 << 20


def test_the_callers_device_and_streams_stay(transfer: Transfer) -> None:
    """Neither sending nor receiving leaves another stream or device current."""
    mine = torch.cuda.Stream()
    with torch.cuda.stream(mine):
        before = torch.cuda.current_device(), torch.cuda.current_stream()
        transfer.receive(transfer.send(numbered(1)))
        assert (torch.cuda.current_device(), torch.cuda.current_stream()) == before


def test_a_tensor_that_is_on_the_device_already_is_safe_too(transfer: Transfer) -> None:
    """Made by late work on the default stream, taken on another one."""
    kernel(LONG_CYCLES)
    there = torch.full((1 << 16,), 7, device="cuda")
    there.add_(1)
    with torch.cuda.stream(torch.cuda.Stream()):
        batch = transfer.receive(transfer.send({"there": there, "new": torch.ones(3)}))
        assert batch["there"] is there
        assert batch["there"].min().item() == 8


def test_memory_stands_still_after_warm_up(transfer: Transfer) -> None:
    """Neither page-locked nor device memory grows from the tenth batch on."""
    if not hasattr(torch.cuda, "host_memory_stats"):
        pytest.skip("this torch does not count page-locked memory")
    counts = []
    for number in range(60):
        batch = transfer.receive(transfer.send(numbered(number)))
        batch["x"].sum()
        del batch
        torch.cuda.synchronize()
        counts.append((torch.cuda.host_memory_stats()["num_host_alloc"], torch.cuda.memory_reserved()))
    assert len(set(counts[10:])) == 1


def test_pinned_batches_are_not_pinned_again(backend: CudaBackend) -> None:
    """`pin` gives the tensor itself; what has gaps gets a dense copy."""
    pinned = backend.alloc_pinned((4, 6), torch.float32)
    assert pinned.is_pinned()
    assert backend.pin(pinned) is pinned
    view = pinned[1:3]
    assert backend.pin(view) is view
    gaps = backend.pin(pinned[:, ::2])
    assert gaps.is_pinned()
    assert gaps.is_contiguous()
    batch = pin_batch({"x": torch.ones(3), "empty": torch.empty(0), "on": torch.ones(2, device="cuda")}, backend)
    assert batch["x"].is_pinned()
    assert batch["on"].is_cuda


def test_out_of_memory_is_a_device_error_and_the_next_batch_comes(transfer: Transfer) -> None:
    """torch's error is the cause."""
    impossible = torch.empty(1, dtype=torch.uint8).as_strided((1 << 46,), (0,))
    transfer.backend.pins = False  # type: ignore[misc]  # the host has no room for it either
    with pytest.raises(DeviceError) as caught:
        transfer.send(impossible)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    assert transfer.receive(transfer.send(numbered(3)))["x"].max().item() == 3


class Samples:
    def __len__(self) -> int:
        return 4000

    def __getitem__(self, key: int) -> tuple[torch.Tensor, int]:
        if not 0 <= key < 4000:
            raise IndexError(key)
        return torch.full((64,), key), key


@on_both_faces
def test_a_pipeline_to_cuda(face: Face) -> None:
    """Batches by both faces, dropped while kernels are queued, on the stream that the consumer is on."""
    loader = Pipeline(Samples()).batch(8).to("cuda").prefetch(2)
    seen = torch.zeros(500, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()), Steps(loader, face) as steps:
        for number in range(500):
            x, y = steps.next()
            kernel(SHORT_CYCLES // 10)
            seen[number].copy_(x[:, -1].sum() + y.sum())
            del x, y
    torch.cuda.synchronize()
    loader.close()
    assert seen.tolist() == [2 * sum(range(8 * number, 8 * number + 8)) for number in range(500)]


def test_overlap_of_copies_and_kernels(transfer: Transfer) -> None:
    """Copies go on while the consumer's stream is busy: all have ended before its kernel has."""
    big: list[Any] = [transfer.backend.alloc_pinned((1 << 22,), torch.float32).zero_() for _ in range(4)]
    transfer.receive(transfer.send(big))
    torch.cuda.synchronize()
    kernel(LONG_CYCLES)
    busy = torch.cuda.Event()
    busy.record()
    sent = transfer.send(big)
    deadline = time.monotonic() + 30
    while not sent.event.query() and time.monotonic() < deadline:
        pass
    assert sent.event.query()
    assert not busy.query()
    busy.synchronize()


def test_a_segment_of_a_worker_is_page_locked_until_it_is_unmapped(backend: CudaBackend) -> None:
    """torch takes it for page-locked memory, all of it, and no longer once it is unlocked."""
    segment = Segment()
    batch = segment.filled(3)
    mapping = segment.mapping
    assert mapping is not None
    assert not batch.is_pinned()
    assert mapping.page_lock(backend)
    assert backend.page_lock(mapping)
    assert batch.is_pinned()
    assert batch[-1:].is_pinned()
    backend.unregister(mapping.address)
    assert not batch.is_pinned()
    assert backend.register(mapping.address, mapping.size)  # as it would not be, if it still were


def late_copies_from_segments(transfer: Transfer) -> bool:
    """Whether batches arrive as they were sent, from segments whose workers write to them as soon as they can."""
    length = 1 << 17
    free: collections.deque[Segment] = collections.deque()
    free.extend(Segment(free, length) for _ in range(4))
    for segment in free:  # before the kernel: the driver may wait for the device
        assert segment.mapping is not None
        assert transfer.backend.page_lock(segment.mapping)
    torch.cuda.synchronize()
    with torch.cuda.stream(transfer._stream):
        kernel(LONG_CYCLES)
    begin = next(fresh_numbers)
    batches = []
    for number in range(begin, begin + 8):
        segment = free.popleft() if free else Segment(free, length)
        batches.append(transfer.receive(transfer.send(segment.filled(number))))
        del segment
    torch.cuda.synchronize()
    return all(bool((batch == number).all()) for number, batch in enumerate(batches, begin))


def test_copies_from_segments_are_right_though_they_are_late(transfer: Transfer) -> None:
    """A segment goes back to its worker after the copy, and without page-locked memory of torch's."""
    assert second_time(late_copies_from_segments, transfer)


def test_without_the_hold_late_copies_read_the_next_batch(backend: CudaBackend) -> None:
    """The test above can fail: the worker writes to what is still to be copied."""
    transfer = WithoutHold(backend)
    assert not second_time(late_copies_from_segments, transfer)
    torch.cuda.synchronize()
    transfer.close()


def test_a_segment_that_cannot_be_page_locked_does_no_harm(backend: CudaBackend) -> None:
    """One warning, and the next kernel does not report the driver's error."""
    with pytest.warns(RuntimeWarning, match="shared memory of worker processes cannot be page-locked"):
        assert not backend.register(1 << 12, 1 << 12)  # nothing is mapped there
    assert (torch.ones(3, device="cuda") + 1).tolist() == [2, 2, 2]
    segment = Segment()
    transfer = Transfer(backend)
    assert transfer.receive(transfer.send(segment.filled(4))).tolist() == [4] * LENGTH
    transfer.close()


@on_both_faces
def test_worker_processes_to_cuda(face: Face) -> None:
    """Two epochs, batches dropped while kernels are queued; the driver is left with nothing that is page-locked."""
    loader = DataLoader(Samples(), 8, worker_type="process", num_workers=2, persistent_workers=True, device="cuda")
    seen = torch.zeros((2, 500), dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for epoch in range(2):
            with Steps(loader, face) as steps:
                for number in range(500):
                    x, y = steps.next()
                    kernel(SHORT_CYCLES // 10)
                    seen[epoch, number].copy_(x[:, -1].sum() + y.sum())
                    del x, y
    torch.cuda.synchronize()
    loader.close()
    assert seen.tolist() == [[2 * sum(range(8 * number, 8 * number + 8)) for number in range(500)]] * 2
