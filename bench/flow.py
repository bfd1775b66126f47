"""How far ahead, and what it is good for: `python -m bench.flow`.

- Stragglers: few samples take much longer than the others. Strict order is to cost no time, with nothing said about
  `ahead`. The limit is completion order (async), or the time of all samples over the number of threads.
- HTTP: the same as requests to a server, where the client is what limits.
- Lead: samples that were begun and not handed out, when the consumer is slow, beside what `stats()` says.
- Rollouts: groups generated for each one trained on, by the shape of the loop.
- With `--against PATH`: what is not used costs nothing. PATH is another checkout of this project.
"""

import argparse
import asyncio
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from aioloader import Pipeline
from bench import _rollouts as rollouts
from bench._checkout import CASES, in_checkout
from bench._failing import by_map as by_requests
from bench._failing import by_spdl as spdl_by_requests
from bench._harness import PER_SECOND, Contender, Report, Target, parser_for, pick
from bench._object_server import Faults, ObjectServer
from bench._stragglers import Stragglers, bare_threads, by_dataloader, by_map, by_spdl, by_torch, ideal

IN_FLIGHT: Final = 256
AHEAD: Final = 8192
OBJECT_BYTES: Final = 16 << 10
THREADS: Final = 8
WORKERS: Final = 16  # of torch, each with one request
BATCH: Final = 8
FETCHES: Final = 8
WIDTHS: Final = (2, 8, 64)
MOST_AHEAD: Final = 40
MOST_GENERATED: Final = 1.9

COMPLETION: Final = "aioloader, completion order"
IDEAL: Final = f"all samples, over {THREADS}"


def async_stragglers(report: Report, options: argparse.Namespace) -> None:
    """One request in a hundred takes a second."""
    scale = pick(options, full=1, quick=1, smallest=0.05)
    slow = partial(Stragglers, seconds=0.03 * scale, slow_seconds=scale, share=0.01)
    samples = pick(options, full=20_000, quick=3_000, smallest=512)
    fewer = pick(options, full=4_000, quick=600, smallest=256)
    few = pick(options, full=600, quick=96, smallest=64)
    ours = {"aioloader, async for": True, "aioloader, for": False}
    report.compare(
        f"{IN_FLIGHT} in flight, 30 ms, 1 % of requests 1 s",
        [
            Contender(COMPLETION, partial(by_map, slow(samples), IN_FLIGHT, ordered=False), samples, limit=True),
            *(
                Contender(name, partial(by_map, slow(samples), IN_FLIGHT, is_async=is_async), samples)
                for name, is_async in ours.items()
            ),
            Contender(f"aioloader, ahead={AHEAD}", partial(by_map, slow(samples), IN_FLIGHT, ahead=AHEAD), samples),
            *(
                Contender(
                    f"SPDL, {order} order", partial(by_spdl, slow(n), IN_FLIGHT, ordered=ordered), n, needs=("spdl",)
                )
                for order, n, ordered in (("completion", samples, False), ("input", fewer, True))
            ),
            Contender(f"torch, {WORKERS} workers", partial(by_torch, slow(few), WORKERS, 1), few),
        ],
        [Target(name, "speed", COMPLETION, 0.9) for name in (*ours, f"aioloader, ahead={AHEAD}")],
        unit=PER_SECOND,
        rounds=pick(options, full=3, quick=1, smallest=1),
    )


