"""The streams of the fake device, and what is queued on them."""

from collections import deque
from collections.abc import Callable
from typing import Any

__all__ = ["FakeStream", "Launch", "Operation"]


class Operation:
    """A piece of work on a stream, which runs once `ready` returns True."""

    def __init__(self, run: Callable[[], object], ready: Callable[[], bool]) -> None:
        self.run = run
        self.ready = ready


class FakeStream:
    """A queue of operations, which run one after the other at times that the device chooses."""

    def __init__(self, name: str, speed: float) -> None:
        self.name = name
        self.speed = speed
        self.queued: deque[Operation] = deque()
        self.enqueued = 0
        self.completed = 0

    def __repr__(self) -> str:
        return f"<FakeStream {self.name}: {self.completed} of {self.enqueued} done>"


class Launch:
    """A kernel that has been queued with `FakeBackend.launch`."""

    def __init__(self) -> None:
        self._results: list[Any] = []

    @property
    def done(self) -> bool:
        """Whether the kernel has run."""
        return bool(self._results)

    @property
    def result(self) -> Any:
        """What the kernel's function returned.

        Raises:
            RuntimeError: It has not run, or failed; call `synchronize` or `verify` first.
        """
        if not self._results:
            raise RuntimeError("the kernel has not run; call backend.synchronize() first, or backend.verify()")
        return self._results[0]
