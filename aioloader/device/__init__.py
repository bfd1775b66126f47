"""The device stage: page-locks batches, copies them on a separate stream, and hands them over safely."""

from aioloader.device.base import Backend, Event, Stream
from aioloader.device.cuda import CudaBackend
from aioloader.device.host import HostBackend
from aioloader.device.open import can_pin, check_device, open_backend
from aioloader.device.transfer import Transfer, Transferred, pin_batch

__all__ = [
    "Backend",
    "CudaBackend",
    "Event",
    "HostBackend",
    "Stream",
    "Transfer",
    "Transferred",
    "can_pin",
    "check_device",
    "open_backend",
    "pin_batch",
]
