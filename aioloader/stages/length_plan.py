"""Which samples go into a batch together, by their lengths. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

__all__ = ["OpenBatch", "TokenBudget", "plan_window"]


@dataclass(frozen=True)
class TokenBudget:
    """What a batch may hold.

    Args:
        max_tokens: Tokens; a single sample may have more.
        padded: All are padded to the longest: count times that is what counts, and else their sum.
        max_samples: Samples; None: any number.
    """

    max_tokens: int
    padded: bool = True
    max_samples: int | None = None


class OpenBatch:
    """Counts what a batch holds so far.

    Args:
        budget: What it may hold.
    """

    __slots__ = ("_budget", "_longest", "_max_samples", "count", "total")

    def __init__(self, budget: TokenBudget) -> None:
        self._budget = budget
        self._max_samples = budget.max_samples or (1 << 62)
        self.clear()

    def clear(self) -> None:
        """Begin another one."""
        self.count = self.total = self._longest = 0

    def fits(self, length: int) -> bool:
        """Whether a sample of `length` may come in, too; into an empty batch any may."""
        count = self.count
        if not count:
            return True
        longest = max(length, self._longest)
        tokens = (count + 1) * longest if self._budget.padded else self.total + length
        return count < self._max_samples and tokens <= self._budget.max_tokens

    def add(self, length: int) -> None:
        """It comes in."""
        self.count += 1
        self.total += length
        self._longest = max(length, self._longest)

    @property
    def full(self) -> bool:
        """Whether no sample fits any more."""
        return not self.fits(1)


def plan_window(lengths: Sequence[int | None], budget: TokenBudget, seed: int) -> list[list[int]]:
    """Batches of the samples of one window.

    They are sorted by length, so that those of a batch need little padding, cut where the next one would pass the
    budget, and the batches are shuffled.

    Args:
        lengths: Of the samples, in order; None: it is in no batch.
        budget: What a batch may hold.
        seed: Of the shuffling.

    Returns:
        The numbers of the samples of each batch.
    """
    numbers = [number for number, length in enumerate(lengths) if length is not None]
    numbers.sort(key=lengths.__getitem__)  # type: ignore[arg-type]  # those without a length are left out
    batches = list(_cut(numbers, lengths, budget))
    Random(seed).shuffle(batches)
    return batches


def _cut(numbers: Sequence[int], lengths: Sequence[int | None], budget: TokenBudget) -> Iterable[list[int]]:
    open_batch = OpenBatch(budget)
    batch: list[int] = []
    for number in numbers:
        length = lengths[number]
        assert length is not None
        if not open_batch.fits(length):
            yield batch
            batch = []
            open_batch.clear()
        open_batch.add(length)
        batch.append(number)
    if batch:
        yield batch
