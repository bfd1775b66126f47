"""A training loop whose main thread is busy in Python: `python -m bench.own_process`.

For each batch the main thread runs a fixed piece of pure Python, some milliseconds of it, as a loop with bookkeeping,
logging or an eager model of many small operations does. A loader in the same process takes turns with it for the GIL,
and both get slower; `in_process()` has a GIL of its own. The limit is the loop without a loader. The loader's work:
samples that are awaited, a transform of numpy's and Python's kind, a collate.
"""

import asyncio
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

import torch
import torch.utils.data
from torch import Tensor

from aioloader import Pipeline
from bench._harness import MS_PER_BATCH, Contender, Epoch, Report, Target, Tick, parser_for, pick

BATCH: Final = 32
LOOP_STEPS: Final = 100_000  # of the main thread for each batch; about 5 ms
STEPS: Final = 1000  # of the transform for each sample; about 0.05 ms
SHAPE: Final = (3, 64, 64)

BARE: Final = "the loop alone"
THREADS: Final = "aioloader, threads"
OWN: Final = "aioloader, in_process()"
TORCH: Final = "torch DataLoader, 2 workers"


def busy(steps: int, value: int = 1) -> int:
    """Pure Python that never lets go of the GIL."""
    for _ in range(steps):
        value = (value * 1103515245 + 12345) & 0x7FFFFFFF
    return value


def transform(key: int) -> Tensor:
    """Python, and a sample of 48 KiB."""
    return torch.full(SHAPE, float(busy(STEPS, key) & 0xFF))


async def fetch(key: int) -> int:
    """What a client would await."""
    await asyncio.sleep(0)
    return key


class Transformed(torch.utils.data.Dataset[Tensor]):
    """For torch, which awaits nothing."""

    def __init__(self, samples: int) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> Tensor:
        return transform(index)


def training(loader: Any) -> Epoch:
    """The loop of the main thread."""

    def epoch(tick: Tick) -> None:
        for batch in loader:
            busy(LOOP_STEPS)
            tick(len(batch))

    return epoch


def alone(samples: int) -> Epoch:
    """No loader: one batch again and again."""
    batch = torch.stack([transform(key) for key in range(BATCH)])
    return training([batch] * (samples // BATCH))


def pipeline(samples: int) -> Pipeline:
    """What is measured."""
    return Pipeline(range(samples)).map(fetch).map(transform, concurrency=2).batch(BATCH)


def by_threads(samples: int) -> Epoch:
    """Beside the loop."""
    return training(pipeline(samples))


def by_own_process(samples: int) -> Epoch:
    """Elsewhere."""
    return training(pipeline(samples).in_process())


def by_torch(samples: int) -> Epoch:
    """Worker processes that stay."""
    return training(torch.utils.data.DataLoader(Transformed(samples), BATCH, num_workers=2, persistent_workers=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    options = parser_for(__doc__).parse_args(arguments)
    samples = pick(options, full=100, quick=16, smallest=4) * BATCH
    report = Report("own_process", options)
    report.compare(
        f"a main thread that is busy in Python, {LOOP_STEPS} steps per batch of {BATCH}",
        [
            Contender(BARE, partial(alone, samples), samples, limit=True),
            Contender(THREADS, partial(by_threads, samples), samples, skip=4 * BATCH),
            Contender(OWN, partial(by_own_process, samples), samples, skip=4 * BATCH),
            Contender(TORCH, partial(by_torch, samples), samples, skip=4 * BATCH),
        ],
        [Target(OWN, "speed", THREADS, 1.2), Target(OWN, "speed", TORCH, 1.0), Target(OWN, "time", BARE, 1.1)],
        unit=MS_PER_BATCH(BATCH),
        apart=True,
    )
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
