"""A `torch.accelerator` without hardware: torch's own names, over the fake device and its late streams.

`AcceleratorBackend` calls torch, and torch here is asked to play two XPUs, of which number 1 is a `FakeBackend`. So the
backend's calls run under all the schedules of the fake device, and a step that is left out shows as wrong numbers. It
proves that the calls are made, in the right order and in the right threads; not that a real driver follows them.
"""

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aioloader.device import AcceleratorBackend
from aioloader.testing import FakeBackend, FakeEvent, FakeStream

__all__ = ["DEVICE", "FakeAccelerator", "OverFake"]

DEVICE = torch.device("xpu", 1)
"""Not the current device of any thread, until somebody makes it that."""


class FakeTorchStream:
    """As `torch.Stream`: two objects may stand for one stream, and are equal then."""

    def __init__(self, fake: "FakeAccelerator", stream: FakeStream) -> None:
        self.fake = fake
        self.stream = stream

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FakeTorchStream) and other.stream is self.stream

    def __hash__(self) -> int:
        return hash(self.stream)

    def record_event(self) -> FakeEvent:
        return self.fake.backend.record_event(self.stream)

    def wait_event(self, event: FakeEvent) -> None:
        self.fake.backend.wait_event(self.stream, event)


class FakeAccelerator:
    """Replaces what torch offers for its accelerator, until the test is over.

    Args:
        backend: Device number 1.
        old: With the names that torch 2.6 has.

    Attributes:
        copies: For each copy to the device: whether it was `non_blocking`, and whether its source was page-locked.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, backend: FakeBackend, *, old: bool = False) -> None:
        self.backend = backend
        self.copies: list[tuple[bool, bool]] = []
        self._local = threading.local()
        accelerator = {
            "current_accelerator": lambda: torch.device("xpu"),
            "current_device_idx" if old else "current_device_index": lambda: self.index,
            "set_device_idx" if old else "set_device_index": self._set_index,
            "current_stream": self._current_stream,
            "set_stream": self._set_stream,
        }
        monkeypatch.setattr(torch, "accelerator", SimpleNamespace(**accelerator))
        monkeypatch.setattr(torch, "get_device_module", lambda _: SimpleNamespace(device_count=lambda: 2))
        monkeypatch.setattr(torch, "Stream", self._new_stream)
        self._patch_memory(monkeypatch)
        self._patch_tensors(monkeypatch)

    @property
    def index(self) -> int:
        """The current device of the calling thread."""
        return int(getattr(self._local, "index", 0))

    def _set_index(self, index: int) -> None:
        self._local.index = index

    def _current_stream(self, device: torch.device) -> FakeTorchStream:
        assert device == DEVICE
        return FakeTorchStream(self, self.backend.current_stream())

    def _set_stream(self, stream: FakeTorchStream) -> None:
        self.backend._current.stream = stream.stream
        self._local.index = DEVICE.index

    def _new_stream(self, device: torch.device) -> FakeTorchStream:
        assert device == DEVICE
        return FakeTorchStream(self, self.backend.new_stream())

    def _patch_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        empty, empty_like = torch.empty, torch.empty_like

        def fake_empty(*size: Any, pin_memory: bool = False, **more: Any) -> torch.Tensor:
            if not pin_memory:
                return empty(*size, **more)
            if not self.backend.pins:
                raise RuntimeError("no allocator for page-locked memory")
            shape = (size[0],) if isinstance(size[0], int) else size[0]
            return self.backend.alloc_pinned(shape, more["dtype"])

        def fake_empty_like(tensor: torch.Tensor, *, pin_memory: bool = False, **more: Any) -> torch.Tensor:
            return self.backend._alloc_pinned(tensor) if pin_memory else empty_like(tensor, **more)

        monkeypatch.setattr(torch, "empty", fake_empty)
        monkeypatch.setattr(torch, "empty_like", fake_empty_like)

    def _patch_tensors(self, monkeypatch: pytest.MonkeyPatch) -> None:
        to: Any = torch.Tensor.to

        def fake_to(tensor: torch.Tensor, *args: Any, non_blocking: bool = False, **more: Any) -> torch.Tensor:
            if args != (DEVICE,):
                found: torch.Tensor = to(tensor, *args, non_blocking=non_blocking, **more)
                return found
            self.copies.append((non_blocking, self.backend.is_pinned(tensor)))
            copied = self.backend.copy(tensor, self.backend.current_stream())
            if not non_blocking:
                self.backend.synchronize()
            return copied

        def record_stream(tensor: torch.Tensor, stream: FakeTorchStream) -> None:
            self.backend.record_use(tensor, stream.stream)

        monkeypatch.setattr(torch.Tensor, "to", fake_to)
        monkeypatch.setattr(torch.Tensor, "record_stream", record_stream)
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: self.backend.is_pinned(tensor))


class OverFake(AcceleratorBackend):
    """Tells memory of the device by its address, since it is in fact the host's."""

    def __init__(self, fake: FakeAccelerator) -> None:
        super().__init__(DEVICE)
        self.fake = fake

    def owns(self, tensor: torch.Tensor) -> bool:
        return self.fake.backend.owns(tensor)
