"""`shard`: this rank's part, the same number of samples on every rank."""

import os
from dataclasses import dataclass
from typing import Any

import torch

from aioloader.engine.entry import Entry
from aioloader.engine.node import Fold
from aioloader.engine.progress import cursor_parts, whole
from aioloader.stages.base import FoldStage, Pass
from aioloader.stages.checks import check_count

__all__ = ["Shard", "current_rank"]


def current_rank() -> tuple[int, int]:
    """Rank and world size of this process: of torch.distributed when it is initialised, else of RANK and WORLD_SIZE.

    Raises:
        ValueError: The environment variables do not fit.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    rank, world_size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    try:
        numbers = int(rank), int(world_size)
    except ValueError:
        raise ValueError(
            f"RANK and WORLD_SIZE must be integers, got RANK={rank!r} and WORLD_SIZE={world_size!r}; "
            f"pass shard(rank, world_size)"
        ) from None
    _check(*numbers, "the environment variables RANK and WORLD_SIZE")
    return numbers


def _check(rank: int, world_size: int, where: str) -> None:
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, got {world_size=} from {where}")
    if not 0 <= rank < world_size:
        raise ValueError(
            f"rank must be in [0, world_size), got {rank=} with {world_size=} from {where}; "
            f"pass torch.distributed.get_rank()"
        )


@dataclass(frozen=True)
class Shard(FoldStage):
    """Every `world_size`-th sample, from number `rank` on.

    All ranks get the same number: the last round is filled from the beginning, as torch's DistributedSampler does, so
    that no rank waits for ever in a collective.

    Args:
        rank: None: found out when iteration begins, see `current_rank`.
        world_size: Likewise.
    """

    rank: int | None = None
    world_size: int | None = None

    def __post_init__(self) -> None:
        if (self.rank is None) != (self.world_size is None):
            raise ValueError(
                f"rank and world_size go together, got rank={self.rank} and world_size={self.world_size}; "
                f"pass both, or neither to take them from torch.distributed or RANK and WORLD_SIZE"
            )
        if self.rank is not None and self.world_size is not None:
            check_count("world_size", self.world_size, least=1)
            if isinstance(self.rank, bool) or not isinstance(self.rank, int):
                raise TypeError(f"rank must be an integer, got {self.rank!r}")
            _check(self.rank, self.world_size, "the arguments")

    @property
    def label(self) -> str:
        return "shard()" if self.rank is None else f"shard({self.rank}, {self.world_size})"

    def place(self) -> tuple[int, int]:
        """Rank and world size, now."""
        if self.rank is None or self.world_size is None:
            return current_rank()
        return self.rank, self.world_size

    def length(self, upstream: int) -> int:
        return -(-upstream // self.place()[1])

    def fold(self, this_pass: Pass) -> Fold:
        return _ShardFold(*self.place())


class _ShardFold:
    """The part of a stream. Cursor: that of the entry, and how many of all ranks' samples were seen by then."""

    full = False

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank = rank
        self._world_size = world_size
        self._seen = 0
        self._newest: Any = None  # cursor
        self._first: list[Entry] = []  # at most world_size - 1 samples, to fill the last round
        self._delivered = 0  # what was seen before a resume

    def failed_at(self, cursor: Any) -> Any:
        return (cursor, self._seen)

    def resume(self, cursor: Any) -> Any:
        self._delivered = whole(cursor_parts(cursor, 2)[1])
        return None  # from the beginning: its first samples may have to fill the last round

    def wants(self, limit: int) -> int:
        return (limit - 1) * self._world_size + (self._rank - self._seen) % self._world_size + 1

    def feed(self, run: list[Entry]) -> list[Entry]:
        mine = []
        for entry in run:
            if len(self._first) < self._world_size - 1:
                self._first.append(_copy(entry))
            self._newest = entry.cursor
            self._seen += 1
            if self._seen > self._delivered and (self._seen - 1) % self._world_size == self._rank:
                entry.cursor = (entry.cursor, self._seen)
                mine.append(entry)
        return mine

    def flush(self) -> list[Entry]:
        missing = self._seen % self._world_size
        if not missing or self._rank < missing or self._delivered > self._seen:
            return []
        filler = _copy(self._first[(self._rank - missing) % len(self._first)])
        filler.cursor = (self._newest, self._seen - missing + self._world_size)  # the end: it is not read again
        return [filler]


def _copy(entry: Entry) -> Entry:
    copy = Entry(entry.value, entry.cursor, entry.key, entry.position)
    copy.error = entry.error
    copy.state = entry.state
    return copy
