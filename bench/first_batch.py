"""How long the first batch takes: `python -m bench.first_batch`.

A dataset that costs nothing, so that what is measured is the loader getting under way: threads and an event loop here,
forked processes there. Once for a new loader, and once for the second epoch of one whose workers stay.
"""

import gc
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Final

import torch
import torch.utils.data
from torch import Tensor

from aioloader import DataLoader, Pipeline
from bench._harness import Contender, Epoch, Report, Target, Tick, Unit, parser_for, pick

BATCH: Final = 32
SAMPLES: Final = 64 * BATCH

FORKED: Final = "torch, 2 workers, fork"
KEPT: Final = "torch, 2 persistent workers"
MS: Final = Unit("ms", lambda seconds: seconds * 1e3)


class Rows(torch.utils.data.Dataset[Tensor]):
    def __init__(self) -> None:
        self._rows = torch.randn(SAMPLES, 16)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Tensor:
        return self._rows[index]


def first_of(make: Callable[[], Iterable[Any]], *, again: bool) -> Epoch:
    """The seconds until the first batch of a new loader, or of a further epoch of one."""
    kept: list[Any] = []

    def epoch(tick: Tick) -> float:
        if not kept or not again:
            kept[:] = [make()]
        (loader,) = kept
        if again:
            for _ in loader:
                pass
        gc.collect()
        began = time.perf_counter()
        batches = iter(loader)
        next(batches)
        seconds = time.perf_counter() - began
        tick(1)
        del batches, loader
        return seconds

    return epoch


def ours() -> Iterable[Any]:
    return DataLoader(Rows(), BATCH, num_workers=2)


def pipeline() -> Iterable[Any]:
    return Pipeline(Rows()).batch(BATCH)


def theirs(*, persistent: bool) -> Iterable[Any]:
    return torch.utils.data.DataLoader(
        Rows(), BATCH, num_workers=2, persistent_workers=persistent, multiprocessing_context="fork"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    options = parser_for(__doc__).parse_args(arguments)
    rounds = pick(options, full=15, quick=3, smallest=1)
    options.rounds = options.rounds or rounds
    report = Report("first_batch", options)
    new, second = "aioloader, 2 workers", "aioloader, 2 workers, second epoch"
    report.compare(
        "until the first batch",
        [
            Contender(new, partial(first_of, ours, again=False)),
            Contender("aioloader, Pipeline", partial(first_of, pipeline, again=False)),
            Contender(second, partial(first_of, ours, again=True)),
            Contender(KEPT, partial(first_of, partial(theirs, persistent=True), again=True)),
            Contender(FORKED, partial(first_of, partial(theirs, persistent=False), again=False)),
        ],
        [
            Target(new, "time", FORKED, 0.05),
            Target(second, "time", FORKED, 0.05),
            Target(second, "time", KEPT, 1),
        ],
        unit=MS,
        apart=True,
    )
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
