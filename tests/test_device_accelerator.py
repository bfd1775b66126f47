"""Devices that torch knows by `torch.accelerator` alone, over a fake of it: no such device has been at hand."""

import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aioloader import DataLoader, Pipeline
from aioloader.device import (
    AcceleratorBackend,
    Backend,
    CudaBackend,
    OneStreamBackend,
    Transfer,
    can_pin,
    check_device,
    open_backend,
    open_transfer,
    pin_batch,
    why_not_pinned,
)
from aioloader.errors import DeviceError
from aioloader.testing import FakeBackend
from tests._accelerator import DEVICE, FakeAccelerator, OverFake
from tests._support import Face, Steps, on_both_faces
from tests.test_device import (
    SCENARIOS,
    Counting,
    Graph,
    Scenario,
    WithoutRecord,
    WithoutWait,
    dropped_early,
    look,
    many_streams,
    saw,
    x,
)

SEEDS = 40
"""Schedules per property. The transfer is the same as for other devices; only the calls of torch are new."""

pytestmark = pytest.mark.skipif(torch.cuda.device_count() > 0, reason="plays a torch whose accelerator is another one")


def is_right(scenario: Scenario, seed: int, transfer: type[Transfer], *, pins: bool = True) -> bool:
    """Whether `scenario` goes well under one schedule of the fake device, by torch's calls."""
    fake = FakeBackend(seed, pins=pins)
    with pytest.MonkeyPatch.context() as monkeypatch:
        accelerator = FakeAccelerator(monkeypatch, fake)
        sender = transfer(OverFake(accelerator))
        right = scenario(fake, sender)
        sender.close()
        assert all(non_blocking is pinned for non_blocking, pinned in accelerator.copies)
        assert {pinned for _, pinned in accelerator.copies} == {pins}
        assert accelerator.index == 0, "the caller's current device has changed"
        assert fake.current_stream() is fake.default_stream(), "the caller's current stream has changed"
    fake.close()
    return right and not fake.problems


