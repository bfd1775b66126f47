"""Statistics as a table for a terminal, within 100 columns."""

from textwrap import wrap
from typing import TYPE_CHECKING, Final

from aioloader.insight.units import amount, duration, nbytes

if TYPE_CHECKING:
    from aioloader.insight.stats import StageStats, Stats

__all__ = ["WIDTH", "headline", "outcomes", "rate", "table"]

WIDTH: Final = 100
_HEADER: Final = ("stage", "places", "at work", "ready", "room", "done", "per s", "each", "busy", "p99 wait")


def table(stats: "Stats") -> str:
    """A line on the epoch, a row for each stage, and below it what else is to be known: errors, retries and the like.

    `ready` are finished samples that wait to be taken, of those that the stage's window has `room` for; `each` is how
    long one call took on average; `p99 wait` is how long finished samples waited for the next stage.
    """
    lines = wrap(headline(stats), WIDTH, subsequent_indent="  ")
    if not stats.stages:
        return "\n".join(lines)
    rows = [_HEADER, *(_row(stage, stats.seconds) for stage in stats.stages)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    widths[0] = min(widths[0], WIDTH - sum(widths[1:]) - 2 * (len(widths) - 1))
    noted = [f"{stage.name}: {said}" for stage in stats.stages if (said := ", ".join(outcomes(stage)))]
    lines += ["", *(_line(row, widths) for row in rows)]
    if noted:
        lines += ["", *(line for note in noted for line in wrap(note, WIDTH, subsequent_indent="  "))]
    return "\n".join(lines)


def headline(stats: "Stats") -> str:
    """The epoch and its consumer, in a sentence."""
    if stats.epoch is None or stats.first_batch_seconds is None:
        which = "no epoch has begun" if stats.epoch is None else f"epoch {stats.epoch}"
        waits = f", the consumer has waited {duration(stats.waiting_seconds)} for it" if stats.waiting_seconds else ""
        return f"{which}: no batch yet{waits}{', paused' if stats.paused else ''}"
    parts = [
        f"epoch {stats.epoch}: {amount(stats.batches)} batches in {duration(stats.seconds)}"
        f" ({amount(rate(stats.batches, stats.seconds))} per s)",
        f"the first after {duration(stats.first_batch_seconds)}",
        f"the consumer waited {duration(stats.waited_seconds)} ({stats.waited_fraction:.0%})",
    ]
    if stats.loop_cpu_fraction >= 0.005:
        parts.append(f"the loop's thread computed {stats.loop_cpu_fraction:.0%}")
    if stats.paused:
        parts.append("paused")
    return ", ".join(parts)


def outcomes(stage: "StageStats") -> list[str]:
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
    said = [f"{amount(count)} {one if count == 1 else several}" for count, one, several in counts if count]
    if stage.cached_bytes:
        said.append(f"{nbytes(stage.cached_bytes)} cached")
    if stage.under_way and stage.oldest_seconds >= 1:
        key = f" (key {_cut(stage.oldest_key, 40)})" if stage.oldest_key else ""
        said.append(f"one has been under way for {duration(stage.oldest_seconds)}{key}")
    return said


def rate(count: float, seconds: float) -> float:
    """Per second; 0 before any time has passed."""
    return count / seconds if seconds else 0.0


def _row(stage: "StageStats", seconds: float) -> tuple[str, ...]:
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
