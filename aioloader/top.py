"""`python -m aioloader top URL`: a live view of loaders in a terminal, from the metrics that Prometheus would read."""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from time import monotonic, sleep
from typing import Final
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from aioloader.insight.units import amount, duration
from aioloader.masking import masked

__all__ = ["LoaderView", "StageView", "address", "parse", "run", "view"]

NARROW: Final = 120  # columns; with fewer, some are left out, for the names of stages
SHORTEST: Final = 12  # characters of a name that is cut
TIMEOUT_SECONDS: Final = 5.0
BUSY: Final = 0.7

Values = dict[str, float]
"""By the names of metrics, without their prefix; quantiles as `batch_wait_seconds/0.99`."""


@dataclass
class StageView:
    """One stage, as it was scraped."""

    name: str
    values: Values = field(default_factory=dict)


@dataclass
class LoaderView:
    """One loader, as it was scraped."""

    name: str
    values: Values = field(default_factory=dict)
    stages: dict[int, StageView] = field(default_factory=dict)


def run(url: str, *, interval: float, once: bool, console: Console | None = None) -> int:
    """Show what is at `url` until Ctrl-C, and return the exit code.

    Args:
        url: See `address`.
        interval: Seconds between two looks.
        once: Two looks, and no more.
        console: Where to; None: standard output.
    """
    console = Console() if console is None else console
    try:
        where = address(url)
        before, at = _scrape(where), monotonic()
    except (OSError, ValueError) as error:
        print(f"aioloader: nothing can be read at {masked(url)}: {_reason(error)}", file=sys.stderr)
        return 1
    if once or not console.is_terminal:
        while True:
            sleep(interval)
            now, later = _scrape(where), monotonic()
            console.print(view(before, now, later - at, console.width))
            if once:
                return 0
            before, at = now, later
    said: RenderableType = view({}, before, 0.0, console.width)
    with Live(said, console=console, screen=True, auto_refresh=False) as live:
        lost = 0.0
        while True:
            sleep(interval)
            try:
                now, later = _scrape(where), monotonic()
            except (OSError, ValueError) as error:
                lost += interval
                note = Text(f"no answer for {duration(lost)}: {_reason(error)}", style="bold red")
                live.update(Group(note, said), refresh=True)
                continue
            said, lost = view(before, now, later - at, console.width), 0.0
            before, at = now, later
            live.update(said, refresh=True)


def address(url: str) -> str:
    """The address of metrics that `url` means: `9108`, `localhost:9108` and `http://host:9108/metrics` all do."""
    if url.isdecimal():
        url = f"localhost:{url}"
    if "://" not in url:
        url = f"http://{url}"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"top reads metrics over http or https, got {masked(url)!r}")
    return url if parts.path.strip("/") else f"{url.rstrip('/')}/metrics"


def parse(text: str) -> dict[str, LoaderView]:
    """The loaders in an exposition.

    Raises:
        ValueError: There are none, or it is no exposition.
    """
    loaders: dict[str, LoaderView] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.labels.get("loader")
            if name is None or not sample.name.startswith("aioloader_"):
                continue
            loader = loaders.setdefault(name, LoaderView(name))
            key, values = sample.name.removeprefix("aioloader_"), loader.values
            if "position" in sample.labels:
                key, position = key.removeprefix("stage_"), int(sample.labels["position"])
                values = loader.stages.setdefault(position, StageView(sample.labels["stage"])).values
            if quantile := sample.labels.get("quantile"):
                key = f"{key}/{quantile}"
            values[key] = sample.value
    if not loaders:
        raise ValueError("there are no metrics of aioloader; register a PrometheusCollector in that process")
    return loaders


def _scrape(url: str) -> dict[str, LoaderView]:
    with urlopen(url, timeout=TIMEOUT_SECONDS) as answer:
        return parse(answer.read().decode("utf-8", "replace"))


def _reason(error: BaseException) -> str:
    return masked(str(error.reason if isinstance(error, URLError) else error))


# -- what is shown -----------------------------------------------------------------------------------------------------


def view(before: Mapping[str, LoaderView], now: Mapping[str, LoaderView], seconds: float, width: int) -> RenderableType:
    """All loaders.

    Args:
        before: What was scraped before; empty: there are no rates yet.
        now: What was scraped now.
        seconds: In between.
        width: Columns that there are.
    """
    parts = [_loader(before.get(loader.name), loader, seconds, width) for loader in now.values()]
    return Group(*chain.from_iterable(parts))


