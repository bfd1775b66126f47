"""How long calls take: a percentile of the latest ones."""

from collections import deque
from math import inf
from typing import Final

__all__ = ["LATE_SECONDS", "TURNS", "Durations"]

ENOUGH_CALLS: Final = 20  # a percentile of fewer says nothing
LATEST_CALLS: Final = 256  # whose durations count

LATE_SECONDS: Final = 0.01
"""A timer that rings so late tells that the loop stood still, so that all calls look as if they took long."""

TURNS: Final = 3
"""Turns of the loop that it gives first, for what has been answered meanwhile."""


class Durations(deque[float]):
    """The latest durations of calls, in seconds.

    Args:
        percent: Which percentile counts, 1 to 99.
    """

    def __init__(self, percent: int) -> None:
        super().__init__(maxlen=LATEST_CALLS)
        self._percent = percent

    @property
    def enough(self) -> bool:
        """Whether there are enough of them for a percentile."""
        return len(self) >= ENOUGH_CALLS

    def percentile(self) -> float:
        """The percentile, in seconds; `inf` while there are not enough."""
        if not self.enough:
            return inf
        ordered = sorted(self)
        return ordered[min(len(ordered) - 1, len(ordered) * self._percent // 100)]
