"""The search of `autotune`: which setting to measure next, and when it counts as better. Pure: it runs nothing.

`climb` is a generator. It yields the point to be measured, is sent what was measured there, and returns what it found.
It climbs along one axis at a time, by doubling or halving, with smaller steps at the end, the busiest stage first.

Machines are noisy, so three rules hold. A point is better only if the difference is larger than what the spread of the
blocks explains; where that is not clear, both points are measured again. A pass over all axes that finds nothing is
repeated twice, and the current point is measured again before, since a disturbance may have hidden a gain. And at the
end the best point is measured against the starting point again, in turn, until it is clear which one is better: unless
the best point is, the starting point stays.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from math import hypot, sqrt
from typing import Final, Literal

__all__ = ["BUSY", "FAILING", "Axis", "Found", "Measured", "Point", "climb"]

Point = tuple[int, ...]
"""A value for each axis."""

GAIN: Final = 0.05  # a step is better by so much at least: less is not worth what it costs
LOSS: Final = 0.05  # fewer failing calls may cost so much of the rate at most
LASTING_GAIN: Final = 0.02  # what is found is better than the start by so much at least
KEEPS_UP: Final = 0.03  # a consumer that waits for less than this share of its time is the limit itself
BUSY: Final = 0.5  # a stage with fewer calls under way, as a share of its places, does not lack places, as a rule
FAILING: Final = 0.01  # a share of calls that fail or are tried again from which fewer calls may be better
PASSES: Final = 3  # passes over all axes without a gain after which there is none
CHECKS: Final = 2  # times that the best point and the start are measured in turn at the end, at least
MOST_CHECKS: Final = 6  # and at most, if it is not clear which of them is better


@dataclass(frozen=True)
class Axis:
    """What may be changed.

    Attributes:
        start: The value without tuning.
        least: The smallest value.
        most: The largest value.
        is_room: It is room for finished ones, else calls at once.
    """

    start: int
    least: int
    most: int
    is_room: bool = False


@dataclass(frozen=True)
class Measured:
    """What was measured at a point.

    Attributes:
        blocks: Of each block of time: batches that were made, and seconds.
        waited: The share of its time that the consumer waited for batches, 0 to 1.
        use: For each axis: calls under way as a share of the places; of room it says nothing.
        failed: The share of calls that failed or were tried again, 0 to 1.
        left: Seconds that are left for the search.
        seconds: How long it took to measure.
    """

    blocks: tuple[tuple[float, float], ...]
    waited: float
    use: tuple[float, ...]
    failed: float = 0.0
    left: float = 0.0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Batches per second: all of them, not a median of blocks, for batches come in bursts."""
        seconds = sum(seconds for _, seconds in self.blocks)
        return max(0.0, sum(batches for batches, _ in self.blocks) / seconds) if seconds else 0.0

    @property
    def score(self) -> float:
        """What is climbed: the rate, and less where calls fail: a server that refuses them is asked too often."""
        return self.rate * sqrt(1.0 - self.failed)

    @property
    def doubt(self) -> float:
        """The standard error of the rate, as a share of it."""
        rate, count = self.rate, len(self.blocks)
        if count < 2 or not rate:
            return 1.0
        strays = sum((batches - rate * seconds) ** 2 for batches, seconds in self.blocks)
        return sqrt(strays * count / (count - 1)) / (rate * sum(seconds for _, seconds in self.blocks))

    def with_more(self, more: "Measured") -> "Measured":
        """Both taken together."""
        return replace(
            more,
            blocks=self.blocks + more.blocks,
            waited=(self.waited + more.waited) / 2,
            failed=(self.failed + more.failed) / 2,
        )


@dataclass(frozen=True)
class Found:
    """How a search ended.

    Attributes:
        point: The values to use.
        before: At the start.
        after: At `point`.
        why: What ended it: the consumer takes no more; nothing else is better; or the time was up.
        points: How many points were measured.
    """

    point: Point
    before: Measured
    after: Measured
    why: Literal["consumer", "best", "time"]
    points: int


def climb(axes: Sequence[Axis]) -> Generator[Point, Measured, Found]:
    """Look for the point with the highest score; the first point that it yields is the start."""
    return _Climb(axes).run()


Steps = Generator[Point, Measured, bool]


