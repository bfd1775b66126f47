"""Whether `autotune` finds what a search by hand would find: `python -m bench.autotune`.

Five pipelines that are written without a number, a grid of 6 x 6 numbers for each, and `autotune` once, in a greedy
loop. The best of 36 noisy figures is too good, and so the best three points are measured again, the best of these once
more, by turns with the pipeline as it was written and with what `autotune` says to write. What is judged is the median
of the ratios within each of these last rounds. Where `autotune` says to keep what is written, that is one contender.
"""

import argparse
import asyncio
import hashlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Final

from aioloader import Pipeline, Retry
from bench._harness import Report, Target, parser_for, pick
from bench._object_server import Faults, ObjectServer

BATCH: Final = 16
REACH: Final = 0.9
NEVER_WORSE: Final = 0.95
AGAIN: Final = 3  # points of the grid that are measured again
ENDLESS: Final = 1 << 40
ALLOWED: Final = 800.0  # requests a second, of the server that throttles

Numbers = dict[str, int]


@dataclass(frozen=True)
class Scenario:
    """A pipeline that takes numbers.

    Attributes:
        name: In the tables.
        make: Makes it; without a number, as it is written without tuning.
        grid: The values of two numbers.
    """

    name: str
    make: Callable[..., Pipeline]
    grid: dict[str, Sequence[int]]

    @property
    def points(self) -> list[Numbers]:
        """All of the grid."""
        return [dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())]


# -- the pipelines -----------------------------------------------------------------------------------------------------


def fetch_from(url: str) -> Callable[[int], Awaitable[bytes]]:
    from obstore.store import HTTPStore

    options: Any = {"client_options": {"allow_http": True}, "retry_config": {"max_retries": 0}}
    store = HTTPStore(url, **options)

    async def fetch(key: int) -> bytes:
        return bytes(await (await store.get_async(str(key))).bytes_async())

    return fetch


def widths(name: str, numbers: Numbers) -> dict[str, Any]:
    """The arguments of a map, of those in `numbers`; `ahead_per_ten` is `ahead` in tenths of `concurrency`."""
    found: dict[str, Any] = {}
    if (width := numbers.get(name)) is not None:
        found["concurrency"] = width
        if (tenths := numbers.get("ahead_per_ten")) is not None:
            found["ahead"] = width * tenths // 10
    if (ahead := numbers.get("ahead")) is not None:
        found["ahead"] = ahead
    return found


def batched(pipeline: Any, numbers: Numbers) -> Any:
    made = pipeline.batch(BATCH, collate_fn=len)
    return made.prefetch(numbers["prefetch"]) if "prefetch" in numbers else made


def latency(url: str, **numbers: int) -> Any:
    return batched(Pipeline(range(ENDLESS)).map(fetch_from(url), **widths("fetch", numbers)), numbers)


def throttled(url: str, **numbers: int) -> Any:
    from obstore.exceptions import GenericError

    retry = Retry(50, on=(GenericError,), wait_initial=0.02, wait_max=0.2, jitter=0.02)
    return batched(Pipeline(range(ENDLESS)).map(fetch_from(url), retry=retry, **widths("fetch", numbers)), numbers)


BLOCK: Final = os.urandom(64 << 10)


def compute(key: int) -> bytes:
    """About 0.4 ms, most of it without the GIL."""
    return hashlib.sha256(BLOCK + BLOCK + BLOCK + BLOCK + key.to_bytes(8, "big")).digest()


def cpu(**numbers: int) -> Any:
    return batched(Pipeline(range(ENDLESS)).map(compute, **widths("compute", numbers)), numbers)


def decode(body: bytes) -> int:
    """Waits for 5 ms, as for a slow disk, and computes for a little."""
    time.sleep(0.005)
    return len(hashlib.sha256(body).digest())


def mixed(url: str, **numbers: int) -> Any:
    fetched: Any = Pipeline(range(ENDLESS)).map(fetch_from(url), **widths("fetch", numbers))
    return batched(fetched.map(decode, **widths("decode", numbers)), numbers)


def files(paths: list[Path], **numbers: int) -> Any:
    def read(path: Path) -> bytes:
        return path.read_bytes()

    return batched(Pipeline(paths).repeat().map(read, **widths("read", numbers)), numbers)


