"""Python code that holds the GIL, in worker processes: `python -m bench.processes`.

Each sample is about 0.2 ms of pure Python, which threads cannot do side by side. The limit is a bare loop in one
process; two workers on two cores can be twice as fast. Rivals: torch's DataLoader with as many workers, which stay from
one epoch to the next, as ours do. The second question is what a batch costs on its way back: 16 MB, made by one call.
The third is what short epochs pay for workers that begin anew in each; one epoch beforehand is not counted.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import torch
import torch.utils.data
from torch import Tensor

from aioloader import DataLoader, Pipeline
from bench._harness import MB_PER_SECOND, Contender, Epoch, Report, Target, by_for, parser_for, pick, whole

BATCH: Final = 32
WORKERS: Final = 2
STEPS: Final = 4000  # of the transform; about 0.2 ms
LARGE: Final = (16, 1 << 18)  # a batch of 16 MiB
SLOW_STEPS: Final = 240_000  # about 12 ms
SLOW_BATCH: Final = 5
IMAGES: Final = (64, 3, 224, 224)  # a batch of 38 MB

BARE: Final = "bare loop, one process"
TORCH: Final = f"torch DataLoader, {WORKERS} workers"
OURS: Final = f'DataLoader(worker_type="process"), {WORKERS} workers'
PIPELINE: Final = f'map(executor="process"), {WORKERS} processes'


def transform(key: int, steps: int = STEPS) -> Tensor:
    """Pure Python, and a small tensor of what it found."""
    value = key
    for _ in range(steps):
        value = (value * 1103515245 + 12345) & 0x7FFFFFFF
    return torch.tensor([value & 0xFF, key], dtype=torch.float32)


class Transformed(torch.utils.data.Dataset[Tensor]):
    """Samples made by `transform`."""

    def __init__(self, samples: int, steps: int = STEPS) -> None:
        self._samples = samples
        self._steps = steps

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> Tensor:
        return transform(index, self._steps)


class Large(torch.utils.data.Dataset[Tensor]):
    """Whole batches, whose making costs little beside their way back."""

    def __init__(self, batches: int, shape: tuple[int, ...] = LARGE) -> None:
        self._batches = batches
        self._shape = shape

    def __len__(self) -> int:
        return self._batches

    def __getitem__(self, index: int) -> Tensor:
        return torch.full(self._shape, float(index))


def bare_loop(samples: int) -> Epoch:
    """No loader and no worker."""
    starts = range(0, samples, BATCH)
    return by_for(lambda: (torch.stack([transform(key) for key in range(at, at + BATCH)]) for at in starts))


def by_torch(dataset: Any, batch_size: int | None, *, stay: bool = True) -> Epoch:
    """Workers that stay, or begin anew in each epoch."""
    return by_for(torch.utils.data.DataLoader(dataset, batch_size, num_workers=WORKERS, persistent_workers=stay))


def by_ours(dataset: Any, batch_size: int | None, *, stay: bool = True) -> Epoch:
    """The same arguments."""
    return by_for(DataLoader(dataset, batch_size, num_workers=WORKERS, persistent_workers=stay, worker_type="process"))


def whole_epoch(of: Callable[..., Epoch], dataset: Any, batch_size: int | None, *, stay: bool) -> Epoch:
    """With what workers take to begin and to end."""
    return whole(of(dataset, batch_size, stay=stay))


def by_threads(samples: int) -> Epoch:
    """Threads, which take turns with the GIL: what processes are for."""
    return by_for(DataLoader(Transformed(samples), BATCH, num_workers=WORKERS))


def by_pipeline(samples: int) -> Epoch:
    """Samples cross, batches are made here."""
    return by_for(Pipeline(range(samples)).map(transform, executor="process", concurrency=WORKERS).batch(BATCH))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    options = parser_for(__doc__).parse_args(arguments)
    samples = pick(options, full=60, quick=10, smallest=4) * BATCH
    report = Report("processes", options)
    report.compare(
        f"a pure-Python transform, batches of {BATCH}",
        [
            Contender(BARE, partial(bare_loop, samples), samples, limit=True),
            Contender("DataLoader, 2 threads", partial(by_threads, samples), samples, ours=True),
            Contender(PIPELINE, partial(by_pipeline, samples), samples, skip=4 * BATCH),
            Contender(OURS, partial(by_ours, Transformed(samples), BATCH), samples, skip=4 * BATCH),
            Contender(TORCH, partial(by_torch, Transformed(samples), BATCH), samples, skip=4 * BATCH),
        ],
        [Target(OURS, "speed", TORCH, 1.0), Target(PIPELINE, "speed", TORCH, 1.0)],
        apart=True,
    )
    batches = pick(options, full=40, quick=12, smallest=4)
    large = batches * LARGE[0]
    size = 4 * LARGE[1]
    report.compare(
        f"batches of {LARGE[0] * size >> 20} MiB from worker processes",
        [
            Contender(OURS, partial(by_ours, Large(batches), None), large, skip=4 * LARGE[0]),
            Contender(TORCH, partial(by_torch, Large(batches), None), large, skip=4 * LARGE[0]),
        ],
        [Target(OURS, "speed", TORCH, 1.0)],
        unit=MB_PER_SECOND(size),
        apart=True,
    )
    short_epochs(report, options)
    return report.finish()


def short_epochs(report: Report, options: argparse.Namespace) -> None:
    """Workers that stay, and such as begin anew, in epochs that take half a second or less."""
    samples = pick(options, full=40, quick=40, smallest=10)
    batches = pick(options, full=10, quick=10, smallest=2)
    slow, images = Transformed(samples, SLOW_STEPS), Large(batches, IMAGES)
    cases: tuple[tuple[str, Any, int | None, int], ...] = (
        (f"{samples} samples of 12 ms, batches of {SLOW_BATCH}", slow, SLOW_BATCH, samples),
        (f"{batches} batches of 38 MB", images, None, batches * IMAGES[0]),
    )
    for what, dataset, size, count in cases:
        for stay, how in ((True, "workers stay"), (False, "workers begin anew")):
            report.compare(
                f"short epochs: {what}, {how}",
                [
                    Contender(name, partial(whole_epoch, of, dataset, size, stay=stay), count)
                    for name, of in ((OURS, by_ours), (TORCH, by_torch))
                ],
                [Target(OURS, "speed", TORCH, 1.0)],
                rounds=pick(options, full=9, quick=2, smallest=1),
                apart=True,
            )


if __name__ == "__main__":
    sys.exit(main())
