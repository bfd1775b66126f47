"""Where a batch comes from."""

from dataclasses import dataclass
from typing import Any

__all__ = ["BatchInfo"]


@dataclass(frozen=True)
class BatchInfo:
    """One batch that was handed out.

    Attributes:
        epoch: The number of its epoch.
        step: Its number in the epoch, from 0; steps before a resume, failed batches and left out steps are counted.
        keys: Of its samples, in order: the index or key that each was loaded by, None for one that has none. Behind
            `merge`, `mix` or `interleave` each says which source it is from, behind `flat_map`, `unbatch` and `repeat`
            which part or round it is. Without `batch`, the key of the one sample.
        seconds_waited: How long the consumer stood still for it.
    """

    epoch: int
    step: int
    keys: tuple[Any, ...]
    seconds_waited: float
