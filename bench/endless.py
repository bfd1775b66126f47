"""Whether memory stays flat when a source never ends and its consumer is slow: `python -m bench.endless`.

Three live sources of samples of 16 KiB, each faster than its consumer: an async generator, a `Channel` that tasks send
into, and many async generators merged. The consumer gives the loop a turn, and so the producers every chance to run
ahead, `TURNS` times for each batch. Told are how far ahead they were at most, and the memory of the process at first
and in the end. What would have been held without a bound is the size of all samples.
"""

import asyncio
import gc
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import psutil

from aioloader import Pipeline
from aioloader.sources import Channel
from bench._harness import Report, Target, parser_for, pick

SAMPLE_BYTES: Final = 16 << 10
BATCH: Final = 64
CONCURRENCY: Final = 64
TURNS: Final = 20
MERGED: Final = 32


@dataclass
class Row:
    """What one source gave.

    Attributes:
        samples: That were delivered.
        ahead: The most samples that were made and not delivered at any time.
        mib_first: Memory of the process after a tenth of the samples.
        mib_last: And in the end.
        mib_all: Of all samples together.
    """

    samples: int
    ahead: int
    mib_first: float
    mib_last: float
    mib_all: float

    @property
    def kept(self) -> float:
        """How much memory has grown since the first tenth, as a part of the samples that came since then."""
        return max(0.0, self.mib_last - self.mib_first) / (0.9 * self.mib_all)


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


async def _consume(made: Made, source: Any, batches: int) -> Row:
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
    return Row(samples, ahead, first, _memory(), samples * SAMPLE_BYTES / (1 << 20))


async def from_generator(batches: int) -> Row:
    """One async generator."""
    made = Made()
    return await _consume(made, lambda: _endless(made), batches)


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
        return await _consume(made, channel, batches)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def from_many(batches: int) -> Row:
    """Many generators, merged."""
    made = Made()
    source = Pipeline.merge(*((lambda: _endless(made)) for _ in range(MERGED)))
    return await _consume(made, source, batches)


SOURCES: Final = {
    "an async generator": from_generator,
    "a Channel, eight tasks": from_channel,
    f"{MERGED} async generators, merged": from_many,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    options = parser_for(__doc__).parse_args(arguments)
    batches = pick(options, full=1000, quick=200, smallest=20)
    report = Report("endless", options)
    for name, measure in SOURCES.items():
        if options.only and not any(text in name for text in options.only):
            continue
        row = asyncio.run(measure(batches))
        report.figure(f"{name}, ahead of the consumer", row.ahead, "samples at most", samples=row.samples)
        report.figure(f"{name}, memory after a tenth", row.mib_first, "MiB")
        report.figure(f"{name}, memory in the end", row.mib_last, "MiB", mib_of_all_samples=row.mib_all)
        phrase = "{ours}: {value} of what came since the first tenth is still there; at most {reach}"
        report.judge(Target(name, "memory", "all samples", 0.02), row.kept, phrase)
        report.note("")
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
