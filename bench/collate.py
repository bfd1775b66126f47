"""How fast large samples become a batch: `python -m bench.collate`.

64 images of 3 x 224 x 224 float32 that are in memory, 38 MB a batch. The limit is one thread that stacks them into one
block of memory again and again; what a loader adds is the hand-over, and the question of where the memory comes from.
"""

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

import torch
import torch.utils.data
from torch import Tensor

from aioloader import DataLoader
from bench._harness import MB_PER_SECOND, Contender, Epoch, Report, Target, Tick, by_for, parser_for, pick
from bench._rivals import spdl_loader

BATCH: Final = 64
SHAPE: Final = (3, 224, 224)
DISTINCT: Final = 128

BARE: Final = "stack(out=) in one thread"
TORCH: Final = "torch, 2 workers"


class Images(torch.utils.data.Dataset[Tensor]):
    """So many samples, of fewer images."""

    def __init__(self, samples: int) -> None:
        self._samples = samples
        self.images = list(torch.rand(DISTINCT, *SHAPE, generator=torch.Generator().manual_seed(0)).unbind())

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index % DISTINCT]


def bare(samples: int) -> Epoch:
    images = Images(samples)
    out = torch.empty(BATCH, *SHAPE)
    torch.set_num_threads(1)

    def epoch(tick: Tick) -> None:
        for start in range(0, samples, BATCH):
            torch.stack([images[index] for index in range(start, start + BATCH)], out=out)
            tick(BATCH)

    return epoch


def ours(samples: int, workers: int) -> Epoch:
    return by_for(DataLoader(Images(samples), BATCH, num_workers=workers))


def theirs(samples: int, workers: int) -> Epoch:
    return by_for(
        torch.utils.data.DataLoader(Images(samples), BATCH, num_workers=workers, persistent_workers=workers > 0)
    )


def by_spdl(samples: int) -> Epoch:
    images = Images(samples)

    def load(indices: list[int]) -> Tensor:
        return torch.stack([images[index] for index in indices])

    def describe(builder: Any) -> Any:
        return builder.add_source(range(samples)).aggregate(BATCH).pipe(load, concurrency=2, output_order="input")

    return by_for(spdl_loader(describe, threads=2))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    options = parser_for(__doc__).parse_args(arguments)
    samples = pick(options, full=8, quick=3, smallest=2) * BATCH
    report = Report("collate", options)
    report.compare(
        f"{BATCH} x 3x224x224 float32",
        [
            Contender(BARE, partial(bare, samples), samples, limit=True),
            Contender("aioloader, 2 workers", partial(ours, samples, 2), samples),
            Contender("aioloader, 0 workers", partial(ours, samples, 0), samples),
            Contender("SPDL, per batch, 2 threads", partial(by_spdl, samples), samples, needs=("spdl",)),
            Contender("torch, 0 workers", partial(theirs, samples, 0), samples),
            Contender(TORCH, partial(theirs, samples, 2), samples),
        ],
        [Target("aioloader, 2 workers", "speed", TORCH, 10), Target("aioloader, 2 workers", "speed", BARE, 0.9)],
        unit=MB_PER_SECOND(3 * 224 * 224 * 4),
        apart=True,
    )
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
