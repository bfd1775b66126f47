"""What a sample costs beyond its own work: `python -m bench.overhead`.

The op is an async function that does not suspend, 64 side by side, batches of 256: all that is left is the loader. The
limit is the bare loop that makes the same batches, `torch.stack([rows[key] for key in keys])`. Rivals: SPDL with an
async stage per sample, as its documentation writes it, and once more with a source and settings that spare it all it
can spare; torch's DataLoader and torchdata.nodes, which know no async op, with the same lookup.

Contenders that cost a hundred times more run shorter epochs: all figures are per sample.
"""

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

import torch
import torch.utils.data
from torch import Tensor

from aioloader import Pipeline
from bench._harness import Contender, Epoch, Report, Target, by_async_for, by_for, parser_for, pick
from bench._rivals import async_items, spdl_loader

BATCH: Final = 256
CONCURRENCY: Final = 64
ROWS: Final = 4096  # different samples; few enough to stay in the cache, since memory is not what is measured
WIDTH: Final = 16  # numbers in a sample

BARE: Final = "bare loop"
SPDL: Final = "SPDL, async op per sample"
OURS: Final = ("aioloader, async for", "aioloader, for")
TARGETS: Final = [Target(ours, "speed", SPDL, 60) for ours in OURS]
INDEXING: Final = "bare loop, stack([X[key] ...])"


class Data:
    """The samples of an epoch: `rows[keys[0]]`, `rows[keys[1]]`, ..."""

    def __init__(self, samples: int) -> None:
        self.keys = [position * 7 % ROWS for position in range(samples)]
        self.rows = list(torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0)).unbind())

    def batches(self) -> list[list[int]]:
        return [self.keys[start : start + BATCH] for start in range(0, len(self.keys), BATCH)]


class MapStyle(torch.utils.data.Dataset[Tensor]):
    """The same for torch."""

    def __init__(self, data: Data) -> None:
        self._keys = data.keys
        self._rows = data.rows

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> Tensor:
        return self._rows[self._keys[index]]


def bare_loop(samples: int) -> Epoch:
    """No loader at all."""
    data = Data(samples)
    rows = data.rows
    return by_for(lambda: (torch.stack([rows[key] for key in keys]) for keys in data.batches()))


def pipeline(samples: int) -> Pipeline:
    """What is measured."""
    data = Data(samples)
    rows = data.rows

    async def load(key: int) -> Tensor:
        return rows[key]

    return Pipeline(data.keys).map(load, concurrency=CONCURRENCY).batch(BATCH)


def bare_indexing(samples: int) -> Epoch:
    """The same where a sample is taken out of a tensor."""
    data = Data(samples)
    x = torch.stack(data.rows)
    return by_for(lambda: (torch.stack([x[key] for key in keys]) for keys in data.batches()))


def pipeline_indexing(samples: int) -> Pipeline:
    data = Data(samples)
    x = torch.stack(data.rows)

    async def load(key: int) -> Tensor:
        return x[key]

    return Pipeline(data.keys).map(load, concurrency=CONCURRENCY).batch(BATCH)


def by_spdl(samples: int, *, spare: bool) -> Epoch:
    """SPDL: a source, an async stage per sample, an aggregate and a stage per batch."""
    data = Data(samples)
    rows = data.rows

    async def load(key: int) -> Tensor:
        return rows[key]

    def describe(builder: Any) -> Any:
        source = async_items(data.keys) if spare else data.keys
        return builder.add_source(source).pipe(load, concurrency=CONCURRENCY).aggregate(BATCH).pipe(torch.stack)

    return by_for(spdl_loader(describe, threads=2, stats=not spare))


def by_torch(samples: int, workers: int) -> Epoch:
    """torch's loader; worker processes stay, so that only the first epoch starts them."""
    return by_for(
        torch.utils.data.DataLoader(MapStyle(Data(samples)), BATCH, num_workers=workers, persistent_workers=workers > 0)
    )


def by_nodes(samples: int) -> Epoch:
    """torchdata.nodes: a parallel map, a batcher, a collate."""
    from torchdata.nodes import Batcher, IterableWrapper, Loader, Mapper, ParallelMapper

    data = Data(samples)
    node: Any = ParallelMapper(IterableWrapper(data.keys), data.rows.__getitem__, num_workers=2)
    return by_for(Loader(Mapper(Batcher(node, BATCH, drop_last=False), torch.stack)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = parser_for(__doc__)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 2], help="of torch's DataLoader")
    options = parser.parse_args(arguments)
    samples = pick(options, full=400, quick=40, smallest=2) * BATCH
    few = pick(options, full=16, quick=3, smallest=2) * BATCH
    report = Report("overhead", options)
    report.compare(
        f"an async op that does not suspend, batches of {BATCH}, {CONCURRENCY} side by side",
        [
            Contender(BARE, partial(bare_loop, samples), samples, limit=True),
            Contender("aioloader, async for", lambda: by_async_for(pipeline(samples)), samples),
            Contender("aioloader, for", lambda: by_for(pipeline(samples)), samples),
            Contender("torchdata.nodes, 2 threads", partial(by_nodes, few), few, needs=("torchdata",)),
            Contender(SPDL, partial(by_spdl, few, spare=False), few, needs=("spdl",)),
            Contender(f"{SPDL}, spared", partial(by_spdl, few, spare=True), few, needs=("spdl",)),
            *(
                Contender(f"torch DataLoader, {count} workers", partial(by_torch, samples, count), samples)
                for count in options.workers
            ),
        ],
        TARGETS,
    )
    report.compare(
        "the same op on one tensor: the loop that the design began with",
        [
            Contender(INDEXING, partial(bare_indexing, samples), samples, limit=True),
            Contender(OURS[0], lambda: by_async_for(pipeline_indexing(samples)), samples),
            Contender(OURS[1], lambda: by_for(pipeline_indexing(samples)), samples),
        ],
        [Target(ours, "time", INDEXING, 3) for ours in OURS],
    )
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
