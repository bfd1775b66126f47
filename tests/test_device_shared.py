"""Shared memory of worker processes, page-locked where it is: copies start from it, and it is not taken from them."""

import asyncio
import gc
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace, TracebackType
from typing import Any

import pytest
import torch

from aioloader import DataLoader, Pipeline
from aioloader.core.memory import tensor_over
from aioloader.device import CudaBackend, HostBackend, OneStreamBackend, Transfer, pin_batch
from aioloader.executors.processes.segments import create_file
from aioloader.memory.mapping import Mapping, mapping_of
from aioloader.testing import FakeBackend
from tests import _work
from tests._segment import LENGTH, Segment
from tests._support import Face, Started, Steps, on_both_faces, run, workers
from tests.test_device import SEEDS, WithoutHold

pytestmark = pytest.mark.usefixtures("fork_server")


class NotClosed(Transfer):
    """Does not wait for its copies when nobody has closed it."""

    def __del__(self) -> None:
        pass


@pytest.fixture
def device() -> Iterator[FakeBackend]:
    """A device that does nothing by itself."""
    device = FakeBackend(threads=True)
    yield device
    device.close()


def test_a_batch_in_a_segment_is_copied_from_there(device: FakeBackend) -> None:
    """No page-locked memory is made for it, and the segment is page-locked once for all of its batches."""
    registered: list[int] = []
    register = device.register

    def recorded(address: int, nbytes: int) -> bool:
        registered.append(address)
        return register(address, nbytes)

    device.register = recorded  # type: ignore[method-assign]
    transfer, segment = Transfer(device), Segment()
    for number in range(5):
        batch = transfer.receive(transfer.send({"x": segment.filled(number)}))["x"]
        device.synchronize()
        assert batch.tolist() == [number] * LENGTH
        transfer.send(())
        assert segment.returned()
    assert segment.mapping is not None
    assert registered == [segment.mapping.address]
    assert device.shared_locked == 1
    assert device.pinned_blocks == 0
    transfer.close()
    device.verify()


def test_a_segment_goes_back_after_the_copy_from_it(device: FakeBackend) -> None:
    """Though nobody holds the batch: not before, and with the next batch at the latest."""
    transfer, segment = Transfer(device), Segment()
    device.hold()
    sent = transfer.send(segment.filled(1))
    transfer.send(())
    assert not segment.returned()
    device.release()
    device.synchronize()
    transfer.send(())
    assert segment.returned()
    assert transfer.receive(sent).tolist() == [1] * LENGTH
    transfer.close()
    device.verify()


def used_again(device: FakeBackend, transfer: Transfer) -> bool:
    """Twelve batches in segments that go back to a worker, which writes to them at once."""
    free: deque[Segment] = deque()
    seen = []
    with device.stream(device.new_stream()):
        for number in range(12):
            segment = free.popleft() if free else Segment(free)
            batch = transfer.receive(transfer.send(segment.filled(number)))
            del segment
            seen.append(device.launch(torch.clone, batch))
            del batch
    device.synchronize()
    return all(bool((launch.result == number).all()) for number, launch in enumerate(seen))


def workers_gone(device: FakeBackend, transfer: Transfer) -> bool:
    """Each segment is forgotten as soon as its batch is sent: nothing but the copy needs it."""
    seen = []
    with device.stream(device.new_stream()):
        for number in range(12):
            segment = Segment()
            batch = transfer.receive(transfer.send(segment.filled(number)))
            segment.forget()
            del segment
            seen.append(device.launch(torch.clone, batch))
            del batch
    device.synchronize()
    return all(bool((launch.result == number).all()) for number, launch in enumerate(seen))


def dropped(device: FakeBackend, transfer: Transfer) -> bool:
    """Nobody holds the transfer when its copies are still to come, nor the segments."""
    sent = []
    for number in range(3):
        segment = Segment()
        sent.append(transfer.send(segment.filled(number)))
        segment.forget()
        del segment
    batches = [transfer.receive(each) for each in sent]
    del transfer
    return len(batches) == 3


SCENARIOS = [used_again, workers_gone, dropped]


def is_right(scenario: Callable[[FakeBackend, Transfer], bool], seed: int, kind: type[Transfer] = Transfer) -> bool:
    """Whether `scenario` goes well under one schedule, and leaves nothing locked."""
    device = FakeBackend(seed)
    try:
        transfers = [kind(device)]
        right = scenario(device, transfers.pop())
        device.synchronize()
        return right and not device.problems and not device.shared_locked
    finally:
        device.close()


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_segments_are_safe_under_every_schedule(scenario: Callable[[FakeBackend, Transfer], bool]) -> None:
    """Late copies read what was sent, from memory that is locked; afterwards it is unlocked."""
    assert not [seed for seed in range(SEEDS) if not is_right(scenario, seed)]


