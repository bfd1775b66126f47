"""The thread of a loader that talks to Ray: connecting, starting, packing and copying all take their time."""

import selectors
import socket
import threading
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from heapq import heappop, heappush
from itertools import count
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

    It never polls: it sleeps until somebody has something for it, a socket that it watches is ready, or what was asked
    for `later` is due. Results come as callbacks of Ray's own threads, which only `call`, or from actors of this host,
    over sockets.

    What if Ray itself hangs, since the head of the cluster has gone? Only this thread waits for it; nobody waits for
    this thread without a limit.
    """

    def __init__(self) -> None:
        self._jobs: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._later: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._numbers = count()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._wake: socket.socket | None = None
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
        self._jobs.append((fn, args))
        if self._thread is None:
            self._start()
        self._wake_up()

    def close(self) -> None:
        """End the actors of all owners, then the thread, without waiting. Idempotent; a finalizer may call it."""
        self._closing = True
        self._wake_up()

    def join(self, seconds: float) -> bool:
        """Wait until all has ended; returns whether it has in time."""
        thread = self._thread
        if thread is None or thread is threading.current_thread():
            return True
        thread.join(max(0.0, seconds))
        return not thread.is_alive()

    def forget(self) -> None:
        """In a forked child: close its copies of the parent's sockets, and never do anything again.

        They are not told apart from the parent's otherwise: an actor would not hear that the parent has hung up.
        """
        self._closing = True
        if self._wake is not None:
            for key in list(self._selector.get_map().values()):
                key.fileobj.close()  # type: ignore[union-attr]  # sockets all of them
            self._wake.close()
            self._selector.close()

    def _wake_up(self) -> None:
        wake = self._wake
        if wake is not None:
            with suppress(OSError):  # full: it is awake; closed: it has ended
                wake.send(b"\0")

    def _start(self) -> None:
        with self._lock:
            if self._thread is not None or self._closing:
                return
            self._woken, wake = socket.socketpair()
            self._woken.setblocking(False)
            wake.setblocking(False)
            self._selector = selectors.DefaultSelector()
            self._selector.register(self._woken, selectors.EVENT_READ, self._drain)
            self._wake = wake  # last, for `forget`
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

    def watch(self, sock: Any, ready: Callable[[], object], *, writes: bool = False) -> None:
        """Call `ready` when there is something to read in `sock`, or also when it takes more; until `unwatch`.

        Args:
            sock: A socket, or what has a `fileno` and a `close`.
            ready: As for `call`.
            writes: Whether somebody has something to write.
        """
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if writes else 0)
        key = self._selector.get_map().get(sock)
        if key is None:
            self._selector.register(sock, events, ready)
        elif key.events != events:
            self._selector.modify(sock, events, ready)

    def unwatch(self, sock: Any) -> None:
        """See `watch`; before it is closed."""
        self._selector.unregister(sock)

    def _main(self) -> None:
        try:
            while not self._closing:
                self._run_once()
        finally:
            self._end()

    def _run_once(self) -> None:
        timeout = self._later[0][0] - monotonic() if self._later else None
        if timeout is not None and timeout <= 0:  # first, or it would never come while there is always something to do
            _, _, fn, args = heappop(self._later)
            _call(fn, args)
            return
        for key, _ in self._selector.select(0 if self._jobs else timeout):
            if self._selector.get_map().get(key.fd) is key:  # one may have been closed earlier in this loop
                _call(key.data)
        for _ in range(len(self._jobs)):
            if self._closing:
                return
            _call(*self._jobs.popleft())

    def _drain(self) -> None:
        with suppress(BlockingIOError):
            while self._woken.recv(4096):
                pass

    def _end(self) -> None:
        self._closing = True
        for owner in list(self._owners.values()):
            _call(owner.end)
        self._owners.clear()
        self._later.clear()
        if self._membership is not None:
            _call(self._membership.leave)
        self._ended = True
        wake, self._wake = self._wake, None
        self._selector.close()
        if wake is not None:
            wake.close()
        self._woken.close()
        self._jobs.clear()


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
    for ray_thread in list(_alive):
        ray_thread.forget()
    _alive.clear()
