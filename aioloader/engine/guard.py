"""What watches over the calls of an async function: a time limit, and a second call for one that takes long.

Each worker of a step has a record of its call, and all records of a step share one timer of the loop. A call notes when
it began, and no more: only the timer looks whether one is late.
"""

from asyncio import CancelledError, Future, Task, TimerHandle, current_task
from collections import deque
from collections.abc import Awaitable, Callable
from contextvars import Context, copy_context
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from aioloader.core.policies import Budget, Hedge

if TYPE_CHECKING:
    from aioloader.engine.run import Run
    from aioloader.engine.steps import Step

__all__ = ["Guard", "GuardedCall"]

ENOUGH_CALLS: Final = 20  # a percentile of fewer says nothing
LATEST_CALLS: Final = 256  # whose durations count
MEASURED: Final = 4  # of so many calls of a worker, one is measured
EARLY_SECONDS: Final = 0.001  # so much before its time a timer may ring: libuv counts milliseconds


class GuardedCall:
    """The calls of one worker, one after the other. Called and awaited like the user's function.

    Attributes:
        active: A call is under way, which began at `began` with `value`.
        cancelled: By us: its time is up, or the second call has a result.
        twin: The second call.
        calls: How many there have been.
    """

    __slots__ = ("active", "began", "calls", "cancelled", "context", "guard", "task", "twin", "value")

    def __init__(self, guard: "Guard", task: "Task[Any]") -> None:
        self.guard = guard
        self.task = task
        self.context: Context | None = None
        self.active = False
        self.began = 0.0
        self.value: Any = None
        self.calls = 0
        self.cancelled = False
        self.twin: Task[Any] | None = None

    async def __call__(self, value: Any) -> Any:
        """Call, and wait for the result."""
        guard = self.guard
        if guard.crowded:
            await guard.enter()
        self.calls += 1
        self.value = value
        self.began = perf_counter()
        self.active = True
        if guard.timer is None:
            guard.set_timer()
        try:
            result = await guard.fn(value)
        except BaseException as error:
            self._ended()
            if not self.cancelled and self.twin is None:
                raise
            return await guard.outcome(self, None, error)
        self.active = False
        self.value = None
        if guard.crowded:
            guard.left()
        if self.cancelled or self.twin is not None:
            return await guard.outcome(self, result, None)
        if guard.measures and not self.calls % MEASURED:
            guard.took(perf_counter() - self.began)
        return result

    def _ended(self) -> None:
        self.active = False
        self.value = None
        if self.guard.crowded:
            self.guard.left()


