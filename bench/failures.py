"""Behind a network that fails: `python -m bench.failures`.

- Faults: 5 % of requests are answered by 503, 1 % never, 2 % are cut off. The limit is the same pipeline where nothing
  fails; beside it what people write by hand: bare asyncio with stamina, SPDL with stamina, torch with tenacity.
- Unused: what all four policies cost a sample when none of them acts.
- Hedge: how long a consumer waits for batches when 1 % of requests take a second.
- Rate: a server that allows 200 requests a second.
- Skipped: how many of the good samples come when 1 % are broken.
"""

import argparse
import asyncio
import statistics
import sys
import time
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
import torch.utils.data

from aioloader import DataLoader, Hedge, Pipeline, Rate, Retry, Skip
from bench._failing import BATCH, IN_FLIGHT, WORKERS, bare, by_map, by_spdl, by_torch
from bench._harness import PER_SECOND, Contender, Epoch, Report, Target, Tick, parser_for, pick
from bench._object_server import Faults, ObjectServer

LATENCY_S: Final = 0.03
OBJECT_BYTES: Final = 16 << 10
FAULTS: Final = Faults(unavailable=0.05, hang=0.01, truncated=0.02)

CLEAN: Final = ("nothing fails, async for", "nothing fails, for")
OURS: Final = ("aioloader, async for", "aioloader, for")


class RefusedError(Exception):
    """Too many requests."""


# -- faults ------------------------------------------------------------------------------------------------------------


def faults(report: Report, options: argparse.Namespace) -> None:
    """The same requests, with and without faults."""
    samples = pick(options, full=20_000, quick=5_000, smallest=256)
    few = pick(options, full=6_000, quick=3_000, smallest=64)
    skip = pick(options, full=4 * IN_FLIGHT, quick=2 * IN_FLIGHT, smallest=BATCH)
    with ObjectServer(OBJECT_BYTES, LATENCY_S) as clean, ObjectServer(OBJECT_BYTES, LATENCY_S, FAULTS) as broken:
        report.compare(
            f"{IN_FLIGHT} in flight, {LATENCY_S * 1e3:g} ms, 5 % answered by 503, 1 % never, 2 % cut off",
            [
                *(
                    Contender(
                        name,
                        partial(by_map, clean.url, samples, is_async=is_async),
                        samples,
                        skip,
                        limit=name == CLEAN[0],
                        needs=("obstore",),
                    )
                    for name, is_async in zip(CLEAN, (True, False), strict=True)
                ),
                Contender(
                    "nothing fails, no policies, async for",
                    partial(by_map, clean.url, samples, policies=False),
                    samples,
                    skip,
                    needs=("obstore",),
                ),
                *(
                    Contender(
                        name, partial(by_map, broken.url, samples, is_async=is_async), samples, skip, needs=("obstore",)
                    )
                    for name, is_async in zip(OURS, (True, False), strict=True)
                ),
                Contender(
                    "aioloader, for, with a hedge",
                    partial(by_map, broken.url, samples, is_async=False, hedge=Hedge(after="p95", budget=0.05)),
                    samples,
                    skip,
                    needs=("obstore",),
                ),
                Contender(
                    "bare asyncio with stamina",
                    partial(bare, broken.url, samples),
                    samples,
                    skip,
                    needs=("obstore", "stamina"),
                ),
                Contender(
                    "SPDL with stamina",
                    partial(by_spdl, broken.url, samples),
                    samples,
                    skip,
                    needs=("spdl", "obstore", "stamina"),
                ),
                Contender(
                    f"torch, {WORKERS} workers, with tenacity",
                    partial(by_torch, broken.url, few),
                    few,
                    WORKERS * BATCH,
                    needs=("tenacity",),
                ),
            ],
            [
                *(Target(name, "speed", its, 0.8) for name, its in zip(OURS, CLEAN, strict=True)),
                *(Target(OURS[0], "speed", rival, 1) for rival in ("bare asyncio with stamina", "SPDL with stamina")),
                Target(OURS[0], "speed", f"torch, {WORKERS} workers, with tenacity", 1),
            ],
            unit=PER_SECOND,
            rounds=pick(options, full=3, quick=1, smallest=1),
        )


# -- what it costs -----------------------------------------------------------------------------------------------------


def process_seconds(samples: int, waits: bool, policies: dict[str, Any]) -> Epoch:
    """CPU seconds of an epoch of an op that suspends, or does not."""

    async def op(key: int) -> int:
        if waits:
            await asyncio.sleep(0)
        return key

    loader = Pipeline(range(samples)).map(op, concurrency=64, **policies).batch(256)

    async def consume(tick: Tick) -> None:
        async for batch in loader:
            tick(len(batch))

    def epoch(tick: Tick) -> float:
        began = time.process_time()
        asyncio.run(consume(tick))
        return time.process_time() - began

    return epoch


