"""`RankSampler`: this rank's part of a dataset's keys, the same as by torch's `DistributedSampler`."""

from collections.abc import Iterator, Sized
from typing import Any

from torch.utils.data import DistributedSampler, IterableDataset, Sampler

from aioloader.core.safe_text import safe_repr
from aioloader.stages.rank import current_rank

__all__ = ["RankSampler", "check_shards"]


class RankSampler(Sampler[int]):
    """Deals the keys of a dataset to the ranks.

    torch's sampler wants to know the ranks when it is made, which is before most trainers make them, and to be told
    each epoch. This one looks them up when an epoch begins.

    Args:
        dataset: Has a length.
        shuffle: Each epoch in an order of its own, the same for all ranks.
        seed: Of that order.
    """

    def __init__(self, dataset: Sized, *, shuffle: bool, seed: int) -> None:
        self.data_source = dataset
        self.shuffle = shuffle
        self.seed = seed

    @property
    def num_replicas(self) -> int:
        """How many ranks there are.

        Raises:
            ValueError: The environment does not fit.
        """
        return current_rank()[1]

    def of(self, epoch: int) -> "DistributedSampler[int]":
        """Torch's own sampler, for one epoch of this rank."""
        rank, num_replicas = current_rank()
        sampler: DistributedSampler[int] = DistributedSampler(
            self.data_source,  # type: ignore[arg-type]  # of which it asks for the length only
            num_replicas,
            rank,
            shuffle=self.shuffle,
            seed=self.seed,
        )
        sampler.set_epoch(epoch)
        return sampler

    def __iter__(self) -> Iterator[int]:
        return iter(self.of(0))

    def __len__(self) -> int:
        return -(-len(self.data_source) // self.num_replicas)


def check_shards(dataset: Any, sampler: Any, batch_sampler: Any) -> None:
    """Refuse what `DataLoader(shard=True)` cannot deal.

    Raises:
        TypeError: The dataset has no length.
        ValueError: It has no keys, or something else decides which ones come.
    """
    for name, given in (("sampler", sampler), ("batch_sampler", batch_sampler)):
        if given is not None:
            raise ValueError(
                f"shard=True deals the keys of the dataset, got {name}={safe_repr(given)}, which decides itself which "
                f"come; pass one of the two"
            )
    indexed = hasattr(dataset, "__getitem__") or hasattr(dataset, "__getitems__")
    if isinstance(dataset, IterableDataset) or not indexed:
        raise ValueError(
            f"shard=True deals keys, and a dataset of type {type(dataset).__name__} has none; use "
            f"Pipeline(dataset).shard(), which deals samples"
        )
    if not hasattr(dataset, "__len__"):
        raise TypeError(
            f"shard=True deals the keys up to the dataset's length, and one of type {type(dataset).__name__} has no "
            f"__len__; give it one, or use Pipeline(dataset).shard()"
        )