def _loader(before: LoaderView | None, now: LoaderView, seconds: float, width: int) -> Iterator[RenderableType]:
    values = _Difference({} if before is None else before.values, now.values, seconds)
    waits = values.share("batch_wait_seconds_sum", "active_seconds_total")
    line = Text(f"  epoch {now.values.get('epoch', 0):.0f}")
    line.append(f"  {values.per_second('batches_total')} batches/s")
    if waits is not None:
        colour = "red" if waits > 0.5 else "yellow" if waits > 0.05 else "green"
        line.append("  waits ").append(f"{waits:.0%}", style=colour)
    half, most = (duration(now.values.get(f"batch_wait_seconds/{quantile}", 0)) for quantile in ("0.5", "0.99"))
    line.append(f"  per batch: p50 {half}, p99 {most}", style="dim")
    if now.values.get("paused"):
        line.append("  paused", style="bold yellow")
    if (waiting := now.values.get("waiting_seconds", 0)) >= 1:
        line.append(f"  no batch for {duration(waiting)}", style="bold red")
    name = Text(now.name, style="bold")
    name.truncate(max(SHORTEST, width - line.cell_len), overflow="ellipsis")
    yield Text.assemble(name, line)
    yield _table(before, now, seconds, wide=width >= NARROW)
    yield Text("")


def _table(before: LoaderView | None, now: LoaderView, seconds: float, *, wide: bool) -> Table:
    table = Table(box=None, padding=(0, 2 if wide else 1, 0, 0), header_style="dim", expand=True)
    table.add_column("stage", ratio=1, overflow="ellipsis", no_wrap=True)
    for name, least in (("at work", 7), ("ready", 9), ("samples/s", 9)):
        table.add_column(name, justify="right", no_wrap=True, min_width=least)
    table.add_column("busy", no_wrap=True, min_width=16 if wide else 4, justify="left" if wide else "right")
    table.add_column("each", justify="right", no_wrap=True, min_width=6)
    if wide:
        table.add_column("oldest", justify="right", no_wrap=True, min_width=6)
        table.add_column("p99 wait", justify="right", no_wrap=True, min_width=8)
    table.add_column("failed", justify="right", no_wrap=True, min_width=6)
    for position, stage in sorted(now.stages.items()):
        known = None if before is None else before.stages.get(position)
        same = known if known is not None and known.name == stage.name else StageView("")
        table.add_row(*_row(stage, _Difference(same.values, stage.values, seconds), wide=wide))
    return table


def _row(stage: StageView, change: "_Difference", *, wide: bool) -> Iterator[RenderableType]:
    values = stage.values
    places = values.get("concurrency", 0)
    yield stage.name
    yield f"{amount(values.get('under_way', 0))}/{amount(places)}" if places else ""
    yield f"{amount(values.get('finished', 0))}/{amount(values['room'])}" if values.get("room") else ""
    yield change.per_second("samples_total")
    busy = change.grown("busy_seconds_total")
    share = None if busy is None or not places or not change.seconds else min(1.0, busy / change.seconds / places)
    yield _busy(share, wide=wide)
    samples = change.grown("samples_total")
    yield duration(busy / samples) if busy and samples else ""
    if wide:
        oldest = values.get("oldest_seconds", 0)
        yield Text(duration(oldest), style="red" if oldest >= 10 else "") if oldest >= 0.001 else ""
        yield duration(wait) if (wait := values.get("wait_seconds/0.99", 0)) else ""
    failed = values.get("errors_total", 0) + values.get("skipped_total", 0)
    yield Text(amount(failed), style="red") if failed else ""


def _busy(share: float | None, *, wide: bool) -> RenderableType:
    if share is None:
        return ""
    style = "red" if share >= BUSY else "green"
    if not wide:
        return Text(f"{share:.0%}", style=style)
    blocks = round(share * 10)
    return Text.assemble(("█" * blocks, style), ("░" * (10 - blocks), "dim"), f" {share:>4.0%}")


class _Difference:
    """How values have changed between two looks."""

    def __init__(self, before: Mapping[str, float], now: Mapping[str, float], seconds: float) -> None:
        self._before = before
        self._now = now
        self.seconds = seconds

    def grown(self, name: str) -> float | None:
        """By how much a counter has grown; None: it was not there before, or the process is another one."""
        if name not in self._before or name not in self._now:
            return None
        grown = self._now[name] - self._before[name]
        return grown if grown >= 0 else None

    def per_second(self, name: str) -> str:
        """The rate of a counter."""
        grown = self.grown(name)
        return "" if grown is None or not self.seconds else amount(grown / self.seconds)

    def share(self, name: str, of: str) -> float | None:
        """How much of one counter's growth is that of another."""
        part, whole = self.grown(name), self.grown(of)
        return None if part is None or not whole else min(1.0, part / whole)