@pytest.mark.parametrize(
    ("mutant", "scenario"), [(WithoutHold, used_again), (WithoutHold, workers_gone), (NotClosed, dropped)]
)
def test_these_tests_see_a_step_that_is_left_out(
    mutant: type[Transfer], scenario: Callable[[FakeBackend, Transfer], bool]
) -> None:
    """Without the hold or the wait at the end, many schedules read memory that the worker has, or that is unlocked."""
    assert len([seed for seed in range(SEEDS) if not is_right(scenario, seed, mutant)]) > SEEDS // 10


def test_a_mapping_is_unlocked_before_it_is_unmapped() -> None:
    """The address may belong to something else afterwards."""
    device, segment = FakeBackend(), Segment()
    mapping = segment.mapping
    assert mapping is not None
    assert mapping.page_lock(device)
    locked_then: list[int] = []
    unmap = mapping._unmap

    def look(address: int, size: int) -> None:
        locked_then.append(device.shared_locked)
        unmap(address, size)

    mapping._unmap = look
    segment.forget()
    del mapping
    gc.collect()
    assert locked_then == [0]
    device.close()


class Signalling:
    """A lock that tells when somebody is about to wait for it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.asked = threading.Semaphore(0)

    def __enter__(self) -> None:
        self.asked.release()
        self.lock.acquire()

    def __exit__(self, kind: type[BaseException] | None, error: object, at: TracebackType | None) -> None:
        self.lock.release()


def test_two_threads_lock_a_segment_once() -> None:
    """The driver refuses the second time; who comes second waits, and finds it locked."""
    segment = Segment()
    mapping = segment.mapping
    assert mapping is not None
    lock, begun, go_on = Signalling(), threading.Event(), threading.Event()
    mapping._locking = lock  # type: ignore[assignment]
    calls: list[int] = []

    class Locker:
        def register(self, address: int, nbytes: int) -> bool:
            calls.append(nbytes)
            begun.set()
            return go_on.wait(30)

        def unregister(self, address: int) -> None:
            pass

    locker = Locker()
    first = Started(lambda: mapping.page_lock(locker))
    assert begun.wait(30)
    second = Started(lambda: mapping.page_lock(locker))
    for _ in range(2):
        assert lock.asked.acquire(timeout=30)
    go_on.set()
    assert (first.outcome(), second.outcome()) == (True, True)
    assert calls == [segment.nbytes]


def test_a_second_device_copies_by_memory_of_its_own() -> None:
    """The first one keeps the segment, as long as it is mapped."""
    segment = Segment()
    devices = FakeBackend(1), FakeBackend(2)
    transfers = [Transfer(device) for device in devices]
    batch = segment.filled(5)
    sent = [transfer.receive(transfer.send(batch)) for transfer in transfers]
    for device in devices:
        device.synchronize()
    assert [tensor.tolist() for tensor in sent] == [[5] * LENGTH] * 2
    assert [device.shared_locked for device in devices] == [1, 0]
    assert [device.pinned_blocks for device in devices] == [0, 1]
    for transfer, device in zip(transfers, devices, strict=True):
        transfer.close()
        device.verify()
        device.close()


@pytest.mark.parametrize("options", [{"locks_shared": False}, {"pins": False}])
def test_a_device_that_does_not_lock_in_place_copies_as_before(options: dict[str, bool]) -> None:
    """By page-locked memory of its own, or from pageable memory."""
    device, segment = FakeBackend(**options), Segment()
    transfer = Transfer(device)
    received = transfer.receive(transfer.send(segment.filled(3)))
    device.synchronize()
    assert received.tolist() == [3] * LENGTH
    assert device.shared_locked == 0
    assert device.pinned_blocks == (1 if device.pins else 0)
    transfer.close()
    device.verify()
    device.close()


def test_what_the_copy_would_make_dense_first_is_pinned(device: FakeBackend) -> None:
    """Views with gaps go by page-locked memory, in which torch's copy can be late."""
    transfer, segment = Transfer(device), Segment()
    received = transfer.receive(transfer.send(segment.filled(4)[::2]))
    device.synchronize()
    assert received.tolist() == [4] * (LENGTH // 2)
    assert (device.shared_locked, device.pinned_blocks) == (0, 1)
    transfer.close()


def test_pin_memory_gives_memory_of_torchs_own(device: FakeBackend) -> None:
    """A consumer who copies for himself may drop the batch at once: nothing holds a segment for him."""
    segment = Segment()
    pinned = pin_batch({"x": segment.filled(6)}, device)["x"]
    assert segment.returned()
    assert device.is_pinned(pinned)
    assert pinned.tolist() == [6] * LENGTH


def test_only_mappings_of_the_main_process_are_found() -> None:
    """A private mapping would be copied to be locked, and then not show what is written to its segment."""
    fd = create_file(1 << 12)
    plain, private, lockable = (
        Mapping(fd, 1 << 12),
        Mapping(fd, 1 << 12, private=True),
        Mapping(fd, 5000, lockable=True),
    )
    os.close(fd)
    tensors = [tensor_over(mapping.memory(), (1 << 12,), torch.uint8) for mapping in (plain, private, lockable)]
    assert [mapping_of(tensor) for tensor in tensors] == [None, None, lockable]
    assert mapping_of(tensors[2][4095:]) is lockable
    assert mapping_of(torch.ones(3)) is None
    assert mapping_of(torch.empty(0)) is None
    device = FakeBackend()
    assert not plain.page_lock(device)
    assert not private.page_lock(device)
    assert not HostBackend().page_lock(lockable)
    assert not OneStreamBackend(torch.device("mps")).page_lock(lockable)
    device.close()


def test_a_mapping_is_found_among_others_until_it_dies() -> None:
    """From its first byte to its last; the neighbours stay."""
    made = [Segment() for _ in range(20)]
    batches = [segment.filled(number) for number, segment in enumerate(made)]
    last = [tensor_over(segment.mapping.memory(), (1 << 12,), torch.uint8)[-1] for segment in made if segment.mapping]
    assert [mapping_of(tensor) for tensor in batches] == [segment.mapping for segment in made]
    assert [mapping_of(tensor) for tensor in last] == [segment.mapping for segment in made]
    ends = [(segment.mapping.address, segment.nbytes) for segment in made[::2] if segment.mapping]
    del made[::2], batches[::2], last[::2]
    assert [mapping_of(tensor) for tensor in batches] == [segment.mapping for segment in made]
    found = [mapping_of(SimpleNamespace(data_ptr=lambda at=at: at)) for at, _ in ends]  # type: ignore[arg-type]
    assert found == [None] * 10


def test_a_forked_child_leaves_the_parents_lock_alone() -> None:
    """It has no driver to unlock with, nor may it lock."""
    device, segment = FakeBackend(), Segment()
    mapping = segment.mapping
    assert mapping is not None
    assert mapping.page_lock(device)
    calls: list[int] = []
    device.unregister = calls.append  # type: ignore[method-assign,assignment]
    child = os.fork()
    if child == 0:
        status = int(mapping.page_lock(device))
        segment.forget()
        del mapping
        os._exit(status + 2 * len(calls))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert mapping.page_lock(device)
    segment.forget()
    address = mapping.address
    del mapping
    assert calls == [address]
    device.close()


def test_a_forked_child_does_not_wait_for_the_parents_copies() -> None:
    """It drops the parent's transfer, whose device it does not have."""
    device, segment = FakeBackend(), Segment()
    transfer = Transfer(device)
    transfer.send(segment.filled(1))
    closed: list[int] = []
    transfer.close = lambda: closed.append(os.getpid())  # type: ignore[method-assign]
    child = os.fork()
    if child == 0:
        del transfer
        os._exit(len(closed))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    del transfer
    assert closed == [os.getpid()]
    device.close()


class Runtime:
    """The part of the CUDA runtime that page-locks."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.calls: list[tuple[Any, ...]] = []

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        self.calls.append(("register", address, nbytes, flags))
        return self.code

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        self.calls.append(("unregister", address))
        return self.code


class CurrentDevice:
    """`torch.cuda.device`."""

    def __init__(self, device: torch.device) -> None:
        assert device == torch.device("cuda", 0)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def cuda_backend(monkeypatch: pytest.MonkeyPatch, runtime: Any) -> CudaBackend:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device", CurrentDevice)
    return CudaBackend(torch.device("cuda", 0))


def test_cuda_is_asked_to_lock_for_all_devices_and_to_unlock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once each, whatever the runtime says in the end."""
    runtime = Runtime()
    backend, segment = cuda_backend(monkeypatch, runtime), Segment()
    mapping = segment.mapping
    assert mapping is not None
    assert mapping.page_lock(backend)
    assert backend.page_lock(mapping)
    runtime.code = 4  # it is unloading
    segment.forget()
    address = mapping.address
    del mapping
    assert runtime.calls == [("register", address, segment.nbytes, 1), ("unregister", address)]


@pytest.mark.parametrize("runtime", [Runtime(2), None, SimpleNamespace()])
def test_a_runtime_that_refuses_is_told_of_once(monkeypatch: pytest.MonkeyPatch, runtime: Any) -> None:
    """Batches are pinned as before, and nothing is asked again, for any segment."""
    backend, segments = cuda_backend(monkeypatch, runtime), [Segment() for _ in range(3)]
    mappings = [segment.mapping for segment in segments if segment.mapping is not None]
    with pytest.warns(RuntimeWarning, match=r"shared memory of worker processes cannot be page-locked for cuda:0"):
        assert not backend.page_lock(mappings[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not any(backend.page_lock(mapping) for mapping in mappings)
        assert not mappings[1].page_lock(backend)
    assert backend.pins
    assert runtime is None or len(getattr(runtime, "calls", [0])) == 1
    segments.clear()
    mappings.clear()
    assert runtime is None or len(getattr(runtime, "calls", [0])) == 1


# --- loaders


class Recorded(FakeBackend):
    """Notes the threads in which segments are locked and unlocked."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.lockers: set[str] = set()
        self.unlockers: set[str] = set()

    def register(self, address: int, nbytes: int) -> bool:
        self.lockers.add(threading.current_thread().name)
        return super().register(address, nbytes)

    def unregister(self, address: int) -> None:
        self.unlockers.add(threading.current_thread().name)
        super().unregister(address)


def process_loaders(device: FakeBackend) -> list[Any]:
    """The ways in which a worker process makes batches."""
    return [
        DataLoader(_work.Filled(8), batch_size=1, worker_type="process", num_workers=2, device=device),
        Pipeline(range(8)).map(_work.filled, executor="process", concurrency=2).to(device),
        Pipeline(range(8)).map(_work.filled).in_process().to(device),
    ]


WAYS = ["DataLoader", "map", "in_process"]


@pytest.mark.parametrize("way", range(3), ids=WAYS)
@on_both_faces
def test_batches_of_worker_processes_come_from_their_segments(face: Face, way: int) -> None:
    """Without page-locked copies, locked by the device thread alone, unlocked when the loader is closed."""
    device = Recorded(threads=True)
    loader = process_loaders(device)[way]
    for _ in range(2):
        with Steps(loader, face) as steps:
            seen = [device.launch(torch.clone, batch) for batch in steps.rest()]
        device.synchronize()
        assert [launch.result.unique().tolist() for launch in seen] == [[number] for number in range(8)]
    assert all(name.startswith("aioloader-device") for name in device.lockers)
    assert device.lockers
    assert device.pinned_blocks == 0
    loader.close()
    gc.collect()
    assert device.shared_locked == 0
    device.verify()
    device.close()


@on_both_faces
def test_copies_outlive_the_worker_whose_memory_they_read(face: Face) -> None:
    """All workers are killed while copies from their segments are still to come."""
    device = Recorded(threads=True)
    loader = Pipeline(range(40)).map(_work.filled, executor="process", concurrency=2).to(device)
    with Steps(loader, face) as steps:
        device.hold()
        seen = [device.launch(torch.clone, steps.next()) for _ in range(2)]
        for pid in workers():
            os.kill(pid, signal.SIGKILL)
        outcomes = steps.outcomes()
        device.release()
    device.synchronize()
    assert [launch.result.unique().tolist() for launch in seen] == [[0], [1]]
    assert len(outcomes) == 38
    loader.close()
    gc.collect()
    assert device.shared_locked == 0
    device.verify()
    device.close()


def test_aclose_waits_for_copies_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop goes on while memory is still read, and is unlocked."""
    device = Recorded(threads=True)

    async def main() -> None:
        loop, waits = asyncio.get_running_loop(), asyncio.Event()
        loader = Pipeline(range(40)).map(_work.filled, executor="process", concurrency=2).to(device)
        batches = aiter(loader)
        await anext(batches)
        device.hold()
        await anext(batches)

        def signalling(transfer: Transfer) -> None:
            monkeypatch.undo()
            loop.call_soon_threadsafe(waits.set)
            transfer.close()

        monkeypatch.setattr(Transfer, "close", signalling)
        closing = asyncio.ensure_future(loader.aclose())
        await waits.wait()
        device.release()
        await closing

    run(main)
    gc.collect()
    assert device.shared_locked == 0
    assert device.unlockers
    assert threading.main_thread().name not in device.unlockers
    device.verify()
    device.close()
