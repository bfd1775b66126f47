"""What the policies of a stage (retry, timeout, hedge, rate) have done, and what waits because of them.

Counted where a call has failed, is late or has to wait, and nowhere else: calls that succeed at once pass none of it.
"""

from dataclasses import dataclass
from time import perf_counter
from typing import Final

from aioloader.core.policies import Policies
from aioloader.core.policy_log import PolicyLog, Waiting
from aioloader.core.rate import Bound

__all__ = ["PolicyMeter", "PolicyStats"]

MOST_KINDS: Final = 16  # of errors that are told apart: types may be made at run time, without end


@dataclass(frozen=True, slots=True)
class PolicyStats:
    """The policies of one stage in one epoch: what they say, and what came of it. Durations are in seconds.

    Attributes:
        timeout: For one attempt; None: no limit.
        wait_initial: Of its `Retry`; None: it has none.
        wait_max: Likewise.
        jitter: Likewise.
        retry_budget: Likewise; None: no limit.
        retried_after: The error after which most attempts were made, by its type's name; empty: there were none.
        retry_wait_seconds: How long samples waited for their next attempts, summed over samples.
        asked_waits: Waits that were longer than `wait_max`, because the server asked for it (`Retry-After`).
        refused_retries: Errors that were final because the budget was used up.
        hedge_budget: Of its `Hedge`; None: it has none.
        hedge_after: So long takes a call that is to have a second one, now; None: not known yet.
        refused_hedges: Calls that took more than twice as long as `hedge_after` and had no second one, because the
            budget was used up.
        per_second: What its `Rate` allows now; None: it has none.
        rate_bound: What keeps the rate from being more: it was `"given"`, is at its `"most"`, calls were refused
            (`"refusals"`), or it is still growing (`"growth"`).
        rate_wait_seconds: Time in which a call could have begun if the rate had let it.
        waiting_for_attempt: Samples that wait for their next attempt, now.
        next_attempt_seconds: In how long the first of them is tried again; None: there is none.
        waiting_for_rate: Samples that could begin if the rate let them, now.
        waiting_for_second_call: Late calls that are to have a second one and find no place, now.
    """

    timeout: float | None = None
    wait_initial: float | None = None
    wait_max: float | None = None
    jitter: float | None = None
    retry_budget: float | None = None
    retried_after: str = ""
    retry_wait_seconds: float = 0.0
    asked_waits: int = 0
    refused_retries: int = 0
    hedge_budget: float | None = None
    hedge_after: float | None = None
    refused_hedges: int = 0
    per_second: float | None = None
    rate_bound: Bound = "given"
    rate_wait_seconds: float = 0.0
    waiting_for_attempt: int = 0
    next_attempt_seconds: float | None = None
    waiting_for_rate: int = 0
    waiting_for_second_call: int = 0


class PolicyMeter(PolicyLog):
    """Counters of one stage that has policies. Written by one thread at a time, read from any.

    Args:
        policies: They.
    """

    def __init__(self, policies: Policies) -> None:
        super().__init__()
        self._policies = policies
        self._kinds: dict[str, int] = {}
        self._throttled: tuple[float, float | None] = (0.0, None)  # seconds, and since; one object, for other threads
        self._asked_waits = 0
        hedge = policies.hedge
        self.hedge_after = None if hedge is None or isinstance(hedge.after, str) else float(hedge.after)

    def tried_again(self, error: BaseException, seconds: float) -> None:
        if self._policies.retry is not None and seconds > self._policies.retry.wait_max:
            self._asked_waits += 1
        kind = type(error).__name__
        if kind in self._kinds or len(self._kinds) < MOST_KINDS:
            self._kinds[kind] = self._kinds.get(kind, 0) + 1

    def throttled(self, *, on: bool) -> None:
        seconds, since = self._throttled
        if on is (since is not None):
            return
        now = perf_counter()
        self._throttled = (seconds, now) if since is None else (seconds + now - since, None)

    def stats(self) -> tuple[PolicyStats, float | None]:
        """As they are now; and when the first sample is tried again (`perf_counter`), None if none waits for that.

        That is for other processes, too, who are told of it some time later.
        """
        retry, hedge, rate = self._policies.retry, self._policies.hedge, self._policies.rate
        waiting = Waiting() if self.waiting is None else self.waiting()
        seconds, since = self._throttled
        kinds = dict(self._kinds)  # in one step: it may grow meanwhile
        stats = PolicyStats(
            timeout=self._policies.timeout,
            wait_initial=None if retry is None else retry.wait_initial,
            wait_max=None if retry is None else retry.wait_max,
            jitter=None if retry is None else retry.jitter,
            retry_budget=None if retry is None else retry.budget,
            retried_after=max(kinds, key=kinds.__getitem__, default=""),
            retry_wait_seconds=self.retry_wait_seconds,
            asked_waits=self._asked_waits,
            refused_retries=self.refused_retries,
            hedge_budget=None if hedge is None else hedge.budget,
            hedge_after=self.hedge_after,
            refused_hedges=self.refused_hedges,
            per_second=None if rate is None else rate.per_second,
            rate_bound="given" if rate is None else rate.bound,
            rate_wait_seconds=seconds + (0.0 if since is None else max(0.0, perf_counter() - since)),
            waiting_for_attempt=waiting.for_attempt,
            waiting_for_rate=waiting.for_rate,
            waiting_for_second_call=waiting.for_second_call,
        )
        return stats, waiting.next_attempt_at
