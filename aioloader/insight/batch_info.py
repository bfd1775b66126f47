"""The provenance of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from aioloader.core.keys import source_of
from aioloader.masking import masked

__all__ = ["BatchInfo"]


@dataclass(frozen=True)
class BatchInfo:
    """Where one batch came from.

    Attributes:
        epoch: The number of its epoch.
        step: Its number in the epoch, from 0. Steps before a resume, failed batches and skipped steps count.
        keys: For each sample, the index or key by which it was loaded, or its number in its stream. After `merge`,
            `mix` or `interleave` each key also has the source, after `flat_map`, `unbatch` and `repeat` the part or
            round. Without `batch`, the key of the one sample. Of a row that `pack` has made, those of its documents; of
            a batch of rows, a list of these for each row.
        positions: For each sample, its position in its source, from 0, in the order of this epoch and over all ranks.
            None where it is not known: after a batch sampler of your own, and after a resume in a source whose cursor
            is not a count (`Lines`, `TarShards`, `ParquetRows`, `Channel`).
        sources: For each sample, the number of its source in `merge`, `mix` or `interleave`, else None. Of a batch of
            packed rows, a tuple of those of its documents for each row.
        attempts: How often work on it was begun: 1, or the maximum over its samples. Work is done again after a worker
            process has died with it, and after a `__getitems__` for many samples has failed.
        seconds_waited: How long the consumer waited for it.
        ages: For each sample, how many batches were handed out between the beginning of the first call for it (the
            first `map` or `filter`, or what loads it from a dataset) and this batch: 0 if it began after the batch
            before this one had been handed out. Batches that raised count, those that `skip_steps` left out do not.
            Without such a call before `batch`, from when the loader read it from its source. None where the loader
            did neither, for instance when an iterable dataset batches in worker processes.
    """

    epoch: int
    step: int
    keys: tuple[Any, ...]
    positions: tuple[int | None, ...]
    attempts: int
    seconds_waited: float
    ages: tuple[int | None, ...] = ()

    @property
    def sources(self) -> tuple[Any, ...]:
        """For each sample, the number of its source in `merge`, `mix` or `interleave`, else None; nested as `keys`."""
        return _sources_of(self.keys)

    def __repr__(self) -> str:
        values = ", ".join(f"{field.name}={getattr(self, field.name)!r}" for field in fields(self))
        return masked(f"BatchInfo({values})")  # keys may be URLs


def _sources_of(keys: Sequence[Any]) -> tuple[Any, ...]:
    return tuple([_sources_of(key) if type(key) is list else source_of(key) for key in keys])
