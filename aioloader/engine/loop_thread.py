"""The private event loop of the sync face, and what happens to it when the process ends.

Not anyio's blocking portal: its thread is not a daemon, so that a process whose user forgot an iterator would wait for
it for ever at exit. Here `atexit`, which runs after the main thread's last line and before anything is torn down, ends
all loops and threads in bounded time.
"""

import asyncio
import atexit
import threading
from collections.abc import Callable, Coroutine
from time import monotonic
from typing import Any
from weakref import WeakSet

from aioloader.core.forks import after_fork_in_child
from aioloader.engine.run import CLOSE_SECONDS
from aioloader.executors.processes.worker_thread import end_all_processes, forget_all_processes
from aioloader.executors.ray.thread import end_all_ray, forget_all_ray
from aioloader.executors.threads import call_loop, end_all_threads, forget_all_threads

try:
    from uvloop import new_event_loop
except ImportError:
    from asyncio import new_event_loop  # type: ignore[assignment]

__all__ = ["LoopThread", "new_event_loop", "process_ends"]


class LoopThread:
    """A thread named `aioloader-loop` that runs an event loop of its own until it is told to stop.

    The thread begins with the first task, and finds it on its loop: nothing has to wake it for it.
    """

    def __init__(self) -> None:
        self.loop = new_event_loop()
        self._stop = self.loop.create_future()
        self._tasks: dict[asyncio.Task[None], Callable[[], None]] = {}
        self._lock = threading.Lock()
        self._coming: set[Callable[[], None]] = set()  # refusals of tasks that have not been started yet
        self._ended = False
        self._thread = threading.Thread(target=self._main, name="aioloader-loop", daemon=True)
        _alive.add(self)

    def start_task(
        self,
        coroutine: Coroutine[Any, Any, None],
        stop: Callable[[], None],
        done: Callable[[BaseException | None], None],
    ) -> None:
        """Run `coroutine` on the loop, from any thread.

        Args:
            coroutine: A supervisor.
            stop: Called on the loop when it is to end.
            done: Called on the loop when it has, with what it raised.
        """

        def finish(task: "asyncio.Task[None]") -> None:
            del self._tasks[task]
            done(asyncio.CancelledError() if task.cancelled() else task.exception())

        def refuse() -> None:
            coroutine.close()
            done(asyncio.CancelledError())

        def start() -> None:
            self._coming.discard(refuse)
            if self._stop.done():
                refuse()
                return
            task = self.loop.create_task(coroutine, name="aioloader-supervisor")
            self._tasks[task] = stop
            task.add_done_callback(finish)

        with self._lock:  # somebody may be closing the loader meanwhile
            if not self._ended:
                self._coming.add(refuse)
                self.loop.call_soon_threadsafe(start)
                if self._thread.ident is None:
                    self._thread.start()
                return
        refuse()

    def request_stop(self) -> None:
        """Stop the loop, from any thread, when the tasks that were started have ended, as they are told to now."""
        call_loop(self.loop, self._stop_now)

    def join(self, seconds: float = 2 * CLOSE_SECONDS) -> bool:
        """Wait for the end of the thread. False: it did not end in time."""
        if self._thread.ident is not None and not self.is_current():
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def is_current(self) -> bool:
        """Whether the caller is on this loop's thread, where waiting for it would be in vain."""
        return threading.current_thread() is self._thread

    def _stop_now(self) -> None:
        for stop in self._tasks.values():
            stop()
        if not self._stop.done():
            self._stop.set_result(None)

    def _main(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
            runner.run(self._wait_for_stop())
            with self._lock:
                self._ended = True
        for refuse in list(self._coming):
            refuse()

    async def _wait_for_stop(self) -> None:
        await self._stop
        if self._tasks:  # each bounds its own end; the rest is cancelled by the runner
            await asyncio.wait(set(self._tasks), timeout=2 * CLOSE_SECONDS)


_alive: WeakSet[LoopThread] = WeakSet()
_process_ends = threading.Event()


def process_ends() -> bool:
    """Whether the interpreter is on its way out."""
    return _process_ends.is_set()


def _forget_after_fork() -> None:
    """In a forked child no thread of its parent lives: nothing to end, and the loops' pipes are the parent's."""
    _alive.clear()
    forget_all_threads()
    forget_all_processes()
    forget_all_ray()


after_fork_in_child(_forget_after_fork)


@atexit.register
def _end_everything() -> None:
    """Interpreter exit with iterators still alive: daemon threads must not be inside torch while it is torn down."""
    _process_ends.set()
    deadline = monotonic() + CLOSE_SECONDS
    loops = list(_alive)
    for loop in loops:
        loop.request_stop()
    for loop in loops:
        loop.join(max(0.0, deadline - monotonic()))
    end_all_threads(deadline)
    end_all_processes(deadline)
    end_all_ray(deadline)
