"""Statistics of stages as a table for a terminal, within 100 columns."""

from collections.abc import Sequence
from textwrap import wrap
from typing import Final

from aioloader.insight.stage_stats import StageStats
from aioloader.insight.units import amount, duration, nbytes

__all__ = ["WIDTH", "outcomes", "rate", "table"]

WIDTH: Final = 100
_HEADER: Final = ("stage", "places", "at work", "ready", "room", "done", "per s", "each", "busy", "p99 wait")


def table(stages: Sequence[StageStats], seconds: float) -> list[str]:
    """A row for each stage, and below them what else is to be known: errors, retries and the like.

    `ready` are finished samples that wait to be taken, of those that the stage's window has `room` for; `each` is how
    long one call took on average; `p99 wait` is how long finished samples waited for the next stage.

    Args:
        stages: At least one.
        seconds: Of the epoch.
    """
    rows = [_HEADER, *(_row(stage, seconds) for stage in stages)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    widths[0] = min(widths[0], WIDTH - sum(widths[1:]) - 2 * (len(widths) - 1))
    lines = [_line(row, widths) for row in rows]
    noted = [f"{stage.name}: {counts}" for stage in stages if (counts := ", ".join(outcomes(stage)))]
    if noted:
        lines += ["", *(line for note in noted for line in wrap(note, WIDTH, subsequent_indent="  "))]
    return lines


def outcomes(stage: StageStats) -> list[str]:
    """What else a stage counted, where that is not 0: "3 errors", "12 retries"."""
    counts = [
        (stage.errors, "error", "errors"),
        (stage.retries, "retry", "retries"),
        (stage.timeouts, "timeout", "timeouts"),
        (stage.hedges, "second call", "second calls"),
        (stage.skipped, "skipped", "skipped"),
        (stage.dropped, "dropped", "dropped"),
        (stage.partial, "partial batch", "partial batches"),
        (stage.hits, "hit", "hits"),
        (stage.misses, "miss", "misses"),
    ]
    words = [f"{amount(count)} {one if count == 1 else several}" for count, one, several in counts if count]
    if stage.cached_bytes:
        words.append(f"{nbytes(stage.cached_bytes)} cached")
    if stage.under_way and stage.oldest_seconds >= 1:
        key = f" (key {_cut(stage.oldest_key, 40)})" if stage.oldest_key else ""
        words.append(f"one has been under way for {duration(stage.oldest_seconds)}{key}")
    return words


def rate(count: float, seconds: float) -> float:
    """Per second; 0 before any time has passed."""
    return count / seconds if seconds else 0.0


def _row(stage: StageStats, seconds: float) -> tuple[str, ...]:
    fold = not stage.concurrency
    return (
        stage.name,
        "" if fold else amount(stage.concurrency),
        "" if fold else amount(stage.under_way),
        amount(stage.finished) if stage.room else "",
        amount(stage.room) if stage.room else "",
        amount(stage.samples),
        amount(rate(stage.samples, seconds)),
        duration(stage.busy_seconds / stage.samples) if stage.samples and stage.busy_seconds else "",
        f"{stage.utilization:.0%}" if stage.concurrency else "",
        duration(stage.waited_seconds.p99) if stage.waited_seconds.p99 else "",
    )


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    name, *numbers = row
    cells = [_cut(name, widths[0]).ljust(widths[0])]
    cells += [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
    return "  ".join(cells).rstrip()


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
