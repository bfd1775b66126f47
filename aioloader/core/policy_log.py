"""What is told of calls that fail, are late or have to wait, by the code that makes them."""

from collections.abc import Callable
from typing import NamedTuple

__all__ = ["PolicyLog", "Waiting"]


class Waiting(NamedTuple):
    """What waits in a stage now.

    Attributes:
        for_attempt: Samples that have failed and are to be tried again.
        next_attempt_at: When the first of them is (`perf_counter`); None: there is none.
        for_rate: Samples that could begin, if the rate let them.
        for_second_call: Late calls that are to have a second one, for which there is no place.
    """

    for_attempt: int = 0
    next_attempt_at: float | None = None
    for_rate: int = 0
    for_second_call: int = 0


class PolicyLog:
    """Is told where a call has failed, is late or has to wait, and nowhere else. This one keeps nothing for `stats()`.

    Attributes:
        refused_retries: Errors that were final because the budget was used up.
        refused_hedges: Calls that took long and had no second one, because the budget was used up.
        retry_wait_seconds: How long samples waited for their next attempts, summed over samples.
        hedge_after: So long takes a call that is to have a second one, now; None: not known yet.
        waiting: Asks the stage at work; None: it does not work any more.
    """

    def __init__(self) -> None:
        self.refused_retries = 0
        self.refused_hedges = 0
        self.retry_wait_seconds = 0.0
        self.hedge_after: float | None = None
        self.waiting: Callable[[], Waiting] | None = None

    def tried_again(self, error: BaseException, seconds: float) -> None:
        """A sample is to be tried again after `error`, in so many seconds."""

    def throttled(self, *, on: bool) -> None:
        """From now on calls could begin if the rate let them; or, not `on`, they do not wait for it any more."""
