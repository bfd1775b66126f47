"""What the reader of a `CursorSource` may use of the run that it is part of."""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future as ConcurrentFuture
from typing import TYPE_CHECKING, Any, TypeVar, cast

from aioloader.core.checks import check_count
from aioloader.core.policies import Policies
from aioloader.core.policy_log import PolicyLog
from aioloader.core.source import RunListener, SourceContext, SourceThreads
from aioloader.executors.threads import Threads
from aioloader.insight.meters import StageMeter
from aioloader.insight.policies import PolicyMeter

if TYPE_CHECKING:
    from aioloader.engine.run import Run

__all__ = ["RunSourceContext"]

T = TypeVar("T")
E = TypeVar("E", bound=RunListener)


class RunSourceContext(SourceContext):
    """What one reader uses of a run.

    Args:
        run: The run that it is part of.
        name: Of the source, for notes and names.
        meter: Of the source.
        seed_of: See `seed`; None: the run's epoch is all that it depends on.
    """

    def __init__(
        self,
        run: "Run",
        name: str,
        meter: StageMeter | None = None,
        seed_of: Callable[[int, str], int] | None = None,
    ) -> None:
        self._run = run
        self._name = name
        self._meter = meter
        self._seed_of = seed_of
        self._pools: list[Threads] = []
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._run.loop

    @property
    def epoch(self) -> int:
        return self._run.epoch

    @property
    def handed_out(self) -> Any:
        return self._run.progress.cursor

    @property
    def consumer_starves(self) -> bool:
        output = self._run.output
        if output.hands_out and not self._run.consumer.batches:
            return False  # the first batch takes its time; whether the others come in time nobody knows yet
        return not output.held and not (output.queued is not None and output.queued())

    def shared(self, owner: object, make: Callable[[], E]) -> E:
        if owner not in self._run.shared:
            self._run.shared[owner] = make()
        return cast(E, self._run.shared[owner])

    def threads(self, limit: int) -> "SourceThreads":
        pool = self._run.threads(check_count("limit", limit, least=1), "aioloader-source")
        self._pools.append(pool)
        return _RunThreads(self._run, pool)

    def spawn(self, fn: Callable[[], Coroutine[Any, Any, None]]) -> "asyncio.Task[None]":
        task = self._run.spawn(self._guarded, fn)
        task.set_name(f"aioloader-{getattr(fn, '__qualname__', 'task')}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def count_dropped(self, count: int) -> None:
        if self._meter is not None:
            self._meter.dropped += count

    def count_requests(self, *, retries: int = 0, timeouts: int = 0, hedges: int = 0) -> None:
        if self._meter is not None:
            self._meter.retries += retries
            self._meter.timeouts += timeouts
            self._meter.hedges += hedges

    def seed(self, seed: int, purpose: str) -> int:
        return super().seed(seed, purpose) if self._seed_of is None else self._seed_of(seed, purpose)

    def part(self) -> "RunSourceContext":
        return RunSourceContext(self._run, self._name, self._meter, self._seed_of)

    def policy_log(self, policies: Policies) -> PolicyLog:
        if self._meter is None:
            return super().policy_log(policies)
        if self._meter.policies is None:  # the next round of a `repeat` goes on counting
            self._meter.policies = PolicyMeter(policies)
        return self._meter.policies

    async def _guarded(self, fn: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await fn()
        except (KeyboardInterrupt, SystemExit) as error:  # which asyncio would end the loop with
            self._run.fail(error)

    async def aclose(self) -> None:
        """End the tasks, wait for them, and let go of the threads."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for pool in self._pools:
            pool.close()


class _RunThreads(SourceThreads):
    def __init__(self, run: "Run", pool: Threads) -> None:
        self._run = run
        self._pool = pool

    def call(self, fn: Callable[..., T], *args: Any) -> "asyncio.Future[T]":
        return self._run.submit(self._pool, fn, *args)

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> "ConcurrentFuture[T]":
        """The same for `loop.run_in_executor`."""
        future: ConcurrentFuture[T] = ConcurrentFuture()

        def job(_: BaseException | None) -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = fn(*args, **kwargs)
            except BaseException as error:  # it is raised where the call is awaited
                future.set_exception(error)
            else:
                future.set_result(result)

        self._pool.submit(job)
        return future
