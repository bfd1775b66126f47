"""How many entries a window may hold: what its slowest step needs, and no more because of what the others are."""

from collections.abc import Sequence
from typing import Final

from aioloader.engine.node import MOST_EARLY, Node
from aioloader.engine.steps import Step
from aioloader.engine.thread_step import SyncStep

__all__ = ["Room", "StepsRoom"]

FEW: Final = 2  # calls of a cheap sync step that are under way, as a rule: one, and one that follows


class Room:
    """Always as many.

    Args:
        places: How many.
    """

    def __init__(self, places: int) -> None:
        self._places = places

    def now(self, asked: int) -> int:
        """Entries under way and finished together, at most.

        Args:
            asked: What is lacking after the window: entries for which there is room, and which it could not give.
        """
        return self._places

    @property
    def may_grow(self) -> bool:
        """Whether more calls are under way than it has places for."""
        return False

    def look(self) -> None:
        """Give calls their places that have been under way for a while."""

    def refresh(self) -> None:
        """What a step says of itself has changed."""


class StepsRoom(Room):
    """As many as the steps of a window have use for.

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
        self._finished = finished
        self._early = early
        self.refresh()

    def refresh(self) -> None:
        several = len(self._working) > 1
        places = [step.places for step in self._awaited]
        places += [min(step.places, FEW) if several and step.extra_room else step.places for step in self._hop]
        widest = max(places, default=1)
        self._places = (sum(places) or 1) + (max(1, widest // 2) if self._finished is None else self._finished)
        self._cheap = min([step.extra_room for step in self._hop], default=0)
        self._found = sum(step.extra_room for step in self._look_ups)

    def now(self, asked: int) -> int:
        room, extra = self._places, self._found
        if self._cheap and (self._early or asked):
            cheap = min([self._cheap, self._upstream.extra_room, *(step.extra_room for step in self._awaited)])
            extra += cheap if self._early else min(cheap, asked)
        return min(room + extra, max(room, MOST_EARLY)) if extra else room

    @property
    def may_grow(self) -> bool:
        return any(min(step.under_way, step.concurrency) > step.places for step in self._later)

    def look(self) -> None:
        for step in self._later:
            step.places = max(step.places, min(step.standing, step.concurrency))
        self.refresh()