def unused(report: Report, options: argparse.Namespace) -> None:
    """None of the policies ever acts."""
    samples = pick(options, full=256_000, quick=64_000, smallest=1_024)
    every: dict[str, Any] = {
        "retry": Retry(4),
        "timeout": 60.0,
        "hedge": Hedge(after=30.0),
        "rate": Rate(1e9, burst=1_000_000),
    }
    for waits in (False, True):
        what = "an async op that suspends once" if waits else "an async op that does not suspend"
        title = f"{what}: CPU time"
        names = ("without policies", "with all four")
        found = report.compare(
            title,
            [
                Contender(names[0], partial(process_seconds, samples, waits, {}), samples, limit=True, ours=True),
                Contender(names[1], partial(process_seconds, samples, waits, every), samples, ours=True),
            ],
        )
        if set(names) <= set(found.timings):
            rounds = zip(*(found.timings[name] for name in names), strict=True)
            more = statistics.median((b.steady_seconds - a.steady_seconds) * 1e6 for a, b in rounds)
            phrase = "{ours}: {value} µs a sample more; at most {reach}"
            report.judge(Target(names[1], "time", names[0], 0.5), more, phrase, of=title)


# -- second calls ------------------------------------------------------------------------------------------------------


async def waits_of(
    samples: int, hedge: Hedge | None, step_s: float, slow_s: float, share: float = 0.01
) -> tuple[list[float], float]:
    """How long the consumer waited for each batch, and requests per sample."""
    import random

    chance, calls = random.Random(0), 0

    async def fetch(key: int) -> int:
        nonlocal calls
        calls += 1
        await asyncio.sleep(slow_s if chance.random() < share else LATENCY_S)
        return key

    found: list[float] = []
    loader = Pipeline(range(samples)).map(fetch, concurrency=IN_FLIGHT, hedge=hedge).batch(BATCH)
    async with loader:
        batches = aiter(loader)
        while True:
            began = time.perf_counter()
            if await anext(batches, None) is None:
                return found[len(found) // 10 :], calls / samples  # the first ones find out what is usual
            found.append(time.perf_counter() - began)
            await asyncio.sleep(step_s)


def hedged(report: Report, options: argparse.Namespace) -> None:
    """The slowest of a batch decides when it comes.

    A consumer that takes no time waits for each round of requests, and then for none of its batches, so its p50 is
    next to nothing even where nothing is slow: that row says so. Targets are those of a consumer that trains.
    """
    samples = pick(options, full=2_000, quick=400, smallest=12) * BATCH
    slow_s = pick(options, full=1.0, quick=1.0, smallest=0.1)
    for step_s, consumer in ((0.0, "that takes no time"), (0.02, "that takes 20 ms a batch")):
        rows: dict[str, dict[str, float]] = {}
        second = Hedge(after="p95", budget=0.05)
        for name, hedge, share in (
            ("nothing slow", None, 0.0),
            ("without", None, 0.01),
            ("with a hedge", second, 0.01),
        ):
            waits, requests = asyncio.run(waits_of(samples, hedge, step_s, slow_s, share))
            cuts = statistics.quantiles(waits, n=100)
            rows[name] = {
                "p50 ms": cuts[49] * 1e3,
                "p95 ms": cuts[94] * 1e3,
                "p99 ms": cuts[98] * 1e3,
                "requests per sample": requests,
            }
        title = f"1 % of requests take 1 s, {IN_FLIGHT} in flight, batches of {BATCH}, a consumer {consumer}"
        report.table(title, rows)
        row = rows["with a hedge"]
        phrase = "{ours}: p99 of the wait is {value} of p50; at most {reach}"
        report.judge(
            Target("with a hedge", "time", "p50", 3), row["p99 ms"] / max(row["p50 ms"], 1.0), phrase, of=title
        )
        phrase = "{ours}: {value} requests for a sample; at most {reach}"
        report.judge(Target("with a hedge", "memory", "requests", 1.05), row["requests per sample"], phrase, of=title)
    report.note("p50 counts as 1 ms at least: a consumer that never waits has none to compare with.\n")


# -- a rate ------------------------------------------------------------------------------------------------------------


async def adaptive(url: str, server: ObjectServer, seconds: float) -> tuple[list[float], dict[str, int]]:
    """When samples came, in seconds from the start, and the answers of the server."""
    import aiohttp

    rate = Rate.adaptive(on=RefusedError, start=10)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def fetch(key: int) -> int:
            async with session.get(f"{url}/{key}") as answer:
                await answer.read()
                if answer.status == 429:
                    raise RefusedError
            return key

        came: list[float] = []
        began = time.perf_counter()
        loader = Pipeline(range(1 << 40)).map(fetch, concurrency=64, rate=rate, retry=Retry(20, RefusedError))
        async with loader:
            async for _ in loader:
                came.append(time.perf_counter() - began)
                if came[-1] > seconds:
                    break
    return came, server.answers()


def throttled(report: Report, options: argparse.Namespace) -> None:
    """A server that says 429 beyond what it allows."""
    seconds = pick(options, full=30.0, quick=8.0, smallest=0.5)
    allowed = 200.0
    with ObjectServer(1024, 0.02, Faults(per_second=allowed)) as server:
        came, answers = asyncio.run(adaptive(server.url, server, seconds))
    refused = answers.get("throttled", 0) / max(1, sum(answers.values()))
    start = min(5.0, seconds / 2)
    later = sum(at > start for at in came) / (came[-1] - start) if came else 0.0
    title = f"a server that allows {allowed:g} requests a second, Rate.adaptive from 10 on, {seconds:g} s"
    row = {"of the allowed rate": len(came) / came[-1] / allowed if came else 0.0, "refused": refused}
    report.table(title, {"all of it": row})
    phrase = "{ours}: {value} of the allowed rate; at least {reach}"
    report.judge(Target("all of it", "speed", "allowed", 0.9), row["of the allowed rate"], phrase, of=title)
    report.judge(Target(f"after {start:g} s", "speed", "allowed", 0.9), later / allowed, phrase, of=title)
    phrase = "{ours}: {value} of the requests are refused; at most {reach}"
    report.judge(Target("all of it", "time", "requests", 0.01), refused, phrase, of=title)
    report.note("")


# -- samples that are left out -----------------------------------------------------------------------------------------


def is_broken(index: int) -> bool:
    """One in a hundred, by chance."""
    return zlib.crc32(index.to_bytes(4, "little")) % 100 == 0


def decoded(index: int) -> int:
    if is_broken(index):
        raise ValueError("broken")
    return index


class Images(torch.utils.data.Dataset[int]):
    """Some are broken."""

    def __init__(self, samples: int) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> int:
        return decoded(index)


async def image(key: int) -> int:
    await asyncio.sleep(0)
    return decoded(key)


def came_of(batches: Any) -> tuple[int, list[Any]]:
    """How many samples come, and the batches; one that fails is gone."""
    found: list[Any] = []
    iterator = iter(batches)
    while True:
        try:
            found.append(next(iterator).tolist())
        except StopIteration:
            return sum(map(len, found)), found
        except ValueError:
            pass


def skipped(report: Report, options: argparse.Namespace) -> None:
    """What comes of the good ones."""
    samples = pick(options, full=10_000, quick=10_000, smallest=1_000)
    good = sum(not is_broken(index) for index in range(samples))
    skip = Skip(max_errors=None, max_share=None)
    ours = {
        f"aioloader, concurrency {width}": came_of(
            Pipeline(range(samples))
            .map(image, concurrency=width)
            .skip_errors(max_errors=None, max_share=None)
            .batch(256)
        )
        for width in (1, 16, 256)
    }
    rows = {name: {"of the good samples": came / good} for name, (came, _) in ours.items()}
    loader: Any = DataLoader(Images(samples), 256, num_workers=4, skip_errors=skip)
    rows["aioloader, DataLoader"] = {"of the good samples": came_of(loader)[0] / good}
    theirs = torch.utils.data.DataLoader(Images(samples), 256)
    rows["torch, a loop that goes on"] = {"of the good samples": came_of(theirs)[0] / good}
    title = f"1 % of {samples:,} samples are broken, batches of 256, skip_errors"
    report.table(title, rows)
    phrase = "{ours}: {value} of the good samples come; at least {reach}"
    for name, row in rows.items():
        if "aioloader" in name:
            report.judge(Target(name, "speed", "good", 1), row["of the good samples"], phrase, of=title)
    same = len({str(batches) for _, batches in ours.values()})
    report.judge(
        Target("aioloader", "time", "concurrency", 1),
        same,
        "{ours}: {value} kinds of batches; at most {reach}",
        of=title,
    )
    report.note("")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = parser_for(__doc__)
    parts: dict[str, Any] = {
        "faults": faults,
        "unused": unused,
        "hedge": hedged,
        "rate": throttled,
        "skipped": skipped,
    }
    parser.add_argument("--part", action="append", choices=[*parts], help="not all of it")
    options = parser.parse_args(arguments)
    report = Report(Path(__file__).stem, options)
    for name, measure in parts.items():
        if not options.part or name in options.part:
            measure(report, options)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
