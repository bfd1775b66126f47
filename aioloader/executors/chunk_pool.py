"""What a step needs of workers elsewhere that run chunks: processes of this machine, or actors of a cluster."""

from asyncio import Future
from collections.abc import Callable, Hashable
from typing import Any, Protocol

from aioloader.executors.processes.worker_pool import Outcome

__all__ = ["ChunkPool"]


class ChunkPool(Protocol):
    """See `WorkerPool`, whose methods these are."""

    ended: "Future[None] | None"
    learned: tuple[float | None, float | None]
    """The seconds and the bytes of a sample, as the step of an epoch has found out; for that of the next one."""

    @property
    def count(self) -> int:
        """Chunks that may be worked on side by side, at most."""

    @property
    def gone(self) -> bool:
        """Whether it is closed and all workers have ended."""

    def prepare(self) -> None:
        """Start what takes long, before the first task is there."""

    def submit(self, owner: Hashable, values: Any, done: Callable[[Outcome], None], slot: int | None = None) -> None:
        """Let a worker run the program on `values`; `done` is called once, unless the owner forgets the task."""

    def forget(self, owner: Hashable) -> None:
        """Drop the tasks of `owner`."""

    def expire(self, owner: Hashable, seconds: float) -> None:
        """Kill the workers that have been at one value of `owner` for so long."""

    def at_work(self, owner: Hashable) -> list[tuple[Any, int, float]]:
        """For each task of `owner` that is run: its values, the index of the one at hand, and since when."""

    def hold(self, owner: Hashable, said: Callable[[bool], None]) -> None:
        """Let no worker begin a value, until all owners have let go."""

    def let_go(self, owner: Hashable) -> None:
        """See `hold`."""

    def end_on(self, loop: Any) -> None:
        """Complete `ended` on this loop when the workers have ended after `close`."""

    def close(self) -> None:
        """End the workers."""

    def alive(self) -> list[str]:
        """The names of the workers."""
