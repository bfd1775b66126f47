"""The order of an indexable source in one epoch: which key is at which position.

`shuffle`, `shard`, `take` and `skip` of an indexable source move no samples: they are arithmetic on its keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from aioloader.stages.rank import Even, uneven

__all__ = ["KeyOrder"]


class KeyOrder:
    """The keys of one epoch, all of them or one rank's: a range if possible, else an int64 tensor.

    Not a list: a permutation of 180 million keys is 1.4 GB as a tensor and about 100 GB in time and garbage as a list
    of Python integers.

    Positions, which are cursors, count the order of all ranks, before it was dealt: `i * stride` keys come before a
    rank's key number `i`.

    Args:
        keys: In order.
        stride: How many ranks have been dealt keys, so that each key stands for as many positions.
        deal: What was dealt from, where nothing has been done to this rank's keys since.
        filler: A key after the last one that fills the last round.
        offset: Which of a round's positions is this rank's.
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

    def after(self, position: int) -> "KeyOrder":
        """What is left after `position`, which may be that of another number of ranks.

        Raises:
            ValueError: `position` is none, or it lies within a round of these ranks, and a stage
                after `shard` needs whole ones.
        """
        if type(position) is not int or position < 0:
            raise ValueError(f"a position must be an integer of at least 0, got {position!r}")
        if self._deal is None and self.stride == 1 and position > len(self):
            raise ValueError(f"position {position} is beyond the end of an order of {len(self)} keys")
        if self._deal is not None:
            return self._deal.after(position)
        if position >= len(self) * self.stride:
            return KeyOrder(range(0), self.stride, offset=self.offset)
        number, rest = divmod(position, self.stride)
        if rest:
            raise ValueError(
                f"position {position} lies within a round of {self.stride} ranks: {number} samples each, and {rest} "
                f"more; resume with the world size that the position comes from"
            )
        return KeyOrder(self._keys[number:], self.stride, filler=self._filler, offset=self.offset)

    def cut(self, start: int, stop: int) -> "KeyOrder":
        """Keys `start` to `stop`, as `slice` counts them."""
        count = len(self._keys)
        filler = self._filler[max(0, start - count) : max(0, stop - count)]
        return KeyOrder(self._keys[start:stop], self.stride, filler=filler, offset=self.offset)

    def permuted(self, seed: int | None) -> "KeyOrder":
        """In random order. Without a seed no key moves, which is enough to tell whether a position fits."""
        if seed is None:
            return KeyOrder(self._keys, self.stride, filler=self._filler, offset=self.offset)
        keys = self._all()
        permutation = torch.randperm(len(keys), generator=torch.Generator().manual_seed(seed), device="cpu")
        plain = isinstance(keys, range) and keys == range(len(keys))
        return KeyOrder(permutation if plain else _tensor(keys)[permutation], self.stride, offset=self.offset)

    def dealt(self, rank: int, world_size: int, even: Even) -> "KeyOrder":
        """Those of one rank, see `Shard`."""
        return _Deal(self._all(), rank, world_size, even, self.stride, self.offset).after(0)

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

    def after(self, position: int) -> KeyOrder:
        """This rank's keys of the rounds that begin at `position`.

        They are dealt anew from there on: the position need not be the end of a round of this many ranks.
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
        elif rest and len(mine) == rounds and self.even in ("pad", "error"):
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
