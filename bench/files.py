"""How fast whole files become batches: `python -m bench.files`.

Files of 64 KiB that are in the page cache, to uint8 tensors [batch, 65536]. The limit is one thread that reads them
with `os.readv` into one block of memory again and again. Opening a file costs the same for all, and is most of it.
"""

import asyncio
import os
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
import torch.utils.data
from torch import Tensor

from aioloader import DataLoader, Pipeline
from aioloader.sources import Files
from bench._harness import MB_PER_SECOND, Contender, Epoch, Report, Target, Tick, by_for, parser_for, pick
from bench._rivals import spdl_loader

BATCH: Final = 256
FILE_BYTES: Final = 64 << 10
AT_ONCE: Final = 64

BARE: Final = "one thread, readv into reused memory"
TORCH: Final = "torch, 2 workers"
AIOFILES: Final = f"aiofiles, {AT_ONCE} at once"


def paths_in(folder: str) -> list[str]:
    return sorted(str(path) for path in Path(folder).iterdir())


def read(path: str) -> Tensor:
    return torch.frombuffer(bytearray(Path(path).read_bytes()), dtype=torch.uint8)


class OneByOne(torch.utils.data.Dataset[Tensor]):
    """As it is written with torch."""

    def __init__(self, folder: str) -> None:
        self._paths = paths_in(folder)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Tensor:
        return read(self._paths[index])


def bare(folder: str) -> Epoch:
    paths = paths_in(folder)
    out = torch.empty(BATCH, FILE_BYTES, dtype=torch.uint8)
    rows = [memoryview(row.numpy()) for row in out]

    def epoch(tick: Tick) -> None:
        for start in range(0, len(paths), BATCH):
            part = paths[start : start + BATCH]
            for path, row in zip(part, rows, strict=False):
                fd = os.open(path, os.O_RDONLY)
                try:
                    os.readv(fd, [row])
                finally:
                    os.close(fd)
            tick(len(part))

    return epoch


def by_pipeline(folder: str) -> Epoch:
    return by_for(Pipeline(Files(folder, read="tensor")).batch(BATCH))


def by_loader(folder: str, workers: int) -> Epoch:
    return by_for(DataLoader(Files(folder, read="tensor"), BATCH, num_workers=workers))


def by_torch(folder: str, workers: int) -> Epoch:
    return by_for(
        torch.utils.data.DataLoader(OneByOne(folder), BATCH, num_workers=workers, persistent_workers=workers > 0)
    )


def by_spdl(folder: str) -> Epoch:
    paths = paths_in(folder)

    def load(part: list[str]) -> Tensor:
        return torch.stack([read(path) for path in part])

    def describe(builder: Any) -> Any:
        return builder.add_source(paths).aggregate(BATCH).pipe(load, concurrency=2, output_order="input")

    return by_for(spdl_loader(describe, threads=2))


def by_aiofiles(folder: str, limit: int) -> Epoch:
    import aiofiles

    paths = paths_in(folder)[:limit]

    async def consume(tick: Tick) -> None:
        gate = asyncio.Semaphore(AT_ONCE)

        async def one(path: str) -> Tensor:
            async with gate, aiofiles.open(path, "rb") as file:
                return torch.frombuffer(bytearray(await file.read()), dtype=torch.uint8)

        for start in range(0, len(paths), BATCH):
            part = paths[start : start + BATCH]
            batch = torch.stack(await asyncio.gather(*map(one, part)))
            tick(len(batch))

    return lambda tick: asyncio.run(consume(tick))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    options = parser_for(__doc__).parse_args(arguments)
    files = pick(options, full=12, quick=4, smallest=2) * BATCH
    few = pick(options, full=4, quick=2, smallest=2) * BATCH
    report = Report("files", options)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(files):
            Path(folder, f"{number:06d}.bin").write_bytes(os.urandom(FILE_BYTES))
        report.compare(
            f"files of 64 KiB in the page cache, batches of {BATCH}",
            [
                Contender(BARE, partial(bare, folder), files, limit=True),
                Contender("aioloader, Pipeline", partial(by_pipeline, folder), files),
                Contender("aioloader, DataLoader, 2 workers", partial(by_loader, folder, 2), files),
                Contender("SPDL, per batch, 2 threads", partial(by_spdl, folder), files, needs=("spdl",)),
                Contender(TORCH, partial(by_torch, folder, 2), files),
                Contender(AIOFILES, partial(by_aiofiles, folder, few), few),
            ],
            [
                Target(ours, "speed", rival, reach)
                for ours in ("aioloader, Pipeline", "aioloader, DataLoader, 2 workers")
                for rival, reach in ((TORCH, 2.3), (BARE, 0.9), (AIOFILES, 15))
            ],
            unit=MB_PER_SECOND(FILE_BYTES),
            apart=True,
        )
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
