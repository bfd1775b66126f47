"""What a state costs: `python -m bench.state`, per batch when it is not asked for, and per call, beside torchdata's.

The same shuffled, map-style dataset of small rows in batches of 32, by aioloader's `DataLoader` and by torchdata's
`StatefulDataLoader`, without workers and with two (threads against processes, each library's own default); torch's
`DataLoader`, which has no state, shows what carrying one costs torchdata per batch. Each is measured twice: nobody asks
for the state, and `state_dict()` after every batch; the difference is the cost of a call.

Each round measures all of them one after the other, beginning with another one each time; the first round only warms
up. Prints a table, then one line of JSON per row.
"""

import argparse
import gc
import json
import pickle
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
import torch.utils.data
from torch import Tensor

from aioloader import DataLoader
from bench._harness import machine

BATCH: Final = 32
WIDTH: Final = 16


class Rows(torch.utils.data.Dataset[Tensor]):
    """Rows of one tensor."""

    def __init__(self, samples: int) -> None:
        self._rows = list(torch.randn(samples, WIDTH, generator=torch.Generator().manual_seed(0)).unbind())

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Tensor:
        return self._rows[index]


@dataclass(frozen=True)
class Row:
    """One loader.

    Attributes:
        us_per_batch: Nobody asks for the state; median over the rounds, in microseconds.
        us_asked: The state is asked for after every batch.
        us_per_call: Median over the rounds of the difference in the same round.
        state_bytes: A state in the middle of an epoch: as JSON, or pickled where JSON cannot hold it; 0: none.
    """

    what: str
    us_per_batch: float
    us_asked: float
    us_per_call: float
    state_bytes: int


def contenders(samples: int, workers: Sequence[int]) -> dict[str, Any]:
    """The loaders, by name."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torchdata.stateful_dataloader as theirs
    except ImportError:
        theirs = None
        print("torchdata is not installed: nothing to compare with (pip install torchdata)")
    rows = Rows(samples)
    found: dict[str, Any] = {}
    for count in workers:
        found[f"aioloader, {count} workers"] = DataLoader(rows, BATCH, shuffle=True, num_workers=count)
        kept: dict[str, Any] = {"shuffle": True, "num_workers": count, "persistent_workers": count > 0}
        if theirs is not None:
            found[f"torchdata, {count} workers"] = theirs.StatefulDataLoader(rows, BATCH, **kept)
        found[f"torch, {count} workers"] = torch.utils.data.DataLoader(rows, BATCH, **kept)
    return found


def epoch(loader: Any, ask: bool) -> tuple[float, Any]:
    """Seconds per batch, without the first one, which waits for the start; and a state of its middle."""
    state = None
    batches = iter(loader)
    next(batches)
    count = 0
    began = time.perf_counter()
    for _ in batches:
        count += 1
        if ask:
            newest = loader.state_dict()
            state = state or newest  # of the middle of the epoch
    return (time.perf_counter() - began) / count, state


def measure(loaders: dict[str, Any], rounds: int) -> list[Row]:
    """All rows, from interleaved rounds."""
    names = list(loaders)
    plain: dict[str, list[float]] = {name: [] for name in names}
    asked: dict[str, list[float]] = {name: [] for name in names}
    states: dict[str, Any] = {}
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            loader = loaders[name]
            gc.collect()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                without, _ = epoch(loader, ask=False)
                with_state = without
                if hasattr(loader, "state_dict"):
                    with_state, states[name] = epoch(loader, ask=True)
            if number:  # the first round warms up
                plain[name].append(without * 1e6)
                asked[name].append(with_state * 1e6)
    return [
        Row(
            name,
            statistics.median(plain[name]),
            statistics.median(asked[name]),
            statistics.median(more - less for more, less in zip(asked[name], plain[name], strict=True)),
            _size(states.get(name)),
        )
        for name in names
    ]


def _size(state: Any) -> int:
    if state is None:
        return 0
    dump: Callable[[Any], Any] = json.dumps
    try:
        return len(dump(state))
    except TypeError:
        return len(pickle.dumps(state))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a few seconds, with figures that vary more")
    size.add_argument("--smallest", action="store_true", help="only to see that it runs: the figures mean nothing")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--workers", type=int, nargs="*", default=None, help="default: 0 and 2")
    options = parser.parse_args(arguments)
    batches, rounds = (4, 1) if options.smallest else (300, 3) if options.quick else (1000, 7)
    rounds = max(1, options.rounds or rounds)
    workers = options.workers if options.workers is not None else [0] if options.smallest else [0, 2]
    facts = machine()
    print(
        f"Python {facts['python']}, torch {facts['torch']}, {facts['cores']} cores; load before: {facts['load_before']}"
    )
    print(f"{batches} batches of {BATCH} shuffled rows per epoch; median of {rounds} rounds\n")
    rows = measure(contenders(batches * BATCH, workers), rounds)
    print(f"{'µs per batch':<26}{'not asked':>12}{'asked':>10}{'per call':>11}{'bytes':>9}")
    for row in rows:
        if row.state_bytes:
            rest = f"{row.us_asked:>10.1f}{row.us_per_call:>11.1f}{row.state_bytes:>9}"
        else:
            rest = f"{'no state':>10}"
        print(f"{row.what:<26}{row.us_per_batch:>12.1f}{rest}")
    print()
    for row in rows:
        figures = {name: value if isinstance(value, str) else round(value, 2) for name, value in asdict(row).items()}
        print(json.dumps({"bench": "state", **figures, "batches": batches, "rounds": rounds, **facts}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
