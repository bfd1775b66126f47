"""The thread of a loader that talks to Ray: connecting, starting, packing and copying all take their time."""

import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from heapq import heappop, heappush
from itertools import count
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any, Protocol, TypeVar
from weakref import WeakSet

from aioloader.executors.processes.worker_thread import WorkerThread
from aioloader.executors.ray.cluster import Membership, join_cluster

__all__ = ["RayOwner", "RayThread", "end_all_ray", "forget_all_ray", "ray_thread_of"]

K = TypeVar("K")


class RayOwner(Protocol):
    """Whoever has actors; called in the thread of `RayThread`."""

    def end(self) -> None:
        """End them, in bounded time. The connection may be gone."""


def ray_thread_of(host: WorkerThread) -> "RayThread":
    """The one of the loader whose worker processes are those of `host`; it ends with them."""
    thread: RayThread = host.beside("ray", RayThread)
    return thread


class RayThread:
    """Calls functions one after the other in a thread `aioloader-ray`, which the first `call` starts and `close` ends.

    It never polls: it sleeps until somebody has something for it, or until what was asked for `later` is due. Results
    come as callbacks of Ray's own threads, which only `call`.

    What if Ray itself hangs, since the head of the cluster has gone? Only this thread waits for it; nobody waits for
    this thread without a limit.
    """

    def __init__(self) -> None:
        self._jobs: SimpleQueue[tuple[Callable[..., object], tuple[Any, ...]] | None] = SimpleQueue()
        self._later: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._numbers = count()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._owners: dict[Any, RayOwner] = {}
        self._membership: Membership | None = None
        self._closing = False
        self._ended = False

    # -- in any thread -----------------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether `close` has been called."""
        return self._closing

    def get_or_create(self, key: Any, make: Callable[[], Any]) -> Any:
        """The owner of actors that is kept under `key` until `close`; made if there is none."""
        with self._lock:
            if key not in self._owners:
                self._owners[key] = make()
            return self._owners[key]

    def kept(self, kind: type[K]) -> list[K]:
        """The owners of a kind."""
        with self._lock:
            return [owner for owner in self._owners.values() if isinstance(owner, kind)]

    def call(self, fn: Callable[..., object], *args: Any) -> None:
        """Call `fn` in the thread, soon. Safe in any thread, and in the middle of a garbage collection.

        What it raises is printed: it must not raise. After the end of the thread it is not called.
        """
        self._jobs.put((fn, args))
        if self._thread is None:
            self._start()

    def close(self) -> None:
        """End the actors of all owners, then the thread, without waiting. Idempotent; a finalizer may call it."""
        if not self._closing:
            self._closing = True
            self._jobs.put(None)

    def join(self, seconds: float) -> bool:
        """Wait until all has ended; returns whether it has in time."""
        thread = self._thread
        if thread is None or thread is threading.current_thread():
            return True
        thread.join(max(0.0, seconds))
        return not thread.is_alive()

    def _start(self) -> None:
        with self._lock:
            if self._thread is not None or self._closing:
                return
            thread = threading.Thread(target=self._main, name="aioloader-ray", daemon=True)
            _alive.add(self)
            thread.start()
            self._thread = thread

    # -- in the thread -----------------------------------------------------------------------------------------------

    def join_cluster(self, address: str | None) -> Membership:
        """Connect, if that has not been done, or the connection has ended; another one is another object.

        Raises:
            ValueError, ConnectionError: See `cluster.join_cluster`.
        """
        if self._membership is not None and not self._membership.alive:
            self._membership.leave()
            self._membership = None
        if self._membership is None:
            self._membership = join_cluster(address)
        return self._membership

    @property
    def connected(self) -> bool:
        """Whether the connection that it has made is still there: the user may have ended it."""
        return self._membership is not None and self._membership.alive

    @property
    def head_answers(self) -> bool:
        """Whether the head of the cluster takes connections. What asks it hangs otherwise."""
        return self._membership is not None and self._membership.head_answers()

    def later(self, seconds: float, fn: Callable[..., object], *args: Any) -> None:
        """Call `fn` in so many seconds, unless the thread has ended by then."""
        heappush(self._later, (monotonic() + seconds, next(self._numbers), fn, args))

    def _main(self) -> None:
        try:
            while not self._closing:
                self._run_once()
        finally:
            self._end()

    def _run_once(self) -> None:
        timeout = self._later[0][0] - monotonic() if self._later else None
        job = None
        if timeout is None or timeout > 0:
            with suppress(Empty):
                job = self._jobs.get(timeout=timeout)
        else:  # first, or it would never come while there is always something to do
            _, _, fn, args = heappop(self._later)
            job = fn, args
        if job is not None:
            _call(*job)

    def _end(self) -> None:
        self._closing = True
        for owner in list(self._owners.values()):
            _call(owner.end)
        self._owners.clear()
        self._later.clear()
        if self._membership is not None:
            _call(self._membership.leave)
        self._ended = True


def _call(fn: Callable[..., object], args: tuple[Any, ...] = ()) -> None:
    try:
        fn(*args)
    except BaseException:  # one of ours: whoever waits for it would wait for ever if the thread ended
        traceback.print_exc()


_alive: WeakSet[RayThread] = WeakSet()


def end_all_ray(deadline: float) -> None:
    """At interpreter exit: end all actors, and wait for that until `deadline` (`time.monotonic`)."""
    alive = list(_alive)
    for ray_thread in alive:
        ray_thread.close()
    for ray_thread in alive:
        ray_thread.join(deadline - monotonic())


def forget_all_ray() -> None:
    """In a forked child: the threads and their actors are the parent's."""
    _alive.clear()
