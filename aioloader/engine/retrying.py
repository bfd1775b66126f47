"""Entries that wait before a step: for their next attempt, or for the rate of a step to allow another call.

While they wait they keep their slots in the window, and take no concurrency from others.
"""

from asyncio import TimerHandle
from collections import deque
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from time import perf_counter

from aioloader.core.entry import Entry, stop_of, tries_of
from aioloader.core.policies import Attempts, Retry
from aioloader.core.rate import Rate
from aioloader.engine.step_protocols import WaitingStep

__all__ = ["Retrying", "Tap", "Turn"]


class Retrying:
    """Lets a step try entries again that have failed. The first attempt knows nothing of it.

    Args:
        retry: How often, and when.
        step: The step.
    """

    def __init__(self, retry: Retry, step: WaitingStep) -> None:
        self._attempts = Attempts(retry)
        self._step = step
        self._waiting: list[tuple[float, int, Entry, float]] = []  # a heap of when, a number, who, and since
        self._number = 0
        self._timer: TimerHandle | None = None
        self._rings_at = 0.0
        self._paused = False

    def again(self, entry: Entry, error: BaseException) -> bool:
        """Whether `entry`, which has failed with `error`, is to be tried again; it waits by then.

        If not, and it has been tried before, `error` gets a note that says so.
        """
        step, now = self._step, perf_counter()
        if step.closed:
            return False
        tries = tries_of(entry)
        done, first = (tries[1], tries[2]) if tries is not None and tries[0] is step else (0, now)
        done += 1
        policies, refused = step.meter.policies, self._attempts.refused
        seconds = self._attempts.wait_after(done, error, now - first, step.meter.samples)
        if seconds is None:
            if policies is not None:
                policies.refused_retries += self._attempts.refused - refused
            return False
        if policies is not None:
            policies.tried_again(error, seconds)
        entry.tries = (step, done, first)
        entry.attempts += 1
        if stop_of(entry) is not None:
            entry.stop = None  # it has not ended there after all
        step.meter.retries += 1
        if step.trace is not None:
            step.trace.retry(entry, error, done + 1, seconds)
        self._wait(entry, now + seconds, now)
        return True

    @property
    def waiting(self) -> tuple[int, float | None]:
        """How many wait, and when the first of them goes on; asked in any thread."""
        waiting = self._waiting.copy()  # in one step
        return len(waiting), waiting[0][0] if waiting else None

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def _wait(self, entry: Entry, until: float, now: float) -> None:
        self._number += 1
        heappush(self._waiting, (until, self._number, entry, now))
        self._step.set_aside(1)
        if self._timer is None or until < self._rings_at:
            self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiting and not self._paused:
            self._rings_at = self._waiting[0][0]
            self._timer = self._step.later(max(0.0, self._rings_at - perf_counter()), self._rung)

    def _rung(self) -> None:
        self._timer = None
        due: list[Entry] = []
        waited = 0.0
        now = perf_counter() + 0.001  # libuv counts milliseconds
        while self._waiting and self._waiting[0][0] <= now:
            _, _, entry, since = heappop(self._waiting)
            due.append(entry)
            waited += now - since
        self._set_timer()
        if due:
            if (policies := self._step.meter.policies) is not None:
                policies.retry_wait_seconds += waited
            self._step.set_aside(-len(due))
            self._step.take_back(due)

    def pause(self, *, paused: bool) -> None:
        """Let nobody be tried again, or go on with that."""
        self._paused = paused
        self._set_timer()

    def close(self) -> None:
        """Nobody is tried again."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._waiting.clear()


class Turn:
    """The place of a step in the queue for a rate.

    Args:
        rate: The rate.
        step: Whose timers tell.
        come: Called when it is there.
    """

    def __init__(self, rate: Rate, step: WaitingStep, come: Callable[[], None]) -> None:
        self._rate = rate
        self._step = step
        self._come = come
        self._taken = False
        self._timer: TimerHandle | None = None

    def take(self, most: int = 1, soon: int = 0) -> int:
        """Let up to `most` calls begin now; returns how many. If none may, `come` is called when one may.

        Args:
            most: At most.
            soon: See `Rate.take_ready`.
        """
        if self._timer is not None:
            return 0
        if self._taken:
            self._taken = False
            return 1 + self._rate.take_ready(most - 1)
        if count := self._rate.take_ready(most, soon):
            return count
        self._taken = True
        self._timer = self._step.later(self._rate.take(), self._rung)
        return 0

    def give_back(self) -> None:
        """There is no call to begin, after all."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._taken:
            self._taken = False
            self._rate.give_back()

    def _rung(self) -> None:
        self._timer = None
        self._come()


class Tap:
    """Lets entries into the inbox of a step as its rate allows, and no sooner than it can begin on them.

    In a pause, what waits for the first step of a window has not begun, and stays here. What waits for a later one is
    under way, and goes on.

    Args:
        rate: The rate, which other steps may share.
        step: The step.

    Attributes:
        waiting: They have not been let in.
        throttled: How many could begin, if the rate let them.
    """

    def __init__(self, rate: Rate, step: WaitingStep) -> None:
        self.rate = rate
        self._step = step
        self._turn = Turn(rate, step, self.pump)
        self.waiting: deque[Entry] = deque()
        self.throttled = 0
        self._pumping = False

    def add(self, entries: Sequence[Entry], *, first: bool = False) -> None:
        """These come to the step; they go `first`, or last."""
        if first:
            self.waiting.extendleft(reversed(entries))
        else:
            self.waiting.extend(entries)
        if self._step.paused:
            self._step.set_aside(len(entries))
        self.pump()

    def hold(self) -> None:
        """The step pauses."""
        self._tell(0)
        self._step.set_aside(len(self.waiting))

    def let_go(self, first: Sequence[Entry]) -> None:
        """The step goes on; these had been let in, and had not begun."""
        self._step.set_aside(-len(self.waiting))
        self.add(first, first=True)

    def pump(self, *, at_hand: bool = False) -> None:
        """The step can begin on more, perhaps; `at_hand`: whoever calls this begins on one."""
        if self._pumping:  # it has let some in, and the step has begun on them at once
            return
        self._pumping = True
        step, waiting = self._step, self.waiting
        throttled = 0
        try:
            while waiting and not (step.paused or step.closed):
                free = min(step.free_places + at_hand, len(waiting))
                if free <= 0:
                    return
                if not (count := self._turn.take(free, len(waiting) - free)):
                    throttled = free
                    return
                step.inbox.extend([waiting.popleft() for _ in range(count)])
                step.dispatch()
        finally:
            self._pumping = False
            if throttled or self.throttled:
                self._tell(throttled)

    def _tell(self, throttled: int) -> None:
        """So many wait for the rate from now on, though there are places for them."""
        self.throttled = throttled
        if (policies := self._step.meter.policies) is not None:
            policies.throttled(on=throttled > 0)

    def close(self) -> None:
        """Nobody is let in any more."""
        self._tell(0)
        self._turn.give_back()
        self.waiting.clear()
