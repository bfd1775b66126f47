"""`Retry` and `Hedge`: what is done about calls that fail or take long; and what may be said of a stage's calls."""

import random
from dataclasses import dataclass
from datetime import UTC, timedelta
from email.utils import parsedate_to_datetime
from math import isfinite
from time import time
from typing import Any, Final

from aioloader.core.checks import Errors, check_count, check_exceptions, check_number, check_positive
from aioloader.core.rate import Rate
from aioloader.core.safe_text import add_note

__all__ = [
    "Attempts",
    "Budget",
    "Errors",
    "Hedge",
    "Policies",
    "Rate",
    "Retry",
    "as_retry",
    "check_exceptions",
    "check_policies",
    "retry_after",
]

FREE: Final = 10  # extra calls that a budget allows at first: a share of no calls would be none
SAVED_CALLS: Final = 1000  # whose share may be saved up: after a day without failures an outage is still an outage

_chance: Final = random.Random()  # the global generator is the user's


@dataclass(frozen=True)
class Retry:
    """A call that fails is made again, after a while.

    The n-th wait is `wait_initial * 2 ** (n - 1)` seconds and up to `jitter` more by chance, `wait_max` at most. Where
    the error says how long to wait (an attribute `retry_after`, or the header `Retry-After` of its response), it is
    that long at least. A sample that waits keeps its slot and its place, and takes no concurrency from others. After
    the last attempt, the user's own exception is raised at the place of the sample, with a note that says how many
    there were.

    Args:
        attempts: Calls for one sample, at least 1: 3 means two retries.
        on: The exception types after which it is worth another attempt.
        wait_initial: Seconds.
        wait_max: Seconds.
        jitter: Seconds.
        budget: Retries as a share of all calls, 0 to 1, so that an outage is not made worse: beyond that, errors are
            final. The first ten retries are free, and the share of up to 1,000 calls is saved up. None: no limit.

    Raises:
        TypeError, ValueError: An argument is none of these.
    """

    attempts: int = 3
    on: Errors = Exception
    wait_initial: float = 0.1
    wait_max: float = 5.0
    jitter: float = 1.0
    budget: float | None = None

    def __post_init__(self) -> None:
        check_count("attempts", self.attempts, least=1, hint="attempts=1 makes no retry")
        object.__setattr__(self, "on", check_exceptions("on", self.on))
        for name in ("wait_initial", "wait_max", "jitter"):
            check_number(name, getattr(self, name), least=0, hint="it is in seconds, and 0 is none")
        if self.budget is not None:
            check_number("budget", self.budget, least=0, most=1, hint="0.1 allows one retry for ten calls")

    def retries(self, error: BaseException) -> bool:
        """Whether another attempt is worth it after `error`."""
        return isinstance(error, self.on)

    def seconds_before(self, attempt: int, error: BaseException) -> float:
        """How long to wait before `attempt` (2 or more), since the one before failed with `error`."""
        wait = min(self.wait_max, self.wait_initial * 2.0 ** min(attempt - 2, 64) + _chance.random() * self.jitter)
        return max(wait, retry_after(error) or 0.0)


class Attempts:
    """What a `Retry` says of the calls of one stage, one failure after the other.

    Attributes:
        refused: Failures that were final only because the budget was used up.
    """

    def __init__(self, retry: Retry) -> None:
        self.refused = 0
        self._retry = retry
        self._budget = Budget(retry.budget)

    def wait_after(self, done: int, error: BaseException, took: float, calls: int) -> float | None:
        """Seconds until the next attempt. None: there is none; if there were several, `error` gets a note that says so.

        Args:
            done: Attempts so far for this sample.
            error: Why the last one failed.
            took: Seconds since the first one failed.
            calls: Of the stage so far.
        """
        retry = self._retry
        if not retry.retries(error):
            why = "" if done == 1 else f"attempt {done} of {retry.attempts} failed, and this is not retried"
        elif done >= retry.attempts:
            why = f"attempt {done} of {retry.attempts} failed, {took:.1f} s after the first one"
        elif self._budget.take(calls):
            return retry.seconds_before(done + 1, error)
        else:
            self.refused += 1
            why = (
                f"attempt {done} of {retry.attempts} failed, and there is none after it: retries are "
                f"{retry.budget:.0%} of all calls at most (budget)"
            )
        if why and not any(str(note).startswith("aioloader: attempt ") for note in getattr(error, "__notes__", ())):
            add_note(error, f"aioloader: {why}")  # once, though one object may be raised for many samples
        return None


def as_retry(retry: object) -> Retry | None:
    """`retry=` of a stage: attempts, a `Retry`, or None.

    Raises:
        TypeError, ValueError: It is none of these.
    """
    if retry is None or isinstance(retry, Retry):
        return retry
    if isinstance(retry, bool) or not hasattr(retry, "__index__"):
        raise TypeError(f"retry must be a number of attempts or a Retry, got {retry!r}; pass for instance retry=3")
    return Retry(check_count("retry", retry, least=1, hint="it is the number of attempts; leave it out for one"))


def retry_after(error: BaseException) -> float | None:
    """Seconds that the server asked to wait, if `error` tells; at most an hour."""
    try:
        value: Any = getattr(error, "retry_after", None)
        for holder in (getattr(error, "response", None), error):
            if value is None and (headers := getattr(holder, "headers", None)) is not None:
                value = headers.get("Retry-After", headers.get("retry-after"))
        if value is None:
            return None
        seconds = _seconds(value)
        return min(max(seconds, 0.0), 3600.0) if isfinite(seconds) else None
    except Exception:  # it is the user's object, and it may say anything
        return None


