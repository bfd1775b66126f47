"""A run: one epoch of one loader, on one event loop, and the supervisor that owns everything it starts."""

import asyncio
import threading
import warnings
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import Context, copy_context
from time import monotonic
from typing import Any, Final, Protocol, TypeVar

import anyio._backends._asyncio
from anyio import move_on_after

from aioloader.core.forks import tell_of_fork
from aioloader.core.source import RunListener
from aioloader.engine.pausing import Pauses, RunPause
from aioloader.engine.progress import Progress
from aioloader.engine.run_protocols import Output, RunTracer, RunTuner
from aioloader.executors.threads import TakesJobs, Threads, call_loop
from aioloader.insight.meters import StageMeter, ThreadClock

BACKEND: Final = anyio._backends._asyncio
"""What closing needs is imported by now. anyio imports its backend when it is first used: that may be in a thread, and
a fork meanwhile would leave the import locked in the child; or after a Ctrl-C, and CPython forgets that it is to die of
SIGINT when code is made of strings, as some modules do when they are imported."""

__all__ = ["CLOSE_SECONDS", "Run"]

T = TypeVar("T")

CLOSE_SECONDS: Final = 5.0  # how long an end waits for user code that is still running, before it says so and goes on


class Pool(Protocol):
    """Threads or processes that end with a run."""

    @property
    def gone(self) -> bool:
        """Closed, and nothing is left."""

    @property
    def ended(self) -> "asyncio.Future[None] | None":
        """Done when nothing is left; None: there was nothing."""

    def close(self) -> None:
        """Begin nothing any more, and end. Idempotent."""

    def alive(self) -> list[str]:
        """Names of what has not ended."""


