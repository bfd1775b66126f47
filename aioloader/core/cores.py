"""The number of usable cores."""

import os

__all__ = ["usable_cores", "use_cores"]

_told: int | None = None


def usable_cores() -> int:
    """How many cores this process may use."""
    if _told is not None:
        return _told
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1


def use_cores(count: int) -> None:
    """Let this process use so many: it has been given no more, though it may run on all."""
    global _told
    _told = count
