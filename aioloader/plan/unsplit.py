"""Warnings: of several ranks that each read all of the same data, as a trainer makes them, and of wrong lengths."""

import sys
import warnings
from typing import Any, Final

from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler

from aioloader.core.source import CursorSource
from aioloader.errors import LengthWarning, ReadAllWarning, UnevenWarning, UnsplitWarning
from aioloader.plan.plan import Combined, Plan
from aioloader.plan.ranks import is_sharded, is_shared
from aioloader.sources.resolve import Indexable
from aioloader.sources.sampled import Sampled
from aioloader.sources.sampler_order import chain_of
from aioloader.stages.rank import current_rank

__all__ = [
    "dataset_gives_all",
    "gives_all",
    "keys_of_all",
    "several_ranks",
    "warn_of_cost",
    "warn_of_length",
    "warn_of_uneven",
    "warn_of_unsplit",
]

_OF_ALL: Final = (BatchSampler, RandomSampler, SequentialSampler)
"""torch's samplers that take their keys from a whole dataset. Of those that were made of indices or weights, and of
somebody's own, nobody knows whether each rank has others."""


def several_ranks() -> int:
    """How many ranks `shard()` would deal to, if that is more than one; else 0."""
    try:
        _, world_size = current_rank()
    except ValueError:  # an environment that fits nothing; `shard` says so to those who use it
        return 0
    return world_size if world_size > 1 else 0


def warn_of_unsplit(loader: object, world_size: int, way_out: str) -> None:
    """Say it where the loader is iterated."""
    _warn(
        f"there are {world_size} ranks, and nothing splits the data of {loader!r}: each rank reads, and trains on, all "
        f"of it; {way_out}. Where that is meant, ignore aioloader.UnsplitWarning",
        UnsplitWarning,
    )


def warn_of_cost(cost: str) -> None:
    """Say what it costs that several ranks read the same files."""
    _warn(cost, ReadAllWarning)


def warn_of_uneven(why: str) -> None:
    """Say why ranks may get different numbers of batches."""
    _warn(why, UnevenWarning)


def warn_of_length(loader: object, told: int, batches: int) -> None:
    """Say that an epoch had another number of batches than somebody has said."""
    _warn(
        f"with_length says that an epoch of {loader!r} has {told} batches, and this one had {batches}; say how many "
        f"there are, or let take({told}) end it there",
        LengthWarning,
    )


def _warn(text: str, category: type[Warning]) -> None:
    """Warn where the user's code is."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("aioloader", "contextlib"):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, category, stacklevel=level)


def gives_all(plan: Plan) -> bool:
    """Whether `plan` gives the same on each rank, as far as can be told: no `shard`, and a source that has no parts."""
    if is_sharded(plan) or is_shared(plan):
        return False
    source = plan.source
    if isinstance(source, Combined):
        return all(map(gives_all, source.plans))
    if isinstance(source.data, Sampled):
        data = source.data
        by_keys = data.iterable or keys_of_all(data.sampling.sampler)
        return by_keys and dataset_gives_all(data.dataset, indexed=not data.iterable)
    if source.sampler is not None:
        return not source.sampler.call and keys_of_all(source.sampler.make)
    if isinstance(source.data, Indexable):
        return dataset_gives_all(source.data.data, indexed=True)
    return dataset_gives_all(source.data.make, indexed=False)


def keys_of_all(sampler: Any) -> bool:
    """Whether a sampler is one of torch's that each rank would have alike."""
    return all(type(part) in _OF_ALL for part in chain_of(sampler))


def dataset_gives_all(dataset: Any, *, indexed: bool) -> bool:
    """Whether a dataset is one whose parts would be known.

    What is indexed gives all, but for `range(rank, n, world_size)`. Iterables may well split themselves. Sources of
    ours do not, but for a `Channel`, into which each rank sends its own samples; and iterable datasets of Hugging Face
    tell whether they were split by `split_dataset_by_node`.
    """
    if indexed:
        return not (isinstance(dataset, range) and dataset.step == several_ranks())
    if isinstance(dataset, CursorSource):
        return dataset.replayable and type(dataset).__module__.startswith("aioloader.")
    return type(dataset).__module__.startswith("datasets.") and getattr(dataset, "_distributed", dataset) is None