def scenarios(stack: ExitStack) -> list[Scenario]:
    """The five, with their servers and files."""
    near = stack.enter_context(ObjectServer(4096, 0.03)).url
    throttles = stack.enter_context(ObjectServer(4096, 0.01, Faults(per_second=ALLOWED))).url
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    paths = [folder / f"{number:04d}" for number in range(512)]
    for path in paths:
        path.write_bytes(BLOCK)
    calls = (1, 2, 3, 4, 8, 16)
    ahead = (10, 12, 15, 20, 40, 80)
    return [
        Scenario("latency", partial(latency, near), {"fetch": (16, 32, 64, 128, 256, 512), "ahead_per_ten": ahead}),
        Scenario("CPU", cpu, {"compute": calls, "prefetch": calls}),
        Scenario("mixed", partial(mixed, near), {"fetch": (8, 16, 32, 64, 128, 256), "decode": (1, 2, 4, 8, 16, 32)}),
        Scenario("files", partial(files, paths), {"read": calls, "prefetch": calls}),
        Scenario(
            "a server that throttles",
            partial(throttled, throttles),
            {"fetch": (2, 4, 8, 16, 32, 64), "ahead_per_ten": ahead},
        ),
    ]


# -- how they are measured ---------------------------------------------------------------------------------------------


async def rate_of(loader: Any, seconds: float) -> float:
    """Samples per second, after the first third of the time."""
    began = time.perf_counter()
    first: tuple[float, int] | None = None
    batches = 0
    async with loader:
        async for _ in loader:
            now, batches = time.perf_counter(), batches + 1
            if first is None and now - began > seconds / 3:
                first = now, batches
            if now - began > seconds and first is not None and batches > first[1]:
                break
    assert first is not None
    return BATCH * (batches - first[1]) / (now - first[0])


async def tuned(scenario: Scenario, seconds: float) -> tuple[Numbers, str]:
    """What `autotune` says to write, as numbers of the scenario, and its text."""
    loader = scenario.make()
    tuning = loader.autotune(seconds=seconds, tell=None)
    async with loader:
        async for _ in loader:
            if tuning.finished:
                break
    numbers: Numbers = {}
    for one in tuning.settings:
        stage = one.stage.removeprefix("map(").removesuffix(")")
        numbers[stage if one.argument == "concurrency" else one.argument] = one.after
    return numbers, str(tuning)


def measure(scenario: Scenario, report: Report, options: argparse.Namespace) -> None:
    """One table, and what is to hold."""
    each = pick(options, full=1.0, quick=0.3, smallest=0.02)
    rounds = pick(options, full=6, quick=2, smallest=1)
    points = pick(options, full=scenario.points, quick=scenario.points[::5], smallest=scenario.points[::18])
    numbers, text = asyncio.run(tuned(scenario, pick(options, full=20.0, quick=4.0, smallest=0.2)))
    rates = [asyncio.run(rate_of(scenario.make(**point), each)) for point in points]
    few = [point for _, point in sorted(zip(rates, points, strict=True), key=lambda pair: -pair[0])[:AGAIN]]
    again = by_turns(scenario, few, 2, 1.5 * each)
    best = max(zip(again, few, strict=True), key=lambda pair: sum(pair[0]))[1]
    contenders = {named("best of the grid:", best): best, "as written": {}} | ({"autotune": numbers} if numbers else {})
    found = dict(zip(contenders, by_turns(scenario, [*contenders.values()], rounds, 1.5 * each), strict=True))
    top, written = (found[name] for name in [*contenders][:2])
    ours = found.get("autotune", written)
    rows = {name: {"samples/s": statistics.median(one), "of the best": ratio(one, top)} for name, one in found.items()}
    low = {"samples/s": min(rates), "of the best": min(rates) / statistics.median(top)}
    report.table(
        f"{scenario.name}: samples per second; autotune wrote {named('', numbers) or 'nothing'}",
        rows | {"worst of the grid": low},
    )
    report.note(text)
    for rival, rates_of_rival, reach in (("the best of the grid", top, REACH), ("as written", written, NEVER_WORSE)):
        report.judge(Target("autotune", "speed", rival, reach), ratio(ours, rates_of_rival), of=scenario.name)


def by_turns(scenario: Scenario, points: Sequence[Numbers], rounds: int, seconds: float) -> list[list[float]]:
    """The rates at each of `points`, one for each round."""
    found: list[list[float]] = [[] for _ in points]
    for turn in range(rounds):
        for at in range(len(points)):
            number = (at + turn) % len(points)
            found[number].append(asyncio.run(rate_of(scenario.make(**points[number]), seconds)))
    return found


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def named(kind: str, numbers: Numbers) -> str:
    """Numbers in words."""
    return " ".join([kind, *(f"{name}={value}" for name, value in numbers.items())]).strip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    options = parser_for(__doc__).parse_args(arguments)
    report = Report("autotune", options)
    with ExitStack() as stack:
        for scenario in scenarios(stack):
            if not options.only or any(text in scenario.name for text in options.only):
                measure(scenario, report, options)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