@pytest.mark.parametrize("pins", [True, False], ids=["page-locked", "pageable"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_batch_is_right_under_every_schedule(scenario: Scenario, pins: bool) -> None:
    """Late copies, early drops and long keeping never show, and only page-locked memory is copied without waiting."""
    wrong = [seed for seed in range(SEEDS) if not is_right(scenario, seed, Transfer, pins=pins)]
    assert not wrong


@pytest.mark.parametrize("mutant", [WithoutWait, WithoutRecord])
@pytest.mark.parametrize("scenario", [dropped_early, many_streams])
def test_these_tests_see_a_step_that_is_left_out(mutant: type[Transfer], scenario: Scenario) -> None:
    """The tests above can fail."""
    assert not all(is_right(scenario, seed, mutant) for seed in range(SEEDS))


@pytest.fixture
def fake() -> Iterator[FakeBackend]:
    fake = FakeBackend(seed=3, threads=True)
    yield fake
    fake.close()


@pytest.fixture
def accelerator(fake: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> FakeAccelerator:
    return FakeAccelerator(monkeypatch, fake)


@on_both_faces
def test_a_pipeline_hands_over_batches_safely(fake: FakeBackend, accelerator: FakeAccelerator, face: Face) -> None:
    """With the loader's own device thread, which makes the device current for itself and for nobody else."""
    loader = Pipeline(Counting(60)).batch(4).to(OverFake(accelerator)).prefetch(3)
    seen = []
    with fake.stream(fake.new_stream()), Steps(loader, face) as steps:
        for _ in range(15):
            seen.append(look(fake, steps.next()))
    loader.close()
    fake.verify()
    assert all(saw(launches, number) for number, launches in enumerate(seen))
    assert accelerator.index == 0
    assert (fake.tensors_alive, fake.pinned_alive) == (0, 0)


def test_the_drop_in_hands_over_batches_safely(fake: FakeBackend, accelerator: FakeAccelerator) -> None:
    """`device=` of the DataLoader."""
    loader: DataLoader[Any] = DataLoader(Counting(40), batch_size=4, num_workers=2, device=OverFake(accelerator))
    seen = [look(fake, batch) for batch in loader]
    loader.close()
    fake.verify()
    assert all(saw(launches, number) for number, launches in enumerate(seen))


def test_batches_are_page_locked_for_it(fake: FakeBackend, accelerator: FakeAccelerator) -> None:
    """`pin_memory()` and `DataLoader(pin_memory=True)` ask for no CUDA where torch has another accelerator."""
    assert can_pin()
    assert why_not_pinned() is None
    accelerator._set_index(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for loader in (Pipeline(Counting(8)).batch(4).pin_memory(), DataLoader(Counting(8), 4, pin_memory=True)):
            with loader:
                assert all(fake.is_pinned(batch["x"]) for batch in loader)


def test_the_names_of_torch_2_6_are_found(fake: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """`current_device_idx` and `set_device_idx`."""
    accelerator = FakeAccelerator(monkeypatch, fake, old=True)
    backend = OverFake(accelerator)
    assert backend.default_stream() == backend.current_stream()
    with fake.stream(fake.new_stream()):
        transfer = Transfer(backend)
        transfer.receive(transfer.send(x()))
        assert accelerator.index == 0
        transfer.close()
    backend.init_thread()
    assert accelerator.index == 1


def test_a_tensor_from_the_default_stream_is_ready_on_any(fake: FakeBackend, accelerator: FakeAccelerator) -> None:
    """What is on the device already is waited for: on the stream of a thread that has set none."""
    backend = OverFake(accelerator)
    backend.init_thread()
    transfer = Transfer(backend)
    there = fake.copy(torch.zeros(4, dtype=torch.int64), fake.default_stream())
    fake.hold()
    fake.launch(lambda tensor: tensor.fill_(7), there, stream=fake.default_stream())
    with fake.stream(fake.new_stream()):
        assert backend.current_stream() != backend.default_stream()
        launch = fake.launch(torch.clone, transfer.receive(transfer.send({"x": there}))["x"])
    fake.release()
    fake.synchronize()
    assert launch.result.tolist() == [7, 7, 7, 7]
    transfer.close()


def test_objects_move_themselves_on_the_loaders_stream(fake: FakeBackend, accelerator: FakeAccelerator) -> None:
    """By their own `to`, and without `non_blocking` where their memory may be pageable."""
    backend = OverFake(accelerator)
    transfer = Transfer(backend)
    asked: list[dict[str, Any]] = []

    class Own(Graph):
        def pin_memory(self) -> "Own":
            return self

        def to(self, device: torch.device, **more: Any) -> "Own":  # type: ignore[override]
            asked.append(more)
            assert fake.current_stream() is transfer._stream.stream
            return self

    transfer.receive(transfer.send(Own(x())))
    backend.pins = False
    transfer.receive(transfer.send(Own(x())))
    assert asked == [{"non_blocking": True}, {}]
    transfer.close()


def test_a_driver_that_refuses_later_is_told_of_once(
    fake: FakeBackend, accelerator: FakeAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its text; a wrong shape stays the caller's error, and so does what a user's `pin_memory()` raises."""
    backend = OverFake(accelerator)

    class Broken(Graph):
        def pin_memory(self) -> "Graph":
            raise RuntimeError("my own")

    with pytest.raises(RuntimeError, match="my own"):
        backend.pin_object(Broken(x()))
    with pytest.raises(RuntimeError, match="negative"):
        backend.alloc_pinned((-1,), torch.int64)
    assert backend.pins

    def refuse(*args: Any) -> torch.Tensor:
        raise RuntimeError("level zero: out of host memory")

    monkeypatch.setattr(fake, "_alloc_pinned", refuse)
    with pytest.warns(RuntimeWarning, match="copied from pageable memory.*level zero"):
        tensor = backend.pin(x())
    assert not fake.is_pinned(tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.alloc_pinned((2,), torch.int64).shape == (2,)
        assert not backend.pins


def test_a_device_without_page_locked_memory_is_no_reason_to_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found out when the backend is opened, and batches are copied from pageable memory."""
    fake = FakeBackend(pins=False)
    backend = OverFake(FakeAccelerator(monkeypatch, fake))
    assert not backend.pins
    batch = {"x": x()}
    assert pin_batch(batch, backend) is batch
    fake.close()


# --- which device


def play(monkeypatch: pytest.MonkeyPatch, kind: str | None, count: int = 1) -> None:
    """Let torch have this accelerator, and so many of it."""
    found = None if kind is None else torch.device(kind)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: found)
    monkeypatch.setattr(torch, "get_device_module", lambda _: SimpleNamespace(device_count=lambda: count))


def test_the_accelerator_of_this_torch_is_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its type, with an index, and by a bare index where there is no CUDA; asking for it starts no driver."""
    play(monkeypatch, "xpu", 2)
    assert check_device("xpu") == torch.device("xpu")
    assert check_device(1) == torch.device("xpu", 1)
    with pytest.raises(DeviceError, match="'xpu:2' is not there, there is xpu:0, xpu:1"):
        Pipeline(range(4)).batch(2).to("xpu:2")
    with pytest.raises(DeviceError, match="'xpu:2' is not there"):
        DataLoader(range(4), device="xpu:2")
    with pytest.raises(DeviceError, match="needs a CUDA device"):
        check_device("cuda")


@pytest.mark.parametrize(
    ("device", "there", "says"),
    [
        ("xpu", None, "'xpu' is not there: torch .* is built without an accelerator; pass device='cpu'"),
        ("hpu:1", "xpu", "'hpu:1' is not there: the accelerator of torch .* is 'xpu'"),
        ("mps", "cuda", "'mps' is not there: the accelerator of torch .* is 'cuda'"),
    ],
)
def test_a_device_that_is_not_there_is_a_device_error(
    monkeypatch: pytest.MonkeyPatch, device: str, there: str | None, says: str
) -> None:
    """At construction, with what is there."""
    play(monkeypatch, there)
    with pytest.raises(DeviceError, match=says):
        Pipeline(range(4)).batch(2).to(device)


def test_a_torch_built_for_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with CUDA: the build says nothing of the machine."""
    play(monkeypatch, "xpu", 0)
    with pytest.raises(DeviceError, match=r"needs such a device, but none was found, though torch .* is built for it"):
        check_device("xpu")
    assert not can_pin()
    assert open_transfer(None) is None


def test_a_device_of_a_package_that_is_not_imported_is_a_value_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch does not know its name before."""
    play(monkeypatch, None)
    with pytest.raises(ValueError, match=r"got 'npu', which this torch does not know; .* once that is imported"):
        check_device("npu")


def test_mps_has_one_stream_and_no_page_locked_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its copies are waited for, `pin_memory` is never asked for, and a loader says why it does not page-lock."""
    play(monkeypatch, "mps")
    backend = open_backend("mps")
    assert isinstance(backend, OneStreamBackend)
    assert backend.device == torch.device("mps", 0)
    assert not backend.pins
    copied: list[tuple[Any, ...]] = []

    def to(tensor: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
        copied.append((*args, more))
        return tensor

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch, "empty", without_pinning(torch.empty))
    transfer = Transfer(backend)
    batch = transfer.receive(transfer.send({"x": x()}))
    assert copied == [(torch.device("mps", 0), {})]
    assert batch["x"].tolist() == x().tolist()
    assert backend.alloc_pinned((2, 3), torch.float32).device.type == "cpu"
    transfer.close()
    assert why_not_pinned() == "mps has no page-locked memory"
    with pytest.warns(UserWarning, match="mps has no page-locked memory"):
        assert next(iter(DataLoader([x()], pin_memory=True))).shape[0] == 1


def without_pinning(empty: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def checked(*args: Any, **more: Any) -> torch.Tensor:
        assert not more.get("pin_memory"), "on MPS this returns memory of the device"
        return empty(*args, **more)

    return checked


def test_each_device_has_its_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA, which ROCm calls itself too, keeps its own; a fake is one; all obey the protocol."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert isinstance(open_backend("cuda"), CudaBackend)
    assert check_device(0) == torch.device("cuda", 0)
    assert all(
        hasattr(kind, name)
        for kind in (AcceleratorBackend, OneStreamBackend)
        for name in Backend.__dict__
        if not name.startswith("_") and name not in ("device", "pins")
    )
    assert DEVICE.type == "xpu"
