"""How far ahead of its consumer a reader asks a store for bytes."""

from collections import deque
from collections.abc import Callable
from time import perf_counter
from typing import Final

__all__ = ["FIRST_RANGE_BYTES", "HURRIED", "LONGER", "Pace"]

FIRST_RANGE_BYTES: Final = 64 << 10
"""How much the first request reads, when nothing is known of the object. The next one follows as soon as its answer
begins."""

LEAST_RANGE_BYTES: Final = 16 << 10
"""The least that later ones read, however little data there is."""

RANGES_PER_EPOCH: Final = 160
"""A range has such a part of what the reader reads in an epoch, at most, as long as that is fast enough."""

LONGER: Final = 4
"""Times as long are ranges, at most, for a consumer that waits now and then."""

HURRIED: Final = 8
"""For one that does little else: that still waits half of its time."""

WAITS: Final = 4
"""As many waits tell that it does."""

FAR_SECONDS: Final = 0.008
"""A store whose answers take longer to begin, all of the latest `ANSWERS`, is far away."""

ANSWERS: Final = 12
"""On a machine that is busy, some of so many come at once."""

OPEN_PER_EPOCH: Final = 30
"""Of what cannot be divided, such a part of what the reader reads in an epoch is open at a time, for a consumer that
waits now and then: what is read now, and what comes next. For one that does little else it is twice as much."""


class Pace:
    """How far ahead of its consumer a reader asks for bytes of objects.

    A reader that is stopped and goes on elsewhere asks once more for what it had asked for ahead. So that this is a
    small share of all that it reads, ranges are short where it reads little in all; where it reads 1.3 GB, they are as
    long as they may be. A training that waits for nothing keeps the short ones. Where they are not enough for consumer
    and latency, which only a wait tells, they get twice as long with each wait, up to `LONGER` times. A wait counts
    when it is longer than `STALL_SECONDS` and the consumer has nothing else: a reader that waits while batches lie
    ready holds nobody up. And when the store is far away: one nearby on a busy machine makes a reader wait, too, and
    asking it for more at once does not help.

    That bounds the rate: a fortieth of the epoch for each answer, behind 30 ms 1.2 s for an epoch, however short it is.
    It is right for a training that waits a little, and wrong for a consumer that takes all it can get: what latency
    costs that one in each epoch is more than what a stop costs it once. So for one that waits half of its time even
    then, ranges are `HURRIED` times as long, and two of them are under way.

    Args:
        lanes: How many files are read side by side.
        files: How many files the reader has; those that are not known yet are taken to be as long as others.
        starves: Whether the consumer has nothing ready; see `SourceContext.consumer_starves`.

    Attributes:
        ahead_bytes: How much may wait, parsed, while more is: a range of a consumer that never waits.
    """

    def __init__(self, lanes: int, files: int, starves: Callable[[], bool] = lambda: True) -> None:
        self.lanes = lanes
        self._files = files
        self._starves = starves
        self._factor = 1
        self._since = 0.0  # ranges are `LONGER` times as long, or more
        self._waits = 0  # since then
        self._waited_seconds = 0.0
        self._answers: deque[float] = deque(maxlen=ANSWERS)
        self.ahead_bytes = FIRST_RANGE_BYTES

    @property
    def hurries(self) -> bool:
        """Whether the next range is asked for before the last one is answered."""
        return self._factor > LONGER

    def range_bytes(self, most: int, size: int | None) -> int:
        """How long the next range is.

        Args:
            most: At most.
            size: Of the object; None: it is not known yet.
        """
        if size is None:
            return min(most, FIRST_RANGE_BYTES * min(self._factor, LONGER))
        return min(most, self.share_bytes(most, size) * self._factor)

    def share_bytes(self, most: int, size: int) -> int:
        """How long a range is for a consumer that never waits; as `range_bytes`."""
        self.ahead_bytes = min(most, max(LEAST_RANGE_BYTES, size * self._files // (RANGES_PER_EPOCH * self.lanes)))
        return self.ahead_bytes

    def answered(self, seconds: float) -> None:
        """The store's answer to a request took so long to begin."""
        self._answers.append(seconds)

    @property
    def _is_far(self) -> bool:
        return min(self._answers, default=0.0) > FAR_SECONDS

    def starved(self, seconds: float) -> None:
        """Bytes were waited for, though some had been asked for ahead: by the consumer, if it has nothing else."""
        if not self._is_far or not self._starves():
            return
        if self._factor < LONGER:
            self._factor *= 2
            self._since = perf_counter()
            return
        self._waits += 1
        self._waited_seconds += seconds
        half = (perf_counter() - self._since) / 2
        self._factor = HURRIED if self._waits >= WAITS and self._waited_seconds > half else LONGER

    def may_open(self, nbytes: int, size: int) -> bool:
        """Whether so much, in units that cannot be divided, is open at a time in one lane.

        Args:
            nbytes: How much, what is read now included.
            size: Of the object.
        """
        share = size * self._files // (OPEN_PER_EPOCH * self.lanes)
        return self._factor > 1 and nbytes * LONGER <= share * self._factor
