"""What a sample costs that is in memory already: `python -m bench.in_memory`.

A tensor and a label, indexed one by one as a map-style dataset does, in batches of 256. Nothing is left but the
loader's own work and the copy into the batch, so torch without workers is the limit: whatever crosses to another
thread or process must pay for it.
"""

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

import torch
import torch.utils.data
from torch import Tensor

from aioloader import DataLoader
from bench._harness import Contender, Epoch, Report, Target, by_async_for, by_for, parser_for, pick

BATCH: Final = 256
WIDTH: Final = 64

TORCH_0: Final = "torch, 0 workers"
TORCH_2: Final = "torch, 2 workers"


class Rows(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """One sample at a time."""

    def __init__(self, samples: int) -> None:
        self.rows = torch.randn(samples, WIDTH, generator=torch.Generator().manual_seed(0))
        self.labels = list(range(samples))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.rows[index], self.labels[index]


class ManyRows(Rows):
    """A batch of samples at a time."""

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        labels = self.labels
        return list(zip(self.rows[indices], [labels[index] for index in indices], strict=True))


def ours(kind: type[Rows], samples: int, workers: int, *, is_async: bool = False) -> Epoch:
    loader: Any = DataLoader(kind(samples), BATCH, num_workers=workers)
    return by_async_for(loader) if is_async else by_for(loader)


def theirs(kind: type[Rows], samples: int, workers: int) -> Epoch:
    return by_for(
        torch.utils.data.DataLoader(kind(samples), BATCH, num_workers=workers, persistent_workers=workers > 0)
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    options = parser_for(__doc__).parse_args(arguments)
    samples = pick(options, full=120, quick=40, smallest=2) * BATCH
    report = Report("in_memory", options)
    report.compare(
        f"tensors in memory, batches of {BATCH}",
        [
            Contender(TORCH_0, partial(theirs, Rows, samples, 0), samples, limit=True),
            Contender("aioloader, 0 workers", partial(ours, Rows, samples, 0), samples),
            Contender("aioloader, 2 workers", partial(ours, Rows, samples, 2), samples),
            Contender("aioloader, 2 workers, async for", partial(ours, Rows, samples, 2, is_async=True), samples),
            Contender(TORCH_2, partial(theirs, Rows, samples, 2), samples),
        ],
        [
            Target("aioloader, 2 workers", "speed", TORCH_2, 2),
            Target("aioloader, 2 workers", "speed", TORCH_0, 0.7),
            Target("aioloader, 0 workers", "speed", TORCH_0, 0.95),
        ],
        apart=True,
    )
    report.compare(
        f"the same, a batch at a time by __getitems__, batches of {BATCH}",
        [
            Contender(TORCH_0, partial(theirs, ManyRows, samples, 0), samples, limit=True),
            Contender("aioloader, 0 workers", partial(ours, ManyRows, samples, 0), samples),
            Contender("aioloader, 2 workers", partial(ours, ManyRows, samples, 2), samples),
            Contender(TORCH_2, partial(theirs, ManyRows, samples, 2), samples),
        ],
        [Target("aioloader, 0 workers", "speed", TORCH_0, 0.95)],
        apart=True,
    )
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
