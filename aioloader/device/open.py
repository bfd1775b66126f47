"""Opens the way to a device, and raises for a wrong device before any work starts."""

from typing import Final, TypeAlias

import torch

from aioloader.device.accelerator import AcceleratorBackend, OneStreamBackend, one_stream
from aioloader.device.base import Backend
from aioloader.device.cuda import CudaBackend
from aioloader.device.host import HostBackend
from aioloader.device.transfer import Transfer
from aioloader.errors import DeviceError

__all__ = ["DeviceLike", "can_pin", "check_device", "open_backend", "open_transfer", "why_not_pinned"]

DeviceLike: TypeAlias = str | torch.device | int | Backend

_ACCELERATORS: Final = frozenset({"hpu", "mps", "mtia", "xpu"})
"""Types that torch itself knows as accelerators, besides CUDA. Others are added by packages, as NPU by torch_npu."""

_RULE: Final = "device must be 'cpu', 'cuda' or the type of torch's accelerator, with ':<index>' if need be"


def check_device(device: DeviceLike) -> torch.device:
    """The `torch.device` for `device`, checked without starting the device's driver in this process.

    So a pipeline can be described and checked before worker processes are forked: children of a process that has used
    CUDA cannot use it.

    Args:
        device: `"cpu"`, `"cuda"`, `"cuda:1"`, the type of the accelerator that this torch was built for or that a
            package has added (`"xpu"`, `"hpu"`, `"npu"`, `"mps"`), a `torch.device`, or an int, which is the index of a
            CUDA device, or of that accelerator where there is no CUDA.

    Returns:
        The device; one without an index stays without one.

    Raises:
        TypeError: Not a device at all.
        ValueError: A device that torch does not know, or that batches cannot be copied to.
        DeviceError: A device that is not there.
    """
    if isinstance(device, Backend):
        return device.device
    found = _parsed(device)
    if found.type == "cuda":
        _check_cuda(found)
    elif found.type != "cpu":
        _check_accelerator(found)
    return found


def open_backend(device: DeviceLike) -> Backend:
    """The backend for `device`. A device without an index is the current one of the calling thread.

    Args:
        device: As in `check_device`. A `Backend` is returned itself: tests pass `aioloader.testing.FakeBackend`.

    Raises:
        TypeError, ValueError, DeviceError: As in `check_device`.
    """
    if isinstance(device, Backend):
        return device
    found = check_device(device)
    if found.type == "cpu":
        return HostBackend()
    if found.type == "cuda":
        return CudaBackend(found)
    if one_stream(found.type):
        return OneStreamBackend(found)
    return AcceleratorBackend(found)


def open_transfer(device: DeviceLike | None) -> Transfer | None:
    """The way to `device`: the only place where a loader opens one.

    Args:
        device: As in `check_device`. None: batches are only page-locked.

    Returns:
        None: `device` is None, and nothing can be page-locked here (`why_not_pinned`).
    """
    chosen = _pinning_device() if device is None else device
    return None if chosen is None else Transfer(open_backend(chosen))


def can_pin() -> bool:
    """Whether there is a device for which page-locked memory is useful; does not start its driver in this process."""
    return _pinning_device() is not None


def why_not_pinned() -> str | None:
    """Why batches cannot be page-locked here; None if they can.

    For a warning, after which a loader goes on without pinning, as torch's DataLoader does.
    """
    if can_pin():
        return None
    accelerator = _accelerator()
    if accelerator is not None and one_stream(accelerator.type) and _count(accelerator) > 0:
        return f"{accelerator.type} has no page-locked memory"
    return "no accelerator is found"


def _parsed(device: object) -> torch.device:
    if isinstance(device, torch.device):
        return device
    if isinstance(device, str):
        try:
            return torch.device(device)
        except RuntimeError as error:
            raise ValueError(
                f"{_RULE}, got {device!r}, which this torch does not know; {_what_is_there()}, and a device of another "
                f"package is known once that is imported"
            ) from error
    if isinstance(device, int) and not isinstance(device, bool):
        if device < 0:
            raise ValueError(
                f"device as a number must be the index of a device, 0 or more, got {device!r}; pass 'cpu' or 'cuda'"
            )
        accelerator = _accelerator()
        return torch.device("cuda" if accelerator is None or torch.cuda.device_count() else accelerator.type, device)
    raise TypeError(f"device must be a str, a torch.device or an int, got {device!r}; pass for instance 'cuda'")


def _check_cuda(device: torch.device) -> None:
    count = torch.cuda.device_count()
    if count == 0:
        built = "" if torch.backends.cuda.is_built() else f", and torch {torch.__version__} is built without CUDA"
        raise DeviceError(f"device {str(device)!r} needs a CUDA device, but none was found{built}; pass device='cpu'")
    _check_index(device, count, "see CUDA_VISIBLE_DEVICES")


def _check_accelerator(device: torch.device) -> None:
    accelerator = _accelerator()
    if accelerator is None or accelerator.type != device.type:
        if device.type not in _ACCELERATORS:
            raise ValueError(
                f"{_RULE}, got {str(device)!r}; leave .to() and device= out and call batch.to({str(device)!r}) in the "
                f"training loop"
            )
        raise DeviceError(f"device {str(device)!r} is not there: {_what_is_there()}; pass device='cpu'")
    count = _count(accelerator)
    if count == 0:
        raise DeviceError(
            f"device {str(device)!r} needs such a device, but none was found, though torch {torch.__version__} is "
            f"built for it; pass device='cpu'"
        )
    _check_index(device, count, "pass one of them")


def _check_index(device: torch.device, count: int, way_out: str) -> None:
    index: int | None = device.index  # torch's annotation leaves the None out
    if index is not None and index >= count:
        names = ", ".join(f"{device.type}:{number}" for number in range(count))
        raise DeviceError(f"device {str(device)!r} is not there, there is {names}; {way_out}")


def _accelerator() -> torch.device | None:
    """The device type that this torch was built for, or that a package has added; it need not be there."""
    return torch.accelerator.current_accelerator()


def _count(accelerator: torch.device) -> int:
    """How many there are. As `torch.accelerator.device_count()`, which in torch 2.6 starts the driver."""
    return int(torch.get_device_module(accelerator.type).device_count())


def _what_is_there() -> str:
    accelerator = _accelerator()
    if accelerator is None:
        return f"torch {torch.__version__} is built without an accelerator"
    return f"the accelerator of torch {torch.__version__} is {accelerator.type!r}"


def _pinning_device() -> torch.device | None:
    # Not `torch.cuda.is_available()`: that starts the driver in this process, after which forked children fail.
    if torch.cuda.device_count() > 0:
        return torch.device("cuda")
    accelerator = _accelerator()
    if accelerator is None or accelerator.type == "cuda" or one_stream(accelerator.type):
        return None
    return accelerator if _count(accelerator) > 0 else None
