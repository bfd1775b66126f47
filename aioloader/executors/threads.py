"""Worker threads: named, started when needed, and ended with their run.

`concurrent.futures.ThreadPoolExecutor` joins its threads at interpreter exit without a limit, so one user function that
hangs keeps the process alive for ever, and there is no way to wait for its threads with a deadline. These are daemon
threads, which an exit hook (`engine/loop_thread.py`) ends in bounded time.
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
    """Runs jobs in threads."""

    def submit(self, job: Job) -> None:
        """Run `job` in a thread."""


class Threads:
    """At most `limit` daemon threads, for jobs submitted from one event loop.

    Args:
        limit: How many threads there may be. The caller keeps at most that many jobs outstanding.
        name: The threads are named `{name}-0`, `{name}-1`, ...
        loop: The loop on which `ended` completes.
        context: Every thread runs in a copy of it, so that user functions see the consumer's context variables.
        initializer: Called once in each thread with its number. If it raises, the thread's first job gets the error, as
            in torch for `worker_init_fn`.
        computes: Whether jobs run torch operations, which may use several cores, see `limit_intraop_threads`.
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
        self.ended: Future[None] | None = None  # done when the last thread has ended; None before the first starts
        self.threads: list[threading.Thread] = []

    @property
    def gone(self) -> bool:
        """Whether it is closed and all threads have ended."""
        return self._closed and not self._alive

    def alive(self) -> list[str]:
        """The names of the threads that have not ended."""
        return [thread.name for thread in self.threads if thread.is_alive()]

    def submit(self, job: Job) -> None:
        """Run `job` in a thread; its argument is the error that the thread's initializer raised, or None."""
        with self._lock:
            self._outstanding += 1
            more = self._outstanding > len(self.threads) and len(self.threads) < self._limit
        self._jobs.put(job)
        if more:
            self._start_thread()

    def allow(self, limit: int) -> None:
        """There may be that many threads from now on; those that have been started stay."""
        self._limit = max(self._limit, limit)

    def prepare(self) -> None:
        """Start the first thread before its job is there: starting takes as long as a small batch."""
        if not self.threads:
            self._start_thread()

    def close(self) -> None:
        """Stop taking jobs: idle threads end now, busy ones after their job. Idempotent."""
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
                del job  # an idle thread must not keep the last sample alive
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
            thread.join()  # takes microseconds, since `_main` is over
        if self.ended is not None and not self.ended.done():
            self.ended.set_result(None)

    def _initialize(self, number: int) -> BaseException | None:
        if self._computes:
            limit_intraop_threads()
        if self._initializer is not None:
            try:
                self._initializer(number)
            except BaseException as error:  # the first job raises it
                return error
        return None


class InContext:
    """Runs jobs in the one thread of `threads`, in a context that they share: two threads could not enter it."""

    def __init__(self, threads: Threads, context: Context) -> None:
        self._threads = threads
        self._context = context

    def submit(self, job: Job) -> None:
        self._threads.submit(lambda broken: self._context.run(job, broken))


def call_loop(loop: AbstractEventLoop, callback: Callable[..., object], *args: object) -> None:
    """Call `callback` on `loop` from another thread; does nothing when the loop is closed.

    The loop may be closed when a worker returns from a slow user function after its run has ended.
    """
    try:  # noqa: SIM105 - `suppress` is three calls more, and this is called for each batch and each hop
        loop.call_soon_threadsafe(callback, *args)
    except RuntimeError:
        pass


_pools: WeakSet[Threads] = WeakSet()  # all that have started threads, for the exit of the process


def end_all_threads(deadline: float) -> None:
    """End the threads of all pools, and wait for them until `deadline` (`time.monotonic`)."""
    pools = list(_pools)
    for pool in pools:
        pool.close()
    for pool in pools:
        for thread in pool.threads:
            thread.join(max(0.0, deadline - monotonic()))


def forget_all_threads() -> None:
    """In a forked child: forget the threads, which exist in the parent only."""
    global _intraop_lock
    _pools.clear()
    _intraop_lock = threading.Lock()


_intraop_lock = threading.Lock()


def limit_intraop_threads() -> None:
    """Let torch use one thread per operation in the calling thread, without changing it for other threads.

    Otherwise the operations of several loader threads would compete for the same OpenMP threads (a copy of 64 KiB takes
    224 µs instead of 2). `torch.set_num_threads` sets the number of the calling thread *and* the default of later
    threads. So the number is set in the libraries below torch directly, which keep one for each thread. Where they are
    not found, the default is restored from a thread that ends at once; a user thread that starts in between has 1 too.
    Measured with torch 2.13: the caller and later threads keep their number.
    """
    if torch.get_num_threads() == 1:  # after this first question torch does not set this thread's number later on
        return
    for set_number in _libraries_of_torch():
        set_number(1)
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
    """Functions that set the number of threads for the calling thread only: OpenMP's, and MKL's if torch has it."""
    found: list[Callable[[int], object]] = []
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    with contextlib.suppress(OSError, AttributeError):  # another system, another build
        library = ctypes.CDLL(str(path))  # already loaded; the lookup includes the libraries that it depends on
        found.append(library.omp_set_num_threads)
        found.append(library.MKL_Set_Num_Threads_Local)
    return found
