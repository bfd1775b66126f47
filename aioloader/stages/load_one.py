"""The samples of a batch, loaded one by one: what a `DataLoader` does whose samples have policies."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter, sleep
from typing import Any, Final

from torch.utils.data import Dataset, Subset

from aioloader.core.checks import is_async_callable
from aioloader.core.policies import Attempts, Policies, Words, check_policies
from aioloader.core.policy_log import PolicyLog, Waiting
from aioloader.core.safe_text import safe_repr
from aioloader.executors.current_sample import current_sample
from aioloader.executors.epochs import Holds

__all__ = ["FetchSample", "FetchSampleAsync", "TriedInPlace", "check_load_policies", "one_of"]

WORDS: Final = Words("sample_timeout", "__getitem__", "worker_type='process' with num_workers=1 or more")


def check_load_policies(
    dataset: Any,
    *,
    retry: Any,
    sample_timeout: Any,
    hedge: Any,
    rate: Any,
    iterable: bool,
    awaited: bool,
    in_processes: bool,
    retried_by_itself: bool,
) -> Policies | None:
    """What is done about loads of samples that fail, take long, or are too many; None: nothing.

    Args:
        dataset: Whose own policies count where none are given here.
        retry: See `DataLoader`, as for the following.
        sample_timeout: See there.
        hedge: See there.
        rate: See there.
        iterable: The dataset is iterated.
        awaited: It is async.
        in_processes: Worker processes load.
        retried_by_itself: The dataset takes such arguments, too.

    Raises:
        TypeError, ValueError: One of them is none, or does not fit the dataset.
    """
    executor = "process" if in_processes else None
    fits = awaited or iterable  # else that is the reason, and not threads
    policies = check_policies(retry, sample_timeout, hedge, rate, is_async=fits, executor=executor, words=WORDS)
    if policies is None:
        its_own = getattr(dataset, "policies", None)
        # A user's attribute of that name may be something else.
        return its_own if awaited and not iterable and isinstance(its_own, Policies) else None
    if retried_by_itself:
        raise ValueError(
            f"retry, hedge, rate and timeout are arguments of {type(dataset).__name__} itself, whose store would go on "
            f"retrying on its own otherwise, got them for the DataLoader; pass them to {type(dataset).__name__}"
        )
    if iterable:
        raise ValueError(
            f"retry, sample_timeout, hedge and rate are for datasets whose samples are loaded by key, got "
            f"{type(dataset).__name__}, which is iterated: what its iterator has raised cannot be asked for again; "
            f"give its source what it takes of them, or load by key"
        )
    return policies


class FetchSample(Holds):
    """One key to one sample, by `__getitem__`, or else by a `__getitems__` that is asked for one.

    Args:
        dataset: Map-style.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._single = _has_getitem(dataset)

    @property
    def held(self) -> tuple[Any, ...]:
        return (self._dataset,)

    def __call__(self, key: Any) -> Any:
        return self._dataset[key] if self._single else one_of(self._dataset.__getitems__([key]))


@dataclass(frozen=True)
class FetchSampleAsync:
    """The same for an async dataset."""

    dataset: Any

    async def __call__(self, key: Any) -> Any:
        """Load."""
        if is_async_callable(getattr(self.dataset, "__getitem__", None)):
            return await self.dataset[key]
        return one_of(await self.dataset.__getitems__([key]))


def _has_getitem(dataset: Any) -> bool:
    """Whether `dataset[key]` is there for use: torch's `Dataset` has one that only raises, and `Subset` passes on."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return getattr(type(dataset), "__getitem__", Dataset.__getitem__) is not Dataset.__getitem__


class TriedInPlace:
    """A dataset whose `__getitem__` waits and tries again by itself, for a loader that has no workers.

    Args:
        dataset: It.
        policies: `retry` and `rate` of them.
        retried: Called before each attempt but the first one, with its number.
        log: Is told of waits.

    Attributes:
        attempts: For the sample that was loaded last.
        began: When the last one of them did (`perf_counter`).
    """

    def __init__(self, dataset: Any, policies: Policies, retried: Callable[[int], None], log: PolicyLog) -> None:
        self._fetch = FetchSample(dataset)
        self._log = log
        self._now = now = [Waiting()]
        log.waiting = lambda: now[0]  # not `self`: statistics outlive the loader's nodes
        self._attempts = None if policies.retry is None else Attempts(policies.retry)
        self._rate = policies.rate
        self._retried = retried
        self._calls = 0
        self.attempts = 1
        self.began = 0.0

    def __getitem__(self, key: Any) -> Any:
        self.attempts, first = 1, 0.0
        while True:
            self._calls += 1
            if self._rate is not None and (wait := self._rate.take()) > 0:
                self._wait(wait)
            self.began = perf_counter()
            try:
                return self._fetch(key)
            except Exception as error:
                now = perf_counter()
                first = first or now
                if self._rate is not None:
                    self._rate.failed(error)
                if self._attempts is None:
                    raise
                refused = self._attempts.refused
                seconds = self._attempts.wait_after(self.attempts, error, now - first, self._calls)
                if seconds is None:
                    self._log.refused_retries += self._attempts.refused - refused
                    raise
                self._log.tried_again(error, seconds)
            self._sleep(seconds, Waiting(for_attempt=1, next_attempt_at=now + seconds))
            self._log.retry_wait_seconds += perf_counter() - now
            self.attempts += 1
            self._retried(self.attempts)
            if (sample := current_sample.get()) is not None:
                sample.rng = None  # what is begun again has the same random numbers, from the first one on

    def _wait(self, seconds: float) -> None:
        """Until the turn comes that was taken."""
        assert self._rate is not None
        self._log.throttled(on=True)
        try:
            self._sleep(seconds, Waiting(for_rate=1))
        except BaseException:  # Ctrl-C: there is no call
            self._rate.give_back()
            raise
        finally:
            self._log.throttled(on=False)

    def _sleep(self, seconds: float, waiting: Waiting) -> None:
        self._now[0] = waiting
        try:
            sleep(seconds)
        finally:
            self._now[0] = Waiting()


def one_of(loaded: Any) -> Any:
    """The sample in what was loaded for one key.

    Raises:
        TypeError: It is something else than a list of one sample.
    """
    samples = [] if isinstance(loaded, Mapping) else list(loaded)
    if len(samples) != 1:
        raise TypeError(
            f"a __getitems__ that asks for sample_rng(), or whose samples have policies, is called for one key at a "
            f"time and must return a list of one sample then, got {safe_repr(loaded)}; or write a __getitem__"
        )
    return samples[0]