def http_stragglers(report: Report, options: argparse.Namespace) -> None:
    """The same with a real server and a real client, which takes most of the time that a request costs."""
    scale = pick(options, full=1, quick=1, smallest=0.05)
    samples = pick(options, full=20_000, quick=5_000, smallest=512)
    fewer = pick(options, full=4_000, quick=1_000, smallest=256)
    needs = ("obstore",)
    with ObjectServer(OBJECT_BYTES, 0.03 * scale, Faults(slow=0.01, slow_s=scale)) as server:
        ours = {"aioloader, async for": True, "aioloader, for": False}
        bare = partial(by_requests, server.url, samples, policies=False)
        theirs = partial(spdl_by_requests, server.url, policies=False)
        report.compare(
            f"HTTP, {IN_FLIGHT} in flight, {OBJECT_BYTES >> 10} KiB each, 30 ms, 1 % of requests 1 s",
            [
                Contender(COMPLETION, partial(bare, ordered=False), samples, limit=True, needs=needs),
                *(
                    Contender(name, partial(bare, is_async=is_async), samples, needs=needs)
                    for name, is_async in ours.items()
                ),
                *(
                    Contender(f"SPDL, {order} order", partial(theirs, n, ordered=ordered), n, needs=("spdl", "obstore"))
                    for order, n, ordered in (("completion", samples, False), ("input", fewer, True))
                ),
            ],
            [Target(name, "speed", COMPLETION, 0.9) for name in ours],
            unit=PER_SECOND,
            rounds=pick(options, full=3, quick=1, smallest=1),
        )


def sync_stragglers(report: Report, options: argparse.Namespace) -> None:
    """One call in ten takes 25 times as long."""
    samples = pick(options, full=3_200, quick=600, smallest=80)
    work = Stragglers(samples, 0.002, 0.05, 0.1)
    ours = {
        "aioloader, map, async for": partial(by_map, work, THREADS, sync=True),
        "aioloader, map, for": partial(by_map, work, THREADS, sync=True, is_async=False),
        "aioloader, map, completion order": partial(by_map, work, THREADS, sync=True, ordered=False),
        "aioloader, DataLoader, batches of 1": partial(by_dataloader, work, THREADS, 1),
        "aioloader, DataLoader, batches of 8": partial(by_dataloader, work, THREADS, 8),
    }
    report.compare(
        f"{THREADS} threads, 2 ms, 10 % of calls 50 ms",
        [
            Contender(IDEAL, partial(ideal, work, THREADS), samples, limit=True),
            Contender("bare threads, no order", partial(bare_threads, work, THREADS), samples),
            *(Contender(name, opened, samples) for name, opened in ours.items()),
            *(
                Contender(
                    f"torch, {THREADS} workers, batches of {size}", partial(by_torch, work, THREADS, size), samples
                )
                for size in (1, 8)
            ),
        ],
        [Target(name, "speed", IDEAL, 0.9) for name in ours],
        unit=PER_SECOND,
        rounds=pick(options, full=3, quick=1, smallest=1),
    )


async def lead_of(width: int, batches: int) -> tuple[int, int]:
    """Samples begun and not handed out, at most, and how many `stats()` says that there may be."""
    begun = 0

    async def fetch(key: int) -> int:
        nonlocal begun
        begun += 1
        await asyncio.sleep(0.001)
        return key

    def decode(key: int) -> int:
        return key

    lead = handed_out = 0
    loader = Pipeline(range(1 << 40)).map(fetch, concurrency=FETCHES).map(decode, concurrency=width)
    async with loader.batch(BATCH) as batched:
        async for batch in batched:
            handed_out += len(batch)
            await asyncio.sleep(0.03)  # a slow consumer; a slower one would see no more
            lead = max(lead, begun - handed_out)
            if handed_out == batches * BATCH:
                break
    rooms = {stage.name: stage.room for stage in batched.stats().stages}
    return lead, rooms["map(decode)"] + BATCH * rooms["collate"]  # both maps share the one window


def lead(report: Report, options: argparse.Namespace) -> None:
    """A cheap stage after an expensive one is not to let it run ahead, however wide it is."""
    batches = pick(options, full=60, quick=20, smallest=5)
    found = {width: asyncio.run(lead_of(width, batches)) for width in WIDTHS}
    title = f"map(fetch, {FETCHES}).map(decode, width).batch({BATCH}), a slow consumer"
    report.table(
        title, {f"width {width}": {"begun ahead": lead, "by stats()": said} for width, (lead, said) in found.items()}
    )
    for width, (most, said) in found.items():
        phrase = "{ours}: {value} of what {rival} says are begun and not handed out; at most {reach}"
        report.judge(Target(f"width {width}", "memory", "stats()", 1), most / said, phrase, of=title)
        phrase = "{ours}: {value} samples are begun and not handed out; at most {reach}"
        report.judge(Target(f"width {width}", "memory", "samples", MOST_AHEAD), most, phrase, of=title)
    report.note("")


