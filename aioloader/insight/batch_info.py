"""Where a batch comes from."""

from dataclasses import dataclass, fields
from typing import Any

from aioloader.core.keys import source_of
from aioloader.masking import masked

__all__ = ["BatchInfo"]


@dataclass(frozen=True)
class BatchInfo:
    """One batch that was handed out.

    Attributes:
        epoch: The number of its epoch.
        step: Its number in the epoch, from 0; steps before a resume, failed batches and left out steps are counted.
        keys: Of its samples, in order: the index or key that each was loaded by, or its number in its stream. Behind
            `merge`, `mix` or `interleave` each says which source it is from, behind `flat_map`, `unbatch` and `repeat`
            which part or round it is. Without `batch`, the key of the one sample.
        positions: Of its samples: where each stands in its source, in the order of this epoch and of all ranks, from 0.
            None where nobody counts: behind a batch sampler of your own, and after a resume in a source whose cursor is
            no count (`Lines`, `TarShards`, `ParquetRows`, `Channel`).
        sources: Of its samples: the number of the source of `merge`, `mix` or `interleave` that each is from; else
            None.
        attempts: How often work for it was begun: 1, or the most that one of its samples took. Work is done again where
            a worker process died before it had given it back, and where a `__getitems__` for many samples failed.
        seconds_waited: How long the consumer stood still for it.
    """

    epoch: int
    step: int
    keys: tuple[Any, ...]
    positions: tuple[int | None, ...]
    attempts: int
    seconds_waited: float

    @property
    def sources(self) -> tuple[int | None, ...]:
        """Of its samples: the number of the source of `merge`, `mix` or `interleave` that each is from, else None."""
        return tuple(map(source_of, self.keys))

    def __repr__(self) -> str:
        told = ", ".join(f"{field.name}={getattr(self, field.name)!r}" for field in fields(self))
        return masked(f"BatchInfo({told})")  # keys may be URLs
