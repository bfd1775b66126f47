"""A second epoch from a cache against the same samples in memory: `python -m bench.cache`.

All go through the same shuffle and batch stage, which copies each sample once, into its batch. The aim is at most
1.2 times the time of a dataset that holds the same tensors. A plain list of them is the limit: reading it calls no
user code, and needs no look-up. The cache on disk is shown beside it: its files are in the memory of the system by
then, so what is measured is reading, checking and unpickling.
"""

import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

import torch
import torch.utils.data
from torch import Tensor

from aioloader import Pipeline
from bench._harness import MB_PER_SECOND, Contender, Epoch, Report, Target, by_async_for, by_for, parser_for, pick

LIST: Final = "a list of the same tensors, for"
DATASET: Final = "a dataset of the same tensors, for"
DATASET_ASYNC: Final = "a dataset of the same tensors, async for"
MEMORY: Final = "cache(memory_bytes), for"
MEMORY_ASYNC: Final = "cache(memory_bytes), async for"
MAPPED: Final = "cache(memory_bytes) and a map behind it"
DISK: Final = "cache(disk), for"
SIZES: Final = [(4, 256), (64, 64), (588, 64)]
"""KiB per sample, and samples per batch; the last one is 3×224×224 float32."""

TARGETS: Final = [Target(MEMORY, "time", DATASET, 1.2), Target(MEMORY_ASYNC, "time", DATASET_ASYNC, 1.2)]


class Fetch:
    """Stands for a request: an async function that gives a new tensor."""

    def __init__(self, numbers: int) -> None:
        self._numbers = numbers

    async def __call__(self, key: int) -> Tensor:
        return torch.full((self._numbers,), float(key))


def filled(pipeline: Pipeline) -> Pipeline:
    """`pipeline` after a first epoch."""
    for _ in pipeline:
        pass
    return pipeline


class InMemory(torch.utils.data.Dataset[Tensor]):
    """What a user writes for data that fits."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = tensors

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, index: int) -> Tensor:
        return self._tensors[index]


def from_tensors(samples: int, numbers: int, batch: int, *, plain: bool = False, by_async: bool = False) -> Epoch:
    data = [torch.full((numbers,), float(key)) for key in range(samples)]
    pipeline = Pipeline(data if plain else InMemory(data)).shuffle(seed=0).batch(batch)
    return by_async_for(pipeline) if by_async else by_for(pipeline)


def cached(samples: int, numbers: int, folder: str | None) -> Pipeline:
    pipeline = Pipeline(range(samples)).shuffle(seed=0).map(Fetch(numbers), concurrency=64)
    return pipeline.cache(memory_bytes=8 << 30) if folder is None else pipeline.cache(disk=folder)


def from_memory(samples: int, numbers: int, batch: int, *, by_async: bool = False, mapped: bool = False) -> Epoch:
    pipeline = cached(samples, numbers, None)
    if mapped:
        pipeline = pipeline.map(Tensor.neg_)
    pipeline = filled(pipeline.batch(batch))
    return by_async_for(pipeline) if by_async else by_for(pipeline)


def from_disk(samples: int, numbers: int, batch: int, folder: str) -> Epoch:
    return by_for(filled(cached(samples, numbers, folder).batch(batch)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = parser_for(__doc__)
    options = parser.parse_args(arguments)
    megabytes = pick(options, full=192, quick=32, smallest=1)
    report = Report("cache", options)
    for kib, batch in pick(options, full=SIZES, quick=SIZES[:2], smallest=SIZES):
        numbers = kib * 256
        samples = max(batch, min(40_000, megabytes * 1024 // kib) // batch * batch)
        with tempfile.TemporaryDirectory() as folder:
            sizes = (samples, numbers, batch)
            report.compare(
                f"{samples} samples of {kib} KiB, shuffled, in batches of {batch}",
                [
                    Contender(LIST, partial(from_tensors, *sizes, plain=True), samples, limit=True),
                    Contender(DATASET, partial(from_tensors, *sizes), samples),
                    Contender(DATASET_ASYNC, partial(from_tensors, *sizes, by_async=True), samples),
                    Contender(MEMORY, partial(from_memory, *sizes), samples),
                    Contender(MEMORY_ASYNC, partial(from_memory, *sizes, by_async=True), samples),
                    Contender(MAPPED, partial(from_memory, *sizes, mapped=True), samples, ours=True),
                    Contender(DISK, partial(from_disk, *sizes, str(Path(folder) / "cache")), samples, ours=True),
                ],
                TARGETS,
                unit=MB_PER_SECOND(kib * 1024),
            )
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
