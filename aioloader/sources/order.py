"""The order of an indexable source in one epoch: which key has which position.

`shuffle`, `shard`, `take` and `skip` of an indexable source move no samples: they are arithmetic on its keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from aioloader.stages.base import Pass, Stage
from aioloader.stages.select import Skip, Take
from aioloader.stages.shard import Even, Shard, uneven
from aioloader.stages.shuffle import Shuffle

__all__ = ["KeyOrder", "is_order_stage", "order_of"]


class KeyOrder:
    """The keys of one epoch, all of them or one rank's: a range if possible, else an int64 tensor.

    Not a list: a permutation of 180 million keys is 1.4 GB as a tensor and about 100 GB in time and garbage as a list
    of Python integers.

    Positions, which are cursors, count in the order of all ranks, before keys were dealt to them: a rank's key number
    `i` comes after `i * stride` others.

    Args:
        keys: In order.
        stride: How many ranks keys were dealt to, so that each key here stands for as many positions.
        deal: What they were dealt from, if nothing has been done to this rank's keys since.
        filler: A key after the last one that fills the last round.
        offset: This rank's position within a round.
    """

    def __init__(
        self,
        keys: range | torch.Tensor,
        stride: int = 1,
        deal: "_Deal | None" = None,
        filler: Sequence[int] = (),
        offset: int = 0,
    ) -> None:
        self._keys = keys
        self._deal = deal
        self._filler = tuple(filler)
        self.stride = stride
        self.offset = offset

    def __len__(self) -> int:
        return len(self._keys) + len(self._filler)

    def slice(self, start: int, stop: int) -> Sequence[int]:
        """Keys `start` to `stop` as Python integers; fewer at the end."""
        keys = self._keys[start:stop]
        taken: Sequence[int] = keys if isinstance(keys, range) else keys.tolist()
        if stop > len(self._keys) and self._filler:
            taken = [*taken, *self._filler[max(0, start - len(self._keys)) : stop - len(self._keys)]]
        return taken

    def behind(self, position: int) -> "KeyOrder":
        """The keys from `position` on, which may come from another number of ranks.

        Raises:
            ValueError: `position` is invalid, or lies within a round of these ranks while stages after `shard` need
                complete rounds.
        """
        if type(position) is not int or position < 0:
            raise ValueError(f"a position must be an integer of at least 0, got {position!r}")
        if self._deal is None and self.stride == 1 and position > len(self):
            raise ValueError(f"position {position} is past the end of an order of {len(self)} keys")
        if self._deal is not None:
            return self._deal.behind(position)
        if position >= len(self) * self.stride:
            return KeyOrder(range(0), self.stride, offset=self.offset)
        number, rest = divmod(position, self.stride)
        if rest:
            raise ValueError(
                f"position {position} lies within a round of {self.stride} ranks: {number} samples each, and {rest} "
                f"more; resume with the world size that the position comes from"
            )
        return KeyOrder(self._keys[number:], self.stride, filler=self._filler, offset=self.offset)

    def apply(self, stage: Stage, this_pass: Pass, *, permute: bool = True) -> "KeyOrder":
        """The order after one more stage; without `permute`, `shuffle` moves no key, and positions stay the same."""
        match stage:
            case Take(n):
                return self._cut(0, n)
            case Skip(n):
                return self._cut(n, len(self))
            case Shuffle(None) if not permute:
                return KeyOrder(self._keys, self.stride, filler=self._filler, offset=self.offset)
            case Shuffle(None, seed):
                generator = torch.Generator().manual_seed(this_pass.seed(seed, "shuffle"))
                keys = self._all()
                permutation = torch.randperm(len(keys), generator=generator, device="cpu")
                plain = isinstance(keys, range) and keys == range(len(keys))
                shuffled = permutation if plain else _tensor(keys)[permutation]
                return KeyOrder(shuffled, self.stride, offset=self.offset)
            case Shard():
                rank, world_size = stage.place()
                dealt = _Deal(self._all(), rank, world_size, stage.even, self.stride, self.offset)
                return dealt.behind(0)
        raise AssertionError(f"{stage.label} is not arithmetic on keys")

    def _cut(self, start: int, stop: int) -> "KeyOrder":
        count = len(self._keys)
        filler = self._filler[max(0, start - count) : max(0, stop - count)]
        return KeyOrder(self._keys[start:stop], self.stride, filler=filler, offset=self.offset)

    def _all(self) -> range | torch.Tensor:
        """All keys, the filler included."""
        if not self._filler:
            return self._keys
        return torch.cat([_tensor(self._keys), torch.tensor(self._filler, dtype=torch.int64, device="cpu")])


@dataclass(frozen=True)
class _Deal:
    """Keys that are dealt to ranks, one each in a round.

    Attributes:
        keys: Those of all ranks.
        even: See `Shard`.
        stride: How many ranks `keys` were dealt to by an earlier `shard`.
        offset: The position of `keys` within a round of these.
    """

    keys: range | torch.Tensor
    rank: int
    world_size: int
    even: Even
    stride: int
    offset: int

    def behind(self, position: int) -> KeyOrder:
        """This rank's keys of the rounds that begin at `position`.

        Keys are dealt again from there on: the position need not be the end of a round of this many ranks.
        """
        stride = self.stride * self.world_size
        total = len(self.keys)
        done = min(total, -(-position // self.stride))
        rounds, rest = divmod(total - done, self.world_size)
        if rest and self.even == "error":
            raise uneven(total, self.world_size, done)
        mine = self.keys[done + self.rank :: self.world_size]
        filler: Sequence[int] = ()
        if rest and self.even == "drop":
            mine = mine[:rounds]
        elif rest and len(mine) == rounds:
            # Fill the last round from the beginning, several times if there are fewer samples than ranks.
            at = (done + self.rank + rounds * self.world_size) % total
            key = self.keys[at]
            filler = (int(key),)
        offset = self.offset + self.rank * self.stride
        return KeyOrder(mine, stride, self if self.stride == 1 else None, filler, offset)


def _tensor(keys: range | torch.Tensor) -> torch.Tensor:
    if isinstance(keys, torch.Tensor):
        return keys
    return torch.arange(keys.start, keys.stop, keys.step, dtype=torch.int64, device="cpu")


def is_order_stage(stage: Stage) -> bool:
    """Whether `stage` of an indexable source is arithmetic on its keys."""
    return isinstance(stage, Take | Skip | Shard) or (isinstance(stage, Shuffle) and stage.buffer_size is None)


def order_of(length: int, stages: Sequence[Stage], this_pass: Pass, *, permute: bool = True) -> KeyOrder:
    """The order of a source of `length` samples after `stages`; without `permute`, only its positions are right."""
    order = KeyOrder(range(length))
    for stage in stages:
        order = order.apply(stage, this_pass, permute=permute)
    return order
