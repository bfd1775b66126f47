"""Memory of a dataset of small Python objects: `python -m bench.memory_pss`.

A list of two million tuples, each with a number and a string, one shuffled epoch, four workers. torch's worker
processes begin with pages that they share with the user's process, but reading an object writes its reference count, so
each worker ends with a copy of its own. Ours are threads. Measured is the proportional memory (PSS, anonymous and
shared pages) of the process tree at its highest.
"""

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

import torch
import torch.utils.data
from torch import Tensor

from aioloader import DataLoader
from bench._harness import Contender, Epoch, Report, Target, by_for, parser_for, pick

BATCH: Final = 1024
WORKERS: Final = 4

THREADS: Final = f"aioloader, {WORKERS} workers (threads)"
TORCH: Final = f"torch DataLoader, {WORKERS} workers"


class Objects(torch.utils.data.Dataset[Any]):
    """Small Python objects in a list."""

    def __init__(self, samples: int) -> None:
        self._samples = [(index, f"sample {index}") for index in range(samples)]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Any:
        return self._samples[index]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        samples = self._samples
        return [samples[index] for index in indices]


def lengths(samples: list[Any]) -> Tensor:
    """Reads each object."""
    return torch.tensor([number + len(text) for number, text in samples])


def by_ours(samples: int) -> Epoch:
    """Threads."""
    return by_for(DataLoader(Objects(samples), BATCH, shuffle=True, num_workers=WORKERS, collate_fn=lengths))


def by_torch(samples: int) -> Epoch:
    """Processes, forked as torch does it by default."""
    dataset = Objects(samples)
    return by_for(
        torch.utils.data.DataLoader(
            dataset, BATCH, shuffle=True, num_workers=WORKERS, collate_fn=lengths, multiprocessing_context="fork"
        )
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    options = parser_for(__doc__).parse_args(arguments)
    samples = pick(options, full=2_000_000, quick=100_000, smallest=4096)
    report = Report("memory_pss", options)
    report.compare(
        f"{samples:,} small Python objects, one shuffled epoch",
        [
            Contender(THREADS, partial(by_ours, samples), samples),
            Contender(TORCH, partial(by_torch, samples), samples),
        ],
        [Target(THREADS, "memory", TORCH, 0.5), Target(THREADS, "speed", TORCH, 1.0)],
        rounds=pick(options, full=2, quick=1, smallest=1),
        memory=True,
    )
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
