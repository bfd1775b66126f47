"""What every script of this folder is made of: contenders, targets, and a report.

A script asks one question:

    def main(arguments: Sequence[str] | None = None) -> int:
        parser = parser_for(__doc__)
        options = parser.parse_args(arguments)
        samples = pick(options, full=256_000, quick=100_000, smallest=512)
        report = Report("overhead", options)
        report.compare(
            "an async op that does not suspend",
            [Contender("bare loop", partial(bare_loop, samples), limit=True), ...],
            [Target("aioloader, for", "speed", "SPDL, async", 60), Target("aioloader, for", "time", "bare loop", 3)],
        )
        return report.finish()

`Contender.open` gives an epoch: a function that is called with `tick` and calls `tick(n)` at each batch that came, of
`n` samples; `by_for(loader)` and `by_async_for(loader)` make one of any loader. Contenders run by turns (A B C, B C A,
...), one round beforehand is not counted; ratios are those of the same round, and their median is what a target is
judged by. `apart=True` gives each contender a process of its own, `memory=True` also measures its process tree.

Printed are tables, verdicts (which never fail the process), and one line of JSON per figure and per target.
"""

import argparse
import asyncio
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import psutil
import torch

from aioloader.doctor import collect
from bench._measure import Contender, Epoch, Tick, Timing, race

__all__ = [
    "MB_PER_SECOND",
    "MS_PER_BATCH",
    "PER_SECOND",
    "US_PER_SAMPLE",
    "Comparison",
    "Contender",
    "Epoch",
    "Measure",
    "Report",
    "Target",
    "Tick",
    "Timing",
    "Unit",
    "by_async_for",
    "by_for",
    "machine",
    "parser_for",
    "pick",
    "size_of",
    "whole",
]

T = TypeVar("T")

# -- the command line --------------------------------------------------------------------------------------------------


def parser_for(doc: str | None) -> argparse.ArgumentParser:
    """The options that every script has."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a few seconds, with figures that vary much")
    size.add_argument("--smallest", action="store_true", help="only to see that it runs: the figures mean nothing")
    parser.add_argument("--rounds", type=int, help="how often each contender runs; without it the size decides")
    parser.add_argument(
        "--only", action="append", default=[], metavar="TEXT", help="contenders with TEXT in their name"
    )
    parser.add_argument("--plot", type=Path, metavar="DIR", help="also draw DIR/<script>.png")
    return parser


def pick(options: argparse.Namespace, *, full: T, quick: T, smallest: T) -> T:
    """The value for the size that was asked for."""
    return smallest if options.smallest else quick if options.quick else full


def _rounds(options: argparse.Namespace) -> int:
    return max(1, options.rounds or pick(options, full=5, quick=2, smallest=1))


# -- epochs of loaders -------------------------------------------------------------------------------------------------


def size_of(batch: Any) -> int:
    """Samples in a batch: the length of the first tensor, array or list of values in it."""
    while isinstance(batch, tuple | list | dict) and len(batch):
        inner = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
        if not hasattr(inner, "__len__") or isinstance(inner, str | bytes):
            break
        batch = inner
    return len(batch)


def by_for(loader: Any, count: Callable[[Any], int] = size_of) -> Epoch:
    """An epoch of any loader by `for`.

    Args:
        loader: Iterated anew each epoch; or a function of no arguments that makes one each epoch.
        count: Samples in a batch.
    """

    def epoch(tick: Tick) -> None:
        for batch in loader() if _makes(loader) else loader:
            tick(count(batch))

    return epoch


def by_async_for(loader: Any, count: Callable[[Any], int] = size_of) -> Epoch:
    """The same by `async for`, in an event loop of asyncio's own that is made each epoch."""

    async def consume(tick: Tick) -> None:
        async for batch in loader() if _makes(loader) else loader:
            tick(count(batch))

    return lambda tick: asyncio.run(consume(tick))


def whole(epoch: Epoch) -> Epoch:
    """The same, timed from beginning to end: with the first batch, and what workers take to begin and to end."""

    def timed(tick: Tick) -> float:
        began = time.perf_counter()
        epoch(tick)
        return time.perf_counter() - began

    return timed


def _makes(loader: Any) -> bool:
    return callable(loader) and not hasattr(type(loader), "__iter__")


