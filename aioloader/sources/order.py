"""The order of an indexable source in one epoch: which key stands at which position.

`shuffle`, `shard`, `take` and `skip` of an indexable source move no samples: they are arithmetic on its keys.
"""

from collections.abc import Sequence

import torch

from aioloader.stages.base import Pass, Stage
from aioloader.stages.select import Skip, Take
from aioloader.stages.shard import Shard
from aioloader.stages.shuffle import Shuffle

__all__ = ["KeyOrder", "is_order_stage", "order_of"]


class KeyOrder:
    """The keys of one epoch: a range where that will do, else an int64 tensor of one entry per sample.

    Not a list: a permutation of 180 million keys is 1.4 GB as a tensor and about 100 GB in time and garbage as a list
    of Python integers.
    """

    def __init__(self, keys: range | torch.Tensor) -> None:
        self._keys = keys

    def __len__(self) -> int:
        return len(self._keys)

    def slice(self, start: int, stop: int) -> Sequence[int]:
        """Keys `start` to `stop` as Python integers; fewer at the end."""
        keys = self._keys[start:stop]
        return keys if isinstance(keys, range) else keys.tolist()

    def apply(self, stage: Stage, this_pass: Pass) -> "KeyOrder":
        """The order after one more stage."""
        keys = self._keys
        match stage:
            case Take(n):
                return KeyOrder(keys[:n])
            case Skip(n):
                return KeyOrder(keys[n:])
            case Shuffle(None, seed):
                generator = torch.Generator().manual_seed(this_pass.seed(seed, "shuffle"))
                permutation = torch.randperm(len(keys), generator=generator, device="cpu")
                return KeyOrder(permutation if keys == range(len(keys)) else _tensor(keys)[permutation])
            case Shard():
                return self._shard(*stage.place())
        raise AssertionError(f"{stage.label} is no arithmetic on keys")

    def _shard(self, rank: int, world_size: int) -> "KeyOrder":
        total = len(self._keys)
        rounds = -(-total // world_size)
        mine = self._keys[rank::world_size]
        if len(mine) == rounds or not total:
            return KeyOrder(mine)
        # The last round is filled from the beginning, and again if there are fewer samples than ranks.
        filler = (rounds * world_size - world_size + rank - total) % total
        return KeyOrder(torch.cat([_tensor(mine), _tensor(self._keys[filler : filler + 1])]))


def _tensor(keys: range | torch.Tensor) -> torch.Tensor:
    if isinstance(keys, torch.Tensor):
        return keys
    return torch.arange(keys.start, keys.stop, keys.step, dtype=torch.int64, device="cpu")


def is_order_stage(stage: Stage) -> bool:
    """Whether `stage` of an indexable source is arithmetic on its keys."""
    return isinstance(stage, Take | Skip | Shard) or (isinstance(stage, Shuffle) and stage.buffer_size is None)


def order_of(length: int, stages: Sequence[Stage], this_pass: Pass) -> KeyOrder:
    """The order of a source of `length` samples after `stages`."""
    order = KeyOrder(range(length))
    for stage in stages:
        order = order.apply(stage, this_pass)
    return order