class Run:
    """One epoch on its way.

    The story of an end. What wants one (the consumer after its last batch, `close()`, the garbage collector, a
    failure of our own) completes `_stop`. The supervisor then cancels all tasks: workers and pumps get
    `CancelledError` in whatever they await (`Pump` says when), pumps close the user's generators, each in its own
    task. Then threads are told to end. Both are waited for, `CLOSE_SECONDS` at most. A cancelled supervisor (the loop
    is shutting down) does the same.

    The tasks are plain tasks of asyncio and not a task group of anyio: there, every `await` of a cancelled task raises
    again, and the `finally: await session.close()` of a user, who writes for asyncio, would not run.

    Args:
        output: The last window, not started.
        epoch: The number of the epoch, for notes.
        progress: Its position; None: at its beginning.
        pauses: Of its loader; None: nobody pauses it.
    """

    def __init__(
        self, output: Output, epoch: int, progress: Progress | None = None, pauses: Pauses | None = None
    ) -> None:
        self.output = output
        self.progress = Progress(epoch) if progress is None else progress
        self.epoch = epoch
        self.meters: list[StageMeter] = []
        self.consumer = self.progress.meter
        self.context: Context = copy_context()
        self.stopping = False
        self.failure: BaseException | None = None
        self.started = False
        self.shared: dict[object, RunListener] = {}  # see `SourceContext.shared`
        self.left = True  # the consumer takes no more once this run is over; False where it has a queue of its own
        self.given_back = False  # sources were told so, and took back what it had not had: it gets that no more
        self.foreign = False  # this is a forked child, and it lives in the parent
        self._over = False
        self._settling = threading.RLock()  # finalizers come here
        self.pausing = RunPause(self, Pauses() if pauses is None else pauses)
        self.loop: asyncio.AbstractEventLoop
        self.private_loop = False  # it is the loader's, as under `for`
        self.tracer: RunTracer | None = None  # set before it starts
        self.tuner: RunTuner | None = None  # likewise, or by itself, see `Tuner.adopt`
        self.windows: list[Any] = []  # those with steps that have started, and are not closed
        self._pools: list[Pool] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._end_when_closed: set[asyncio.Task[None]] = set()
        self._pending: deque[Callable[[], None]] = deque()
        self._after_turn: list[Callable[[], None]] = []
        self.active: Callable[[], None] | None = None  # called when something may have happened
        self._drain_scheduled = False
        self._stop: asyncio.Future[None]
        tell_of_fork(self)

    # -- for nodes ---------------------------------------------------------------------------------------------------

    def spawn(
        self,
        fn: Callable[..., Coroutine[Any, Any, None]],
        *args: Any,
        context: Context | None = None,
        ends_when_closed: bool = False,
    ) -> "asyncio.Task[None]":
        """Start a task that the supervisor owns.

        Args:
            fn: What it does.
            args: Of `fn`.
            context: Which it runs in; None: a copy of the consumer's.
            ends_when_closed: Its node cancels it, at the right moment after `close`.
        """
        name = f"aioloader-{getattr(fn, '__qualname__', 'task')}"
        task = self.loop.create_task(fn(*args), name=name, context=self.context.copy() if context is None else context)
        self._tasks.add(task)
        if ends_when_closed:
            self._end_when_closed.add(task)
        task.add_done_callback(self._task_done)
        if self.stopping:
            task.cancel()
        return task

    def begin(self, fn: Callable[[Any], Awaitable[T]], value: Any, *, context: Context | None) -> "asyncio.Task[T]":
        """Call the user's `fn` in a task of its own; whoever begins it awaits it, and the supervisor ends it."""

        async def call() -> T:
            return await fn(value)

        task = self.loop.create_task(call(), name="aioloader-call", context=context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if self.stopping:
            task.cancel()
        return task

    def _task_done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        self._end_when_closed.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail(error)  # a user's exception goes with its sample: this is one of ours

    def threads(
        self,
        limit: int,
        name: str,
        initializer: Callable[[int], None] | None = None,
        *,
        computes: bool = True,
    ) -> Threads:
        """Up to `limit` threads that end with this run at the latest; for the other arguments see `Threads`."""
        pool = Threads(limit, name, self.loop, self.context, initializer, computes=computes)
        self.own(pool)
        return pool

    def own(self, pool: "Pool") -> None:
        """End `pool` with this run at the latest."""
        self._pools = [pool for pool in self._pools if not pool.gone]  # an endless `repeat` comes here for ever
        self._pools.append(pool)

    def adopt(self, meter: StageMeter) -> StageMeter:
        """Count with `meter`, or go on with that of the same stage in an earlier repetition."""
        for known in self.meters:
            same = (known.address, known.name, known.kind) == (meter.address, meter.name, meter.kind)
            if known.retired and same:
                known.retired = False
                return known
        self.meters.append(meter)
        return meter

    def joined_by(self, window: Any) -> None:
        """A window with steps begins."""
        self.windows = [one for one in self.windows if not one.closed]  # an endless `repeat` comes here for ever
        self.windows.append(window)

    async def in_thread(self, threads: TakesJobs, fn: Callable[..., T], *args: Any) -> T:
        """Call `fn(*args)` in one of `threads`. When this is cancelled, the call itself goes on and is forgotten."""
        return await self.submit(threads, fn, *args)

    def submit(self, threads: TakesJobs, fn: Callable[..., T], *args: Any) -> "asyncio.Future[T]":
        """Begin a call of `fn(*args)` in one of `threads`."""
        future: asyncio.Future[T] = self.loop.create_future()

        def settle(result: T | None, error: BaseException | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(result)  # type: ignore[arg-type]  # T may be None
            elif isinstance(error, StopIteration):  # which a future cannot carry
                stopped = RuntimeError(f"{fn!r} raised StopIteration")
                stopped.__cause__ = error
                future.set_exception(stopped)
            else:
                future.set_exception(error)

        def job(_: BaseException | None) -> None:
            try:
                result = fn(*args)
            except BaseException as error:  # it is raised where the call is awaited
                call_loop(self.loop, settle, None, error)
            else:
                call_loop(self.loop, settle, result, None)

        threads.submit(job)
        return future

    async def closing(self, close: Callable[[], Awaitable[object]]) -> None:
        """Await the end of something of the user's, even when cancelled, but not for ever."""
        with move_on_after(CLOSE_SECONDS, shield=True) as scope:
            await close()
        if scope.cancelled_caught:
            _warn_late(f"{close!r} did not return")

    def guarded(self, callback: Callable[..., None], *args: Any) -> None:
        """Call one of the engine's callbacks; what it raises ends the run, loudly.

        The event loop would only log it, and the consumer would wait for ever.
        """
        try:
            callback(*args)
        except BaseException as error:
            self.fail(error)
            if not isinstance(error, Exception):
                raise

    def soon(self, callback: Callable[[], None]) -> None:
        """Call `callback` on the loop after what is going on now: in its next turn, or in the next `drain`."""
        self._pending.append(callback)
        if not self._drain_scheduled:  # as in `_will_drain`: this is called a lot
            self._drain_scheduled = True
            self.loop.call_soon(self._drain_turn)

    def first(self, callback: Callable[[], None]) -> None:
        """The same, before all that waits already."""
        self._pending.appendleft(callback)
        self._will_drain()

    def _will_drain(self) -> None:
        if not self._drain_scheduled:
            self._drain_scheduled = True
            self.loop.call_soon(self._drain_turn)

    def after_turn(self, callback: Callable[[], None]) -> None:
        """Call `callback`, which never fails, on the loop in its next turn, whatever `drain` does before."""
        self._after_turn.append(callback)
        self._will_drain()

    def _drain_turn(self) -> None:
        self._drain_scheduled = False
        if self._after_turn:
            callbacks, self._after_turn = self._after_turn, []
            for callback in callbacks:
                callback()
        if self.active is not None:
            self.active()
        self.drain()

    def drain(self) -> None:
        """Call what waits, and what that brings up, without a turn of the loop: each costs 10 µs and more.

        It ends, since nodes bring up callbacks only as entries move, and what may move is bounded by their rooms.
        """
        pending = self._pending
        try:
            while pending:
                pending.popleft()()
        except BaseException as error:
            self.fail(error)
            if not isinstance(error, Exception):
                raise

    def fail(self, error: BaseException) -> None:
        """The engine itself is broken: the consumer gets `error`."""
        if self.failure is None:
            self.failure = error
        self.request_stop()

    # -- for faces ---------------------------------------------------------------------------------------------------

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Say which loop this run will live on. `leave` works from here on."""
        self.loop = loop
        self._stop = loop.create_future()
        self.pausing.attach()

    def request_stop(self) -> None:
        """End the run. On its loop; idempotent."""
        if not self._stop.done():
            self._stop.set_result(None)

    def be_tuned(self, tuner: RunTuner) -> None:
        """Let `tuner` measure and change it from now on, if it is not over. From any thread, once it has a loop."""
        call_loop(self.loop, self.guarded, tuner.adopt, self)

    def leave(self) -> None:
        """The consumer takes no more: end the run, from any thread."""
        if self.foreign:
            return
        self.left = True
        self._settle()
        call_loop(self.loop, self.request_stop)

    def _forked(self) -> None:
        """See `Forkable`."""
        self.foreign = True

    def drained(self) -> None:
        """The consumer has had all there was in its queue after the run was over."""
        self.left = True
        self._settle()

    def _settle(self) -> None:
        """Once the run is over and the consumer takes no more, tell what sources share, in whatever thread that is."""
        with self._settling:
            if not (self._over and self.left) or self.given_back or not self.shared:
                return
            self.given_back = True
        for shared in self.shared.values():
            self.guarded(shared.run_over, self.progress.cursor)

    async def supervise(self, kick: Callable[[], None]) -> None:
        """Own all tasks and threads of the run until it ends.

        Args:
            kick: Called on the loop when `output.poll`, or `failure`, is worth a look, and once at the very end.
        """
        self.consumer.loop = ThreadClock()
        self.pausing.begin()
        try:
            if not self._stop.done():
                self.output.start(self, kick)
                self.started = True
                if self.tuner is not None:
                    self.tuner.begin(self)
                kick()
                await self._stop
        except Exception as error:
            self.failure = self.failure or error
        finally:
            self.stopping = True
            self.pausing.stop()
            self.output.close()  # idle workers end by themselves
            if self.tuner is not None:
                self.tuner.end(self)
            self.consumer.finish()
            for meter in self.meters:
                meter.idle.wait_for(None)
            try:
                await self._end_tasks()
            finally:
                try:
                    await self._end_threads()
                finally:
                    self._over = True
                    self.pausing.end()
                    self._settle()
                    kick()

    async def _end_tasks(self) -> None:
        for task in self._tasks - self._end_when_closed:
            if not task.cancelling():  # a second one would cut short the user's `finally: await ...`
                task.cancel()
        late = await _outlast(set(self._tasks))
        if late:
            names = ", ".join(sorted(task.get_name() for task in late))
            _warn_late(f"a user function goes on in spite of its cancellation, in {names}; it is left behind")

    async def _end_threads(self) -> None:
        for pool in self._pools:
            pool.close()
        late = await _outlast({pool.ended for pool in self._pools if pool.ended is not None})
        if not late:
            return
        alive = [name for pool in self._pools for name in pool.alive()]
        _warn_late(f"user code is still running in {', '.join(alive)}; it is left behind")


F = TypeVar("F", bound="asyncio.Future[None]")


async def _outlast(futures: set[F]) -> set[F]:
    """Wait for `futures`, `CLOSE_SECONDS` at most; returns those that are not done.

    A cancellation meanwhile does not cut this short, since what must end would be left behind; it is raised afterwards.
    `asyncio.run`, for instance, cancels every task there is, and waits for them all.
    """
    deadline = monotonic() + CLOSE_SECONDS
    cancelled: asyncio.CancelledError | None = None
    while futures and (left := deadline - monotonic()) > 0:
        try:
            _, futures = await asyncio.wait(futures, timeout=left)
        except asyncio.CancelledError as error:
            cancelled = error
            futures = {future for future in futures if not future.done()}
    if cancelled is not None:
        raise cancelled
    return futures


def _warn_late(what: str) -> None:
    warnings.warn(f"aioloader: closing waited {CLOSE_SECONDS:g} s, but {what}", ResourceWarning, stacklevel=2)
