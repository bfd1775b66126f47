"""Threads of our own: named, started when needed, and gone when their run is.

`concurrent.futures.ThreadPoolExecutor` joins its threads at interpreter exit without a limit, so that one hanging user
function keeps the process for ever; its threads also cannot be waited for with a deadline. These are daemon threads,
which an exit hook (`engine/loop_thread.py`) ends in bounded time.
"""

import contextlib
import ctypes
import threading
from asyncio import AbstractEventLoop, Future
from collections.abc import Callable
from contextvars import Context
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from time import monotonic
from typing import Protocol
from weakref import WeakSet

import torch

__all__ = [
    "InContext",
    "TakesJobs",
    "Threads",
    "call_loop",
    "end_all_threads",
    "forget_all_threads",
    "limit_intraop_threads",
]

Job = Callable[[BaseException | None], None]


class TakesJobs(Protocol):
    """Threads, or a way to them."""

    def submit(self, job: Job) -> None:
        """Run `job` in a thread."""


class Threads:
    """At most `limit` daemon threads, for jobs submitted from one event loop.

    Args:
        limit: How many threads there may be. The caller keeps at most that many jobs outstanding.
        name: The threads are named `{name}-0`, `{name}-1`, ...
        loop: The loop to tell when the last thread has ended.
        context: Every thread runs in a copy of it, so that user functions see the consumer's context variables.
        initializer: Called once in each thread with its number. What it raises is given to the thread's first job, as
            torch gives what `worker_init_fn` raises.
        computes: Its jobs do what torch may spread over several cores, see `limit_intraop_threads`.
    """

    def __init__(
        self,
        limit: int,
        name: str,
        loop: AbstractEventLoop,
        context: Context,
        initializer: Callable[[int], None] | None = None,
        *,
        computes: bool = True,
    ) -> None:
        self._limit = limit
        self._name = name
        self._loop = loop
        self._context = context
        self._initializer = initializer
        self._computes = computes
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._outstanding = 0
        self._alive = 0
        self._closed = False
        self.ended: Future[None] | None = None  # done when the last thread has ended; None: there was none
        self.threads: list[threading.Thread] = []

    @property
    def gone(self) -> bool:
        """Closed, and no thread is left."""
        return self._closed and not self._alive

    def alive(self) -> list[str]:
        """Names of the threads that have not ended."""
        return [thread.name for thread in self.threads if thread.is_alive()]

    def submit(self, job: Job) -> None:
        """Run `job` in a thread. It gets what the thread's initializer raised, or None."""
        with self._lock:
            self._outstanding += 1
            more = self._outstanding > len(self.threads) and len(self.threads) < self._limit
        self._jobs.put(job)
        if more:
            self._start_thread()

    def prepare(self) -> None:
        """Start the first thread for a job that is sure to come: getting ready takes it as long as a small batch."""
        if not self.threads:
            self._start_thread()

    def close(self) -> None:
        """Take no more jobs; idle threads end now, busy ones after their job. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for _ in self.threads:
            self._jobs.put(None)

    def _start_thread(self) -> None:
        number = len(self.threads)
        if self.ended is None:
            self.ended = self._loop.create_future()
        context = self._context.copy()
        thread = threading.Thread(
            target=context.run, args=(self._main, number), name=f"{self._name}-{number}", daemon=True
        )
        self.threads.append(thread)
        with self._lock:
            self._alive += 1
        _pools.add(self)
        thread.start()

    def _main(self, number: int) -> None:
        try:
            broken = self._initialize(number)
            while (job := self._jobs.get()) is not None:
                job(broken)
                broken = None
                del job  # or the last sample would live as long as the thread is idle
                with self._lock:
                    self._outstanding -= 1
        finally:
            with self._lock:
                self._alive -= 1
                last = self._alive == 0
            if last:
                call_loop(self._loop, self._all_ended)

    def _all_ended(self) -> None:
        for thread in self.threads:
            thread.join()  # it has said goodbye already: microseconds
        if self.ended is not None and not self.ended.done():
            self.ended.set_result(None)

    def _initialize(self, number: int) -> BaseException | None:
        if self._computes:
            limit_intraop_threads()
        if self._initializer is not None:
            try:
                self._initializer(number)
            except BaseException as error:  # kept, and raised for each sample: nothing is lost
                return error
        return None


class InContext:
    """A way to one thread of `Threads`, for jobs that share a context of their own.

    Args:
        threads: One thread: a context cannot be entered by two.
        context: Theirs.
    """

    def __init__(self, threads: Threads, context: Context) -> None:
        self._threads = threads
        self._context = context

    def submit(self, job: Job) -> None:
        """Run `job` in the thread."""
        self._threads.submit(lambda broken: self._context.run(job, broken))


def call_loop(loop: AbstractEventLoop, callback: Callable[..., object], *args: object) -> None:
    """Call `callback` on `loop` from another thread; nothing happens when the loop is closed.

    A closed loop means that its run is over and nobody listens: a worker that was inside a slow user function while
    everything ended finds it so.
    """
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(callback, *args)


_pools: WeakSet[Threads] = WeakSet()  # those that have had threads; for the end of the process


def end_all_threads(deadline: float) -> None:
    """Tell the threads of all pools to end, and wait for them until `deadline` (`time.monotonic`)."""
    pools = list(_pools)
    for pool in pools:
        pool.close()
    for pool in pools:
        for thread in pool.threads:
            thread.join(max(0.0, deadline - monotonic()))


def forget_all_threads() -> None:
    """In a forked child, where none of them lives."""
    global _intraop_lock
    _pools.clear()
    _intraop_lock = threading.Lock()


_intraop_lock = threading.Lock()


def limit_intraop_threads() -> None:
    """Let torch use one thread for each operation of the calling thread, and change nothing for any other thread.

    The operations of several loader threads would otherwise fight for the same OpenMP threads (a copy of 64 KiB: 224 µs
    against 2). `torch.set_num_threads` sets the calling thread *and* the default of threads to come. So the libraries
    that it passes the number on to are told directly, which keep it for each thread. Where they are not found, the
    default is put back from a thread that ends at once; a thread of the user's that starts in between has 1 as well.
    Measured with torch 2.13: the caller, and threads started later, keep their number.
    """
    if torch.get_num_threads() == 1:  # asked for here, torch has set this thread's number by now, and will not later
        return
    for tell in _libraries_of_torch():
        tell(1)
    if torch.get_num_threads() == 1:
        return
    with _intraop_lock:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        restorer = threading.Thread(target=torch.set_num_threads, args=(before,), daemon=True)
        restorer.start()
        restorer.join()


@cache
def _libraries_of_torch() -> list[Callable[[int], object]]:
    """Functions that set the number of threads for the calling thread alone: of OpenMP, and of MKL if torch has it."""
    found: list[Callable[[int], object]] = []
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    with contextlib.suppress(OSError, AttributeError):  # another system, another build
        library = ctypes.CDLL(str(path))  # it is loaded already; what it depends on is looked through as well
        found.append(library.omp_set_num_threads)
        found.append(library.MKL_Set_Num_Threads_Local)
    return found
