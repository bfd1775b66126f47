"""Retries, time limits, second calls and rates for the requests of sources that read from stores.

`Objects` fetches each object in a step of the engine, which does all that by itself. The other sources make several
requests for a sample, or one for many samples: here each request is made again on its own, so what has arrived of an
archive is not fetched anew.
"""

import asyncio
import threading
from asyncio import FIRST_COMPLETED, CancelledError, wait
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import CancelledError as ThreadCancelledError
from concurrent.futures import Future as ThreadFuture
from math import inf
from time import perf_counter
from typing import Any, Generic, TypeVar

from aioloader.core.durations import LATE_SECONDS, TURNS, Durations
from aioloader.core.policies import Attempts, Budget, Policies, Rate, Retry, check_policies
from aioloader.core.policy_log import PolicyLog, Waiting
from aioloader.core.source import SourceContext
from aioloader.errors import CutShortError

__all__ = ["CutShortError", "Pending", "RequestPolicies", "Requests", "StoreRetry", "store_policies"]

T = TypeVar("T")


class StoreRetry(Retry):
    """A `Retry` for which nobody has said `on`: what another attempt cannot change is final."""

    def retries(self, error: BaseException) -> bool:
        return isinstance(error, self.on) and (isinstance(error, CutShortError) or not isinstance(error, _final()))


def _final() -> tuple[type[BaseException], ...]:
    """Errors that say the same each time: it is not there, it is not allowed, it is another version, it cannot be."""
    from obstore import exceptions

    return (
        FileNotFoundError,
        IsADirectoryError,
        NotADirectoryError,
        PermissionError,
        ImportError,
        TypeError,
        ValueError,  # and so `BrokenDataError`
        exceptions.AlreadyExistsError,
        exceptions.InvalidPathError,
        exceptions.NotFoundError,
        exceptions.NotModifiedError,
        exceptions.NotSupportedError,
        exceptions.PermissionDeniedError,
        exceptions.PreconditionError,
        exceptions.UnauthenticatedError,
        exceptions.UnknownConfigurationKeyError,
    )


def store_policies(retry: Any, timeout: Any, hedge: Any, rate: Any) -> Policies | None:
    """What is done about the requests to a store; None: nothing.

    Raises:
        TypeError, ValueError: An argument is invalid, see `Pipeline.map`.
    """
    policies = check_policies(retry, timeout, hedge, rate, is_async=True)
    if policies is None or type(policies.retry) is not Retry or policies.retry.on != (Exception,):
        return policies  # there is none, or it is the user's own kind, or says after what
    return Policies(StoreRetry(**vars(policies.retry)), policies.timeout, policies.hedge, policies.rate)


class RequestPolicies:
    """What a source does about its requests.

    No dataclass, and always there, so that a cache on disk is the same whatever is in it.

    Args:
        policies: None: nothing.
        name: Of the source, for errors.
    """

    def __init__(self, policies: Policies | None, name: str) -> None:
        self._policies = policies
        self._name = name

    @property
    def policies(self) -> Policies | None:
        """What is done; None: nothing."""
        return self._policies

    @property
    def rate(self) -> Rate | None:
        """How many requests begin in a second; others may share it."""
        return None if self._policies is None else self._policies.rate

    def begin(self, context: SourceContext) -> "Requests | None":
        """For one epoch; None: the requests are made as they are."""
        return None if self._policies is None else Requests(self._policies, self._name, context)

    def begin_for_threads(self, context: SourceContext) -> "Requests":
        """For one epoch of a reader whose threads ask (`Requests.call`), with policies or without."""
        return Requests(self._policies or Policies(), self._name, context)


class Pending(Generic[T]):
    """A call in a task of its own, whose outcome waits until it is asked for.

    Attributes:
        task: Which it runs in.
        value: Its result, once it is over.
        error: What it raised; None: nothing, or it is not over.
    """

    def __init__(self, context: SourceContext, call: Callable[[], Awaitable[T]]) -> None:
        self._call = call
        self.value: T
        self.error: BaseException | None = None
        self.task = context.spawn(self._run)

    async def _run(self) -> None:
        try:
            self.value = await self._call()
        except (CancelledError, GeneratorExit):
            raise
        except BaseException as error:
            self.error = error
            if not isinstance(error, Exception):
                raise

    @property
    def won(self) -> bool:
        """Whether it has a result."""
        return self.task.done() and self.error is None and not self.task.cancelled()

    async def result(self) -> T:
        """Wait for it, without taking a cancellation to it. To be asked for once: an error is let go of then."""
        if not self.task.done():
            await wait({self.task})
        error, self.error = self.error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback has this frame, which would have it
        if self.task.cancelled():
            raise CancelledError
        return self.value

    def cancel(self) -> None:
        """Cancel it, once: a second time would cut its cleanup short."""
        if not self.task.done() and not self.task.cancelling():
            self.task.cancel()


