"""What a sample costs beyond its own work: `python -m bench.overhead`.

The op is an async function that does not suspend, 64 side by side, batches of 256: all that is left is the loader. The
rival is the bare loop that makes the same batches, `torch.stack([rows[key] for key in keys])`. The aim of the project
is to stay within 3 µs per sample of it. torch's DataLoader on the same data is there for scale.

Each round measures all of them one after the other, beginning with another one each time, so that a machine that gets
slower or faster meanwhile does so for all. Epochs are whole ones, garbage collection is on, and the first round only
warms up. Prints a table, then one line of JSON per row.
"""

import argparse
import asyncio
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
import torch.utils.data
from torch import Tensor

from aioloader import Pipeline
from aioloader.doctor import collect

BATCH: Final = 256
CONCURRENCY: Final = 64
ROWS: Final = 4096  # different samples; few enough to stay in the cache, since memory is not what is measured
WIDTH: Final = 16  # numbers in a sample
AIM_US: Final = 3.0

BARE: Final = "bare loop"


class Data:
    """The samples of an epoch: `rows[keys[0]]`, `rows[keys[1]]`, ..."""

    def __init__(self, samples: int) -> None:
        self.keys = [position * 7 % ROWS for position in range(samples)]
        self.rows = list(torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0)).unbind())


class MapStyle(torch.utils.data.Dataset[Tensor]):
    """The same for torch."""

    def __init__(self, data: Data) -> None:
        self._keys = data.keys
        self._rows = data.rows

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> Tensor:
        return self._rows[self._keys[index]]


Epoch = Callable[[], int]
"""One epoch; returns how many samples came."""


def bare_loop(data: Data) -> Epoch:
    """No loader at all."""
    keys, rows = data.keys, data.rows

    def epoch() -> int:
        count = 0
        for start in range(0, len(keys), BATCH):
            batch = torch.stack([rows[key] for key in keys[start : start + BATCH]])
            count += len(batch)
        return count

    return epoch


def pipeline(data: Data) -> Pipeline:
    """What is measured."""
    rows = data.rows

    async def load(key: int) -> Tensor:
        return rows[key]

    return Pipeline(data.keys).map(load, concurrency=CONCURRENCY).batch(BATCH)


def by_for(loader: Any) -> Epoch:
    """Consume any loader by `for`."""

    def epoch() -> int:
        return sum(len(batch) for batch in loader)

    return epoch


def by_async_for(loader: Any) -> Epoch:
    """Consume any loader by `async for`."""

    async def count() -> int:
        count = 0
        async for batch in loader:
            count += len(batch)
        return count

    return lambda: asyncio.run(count())


@dataclass(frozen=True)
class Row:
    """One contender.

    Attributes:
        us_per_sample: Median over the rounds, in microseconds.
        us_low: The fastest round.
        us_high: The slowest round.
        us_above_bare: Median over the rounds of the difference to the bare loop in the same round.
    """

    what: str
    us_per_sample: float
    us_low: float
    us_high: float
    us_above_bare: float


def contenders(data: Data, workers: Sequence[int]) -> dict[str, Epoch]:
    """What takes part, by name."""
    dataset = MapStyle(data)
    loader = pipeline(data)
    by_torch = {
        f"torch DataLoader, {count} workers": by_for(
            # Kept alive, so that the start of the processes is not counted.
            torch.utils.data.DataLoader(dataset, BATCH, num_workers=count, persistent_workers=count > 0)
        )
        for count in workers
    }
    return {
        BARE: bare_loop(data),
        "aioloader, async for": by_async_for(loader),
        "aioloader, for": by_for(loader),
        **by_torch,
    }


def measure(epochs: dict[str, Epoch], samples: int, rounds: int) -> list[Row]:
    """All rows, from interleaved rounds."""
    names = list(epochs)
    # Those with processes begin: forking is safest before there are threads.
    for name in reversed(names):
        _seconds(epochs[name], samples)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(_seconds(epochs[name], samples))
    bare = seconds[BARE]
    rows = []
    for name in names:
        each = [taken / samples * 1e6 for taken in seconds[name]]
        above = [(taken - least) / samples * 1e6 for taken, least in zip(seconds[name], bare, strict=True)]
        rows.append(Row(name, statistics.median(each), min(each), max(each), statistics.median(above)))
    return rows


def _seconds(epoch: Epoch, samples: int) -> float:
    gc.collect()
    began = time.perf_counter()
    count = epoch()
    taken = time.perf_counter() - began
    if count != samples:
        raise RuntimeError(f"an epoch must give {samples} samples, got {count}")
    return taken


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    facts = collect()
    return {
        "python": platform.python_version(),
        "torch": facts.versions["torch"],
        "cores": facts.usable_cores,
        "loop_of_for": facts.event_loop,
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=256_000, help="per epoch; rounded down to whole batches")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 2], help="of torch's DataLoader")
    parser.add_argument("--quick", action="store_true", help="3 rounds of 204,800 samples")
    options = parser.parse_args(arguments)
    if options.quick:
        options.samples, options.rounds = 204_800, 3
    samples = max(1, options.samples // BATCH) * BATCH
    rounds = max(1, options.rounds)
    facts = machine()
    print(
        f"Python {facts['python']}, torch {facts['torch']}, {facts['cores']} cores, `for` over {facts['loop_of_for']}, "
        f"`async for` over asyncio; load before: {facts['load_before']}"
    )
    print(f"{samples} samples per epoch, batches of {BATCH}, concurrency {CONCURRENCY}; median of {rounds} rounds\n")
    rows = measure(contenders(Data(samples), options.workers), samples, rounds)
    print(f"{'µs per sample':<30}{'median':>8}{'fastest':>9}{'slowest':>9}{'above bare':>12}")
    for row in rows:
        above = "" if row.what == BARE else f"{row.us_above_bare:.2f}"
        print(f"{row.what:<30}{row.us_per_sample:>8.2f}{row.us_low:>9.2f}{row.us_high:>9.2f}{above:>12}")
    worst = max(row.us_above_bare for row in rows if row.what.startswith("aioloader"))
    verdict = "reached" if worst <= AIM_US else "missed"
    print(f"\nat most {AIM_US:g} µs above the bare loop is the aim: {verdict} with {worst:.2f}\n")
    for row in rows:
        figures = {name: value if isinstance(value, str) else round(value, 3) for name, value in asdict(row).items()}
        print(json.dumps({"bench": "overhead", **figures, "samples": samples, "rounds": rounds, **facts}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