class Guard:
    """Time limits and second calls for all workers of a step.

    The story of a cancellation. A call whose time is up is cancelled, and awaited until it has cleaned up: it runs in
    the task of its worker, so the exception goes in where the call waits, and comes out in `GuardedCall`. That it was
    ours is noted before; another cancellation, of the run that ends, counts in `Task.uncancel`, and is raised.

    The story of a second call. It runs in a task of its own. Whichever has a result first wins: if it is the second
    one, the first is cancelled as above, and comes to the other's result; if it is the first one, the second is
    cancelled and awaited. One that fails does not win: the other goes on, and if both fail the first one's error
    counts. It takes a place of the stage's concurrency: the next one that is free, before samples that wait. Under a
    `Limit` there is one only where a slot is free that no other call waits for.

    Args:
        fn: The user's function.
        name: Of the stage, for errors.
        timeout: Seconds for one call; None: no limit.
        hedge: When there is a second call; None: never.

    Attributes:
        crowded: There are second calls, or some are wanted, so that first ones must ask for a place.
        measures: How long calls take is to be known.
        timer: None: none is set.
    """

    def __init__(
        self, fn: Callable[[Any], Awaitable[Any]], name: str, timeout: float | None, hedge: Hedge | None
    ) -> None:
        self.fn = fn
        self._name = name
        self._timeout = timeout
        self._hedge = hedge
        self._budget = Budget(None if hedge is None else hedge.budget)
        self.measures = hedge is not None and hedge.percentile is not None
        self.crowded = False
        self.timer: TimerHandle | None = None
        self._records: set[GuardedCall] = set()
        self._wanting: deque[tuple[GuardedCall, int]] = deque()  # they are to get a second call; and the number of it
        self._hedged: dict[GuardedCall, int] = {}  # the number of the call that has had its chance
        self._twins = 0
        self._entering = 0  # they have a place, and have not begun
        self._places: deque[Future[None]] = deque()  # first calls that wait for a place
        self._durations: deque[float] = deque(maxlen=LATEST_CALLS)
        self._after = None if hedge is None or self.measures else float(hedge.after)

    def bind(self, run: "Run", step: "Step") -> None:
        """Join a run; `step` says how many calls may be under way, and its meter counts."""
        self._run = run
        self._step = step

    def _concurrency(self) -> int:
        return self._step.concurrency

    def for_worker(self, task: "Task[Any]") -> GuardedCall:
        """What the worker in `task` calls instead of the function."""
        record = GuardedCall(self, task)
        if self._hedge is not None:
            record.context = copy_context()
        self._records.add(record)
        task.add_done_callback(lambda _: self._records.discard(record))
        return record

    def close(self) -> None:
        """No call begins any more. Those under way are the run's to cancel, second ones too."""
        self._wanting.clear()
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    # -- the end of a call -------------------------------------------------------------------------------------------

    async def outcome(self, call: GuardedCall, result: Any, failed: BaseException | None) -> Any:
        """What a call comes to whose time was up, or that had a second one."""
        twin, call.twin = call.twin, None
        cancelled, call.cancelled = call.cancelled, False
        if cancelled:
            if call.task.uncancel():  # the run ends as well
                raise CancelledError
            if failed is not None and not (twin is not None and _won(twin)):
                late = self._too_late()
                late.__cause__ = None if isinstance(failed, CancelledError) else failed
                failed = late
        elif isinstance(failed, CancelledError) and _being_cancelled():
            if twin is not None:
                await _end(twin)
            raise failed
        if twin is not None:
            if failed is not None and (not cancelled or _won(twin)):
                return await self._second(twin, failed)
            await _end(twin)
        if failed is not None:
            raise failed
        return result

    async def _second(self, twin: "Task[Any]", failed: BaseException) -> Any:
        """The result of the second call, since the first one has none."""
        try:
            return await twin
        except CancelledError:
            if not twin.done() or _being_cancelled():
                await _end(twin)
                raise
        except Exception:
            pass
        raise failed

    def _too_late(self) -> TimeoutError:
        self._step.meter.timeouts += 1
        return TimeoutError(f"{self._name} took longer than timeout={self._timeout:g} s")

    # -- places ------------------------------------------------------------------------------------------------------

    @property
    def _busy(self) -> int:
        return self._twins + self._entering + sum(record.active for record in self._records)

    async def enter(self) -> None:
        """Wait for a place: a second call may have the one that was this worker's."""
        while self.crowded and self._busy >= self._concurrency():
            place = self._run.loop.create_future()
            self._places.append(place)
            try:
                await place
            except BaseException:
                if place.done() and not place.cancelled():
                    self._entering -= 1
                    self.left()
                raise
            self._entering -= 1
            return

    def left(self) -> None:
        """A call has ended: give its place to a second one that is wanted, or else to a first one that waits."""
        while self._wanting and not self._run.stopping and self._busy < self._concurrency():
            call, number = self._wanting.popleft()
            if call.active and call.calls == number and not call.cancelled:
                self._begin_twin(call)
        while self._places and self._busy < self._concurrency():
            place = self._places.popleft()
            if not place.done():
                self._entering += 1
                place.set_result(None)
        self.crowded = bool(self._twins or self._wanting or self._places)

    # -- time --------------------------------------------------------------------------------------------------------

    def took(self, seconds: float) -> None:
        """A call has taken that long."""
        durations, hedge = self._durations, self._hedge
        durations.append(seconds)
        assert hedge is not None
        if len(durations) < ENOUGH_CALLS or (self._after is not None and self.timer is not None):
            return  # it is worked out when the timer rings
        self._after = self._percentile_of(hedge.percentile or 0)
        if self.timer is not None:
            self.timer.cancel()
        self.set_timer()

    def _percentile_of(self, percent: int) -> float:
        ordered = sorted(self._durations)
        return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]

    def set_timer(self) -> None:
        """At the next moment when something may be due."""
        now = perf_counter()
        due = []
        for record in self._records:
            if not record.active or record.cancelled:
                continue
            if self._timeout is not None:
                due.append(record.began + self._timeout)
            if self._after is not None and self._hedged.get(record) != record.calls:
                due.append(record.began + self._after)
        if due:
            seconds = max(EARLY_SECONDS, min(due) - now)
            self.timer = self._run.loop.call_later(seconds, self._run.guarded, self._rung)

    def _rung(self) -> None:
        self.timer = None
        if self._run.stopping:
            return
        if self.measures and len(self._durations) >= ENOUGH_CALLS:
            assert self._hedge is not None
            self._after = self._percentile_of(self._hedge.percentile or 0)
        now = perf_counter() + EARLY_SECONDS
        for record in self._records:
            if not record.active or record.cancelled:
                continue
            if self._timeout is not None and record.began + self._timeout <= now:
                self._cancel(record)
            elif self._after is not None and record.began + self._after <= now:
                self._hedge_it(record)
        self.set_timer()

    def _hedge_it(self, record: GuardedCall) -> None:
        """Give a late call its chance: now, or when there is a place."""
        if self._hedged.get(record) == record.calls:
            return
        self._hedged[record] = record.calls
        if not self._budget.take(sum(record.calls for record in self._records)):
            return
        self.crowded = True
        if self._busy < self._concurrency():
            self._begin_twin(record)
        else:
            self._wanting.append((record, record.calls))

    def _cancel(self, call: GuardedCall) -> None:
        if not call.cancelled:
            call.cancelled = True
            call.task.cancel()

    def _begin_twin(self, call: GuardedCall) -> None:
        slots = self._step.slots
        if slots is not None and not slots.take_free():
            return
        self._step.meter.hedges += 1
        self._twins += 1
        call.twin = self._run.begin(self.fn, call.value, context=call.context)
        number = call.calls
        call.twin.add_done_callback(lambda twin: self._twin_done(call, number, twin))

    def _twin_done(self, call: GuardedCall, number: int, twin: "Task[Any]") -> None:
        if self._step.slots is not None:
            self._step.slots.release()
        self._twins -= 1
        self.left()
        if _won(twin) and call.active and call.calls == number:
            self._cancel(call)


def _being_cancelled() -> bool:
    task = current_task()
    return task is not None and task.cancelling() > 0


def _won(twin: "Task[Any]") -> bool:
    return twin.done() and not twin.cancelled() and twin.exception() is None


async def _end(twin: "Task[Any]") -> None:
    """Cancel, and wait until it has cleaned up; what it raises was the second opinion on a sample that has its own."""
    twin.cancel()
    try:
        await twin
    except CancelledError:
        if _being_cancelled():
            raise
    except Exception:
        pass