class Requests:
    """The requests of one reader. What is said of a stage's calls holds for each of them: attempts are its attempts.

    The first attempt runs bare, in the task that asks, unless something has to watch it: a time limit, or the moment
    for a second call. Then each call has a task of the reader's. Whichever has a result first wins, as in
    `aioloader.engine.guard`; the other one is cancelled and awaited, and so are both when the time is up.

    Pyarrow reads from threads: `call` takes a request to the loop and waits. When the epoch is given up, the request is
    cancelled with all tasks of the reader, so the thread waits no longer; and one that was about to ask, or whose task
    has not begun, is refused by `close`, under a lock, since the loop may make no turn any more.

    Args:
        policies: What is done about them.
        name: Of the source, for errors.
        context: The reader's.

    Attributes:
        told: Called with how many seconds an answer took to begin, where the reader wants to know.
    """

    told: Callable[[float], object] | None = None

    def __init__(self, policies: Policies, name: str, context: SourceContext) -> None:
        self._name = name
        self._context = context
        self._log = context.policy_log(policies) if policies != Policies() else PolicyLog()
        self._log.waiting = self._waiting
        self._attempts = None if policies.retry is None else Attempts(policies.retry)
        self._timeout = inf if policies.timeout is None else policies.timeout
        self._rate = policies.rate
        hedge = policies.hedge
        percentile = None if hedge is None else hedge.percentile
        self._after = inf if hedge is None or percentile is not None else float(hedge.after)
        self._durations = None if percentile is None else Durations(percentile)
        self._hedges = None if hedge is None else Budget(hedge.budget)
        self._calls = 0
        self._for_rate = 0
        self._next_attempts: dict[object, float] = {}  # when each of those is made that wait
        self._lock = threading.Lock()
        self._closed = False
        self._threads_wait: set[ThreadFuture[Any]] = set()

    async def run(self, request: Callable[[], Awaitable[T]], *, hedged: bool = True, rated: bool = True) -> T:
        """The result of `request()`, which may be called again.

        Args:
            request: Makes one request from its beginning to its end.
            hedged: It may be called while an earlier call is under way.
            rated: It counts in the rate; False: it is a part of a request, which takes its `turn` itself.

        Raises:
            TimeoutError: Each attempt took too long.
            Exception: Of the last attempt, with a note.
        """
        done, began = 0, perf_counter()
        while True:
            if rated:
                await self.turn()
            self._calls += 1
            try:
                if self._timeout == inf and not (hedged and self._hedges is not None):
                    return await request()
                return await self._watched(request, hedged=hedged)
            except Exception as error:
                done += 1
                seconds = self._seconds_before_next(done, began, error)
                if seconds is None:
                    raise
            self._context.count_requests(retries=1)
            await self._wait_for_attempt(seconds)

    def begin(self, request: Callable[[], Awaitable[T]]) -> Pending[T]:
        """`run(request)` in a task of its own, for what is asked for ahead."""
        return Pending(self._context, lambda: self.run(request))

    def _seconds_before_next(self, done: int, began: float, error: Exception) -> float | None:
        if self._rate is not None:
            self._rate.failed(error)
        if self._attempts is None:
            return None
        refused = self._attempts.refused
        seconds = self._attempts.wait_after(done, error, perf_counter() - began, self._calls)
        if seconds is None:
            self._log.refused_retries += self._attempts.refused - refused
        else:
            self._log.tried_again(error, seconds)
        return seconds

    async def _wait_for_attempt(self, seconds: float) -> None:
        began, one = perf_counter(), object()
        self._next_attempts[one] = began + seconds
        try:
            await asyncio.sleep(seconds)
        finally:
            del self._next_attempts[one]
            self._log.retry_wait_seconds += perf_counter() - began

    async def turn(self) -> None:
        """Wait until the rate allows another request."""
        if self._rate is None or not (seconds := self._rate.take()):
            return
        self._for_rate += 1
        self._log.throttled(on=True)
        try:
            await asyncio.sleep(seconds)
        except CancelledError:
            self._rate.give_back()
            raise
        finally:
            self._for_rate -= 1
            self._log.throttled(on=self._for_rate > 0)

    def _waiting(self) -> Waiting:
        """What waits now; asked in any thread."""
        times = self._next_attempts.copy()  # in one step
        return Waiting(len(times), min(times.values(), default=None), self._for_rate)

    async def _watched(self, request: Callable[[], Awaitable[T]], *, hedged: bool) -> T:
        """One attempt: one call, or two, within the time limit."""
        began = perf_counter()
        until = began + self._timeout
        calls = [Pending(self._context, request)]
        try:
            after = self._hedge_after if hedged else inf
            if after < self._timeout and not await _one_done(calls, began + after) and self._may_hedge():
                calls.append(Pending(self._context, request))
            result = await self._first_result(calls, until)
            if self._durations is not None:
                self._took(perf_counter() - began)
            return result
        finally:
            for call in calls:
                call.cancel()
            await wait({call.task for call in calls})
            for call in calls[1:]:
                if call.error is not None and self._rate is not None:
                    self._rate.failed(call.error)
                call.error = None

    @property
    def _hedge_after(self) -> float:
        return self._after if self._durations is None else self._durations.percentile()

    def _took(self, seconds: float) -> None:
        """An attempt has taken that long, where the time of a second call follows from that."""
        assert self._durations is not None
        self._durations.append(seconds)
        if self._durations.enough:
            self._log.hedge_after = self._durations.percentile()

    def _may_hedge(self) -> bool:
        """Whether there may be a second call, which is counted then. It waits for no turn: it would come too late."""
        assert self._hedges is not None
        if not self._hedges.take(self._calls):
            self._log.refused_hedges += 1
            return False
        if self._rate is not None and not self._rate.take_ready(1):
            self._hedges.give_back()
            return False
        self._calls += 1
        self._context.count_requests(hedges=1)
        return True

    async def _first_result(self, calls: Sequence[Pending[T]], until: float) -> T:
        """The first result; the error of the first call if none has one.

        Raises:
            TimeoutError: There is none in time.
        """
        while True:
            if (won := next((call for call in calls if call.won), None)) is not None:
                return await won.result()
            under_way = [call for call in calls if not call.task.done()]
            if not under_way:
                return await calls[0].result()
            if not await _one_done(under_way, until):
                if self._durations is not None:
                    self._took(self._timeout)
                self._context.count_requests(timeouts=1)
                raise TimeoutError(f"{self._name}: a request took longer than timeout={self._timeout:g} s")

    # -- for threads -------------------------------------------------------------------------------------------------

    def call(self, request: Callable[[], Awaitable[T]]) -> T:
        """`run(request)` on the loop, for a thread that waits.

        Raises:
            concurrent.futures.CancelledError: The epoch is over.
            Exception: As `run`.
        """
        answer: ThreadFuture[T] = ThreadFuture()
        with self._lock:
            if self._closed:
                answer.cancel()
            else:
                self._threads_wait.add(answer)
                self._context.loop.call_soon_threadsafe(self._answer, request, answer)
        try:
            return answer.result()
        finally:
            with self._lock:
                self._threads_wait.discard(answer)
            del answer  # which has the error, whose traceback has this frame

    def _answer(self, request: Callable[[], Awaitable[T]], answer: "ThreadFuture[T]") -> None:
        if answer.cancelled():
            return
        pending = self.begin(request)

        def done(task: "asyncio.Task[None]") -> None:
            if not answer.set_running_or_notify_cancel():
                return
            error, pending.error = pending.error, None
            if error is not None:
                answer.set_exception(error)
            elif task.cancelled():
                answer.set_exception(ThreadCancelledError())
            else:
                answer.set_result(pending.value)

        pending.task.add_done_callback(done)

    def close(self) -> None:
        """No thread waits any more."""
        with self._lock:
            self._closed = True
            for answer in self._threads_wait:
                answer.cancel()


async def _one_done(calls: Sequence[Pending[Any]], until: float) -> bool:
    """Whether one of `calls` is done at the time `until`; waits no longer than that.

    After the loop has stood still, those come first that were answered meanwhile.
    """
    tasks = {call.task for call in calls}
    await wait(tasks, timeout=None if until == inf else max(0.0, until - perf_counter()), return_when=FIRST_COMPLETED)
    turns = TURNS if perf_counter() - until > LATE_SECONDS else 0
    while turns and not any(task.done() for task in tasks):
        await asyncio.sleep(0)
        turns -= 1
    return any(task.done() for task in tasks)
