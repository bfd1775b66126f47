"""In which order the files of a source are read: permuted anew in each pass, dealt to ranks, side by side in lanes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Dealt", "FileOrder", "file_order"]


@dataclass(frozen=True, slots=True)
class Dealt:
    """The rank that reads, of how many.

    Attributes:
        counted: How many samples each rank gets is known, and all get as many, see `EvenReader`.
    """

    rank: int
    world_size: int
    even: str | None

    @property
    def counted(self) -> bool:
        return self.even is not None


@dataclass(frozen=True, slots=True)
class FileOrder:
    """Files in the order in which they are read.

    Of several lanes the first one has the positions 0, `lanes`, 2 `lanes`, ..., the second one 1, `lanes` + 1, ...,
    whatever is in the files: so which file a lane opens next does not depend on how far the others are.

    Attributes:
        numbers: The files, by their numbers in the source.
        lanes: How many are read side by side.
    """

    numbers: Sequence[int]
    lanes: int

    def places(self, at: int) -> Iterator[tuple[int, int]]:
        """Position and number of each file from position `at` on that is in the same lane."""
        for position in range(at, len(self.numbers), self.lanes):
            yield position, self.numbers[position]


def file_order(files: int, seed: int | None, dealt: Dealt | None) -> Sequence[int]:
    """The numbers of the files that are read, in order.

    All files are permuted before they are dealt, so that a rank gets others in each epoch. With fewer files than ranks,
    a rank without one gets that of another, as when a last round of samples is filled from the beginning.

    Args:
        files: How many there are.
        seed: Of this pass; None: they stay in the order in which they were given.
        dealt: Which rank reads; None: there is one.
    """
    numbers: Sequence[int] = range(files)
    if seed is not None:
        # torch's, as for keys: a hundred thousand names take a millisecond, and not 60 on the event loop
        generator = torch.Generator().manual_seed(seed)
        numbers = torch.randperm(files, generator=generator, device="cpu").tolist()
    if dealt is None:
        return numbers
    if dealt.rank >= files and dealt.counted:
        return [numbers[dealt.rank % files]]
    return numbers[dealt.rank :: dealt.world_size]
