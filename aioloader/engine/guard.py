"""What watches over the calls of an async function: a time limit, and a second call for one that takes long.

Each worker of a step has a record of its call, and all records of a step share one timer of the loop. A call notes when
it began, and no more: only the timer looks whether one is late.
"""

from asyncio import CancelledError, Task, TimerHandle, wait
from collections import deque
from collections.abc import Awaitable, Callable
from math import inf
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from aioloader.core.durations import LATE_SECONDS, TURNS, Durations
from aioloader.core.entry import Entry
from aioloader.core.limit import Slots
from aioloader.core.policies import Budget, Hedge
from aioloader.engine.retrying import Turn
from aioloader.executors.current_sample import SampleContext, current_sample

if TYPE_CHECKING:
    from aioloader.engine.run import Run
    from aioloader.engine.steps import Step

__all__ = ["Guard", "GuardedCall"]

MUCH: Final = 2.0  # times as long as a call takes that is to have a second one: it is worth a word
MEASURED: Final = 4  # of so many calls of a worker, one is measured, once there are enough
EARLY_SECONDS: Final = 0.001  # so much before its time a timer may ring: libuv counts milliseconds

SecondCall: TypeAlias = "Task[tuple[Any, BaseException | None]]"
"""The task of a second call: its result, or what it raised. That may be anything, and would end the loop otherwise."""


class GuardedCall:
    """The calls of one worker, one after the other.

    A call costs no more than a note of when it began, which the worker writes, since a method for it would cost half as
    much again. The worker says when it has none (`rest`); and if the call was `touched`, it comes to what
    `Guard.outcome` says.

    Attributes:
        began: When the call under way began; `inf` if there is none. Until the worker begins the next one, or rests,
            there may be none any more: nobody else runs in between.
        touched: It was cancelled by us, or has a second call.
        cancelled: By us: its time is up, or the second call has a result.
        twin: The second call.
        hedged: When the last one began that has had its chance of a second call.
        refused: When the last one began that took long, and had no second call since the budget was used up.
        sample: Of the worker; tells what is called with.
    """

    __slots__ = ("began", "cancelled", "guard", "hedged", "refused", "sample", "task", "touched", "twin")

    def __init__(self, guard: "Guard", task: "Task[Any]", sample: SampleContext) -> None:
        self.guard = guard
        self.task = task
        self.sample = sample
        self.began = inf
        self.hedged = self.refused = -inf
        self.touched = self.cancelled = False
        self.twin: SecondCall | None = None

    def rest(self) -> None:
        """None is under way."""
        self.began = inf

    def ended(self) -> None:
        """The call under way has ended, after it had suspended, with a result; where calls are measured."""
        if self.began < inf:
            self.guard.ended(self.began)

    def may_have_another(self, began: float) -> bool:
        """Whether the call that began then is still under way."""
        return self.began == began and not self.cancelled