# -- what is compared --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """How seconds per sample are shown.

    Attributes:
        name: For instance `"µs per sample"`.
        of: From seconds per sample.
        more_is_better: Rates, not costs.
    """

    name: str
    of: Callable[[float], float]
    more_is_better: bool = False


US_PER_SAMPLE: Final = Unit("µs per sample", lambda seconds: seconds * 1e6)
PER_SECOND: Final = Unit("samples/s", lambda seconds: 1 / seconds, more_is_better=True)


def MB_PER_SECOND(sample_bytes: int) -> Unit:  # noqa: N802 - a unit, like the others
    """Of samples of one size."""
    return Unit("MB/s", lambda seconds: sample_bytes / seconds / 1e6, more_is_better=True)


def MS_PER_BATCH(batch_size: int) -> Unit:  # noqa: N802
    """Of batches of one size."""
    return Unit("ms per batch", lambda seconds: seconds * batch_size * 1e3)


Measure = Literal["speed", "time", "first", "memory"]

_PHRASES: Final[dict[str, str]] = {
    "speed": "{ours} runs at {value} times the speed of {rival}; at least {reach}",
    "time": "{ours} takes {value} of the time of {rival}; at most {reach}",
    "first": "{ours} gives its first batch in {value} of the time of {rival}; at most {reach}",
    "memory": "{ours} takes {value} of the memory of {rival}; at most {reach}",
}


@dataclass(frozen=True)
class Target:
    """What is to be reached.

    Attributes:
        ours: A contender.
        measure: `"speed"`: steady, ours by theirs, at least `reach`. `"time"`: the same turned round, at most `reach`.
            `"first"`: time to first batch, ours by theirs, at most. `"memory"`: likewise.
        rival: Another contender.
        reach: The ratio.
    """

    ours: str
    measure: Measure
    rival: str
    reach: float

    def holds(self, value: float) -> bool:
        """Whether `value` reaches it."""
        return value >= self.reach if self.measure == "speed" else value <= self.reach


@dataclass
class Comparison:
    """What one race gave.

    Attributes:
        title: What was compared.
        timings: By contender, one per round.
        memory: Peak bytes by contender, where it was measured.
        limit: The bare loop.
        ours: What is not a rival.
    """

    title: str
    unit: Unit
    timings: dict[str, list[Timing]]
    memory: dict[str, int]
    limit: str | None = None
    ours: frozenset[str] = frozenset()

    def ratio(self, measure: Measure, ours: str, rival: str) -> float:
        """See `Target`: the median of the ratios within a round."""
        if measure == "memory":
            return self.memory[ours] / self.memory[rival]
        seconds = {name: self._seconds(name, measure) for name in (ours, rival)}
        if measure == "speed":
            ours, rival = rival, ours
        return statistics.median(a / b for a, b in zip(seconds[ours], seconds[rival], strict=True))

    def _seconds(self, name: str, measure: Measure) -> list[float]:
        of = "first_seconds" if measure == "first" else "steady_seconds"
        return [max(1e-9, getattr(timing, of)) for timing in self.timings[name]]

    def row(self, name: str) -> dict[str, Any]:
        """The figures of one contender."""
        steady = self._seconds(name, "speed")
        shown = sorted(self.unit.of(seconds) for seconds in steady)
        timings = self.timings[name]
        row: dict[str, Any] = {
            "median": statistics.median(shown),
            "low": shown[0],
            "high": shown[-1],
            "unit": self.unit.name,
            "us_per_sample": statistics.median(steady) * 1e6,
            "first_ms": statistics.median(timing.first_seconds for timing in timings) * 1e3,
            "samples": timings[0].samples,
            "rounds": len(timings),
        }
        if self.limit is not None:
            row["of_limit"] = self.ratio("speed", name, self.limit)
        if name in self.memory:
            row["memory_mib"] = self.memory[name] / (1 << 20)
        return row


@dataclass
class Report:
    """Collects and prints what one script found.

    Args:
        bench: The script's name.
        options: What `parser_for` parsed.
    """

    bench: str
    options: argparse.Namespace
    comparisons: list[Comparison] = field(default_factory=list)
    _lines: list[dict[str, Any]] = field(default_factory=list)
    _facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._facts = machine()
        print(", ".join(f"{name} {value}" for name, value in self._facts.items() if value is not None), flush=True)

    def compare(
        self,
        title: str,
        contenders: Sequence[Contender],
        targets: Sequence[Target] = (),
        *,
        unit: Unit = US_PER_SAMPLE,
        rounds: int | None = None,
        apart: bool = False,
        memory: bool = False,
    ) -> Comparison:
        """Measure `contenders` by turns, print the table, and judge the targets of those that took part.

        Args:
            title: What is compared, with sizes.
            contenders: The first one is the limit, as a rule.
            targets: What is to be reached.
            unit: How the table shows it.
            rounds: Instead of those of the command line, where an epoch is long.
            apart: Each contender in a process of its own.
            memory: And the memory of its process tree, over one more epoch. Implies `apart`.
        """
        only = self.options.only
        chosen = []
        for contender in contenders:
            missing = [module for module in contender.needs if importlib.util.find_spec(module) is None]
            if missing:
                print(f"left out: {contender.name}, for want of {', '.join(missing)}")
            elif not only or any(text in contender.name for text in only):
                chosen.append(contender)
        smallest = self.options.smallest
        timings, peaks = race(
            chosen,
            min(rounds, _rounds(self.options)) if rounds else _rounds(self.options),
            warm_up=0 if smallest else 1,
            apart=(apart or memory) and not smallest,
            memory=memory and not smallest,
        )
        limit = next((contender.name for contender in chosen if contender.limit), None)
        ours = {name for name in timings if "aioloader" in name} | {target.ours for target in targets}
        ours |= {contender.name for contender in chosen if contender.ours}
        comparison = Comparison(title, unit, timings, peaks, limit, frozenset(ours))
        self.comparisons.append(comparison)
        self._print(comparison)
        for target in targets:
            if target.measure == "memory" and not peaks:
                continue
            if target.ours in timings and target.rival in timings:
                value = comparison.ratio(target.measure, target.ours, target.rival)
                self.judge(target, value, of=title)
        print(flush=True)
        return comparison

    def _print(self, comparison: Comparison) -> None:
        rows = {name: comparison.row(name) for name in comparison.timings}
        for name, row in rows.items():
            self._lines.append({"what": name, "of": comparison.title, **row})
        rounds = max((row["rounds"] for row in rows.values()), default=0)
        print(f"\n{comparison.title}: median of {rounds} rounds\n")
        width = max([len(comparison.unit.name), *map(len, rows)]) + 2
        header = f"{comparison.unit.name:<{width}}{'median':>10}{'low':>10}{'high':>10}{'first ms':>11}"
        header += f"{'of limit':>10}" if comparison.limit else ""
        print(header + (f"{'MiB':>8}" if comparison.memory else ""))
        for name, row in rows.items():
            line = f"{name:<{width}}" + "".join(f"{_short(row[column]):>10}" for column in ("median", "low", "high"))
            line += f"{_short(row['first_ms']):>11}"
            line += f"{_short(row['of_limit']):>10}" if comparison.limit else ""
            print(line + (f"{row['memory_mib']:>8.0f}" if "memory_mib" in row else ""))

    def figure(self, what: str, value: float, unit: str, **more: Any) -> None:
        """A figure that no comparison gave."""
        print(f"{what}: {_short(value)} {unit}")
        self._lines.append({"what": what, "median": value, "unit": unit, **more})

    def table(self, title: str, rows: dict[str, dict[str, float]]) -> None:
        """Figures of several contenders that no comparison gave.

        Args:
            title: What they are about.
            rows: By contender; all have the same columns.
        """
        columns = list(next(iter(rows.values()), {}))
        width = max([0, *map(len, rows)]) + 2
        print(f"\n{title}\n\n{'':<{width}}" + "".join(f"{column:>{len(column) + 3}}" for column in columns))
        for name, row in rows.items():
            print(f"{name:<{width}}" + "".join(f"{_short(row[column]):>{len(column) + 3}}" for column in columns))
            self._lines.append({"what": name, "of": title, **row})

    def judge(self, target: Target, value: float, phrase: str | None = None, *, of: str = "") -> bool:
        """Say whether `value` reaches `target`.

        Args:
            target: Of `ours` and `rival` only the names matter.
            value: What was measured.
            phrase: Instead of the usual one, with the fields of `Target` and `{value}`.
            of: The comparison's title, where a script has several.
        """
        reached = target.holds(value)
        words = {**asdict(target), "reach": f"{target.reach:g}", "value": _short(value)}
        sentence = (phrase or _PHRASES[target.measure]).format(**words)
        print(f"\n{sentence}: {'reached' if reached else 'missed'}", end="")
        self._lines.append(
            {"what": "target", "of": of, **asdict(target), "value": value, "reached": reached, "sentence": sentence}
        )
        return reached

    def note(self, text: str) -> None:
        """A line among the tables."""
        print(text)

    def finish(self) -> int:
        """Print the lines of JSON, draw the plot; returns the script's exit status, 0."""
        print()
        for line in self._lines:
            rounded = {key: round(value, 6) if isinstance(value, float) else value for key, value in line.items()}
            print(json.dumps({"bench": self.bench, **rounded, **self._facts}, ensure_ascii=False))
        if self.options.plot is not None and self.comparisons:
            from bench._plot import draw

            print(f"drawn: {draw(self.bench, self.comparisons, self.options.plot)}")
        return 0


def _short(value: float) -> str:
    """Three or four digits that mean something."""
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if size >= 10 else f"{value:.2f}" if size >= 0.1 else f"{value:.4f}"


def machine() -> dict[str, Any]:
    """What the figures are taken on."""
    facts = collect()
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cores": facts.usable_cores,
        "cpu": _cpu(),
        "memory_gib": round(psutil.virtual_memory().total / (1 << 30)),
        "system": facts.system,
        "loop_of_for": facts.event_loop,
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
