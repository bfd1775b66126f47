"""What a state costs: `python -m bench.state`, per batch when nobody asks for it, and per call, beside torchdata's.

The same shuffled, map-style dataset of small rows in batches of 32, by aioloader's `DataLoader` and by torchdata's
`StatefulDataLoader`, without workers and with two: threads against processes, each library's own default. Each twice:
nobody asks for the state, and `state_dict()` after every batch; then the calls themselves are timed. torch's
`DataLoader`, which has no state, shows what carrying one costs per batch.
"""

import json
import pickle
import statistics
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from time import perf_counter
from typing import Any, Final

import torch
import torch.utils.data
from torch import Tensor

from aioloader import DataLoader
from bench._harness import Contender, Epoch, Report, Target, Unit, parser_for, pick

BATCH: Final = 32
WIDTH: Final = 16
PER_BATCH: Final = Unit("µs per batch", lambda seconds: seconds * BATCH * 1e6)


class Rows(torch.utils.data.Dataset[Tensor]):
    """Rows of one tensor."""

    def __init__(self, samples: int) -> None:
        self._rows = list(torch.randn(samples, WIDTH, generator=torch.Generator().manual_seed(0)).unbind())

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Tensor:
        return self._rows[index]


def make_loader(library: str, samples: int, workers: int) -> Any:
    """A loader over `Rows`, whose workers stay between epochs."""
    rows = Rows(samples)
    arguments: dict[str, Any] = {"shuffle": True, "num_workers": workers, "persistent_workers": workers > 0}
    if library == "aioloader":
        return DataLoader(rows, BATCH, **arguments)
    if library == "torch":
        return torch.utils.data.DataLoader(rows, BATCH, **arguments)
    import torchdata.stateful_dataloader

    return torchdata.stateful_dataloader.StatefulDataLoader(rows, BATCH, **arguments)


def epochs(library: str, samples: int, workers: int, *, ask: bool) -> Epoch:
    """Epochs that ask for the state after every batch, or not."""
    loader = make_loader(library, samples, workers)

    def epoch(tick: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchdata's, of torch
            for batch in loader:
                tick(len(batch))
                if ask:
                    loader.state_dict()

    return epoch


def calls(library: str, samples: int, workers: int) -> tuple[float, int]:
    """Median seconds of a call of `state_dict()` over an epoch; and its bytes, as JSON or else pickled."""
    loader = make_loader(library, samples, workers)
    seconds: list[float] = []
    sizes: list[int] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in loader:
            began = perf_counter()
            state = loader.state_dict()
            seconds.append(perf_counter() - began)
            if not sizes:
                sizes.append(_size(state))
    return statistics.median(seconds), sizes[0]


def _size(state: Any) -> int:
    try:
        return len(json.dumps(state))
    except TypeError:
        return len(pickle.dumps(state))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    options = parser_for(__doc__).parse_args(arguments)
    batches = pick(options, full=300, quick=60, smallest=4)
    samples = batches * BATCH
    report = Report("state", options)
    for workers in pick(options, full=(0, 2), quick=(0, 2), smallest=(0,)):
        contenders = [
            Contender(f"torch, {workers} workers", partial(epochs, "torch", samples, workers, ask=False), samples)
        ]
        for library in ("aioloader", "torchdata"):
            needs = ("torchdata",) if library == "torchdata" else ()
            for ask in (False, True):
                name = f"{library}, {workers} workers" + (", asked" if ask else "")
                contenders.append(
                    Contender(name, partial(epochs, library, samples, workers, ask=ask), samples, needs=needs)
                )
        ours = f"aioloader, {workers} workers"
        targets = [
            Target(ours, "time", f"torchdata, {workers} workers", 1),
            Target(f"{ours}, asked", "time", f"torchdata, {workers} workers, asked", 1),
        ]
        title = f"{batches} batches of {BATCH} shuffled rows, {workers} workers"
        found = report.compare(title, contenders, targets, unit=PER_BATCH)
        for library in ("aioloader", "torchdata"):
            name = f"{library}, {workers} workers"
            if name in found.timings:
                seconds, size = calls(library, samples, workers)
                report.figure(f"{name}: a call of state_dict(), {size:,} bytes", seconds * 1e6, "µs", state_bytes=size)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
