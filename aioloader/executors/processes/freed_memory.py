"""What a worker has freed, it keeps for the next sample."""

import ctypes
import os
from contextlib import suppress
from typing import Final

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD: Final = -1, 64 << 20  # numbers of `mallopt`, and bytes
_MMAP_THRESHOLD: Final = -3, 32 << 20  # the most there may be
_SET_BY_USERS: Final = ("GLIBC_TUNABLES", "LD_PRELOAD", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def keep_freed_memory() -> None:
    """Let this process, a worker, keep up to 64 MiB that were freed.

    Samples of some hundred kilobytes are made and freed one after the other. By default, glibc gives their memory back
    to the system each time, or does not, depending on what else lies there; and fresh pages take as long as what is
    written to them. Where the user has said something of that, or malloc is another one, nothing is changed.
    """
    if any(name in os.environ for name in _SET_BY_USERS):
        return
    with suppress(OSError, AttributeError, TypeError):  # not glibc
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 - musl has a `mallopt`, too
        for setting in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            library.mallopt(*setting)