def generated(report: Report, options: argparse.Namespace) -> None:
    """Groups are generated for nothing when they have no variance, and when they are too old before their turn."""
    steps = pick(options, full=60, quick=10, smallest=4)
    rounds = options.rounds or pick(options, full=3, quick=1, smallest=1)
    sizes = {"group_seconds": 0.008, "step_seconds": pick(options, full=0.03, quick=0.03, smallest=0.01)}
    chosen = {
        name: shape
        for name, shape in rollouts.SHAPES.items()
        if not options.only or any(text in name for text in options.only)
    }
    outcomes: dict[str, list[rollouts.Outcome]] = {name: [] for name in chosen}
    for seed in range(rounds):
        for name, shape in chosen.items():
            outcomes[name].append(rollouts.run(shape, **sizes, steps=steps, seed=seed))
    floor = 1 / (1 - rollouts.WITHOUT_VARIANCE)
    sizes_of = f"batches of {rollouts.BATCH}, staleness {rollouts.STALENESS}"
    title = f"groups begun per group trained on, {sizes_of}, floor {floor:.2f}"
    rows: dict[str, dict[str, float]] = {}
    for name, found in outcomes.items():
        rows[name] = {
            "median": statistics.median(each.per_trained for each in found),
            "low": min(each.per_trained for each in found),
            "high": max(each.per_trained for each in found),
            "oldest": max(each.oldest for each in found),
            "ms per update": 1e3 * statistics.median(each.seconds for each in found),
        }
    report.table(title, rows)
    for name, row in rows.items():
        if "max_staleness" in name or "reserve" in name:
            phrase = "{ours}: {value} begun for each one trained on; at most {reach}"
            report.judge(Target(name, "time", "the floor", MOST_GENERATED), row["median"], phrase, of=title)
        if (most := chosen[name].oldest) is not None:
            phrase = "{ours}: the oldest was {value} updates old; at most {reach}"
            report.judge(Target(name, "time", "staleness", most), row["oldest"], phrase, of=title)
    report.note("")


def unused(report: Report, options: argparse.Namespace, other: Path) -> None:
    """The same in this checkout and in another one, in processes by turns."""
    here = Path(__file__).parents[1]
    for case, what in CASES.items():
        slow = case == "10 ms"
        samples = pick(options, full=32, quick=16, smallest=1) * (256 if slow else 6_400)
        for is_async in (True, False):
            face = "async for" if is_async else "for"
            report.compare(
                f"{what}, {face}",
                [
                    Contender(
                        name, partial(in_checkout, root, case, samples, is_async=is_async), samples, limit=root == other
                    )
                    for name, root in (("the other checkout", other), ("this checkout", here))
                ],
                [Target("this checkout", "speed", "the other checkout", 0.97)],
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = parser_for(__doc__)
    parser.add_argument("--against", type=Path, metavar="PATH", help="another checkout, to see that nothing got slower")
    parts: dict[str, Any] = {
        "async": async_stragglers,
        "http": http_stragglers,
        "sync": sync_stragglers,
        "lead": lead,
        "rollouts": generated,
    }
    parser.add_argument("--part", action="append", choices=[*parts, "against"], help="not all of it")
    options = parser.parse_args(arguments)
    report = Report("flow", options)
    for name, measure in parts.items():
        if not options.part or name in options.part:
            measure(report, options)
    if options.against is not None:
        unused(report, options, options.against)
    elif not options.part:
        report.note("Nothing to compare this checkout with: --against PATH names another one.")
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