class _Climb:
    def __init__(self, axes: Sequence[Axis]) -> None:
        self._axes = axes
        self._start = self._at = tuple(axis.start for axis in axes)
        self._here: Measured
        self._last: Measured
        self._strictness = 1.0  # how many standard errors of doubt a step must be better by
        self._top = 0.0  # the highest rate of a point that was better
        self._longest = 0.0  # seconds for a point
        self._points = 0

    def run(self) -> Generator[Point, Measured, Found]:
        """See `climb`."""
        self._here = before = yield from self._measure(self._start)
        self._top = before.rate
        while True:
            without_gain = yield from self._passes()
            if self._at == self._start:
                break
            before = yield from self._check(before)
            if self._at != self._start or not self._may_go_on():
                break
            self._strictness *= 2  # it was luck: look once more, and do not believe as easily
            self._top = before.rate
        why: Literal["consumer", "best", "time"] = "best" if without_gain else "time"
        if self._here.waited < KEEPS_UP:
            why = "consumer"
        return Found(self._at, before, self._here, why, self._points)

    def _passes(self) -> Steps:
        """Along all axes, until that brings nothing; False: the time is up before."""
        without_gain = 0
        while without_gain < PASSES and self._may_go_on():
            if without_gain:  # nothing was better: was it luck?
                again = yield from self._measure(self._at)
                self._here = self._here.with_more(again)
            moved = yield from self._pass()
            without_gain = 0 if moved else without_gain + 1
        return without_gain == PASSES

    def _measure(self, point: Point) -> Generator[Point, Measured, Measured]:
        self._points += 1
        self._last = last = yield point
        self._longest = max(self._longest, last.seconds)
        return last

    def _may_go_on(self) -> bool:
        """Whether another point is worth it, and what it takes to check what was found is still left then."""
        points = 1 + (2 * CHECKS if self._at != self._start else 0)
        return self._here.waited >= KEEPS_UP and self._last.left > points * self._longest

    def _pass(self) -> Steps:
        """Along each axis once; whether that brought anything."""
        moved = False
        use = self._here.use
        for number in sorted(range(len(self._axes)), key=lambda number: (self._axes[number].is_room, -use[number])):
            for ways in self._ways(number):
                along = yield from self._along(number, ways)
                moved = moved or along
                if along:
                    break
        return moved

    def _ways(self, number: int) -> Iterator[tuple[float, ...]]:
        """Factors by which to go along an axis, in each direction: the first as often as it helps, then the others."""
        axis, here = self._axes[number], self._here
        if axis.is_room:
            yield (2.0,)
            return
        # The busiest one counts in any case: of cheap calls, what it takes to cross into a thread is not in `use`.
        failing, busy = here.failed >= FAILING, here.use[number] >= min(BUSY, max(here.use))
        if failing:
            yield (0.5, 0.75)
        if busy:
            yield (2.0, 1.5)
        if busy and not failing:
            yield (0.5, 0.75)

    def _along(self, number: int, factors: tuple[float, ...]) -> Steps:
        moved = False
        for factor in factors:
            while self._may_go_on():
                point = self._stepped(number, factor)
                if point == self._at or not (yield from self._try(point)):
                    break
                moved = True
        return moved

    def _stepped(self, number: int, factor: float) -> Point:
        axis, value = self._axes[number], self._at[number]
        step = max(1, int(abs(factor - 1) * value))
        value = max(axis.least, min(axis.most, value + step if factor > 1 else value - step))
        return (*self._at[:number], value, *self._at[number + 1 :])

    def _try(self, point: Point) -> Steps:
        """Go to `point` if it is better."""
        there = yield from self._measure(point)
        while _may_be_better(there, self._here, GAIN) and there.rate > self._top * (1 - LOSS):
            if self._is_better(there):
                self._at, self._here = point, there
                self._top = max(self._top, there.rate)
                return True
            if len(there.blocks) > 2 * len(self._last.blocks) or not self._may_go_on():
                break
            again = yield from self._measure(self._at)
            self._here = self._here.with_more(again)
            again = yield from self._measure(point)
            there = there.with_more(again)
        return False

    def _is_better(self, there: Measured) -> bool:
        """Whether noise does not explain it."""
        doubt = self._strictness * hypot(there.doubt, self._here.doubt)
        return there.score > self._here.score * (1 + max(GAIN, doubt))

    def _check(self, before: Measured) -> Generator[Point, Measured, Measured]:
        """Measure the start and the best point in turn, and go back unless the best one is better; the start's."""
        best, starts, bests = self._at, [], []
        while True:
            starts.append((yield from self._measure(self._start)))
            bests.append((yield from self._measure(best)))
            before, after = _together(starts), _together(bests)
            clear = abs(after.score - before.score) > before.score * 2 * hypot(after.doubt, before.doubt)
            if len(starts) >= CHECKS and (clear or len(starts) == MOST_CHECKS or self._last.left < 2 * self._longest):
                break
        if _may_be_better(after, before, LASTING_GAIN):
            self._here = after
        else:
            self._at, self._here = self._start, before
        return before


def _together(several: list[Measured]) -> Measured:
    whole = several[0]
    for more in several[1:]:
        whole = whole.with_more(more)
    return whole


def _may_be_better(there: Measured, here: Measured, gain: float) -> bool:
    return there.score > here.score * (1 + gain) and there.rate > here.rate * (1 - LOSS)