class Guard:
    """Time limits and second calls for all workers of a step.

    The story of a cancellation. A call whose time is up is cancelled, and awaited until it has cleaned up: it runs in
    the task of its worker, so the exception goes in where the call waits, and comes out in the worker. That it was
    ours is noted before; another cancellation, of the run that ends, counts in `Task.uncancel`, and is raised. A call
    that swallows the exception and returns a value has that value; one that raises another error was too late.

    The story of a second call. It runs in a task of its own. Whichever has a result first wins: if it is the second
    one, the first is cancelled as above, and comes to the other's result; if it is the first one, the second is
    cancelled and awaited. One that fails does not win: the other goes on, and if both fail the first one's error
    counts. Both have to be done in the time limit of the attempt. A second call takes a place of the stage's
    concurrency, a slot of its `Limit`, and its turn at its rate: the next ones that are free, before samples that wait.

    When a loop has stood still, since the consumer trained on it, all calls look late. So a timer that rings late
    gives the loop some turns first, in which those end that were answered meanwhile.

    Args:
        fn: The user's function.
        name: Of the stage, for errors.
        timeout: Seconds for one call; None: no limit.
        hedge: When there is a second call; None: never.
        timeout_name: The argument that says `timeout`, for errors.

    Attributes:
        crowded: There are second calls, or some are wanted, so that not each worker may begin a first one.
        measured: Of so many calls of a worker, it is to be known how long one took; 0: of none.
        watched: The timer rings before a call is late that begins now.
    """

    def __init__(
        self,
        fn: Callable[[Any], Awaitable[Any]],
        name: str,
        timeout: float | None,
        hedge: Hedge | None,
        timeout_name: str = "timeout",
    ) -> None:
        self.fn = fn
        self._name = name
        self._timeout_name = timeout_name
        self._timeout = inf if timeout is None else timeout
        self._percentile = None if hedge is None else hedge.percentile
        self._after = inf if hedge is None or self._percentile is not None else float(hedge.after)
        self._budget = Budget(0.0 if hedge is None else hedge.budget)
        self.measured = 0 if self._percentile is None else 1
        self._unmeasured = 0  # calls, before one is measured
        self.crowded = False
        self.watched = False
        self._soonest = min(self._timeout, self._after)  # so long may a call take before anybody looks
        self._rings_at = inf  # when the timer rings; never, if there is none
        self._timer: TimerHandle | None = None
        self._turns = 0
        self._records: set[GuardedCall] = set()
        self._wanting: deque[tuple[GuardedCall, float]] = deque()  # they are to get a second call; when they began
        self._twins = 0
        self._durations = Durations(self._percentile or 0)
        self._turn: Turn | None = None

    def bind(self, run: "Run", step: "Step") -> None:
        """Join a run; `step` says how many calls may be under way, and its meter counts."""
        self._run = run
        self._step = step
        if step.tap is not None:
            self._turn = Turn(step.tap.rate, step, self.serve)

    def for_worker(self, task: "Task[Any]", sample: SampleContext) -> GuardedCall:
        """What the worker in `task` calls instead of the function; `sample` tells its current sample."""
        record = GuardedCall(self, task, sample)
        self._records.add(record)
        task.add_done_callback(lambda _: self._records.discard(record))
        return record

    def close(self) -> None:
        """No call begins any more. Those under way are the run's to cancel, second ones too."""
        self._wanting.clear()
        if self._turn is not None:
            self._turn.give_back()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._rings_at = -inf  # so there is none after this

    # -- the end of a call -------------------------------------------------------------------------------------------

    async def failed(self, call: GuardedCall, entry: Entry, failed: BaseException) -> BaseException | None:
        """What a touched call comes to that has raised; None: it has a result after all, which `entry` has."""
        try:
            entry.value = await self.outcome(call, None, failed)
        except BaseException as error:
            return error
        finally:
            del failed
        return None

    async def outcome(self, call: GuardedCall, result: Any, failed: BaseException | None) -> Any:
        """What a touched call comes to: its time was up, or it had a second one."""
        began, call.began = call.began, inf
        twin, call.twin = call.twin, None
        cancelled, call.cancelled = call.cancelled, False
        call.touched = False
        try:
            if isinstance(failed, GeneratorExit) or (cancelled and call.task.uncancel()):
                raise failed or CancelledError  # the run ends, which ends the second call as well
            if self.measured and (cancelled or failed is None):
                self.ended(began)  # it has taken as long at least
            too_late = failed is not None and cancelled and not (twin is not None and _won(twin))
            if too_late:
                error = self._too_late()
                error.__cause__ = None if isinstance(failed, CancelledError) else failed
                failed = error
            if twin is not None:
                self._step.go_on()  # there is one call less
                if failed is not None and not too_late and (cancelled or not isinstance(failed, CancelledError)):
                    return await self._second(twin, began + self._timeout, failed)
                await _end(twin)
            if failed is not None:
                raise failed
            return result
        finally:
            del failed  # its traceback has this frame, which would have it

    async def _second(self, twin: SecondCall, until: float, failed: BaseException) -> Any:
        """The result of the second call, since the first one has none."""
        await wait({twin}, timeout=None if until == inf else max(0.0, until - perf_counter()))
        if not twin.done():
            await _end(twin)
            raise self._too_late() from failed
        if _won(twin):
            return twin.result()[0]
        raise failed

    def _too_late(self) -> TimeoutError:
        self._step.meter.timeouts += 1
        return TimeoutError(f"{self._name} took longer than {self._timeout_name}={self._timeout:g} s")

    # -- second calls ------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> int:
        """Calls under way, second ones too."""
        return self._twins + sum(record.began < inf for record in self._records)

    @property
    def full(self) -> bool:
        """Whether there are as many calls as may be."""
        return self.busy >= self._step.concurrency

    def serve(self) -> None:
        """Begin second calls that are wanted, as far as there are places."""
        wanting, slots, turn = self._wanting, self._step.slots, self._turn
        while wanting and not self._run.stopping:
            call, began = wanting[0]
            if not call.may_have_another(began):
                wanting.popleft()
                self._budget.give_back()
                continue
            if self.full or (slots is not None and not slots.take()):
                break
            if turn is not None and not turn.take():
                if slots is not None:
                    slots.release()
                break
            wanting.popleft()
            self._begin_twin(call)
        if turn is not None and not wanting:
            turn.give_back()
        self.crowded = bool(self._twins or wanting)

    @property
    def wanted(self) -> int:
        """How many late calls wait for a second one; asked in any thread."""
        return sum(call.may_have_another(began) for call, began in self._wanting.copy())

    @property
    def waits(self) -> bool:
        """Whether second calls are wanted that had no place."""
        return bool(self._wanting)

    def _hedge_it(self, record: GuardedCall) -> None:
        """Give a late call its chance: now, or when there is a place; not if the budget is used up."""
        if self._budget.take(self._step.meter.samples):
            record.hedged = record.began
            if record.refused == record.began:
                self._count_refused(-1)
            self._wanting.append((record, record.began))
            self.serve()
        elif record.refused != record.began and perf_counter() - record.began >= MUCH * self._after:
            record.refused = record.began
            self._count_refused(1)

    def _count_refused(self, count: int) -> None:
        if (policies := self._step.meter.policies) is not None:
            policies.refused_hedges += count

    def _begin_twin(self, call: GuardedCall) -> None:
        """In a context like that of a worker, with the same sample, and random numbers of its own."""
        self._step.meter.hedges += 1
        self._twins += 1
        entry: Any = call.sample.name
        sample = SampleContext(call.sample.seed)
        sample.name = entry
        context = self._run.context.copy()
        context.run(current_sample.set, sample)
        call.touched = True
        call.twin = self._run.begin(self._call, entry.value, context=context)
        began, slots = call.began, self._step.slots  # that of this call: others may follow a `Limit` by its end
        call.twin.add_done_callback(lambda twin: self._run.guarded(self._twin_done, call, began, slots, twin))
        if (trace := self._step.trace) is not None:
            since = perf_counter()
            call.twin.add_done_callback(lambda _: trace.second_call(entry, since))

    async def _call(self, value: Any) -> tuple[Any, BaseException | None]:
        try:
            return await self.fn(value), None
        except (CancelledError, GeneratorExit):
            raise
        except BaseException as error:
            return None, error

    def _twin_done(self, call: GuardedCall, began: float, slots: Slots | None, twin: SecondCall) -> None:
        self._twins -= 1
        if slots is not None:
            slots.release()
        if self._run.stopping:
            return
        if _won(twin) and call.may_have_another(began):
            self._cancel(call)
        elif self._step.tap is not None and not twin.cancelled() and (error := twin.result()[1]) is not None:
            self._step.tap.rate.failed(error)
        self.serve()
        self._step.go_on()

    # -- time --------------------------------------------------------------------------------------------------------

    def ended(self, began: float) -> None:
        """A call that began then has ended; one in a few is measured."""
        self._unmeasured -= 1
        if self._unmeasured < 0:
            self._unmeasured = self.measured - 1
            self.took(perf_counter() - began)

    def took(self, seconds: float) -> None:
        """A call has taken that long."""
        self._durations.append(seconds)
        if self._after == inf and self._durations.enough:
            self.measured = MEASURED
            self._work_out()
            self._ring(perf_counter())  # for those that are under way; from now on that is worked out when it rings

    def _work_out(self) -> None:
        self._after = self._durations.percentile()
        self._soonest = min(self._timeout, self._after)
        if (policies := self._step.meter.policies) is not None:
            policies.hedge_after = self._after

    def watch(self, began: float) -> None:
        """Look when a call that began then may be late; those after it cannot be late before that."""
        self._ring(began + self._soonest)
        self.watched = True

    def _ring(self, at: float) -> None:
        """Look at that time, or before."""
        if at >= self._rings_at:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._rings_at = at
        self._timer = self._step.later(max(EARLY_SECONDS, at - perf_counter()), self._rung)

    def _rung(self) -> None:
        self._timer = None
        if self._run.stopping:
            return
        now = perf_counter()
        if now - self._rings_at > LATE_SECONDS and self._turns < TURNS:
            self._turns += 1
            self._timer = self._step.later(0.0, self._rung)
            return
        self._turns = 0
        self._rings_at = inf
        if self._durations.enough:
            self._work_out()
        self._ring(self._look(now))
        self.watched = False

    def _look(self, now: float) -> float:
        """Do about each call what is due; returns when the next look is, if no call begins before that."""
        following = inf
        late: list[GuardedCall] = []
        for record in self._records:
            if record.began == inf or record.cancelled:
                continue
            took = now - record.began + EARLY_SECONDS
            if took >= self._timeout:
                self._cancel(record)
            elif record.hedged == record.began:
                following = min(following, record.began + self._timeout)
            elif took >= self._after:
                late.append(record)
            else:
                following = min(following, record.began + self._soonest)
        for record in sorted(late, key=_began):  # those that take longest first: the budget may not do for all
            self._hedge_it(record)
            again = record.began + self._timeout
            if record.hedged != record.began:
                again = min(again, now + self._after)  # by then those that are only a little late will have ended
            following = min(following, again)
        return following

    def _cancel(self, call: GuardedCall) -> None:
        call.touched = call.cancelled = True
        call.task.cancel()


def _began(call: GuardedCall) -> float:
    return call.began


def _won(twin: SecondCall) -> bool:
    return twin.done() and not twin.cancelled() and twin.result()[1] is None


async def _end(twin: SecondCall) -> None:
    """Cancel, and wait until it has cleaned up; what it raises was the second opinion on a sample that has its own.

    It is cancelled once, or its cleanup would be cut short. So not if the run ends, which has cancelled it; and if that
    ends while this waits, awaiting the task itself would cancel it again.
    """
    if not twin.cancelling():
        twin.cancel()
    await wait({twin})
