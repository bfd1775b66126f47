"""Whether Ray is still there, asked now and then while somebody waits for it."""

from collections.abc import Callable
from contextlib import suppress
from time import perf_counter
from typing import Final

from aioloader.errors import WorkerDiedError
from aioloader.executors.ray.thread import RayThread

__all__ = ["Lookout"]

LOOK_SECONDS: Final = 2.0  # between two looks
SILENT_SECONDS: Final = 40.0  # without a head, after which an epoch ends: Ray ends the whole process after 60


class Lookout:
    """Looks whether Ray is still there while calls wait for it. In the thread of `RayThread`.

    After `ray.shutdown()` no earlier call is ever answered, and nobody is told. Without a head actors
    work on, and it may come back; if not, Ray ends this process, so the program is told while it can still save its
    state.

    Args:
        thread: It.
        waits: Whether somebody still waits for something.
        has_gone: Whether the connection has ended; sees to those who wait.
        fail: Tells them that the head does not answer.
        seen: Called when it does.
    """

    def __init__(
        self,
        thread: RayThread,
        *,
        waits: Callable[[], bool],
        has_gone: Callable[[], bool],
        fail: Callable[[BaseException], None],
        seen: Callable[[], None],
    ) -> None:
        self._thread = thread
        self._waits, self._has_gone, self._fail, self._seen = waits, has_gone, fail, seen
        self._looks = False
        self._silent_since: float | None = None

    def watch(self) -> None:
        """Look from now on, until nobody waits any more."""
        if not self._looks:
            self._looks = True
            self._thread.later(LOOK_SECONDS, self._look)

    def _look(self) -> None:
        self._looks = False
        if not self._waits() or self._has_gone():
            self._silent_since = None
            return
        self.watch()
        if self._thread.head_answers:
            self._silent_since = None
            with suppress(Exception):  # it has just gone
                self._seen()
        elif self._silent_since is None:
            self._silent_since = perf_counter()
        elif perf_counter() - self._silent_since >= SILENT_SECONDS:
            self._silent_since = None
            self._fail(
                WorkerDiedError(
                    f"the head of the Ray cluster has not answered for {SILENT_SECONDS:.0f} s; Ray ends this process "
                    f"soon unless ray.shutdown() is called"
                )
            )
