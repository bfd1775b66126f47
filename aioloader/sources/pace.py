"""How far ahead of its consumer a reader asks a store for bytes."""

from typing import Final

__all__ = ["FIRST_RANGE_BYTES", "LONGER", "Pace"]

FIRST_RANGE_BYTES: Final = 64 << 10
"""How much the first request reads, when nothing is known of the object. The next one follows as soon as its answer
begins."""

LEAST_RANGE_BYTES: Final = 16 << 10
"""The least that later ones read, however little data there is."""

RANGES_PER_EPOCH: Final = 160
"""A range has such a part of what the reader reads in an epoch, at most, as long as that is fast enough."""

LONGER: Final = 4
"""Times as long are ranges, at most, for a consumer that waits."""


class Pace:
    """How far ahead of its consumer a reader asks for bytes of objects.

    A reader that is stopped and goes on elsewhere asks once more for what it had asked for ahead. So that this is a
    small share of all that it reads, ranges are short where it reads little in all; where it reads 1.3 GB, they are as
    long as they may be. Two short ranges under way are not enough for a consumer that is faster than the latency
    allows: each time that it waits for longer than `STALL_SECONDS`, ranges are twice as long from then on, up to
    `LONGER` times. That is a fortieth of what is read, so what latency costs an epoch is that of some forty requests,
    one after the other: 1.5 s for 28 MB behind 30 ms, of a consumer that does nothing, where ranges without a bound
    took 0.5. A training that waits for nothing keeps the short ones.

    Args:
        lanes: How many files are read side by side.
        files: How many files the reader has; those that are not known yet are taken to be as long as others.

    Attributes:
        ahead_bytes: How much may wait, parsed, while more is: a range of a consumer that never waits.
    """

    def __init__(self, lanes: int, files: int) -> None:
        self.lanes = lanes
        self._files = files
        self._factor = 1
        self.ahead_bytes = FIRST_RANGE_BYTES

    def range_bytes(self, most: int, size: int | None) -> int:
        """How long the next range is.

        Args:
            most: At most.
            size: Of the object; None: it is not known yet.
        """
        if size is None:
            return min(most, FIRST_RANGE_BYTES * self._factor)
        share = size * self._files // (RANGES_PER_EPOCH * self.lanes)
        self.ahead_bytes = min(most, max(LEAST_RANGE_BYTES, share))
        return min(most, self.ahead_bytes * self._factor)

    def starved(self) -> None:
        """The consumer has waited for bytes, though some had been asked for ahead."""
        self._factor = min(2 * self._factor, LONGER)

    def may_fetch(self, nbytes: int, size: int) -> bool:
        """Whether so much, that cannot be divided, is fetched before its turn.

        Args:
            nbytes: How much.
            size: Of the object.
        """
        return self._factor == LONGER and nbytes * self.lanes * RANGES_PER_EPOCH <= size * self._files * 2 * LONGER
