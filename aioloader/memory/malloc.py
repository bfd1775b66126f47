"""An advice to the C library: keep what is freed, for the next allocation of that size."""

import ctypes
import sys
from typing import Final

__all__ = ["keep_freed_memory"]

_M_TRIM_THRESHOLD: Final = -1
_M_TOP_PAD: Final = -2
_M_MMAP_THRESHOLD: Final = -3

LARGEST_BYTES: Final = 32 << 20
"""Larger blocks come from the system each time; glibc takes no more."""


def keep_freed_memory() -> bool:
    """Let this process keep memory that it has freed, instead of giving it back and asking for it again.

    A decoder that needs half a megabyte for each image frees it again at once. glibc then gives the pages back to the
    system, and the next image touches fresh ones, which the system has to fill with zeros; with several threads each of
    these steps also stops the others for a moment. Decoding JPEGs in two threads gets a third faster without.

    It is an advice for the whole process, for good, and the reason why no loader gives it by itself: memory in use
    stays at its peak. Call it once, before the first loader. Nothing else changes.

    Returns:
        Whether the C library took it: glibc does (most Linux), others have no such setting.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):  # musl has neither
        return False
    settings = ((_M_MMAP_THRESHOLD, LARGEST_BYTES), (_M_TRIM_THRESHOLD, (1 << 31) - 1), (_M_TOP_PAD, 16 << 20))
    return all(bool(mallopt(name, value)) for name, value in settings)
