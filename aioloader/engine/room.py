"""How many entries a window may hold: what its slowest step needs, and no more because of what the others are."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from time import perf_counter
from typing import Final

from aioloader.core.entry import DONE, Entry
from aioloader.core.sizes import MeanBytes
from aioloader.engine.node import CHUNK_SECONDS, MOST_EARLY, Node
from aioloader.engine.steps import Step
from aioloader.engine.sync_step import SyncStep

__all__ = ["BytesRoom", "GrowingRoom", "Growth", "Room", "StepsRoom", "places_for_finished"]

FEW: Final = 2  # calls of a cheap sync step that are under way, as a rule: one, and one that follows

WIDEST: Final = 16  # times the concurrency, where a slow sample at the front holds others up
MOST_BYTES: Final = 256 << 20  # of finished samples, as far as room has grown
MANY: Final = 32  # arrivals; those of entries that have left are forgotten then, or when somebody asks
WEIGHED: Final = 16  # one of so many chances to weigh samples is taken: what they are like changes slowly


def places_for_finished(widest: int) -> int:
    """Of samples that wait for a slower one before them, where so many calls may stand side by side."""
    return max(1, widest // 2)


class Growth:
    """More room while a slow sample at the front holds finished ones up, so that strict order costs no time.

    When a window is full, its front is under way, and fewer samples are under way than its steps have places for, then
    as many more may begin as places stand idle. Samples that take equally long are not finished exactly in order,
    either: the front must have been under way for as long as one takes on average. Nothing is remembered: a full window
    with a finished front has a slow consumer, and gets nothing.
    """

    def __init__(self) -> None:
        self._bytes = MeanBytes()
        self._chances = 0
        self._came = 0
        self._arrivals: deque[tuple[int, float]] = deque()  # the number of the first that came together, and when

    def came(self, count: int, held: int, now: float) -> None:
        """So many entries have come in at `now`, after the `held` ones that are still there."""
        if len(self._arrivals) >= MANY:
            self._forget(held)
        self._arrivals.append((self._came, now))
        self._came += count

    def wait(self, held: int, seconds_each: float) -> float:
        """For how many seconds the first of `held` entries is still to be waited for; 0 or less: for none.

        Args:
            held: Those that are in the window.
            seconds_each: How long one takes on average.
        """
        self._forget(held)
        return self._arrivals[0][1] + max(2 * CHUNK_SECONDS, seconds_each) - perf_counter()

    def _forget(self, held: int) -> None:
        """The arrivals of those that have left."""
        arrivals, first = self._arrivals, self._came - held
        while len(arrivals) > 1 and arrivals[1][0] <= first:
            arrivals.popleft()

    def most(self, concurrency: int, entries: Iterable[Entry]) -> int:
        """Entries that the window may hold; `entries` are some of those that wait in it."""
        self._chances += 1
        if self._chances % WEIGHED == 1:
            for entry in entries:
                if entry.state == DONE and entry.error is None:
                    self._bytes.saw(entry.value)
        places = self._bytes.places(MOST_BYTES)
        return WIDEST * concurrency if places is None else min(WIDEST * concurrency, places)


class Room:
    """Always as many.

    Args:
        places: How many.
        follow: Gives their number anew where concurrency may change, see `Limit`; None: it does not.

    Attributes:
        growth: How it becomes more; None: never.
        weighs: Whether `gave` is to be told.
        width: Entries under way that its steps have places for, where it may grow.
        widest: The largest concurrency among its steps, where it may grow.
    """

    growth: Growth | None = None
    weighs = False
    width = 0
    widest = 0

    def __init__(self, places: int, follow: Callable[[], int] | None = None) -> None:
        self._places = places
        self._follow = follow

    def now(self, asked: int) -> int:
        """Entries under way and finished together, at most.

        Args:
            asked: What is lacking after the window: entries for which there is room, and which it could not give.
        """
        return self._places

    def gave(self, entries: Sequence[Entry]) -> None:
        """These have been taken."""

    @property
    def elastic(self) -> bool:
        """Whether there is more for samples that cost little, so that a hop is worth its cost."""
        return False

    @property
    def may_grow(self) -> bool:
        """Whether more calls are under way than it has places for."""
        return False

    def look(self) -> None:
        """Give calls their places that have been under way for a while."""

    def refresh(self) -> None:
        """What a step says of itself has changed."""
        if self._follow is not None:
            self._places = self._follow()


class GrowingRoom(Room):
    """So many, and more as `Growth` says.

    Args:
        places: How many there are at least.
        width: Calls that may be under way.
        widest: How much it may grow depends on that; None: on `width`.
    """

    def __init__(self, places: int, width: int, widest: int | None = None) -> None:
        super().__init__(places)
        self.growth = Growth()
        self.width = width
        self.widest = width if widest is None else widest


class BytesRoom(Room):
    """As many as fit into a budget, by the running mean of what came.

    Args:
        nbytes: The budget.
        least: How many there are in any case.
        most: How many there are at most; None: it is for the budget alone to say.
        follow: Gives `least` anew, see `Room`.
    """

    weighs = True

    def __init__(self, nbytes: int, least: int, most: int | None, follow: Callable[[], int] | None = None) -> None:
        super().__init__(least, follow)
        self._nbytes = nbytes
        self._most = most
        self._bytes = MeanBytes()

    def now(self, asked: int) -> int:
        places = self._bytes.places(self._nbytes)
        if places is None:
            return self._places
        return max(self._places, places if self._most is None else min(places, self._most))

    def gave(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            if entry.error is None:
                self._bytes.saw(entry.value)


class StepsRoom(Room):
    """As many as the steps of a window have use for, and more as `Growth` says.

    The first step counts with its whole width, and async ones do; a sync step after another one only with the calls
    that were found standing side by side in it, and with two if it is cheap. So a wide and cheap `decode`
    after `fetch` lets `fetch` begin nothing more, and a slow one gets its places as it takes them. Half of the widest
    step is for samples that wait, finished, for a slower one before them: behind latency that keeps 96 to 99 % of
    the rate of a loop that does not keep order (measured with 512 under way: 64 places more gave 77 %, 256 gave 96 to
    99 %).

    A hop into a thread costs as much as a hundred cheap samples. So where *all* that is done to a sample up to
    here is cheap, there is more room, as much as the slowest step has use for. After another stage it is used only for
    what has a place after the window: those samples would have been begun anyway.

    Args:
        upstream: Where entries come from.
        steps: Those of the window.
        finished: Places for finished samples; None: half as many as the widest step has.
        early: The room for cheap samples needs no place after the window.
    """

    def __init__(self, upstream: Node, steps: Sequence[Step], finished: int | None, *, early: bool) -> None:
        self._upstream = upstream
        self._working = [part for step in steps for part in step.parts if part.concurrency]
        self._look_ups = [step for step in steps if not step.concurrency]
        self._hop = [step for step in self._working if isinstance(step, SyncStep)]
        self._awaited = [step for step in self._working if not isinstance(step, SyncStep)]
        self._later = [step for step in self._hop if step is not self._working[0]]
        for step in self._later:
            step.places = min(step.places, FEW)
            step.places_follow = False
        self._finished = finished
        self._early = early
        self.growth = Growth() if finished is None else None
        self.refresh()

    def refresh(self) -> None:
        several = len(self._working) > 1
        places = [step.places for step in self._awaited]
        places += [min(step.places, FEW) if several and step.extra_room else step.places for step in self._hop]
        self.width = sum(places) or 1
        self.widest = widest = max(places, default=1)
        self._places = self.width + (places_for_finished(widest) if self._finished is None else self._finished)
        self._cheap = min([step.extra_room for step in self._hop], default=0)
        self._found = sum(step.extra_room for step in self._look_ups)

    def now(self, asked: int) -> int:
        room, extra = self._places, self._found
        if self._cheap and (self._early or asked):
            cheap = min([self._cheap, self._upstream.extra_room, *(step.extra_room for step in self._awaited)])
            extra += cheap if self._early else min(cheap, asked)
        return min(room + extra, max(room, MOST_EARLY)) if extra else room

    @property
    def elastic(self) -> bool:
        return bool(self._found or min([self._cheap, *(step.extra_room for step in self._awaited)]))

    @property
    def may_grow(self) -> bool:
        return any(min(step.under_way, step.concurrency) > step.places for step in self._later)

    def look(self) -> None:
        for step in self._later:
            step.places = max(step.places, min(step.standing, step.concurrency))
        self.refresh()
