"""The device stage: page-locks batches, copies them on a separate stream, and hands them over safely."""

from aioloader.device.accelerator import AcceleratorBackend, OneStreamBackend
from aioloader.device.base import Backend, Event, Stream
from aioloader.device.cuda import CudaBackend
from aioloader.device.host import HostBackend
from aioloader.device.open import DeviceLike, can_pin, check_device, open_backend, open_transfer, why_not_pinned
from aioloader.device.transfer import Transfer, Transferred, pin_batch

__all__ = [
    "AcceleratorBackend",
    "Backend",
    "CudaBackend",
    "DeviceLike",
    "Event",
    "HostBackend",
    "OneStreamBackend",
    "Stream",
    "Transfer",
    "Transferred",
    "can_pin",
    "check_device",
    "open_backend",
    "open_transfer",
    "pin_batch",
    "why_not_pinned",
]
