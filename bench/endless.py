"""Whether memory stays flat when a source never ends and its consumer is slow: `python -m bench.endless`.

Three live sources of samples of 16 KiB, each faster than its consumer: an async generator, a `Channel` that tasks send
into, and many async generators merged. The consumer gives the loop a turn, and so the producers every chance to run
ahead, `TURNS` times for each batch. Told are how far ahead they were at most, and the memory of the process at first
and in the end. What would have been held without a bound is the size of all samples.
"""

import argparse
import asyncio
import gc
import json
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import psutil

from aioloader import Pipeline
from aioloader.sources import Channel

SAMPLE_BYTES: Final = 16 << 10
BATCH: Final = 64
CONCURRENCY: Final = 64
TURNS: Final = 20
MERGED: Final = 32


@dataclass
class Row:
    """What one source gave.

    Attributes:
        what: The source.
        samples: That were delivered.
        ahead: The most samples that were made and not delivered at any time.
        mib_first: Memory of the process after a tenth of the samples.
        mib_last: And in the end.
        mib_all: Of all samples together.
    """

    what: str
    samples: int
    ahead: int
    mib_first: float
    mib_last: float
    mib_all: float

    @property
    def growth(self) -> float:
        """MiB since the first tenth, for each GiB of samples since then."""
        return (self.mib_last - self.mib_first) / max(1e-9, 0.9 * self.mib_all / 1024)


class Made:
    """Counts the samples that a source made."""

    def __init__(self) -> None:
        self.count = 0

    def sample(self) -> bytearray:
        self.count += 1
        return bytearray(SAMPLE_BYTES)


async def _endless(made: Made) -> AsyncIterator[bytearray]:
    while True:
        await asyncio.sleep(0)
        yield made.sample()


async def _fetch(sample: bytearray) -> bytearray:
    await asyncio.sleep(0)
    return sample


def _memory() -> float:
    gc.collect()
    return float(psutil.Process().memory_info().rss) / (1 << 20)


async def _consume(what: str, made: Made, source: Any, batches: int) -> Row:
    loader = Pipeline(source).map(_fetch, concurrency=CONCURRENCY).batch(BATCH, collate_fn=len)
    samples = ahead = count = 0
    first = 0.0
    async with loader:
        async for size in loader:
            samples += size
            count += 1
            for _ in range(TURNS):  # a slow consumer; time would only make it longer
                await asyncio.sleep(0)
            ahead = max(ahead, made.count - samples)
            if count == max(1, batches // 10):
                first = _memory()
            if count == batches:
                break
    return Row(what, samples, ahead, first, _memory(), samples * SAMPLE_BYTES / (1 << 20))


async def from_generator(batches: int) -> Row:
    """One async generator."""
    made = Made()
    return await _consume("an async generator", made, lambda: _endless(made), batches)


async def from_channel(batches: int) -> Row:
    """A channel that eight tasks send into."""
    made = Made()

    async def produce(sender: Any) -> None:
        with sender:
            while True:
                await sender.send(made.sample())

    channel = Channel(maxsize=256)
    tasks = [asyncio.create_task(produce(channel.sender())) for _ in range(8)]
    try:
        return await _consume("a Channel, eight tasks", made, channel, batches)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def from_many(batches: int) -> Row:
    """Many generators, merged."""
    made = Made()
    source = Pipeline.merge(*((lambda: _endless(made)) for _ in range(MERGED)))
    return await _consume(f"{MERGED} async generators, merged", made, source, batches)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="in a few seconds")
    parser.add_argument("--batches", type=int, help="for each source")
    options = parser.parse_args(arguments)
    batches = options.batches or (300 if options.quick else 2000)
    rows = [asyncio.run(measure(batches)) for measure in (from_generator, from_channel, from_many)]
    print(f"batches of {BATCH} samples of {SAMPLE_BYTES >> 10} KiB, {CONCURRENCY} side by side\n")
    print(
        f"{'source':<34}{'samples':>9}{'ahead':>7}{'MiB first':>11}{'MiB last':>10}{'MiB per GiB':>13}{'all, MiB':>10}"
    )
    for row in rows:
        print(
            f"{row.what:<34}{row.samples:>9}{row.ahead:>7}{row.mib_first:>11.1f}{row.mib_last:>10.1f}"
            f"{row.growth:>13.2f}{row.mib_all:>10.0f}"
        )
    print()
    for row in rows:
        print(json.dumps({"bench": "endless", **asdict(row), "mib_per_gib": round(row.growth, 3)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