def _seconds(value: Any) -> float:
    """A number, as text too, a `timedelta`, or the date of an HTTP header."""
    if isinstance(value, timedelta):
        return value.total_seconds()
    try:
        return float(value)
    except ValueError:
        date = parsedate_to_datetime(value)
        return (date if date.tzinfo is not None else date.replace(tzinfo=UTC)).timestamp() - time()


@dataclass(frozen=True)
class Hedge:
    """A second call for a sample whose first one takes long: the first result counts, the other call is cancelled.

    For async functions that may be called twice for one sample. The loser is cancelled and awaited. Both calls count in
    the concurrency of the stage, and in its rate: where calls that hang have taken all places, there are no second
    ones, and only a `timeout` helps. With one, both calls have to be done in time.

    Args:
        after: Seconds; or a percentile of this stage's calls, `"p95"`: known after some twenty calls.
        budget: Second calls as a share of all calls, 0 to 1; counted as that of `Retry`.

    Raises:
        TypeError, ValueError: An argument is none of these.
    """

    after: float | str = "p95"
    budget: float = 0.05

    def __post_init__(self) -> None:
        if isinstance(self.after, str):
            if self.percentile is None:
                raise ValueError(f"after must be seconds or a percentile from 'p1' to 'p99', got {self.after!r}")
        else:
            check_number("after", self.after, least=0, hint="it is in seconds; or pass a percentile, such as 'p95'")
        check_number("budget", self.budget, least=0, most=1, hint="0.05 allows one second call for twenty")

    @property
    def percentile(self) -> int | None:
        """1 to 99; None: `after` is in seconds."""
        after = self.after
        if not isinstance(after, str) or not after.startswith("p") or not after[1:].isdigit():
            return None
        number = int(after[1:])
        return number if 1 <= number <= 99 else None


@dataclass(frozen=True)
class Policies:
    """What is done about the calls of one stage.

    Attributes:
        retry: When one that fails is made again; None: never.
        timeout: Seconds for one attempt; None: no limit.
        hedge: When there is a second call beside the first one; None: never.
        rate: How many begin; None: as many as there is room for.
        timeout_name: The argument that says `timeout`, for errors.
    """

    retry: Retry | None = None
    timeout: float | None = None
    hedge: Hedge | None = None
    rate: Rate | None = None
    timeout_name: str = "timeout"


@dataclass(frozen=True)
class Words:
    """How things are called where policies are given."""

    timeout: str = "timeout"
    function: str = "it"
    in_process: str = "executor='process'"


def check_policies(
    retry: object,
    timeout: object,
    hedge: object,
    rate: object,
    *,
    is_async: bool,
    executor: object = None,
    words: Words | None = None,
) -> Policies | None:
    """What is done about the calls of a stage; None: nothing.

    Args:
        retry: See `Pipeline.map`, as for the following.
        timeout: See there.
        hedge: See there.
        rate: See there.
        is_async: The function is async.
        executor: Where it runs, if it is not.
        words: How the caller calls things; None: as `map`.

    Raises:
        TypeError, ValueError: One of them is none, or does not fit the function.
    """
    words = Words() if words is None else words
    if timeout is not None:
        timeout = check_positive(words.timeout, timeout, "leave it out for no limit")
        if not is_async and executor not in ("process", "ray"):
            raise ValueError(
                f"{words.timeout} cannot stop a thread, got {words.timeout}={timeout:g} for a function that runs in "
                f"one; make {words.function} async, or pass {words.in_process}, or give the client inside of it a "
                f"timeout of its own"
            )
    if hedge is not None:
        if not isinstance(hedge, Hedge):
            raise TypeError(f"hedge must be a Hedge, got {hedge!r}; pass for instance Hedge(after='p95', budget=0.05)")
        if not is_async:
            raise ValueError("hedge is for async functions, whose second calls can be cancelled; leave it out")
        if executor == "ray":
            raise ValueError(
                "hedge makes its second calls on the loop of this process, and this function is called in actors; "
                "leave hedge out, or the executor"
            )
    if rate is not None and not isinstance(rate, Rate):
        raise TypeError(f"rate must be a Rate, got {rate!r}; pass for instance Rate(100), which may be shared")
    retry = as_retry(retry)
    if retry is not None and retry.attempts == 1:
        retry = None
    if retry is None and timeout is None and hedge is None and rate is None:
        return None
    return Policies(retry, timeout, hedge, rate, words.timeout)


class Budget:
    """Extra calls as a share of calls.

    Args:
        share: 0 to 1; None: any number.
    """

    def __init__(self, share: float | None) -> None:
        self._share = share
        self._left = FREE if share else 0.0
        self._calls = 0  # as of the last look

    def take(self, calls: int) -> bool:
        """Whether one more is allowed, after `calls` calls."""
        share = self._share
        if share is None:
            return True
        news = calls - self._calls
        self._calls = calls
        self._left = min(self._left + share * news, max(FREE, share * SAVED_CALLS) if share else 0.0)
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True

    def give_back(self) -> None:
        """One that was allowed was not made."""
        self._left += 1.0
