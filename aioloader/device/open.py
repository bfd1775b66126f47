"""Opens the backend for a device, and raises for a wrong device before any work starts."""

import torch

from aioloader.device.base import Backend
from aioloader.device.cuda import CudaBackend
from aioloader.device.host import HostBackend
from aioloader.errors import DeviceError

__all__ = ["can_pin", "check_device", "open_backend"]

DeviceLike = str | torch.device | int | Backend


def check_device(device: DeviceLike) -> torch.device:
    """The `torch.device` for `device`, checked without starting CUDA in this process.

    So a pipeline can be described and checked before worker processes are forked: children of a process that has used
    CUDA cannot use it.

    Args:
        device: `"cpu"`, `"cuda"`, `"cuda:1"`, a `torch.device`, or an int, which is a CUDA index as in torch.

    Returns:
        The device; `cuda` without an index stays without one.

    Raises:
        TypeError: Not a device at all.
        ValueError: A device that batches cannot be copied to.
        DeviceError: A CUDA device that does not exist.
    """
    if isinstance(device, torch.device):
        found = device
    elif isinstance(device, str):
        try:
            found = torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:<index>', got {device!r}") from error
    elif isinstance(device, int) and not isinstance(device, bool):
        if device < 0:
            raise ValueError(
                f"device as a number must be a CUDA index, 0 or more, got {device!r}; pass 'cpu' or 'cuda'"
            )
        found = torch.device("cuda", device)
    elif isinstance(device, Backend):
        return device.device
    else:
        raise TypeError(f"device must be a str, a torch.device or an int, got {device!r}; pass for instance 'cuda'")
    if found.type not in ("cpu", "cuda"):
        raise ValueError(
            f"device must be 'cpu', 'cuda' or 'cuda:<index>', got {str(found)!r}; leave .to() and device= out and call "
            f"batch.to({str(found)!r}) in the training loop"
        )
    if found.type == "cuda":
        _check_cuda(found)
    return found


def open_backend(device: DeviceLike) -> Backend:
    """The backend for `device`. `"cuda"` without an index is the current CUDA device of the calling thread.

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
    return CudaBackend(found)


def can_pin() -> bool:
    """Whether there is a device for which page-locked memory is useful; does not start CUDA in this process.

    If there is none, warn and go on without pinning, as torch's DataLoader does.
    """
    # Not `torch.cuda.is_available()`: that starts the driver in this process, after which forked children fail.
    return torch.cuda.device_count() > 0


def _check_cuda(device: torch.device) -> None:
    count = torch.cuda.device_count()
    if count == 0:
        built = "" if torch.backends.cuda.is_built() else f", and torch {torch.__version__} is built without CUDA"
        raise DeviceError(f"device {str(device)!r} needs a CUDA device, but none was found{built}; pass device='cpu'")
    index: int | None = device.index  # torch's annotation leaves the None out
    if index is not None and index >= count:
        names = ", ".join(f"cuda:{number}" for number in range(count))
        raise DeviceError(f"device {str(device)!r} is not there, there is {names}; see CUDA_VISIBLE_DEVICES")
