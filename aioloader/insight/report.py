"""`loader.report(path)`: one page on the newest epoch, which opens without a network."""

import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import Final

from aioloader.insight.report_style import STYLE
from aioloader.insight.stats import StageStats, Stats, headline
from aioloader.insight.stats_table import outcomes, rate
from aioloader.insight.units import amount, duration
from aioloader.insight.waits_plot import Waited, waits_plot
from aioloader.masking import masked

__all__ = ["page", "write_report"]

BUSY: Final = 0.7  # a stage busier than this has no free place when a sample comes
_WORD_ENDS: Final = re.compile(r"[_.(](?=\w)")
_KINDS: Final = {
    "source": "a source",
    "async": "awaited on the loop",
    "sync": "in threads",
    "process": "in processes",
    "fold": "on the loop",
}


def write_report(
    path: str | os.PathLike[str], loader: str, stats: Stats, explained: str, waits: Sequence[Waited]
) -> None:
    """Write the page.

    Args:
        path: Where to; what is there is replaced.
        loader: Its repr.
        stats: Of the epoch.
        explained: What limits it, and what to change.
        waits: When batches were asked for, in seconds of the epoch, and how long they took.

    Raises:
        OSError: It cannot be written.
    """
    target = Path(path)
    half = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        half.write_text(page(loader, stats, explained, waits), encoding="utf-8", errors="backslashreplace")
        half.replace(target)  # whoever has the page open never sees half of it
    except OSError as error:
        error.filename, error.filename2 = os.fspath(target), None  # not of the half that was to be renamed
        raise
    finally:
        with suppress(OSError):
            half.unlink(missing_ok=True)


def page(loader: str, stats: Stats, explained: str, waits: Sequence[Waited]) -> str:
    """The page as HTML; for the arguments see `write_report`."""
    when = time.strftime("%Y-%m-%d %H:%M:%S")
    parts = [
        f"<header><h1>aioloader report</h1><p class='loader'>{_text(loader)}</p><p>{_text(headline(stats))}. "
        f"Written {when}.</p></header>",
        _section("What limits, and what to change", f"<p class='verdict'>{_text(explained)}</p>"),
        _section("The pipeline", _pipeline(stats)),
        _section("How long the training loop waited for each batch", _waits(stats, waits)),
        _section("Where the time of a sample goes", _times(stats)),
        _section("Errors, retries and what was left out", _outcomes(stats)),
        _section("All figures", f"<div class='wide'><pre>{_text(str(stats))}</pre></div>"),
    ]
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>aioloader report</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>"


def _text(text: str) -> str:
    return escape(masked(text))


def _name(stage: StageStats) -> str:
    """Its name, which may be broken where a word of it ends."""
    return _WORD_ENDS.sub(r"\g<0><wbr>", _text(stage.name))


# -- the pipeline ------------------------------------------------------------------------------------------------------


def _pipeline(stats: Stats) -> str:
    if not stats.stages:
        return "<p>No batch has been asked for yet.</p>"
    busiest = max(stats.stages, key=lambda stage: stage.utilization)
    boxes = [_box(stage, stats, limit=stage is busiest and stage.utilization >= BUSY) for stage in stats.stages]
    share = f"{stats.waited_fraction:.0%}"
    consumer = (
        f"<li class='box consumer'><h3>your loop</h3><p class='kind'>{amount(rate(stats.batches, stats.seconds))} "
        f"batches/s</p>{_bar('waits', stats.waited_fraction, share)}</li>"
    )
    legend = (
        "<p class='note'>Samples go along the arrows. <b>busy</b>: of what its places could have done; <b>ready</b>: "
        "finished ones that wait now, of those that there is room for. A stage whose places are busy and that has "
        "little ready is the limit; one with much ready waits for a slow sample, or for the stage after it.</p>"
    )
    return f"<ol class='pipeline'>{''.join(boxes)}{consumer}</ol>{legend}"


def _box(stage: StageStats, stats: Stats, *, limit: bool) -> str:
    what = _KINDS[stage.kind]
    places = (
        f", {amount(stage.concurrency)} {'place' if stage.concurrency == 1 else 'places'}" if stage.concurrency else ""
    )
    lines = [f"<h3>{_name(stage)}</h3>", f"<p class='kind'>{what}{places}</p>"]
    lines.append(f"<p class='rate'>{amount(rate(stage.samples, stats.seconds))}<small> per second</small></p>")
    if stage.concurrency:
        lines.append(_bar("busy", stage.utilization, f"{stage.utilization:.0%}"))
    if stage.room:
        share = min(1.0, stage.finished / stage.room)
        lines.append(_bar("ready", share, f"{amount(stage.finished)} of {amount(stage.room)}"))
    return f"<li class='box{' limit' if limit else ''}'>{''.join(lines)}</li>"


def _bar(name: str, share: float, said: str) -> str:
    width = max(0.0, min(1.0, share)) * 100
    return (
        f"<div class='bar'><span>{name}</span><i><b style='width:{width:.1f}%'></b></i><span class='said'>{said}</span>"
        "</div>"
    )


# -- waits -------------------------------------------------------------------------------------------------------------


def _waits(stats: Stats, waits: Sequence[Waited]) -> str:
    if not stats.batches:
        return "<p>No batch has come yet.</p>"
    first = "" if stats.first_batch_seconds is None else f"The first batch took {duration(stats.first_batch_seconds)}. "
    said = (
        f"<p>{first}Of the others, half took no longer than <b>{duration(stats.waits.p50)}</b>, 95% no longer than "
        f"<b>{duration(stats.waits.p95)}</b>, 99% no longer than <b>{duration(stats.waits.p99)}</b>; the longest took "
        f"<b>{duration(stats.waits.max)}</b>.</p>"
    )
    if stats.batches == 1:
        said = f"<p>{first}</p>"
    shown = f"the latest {len(waits):,} of {stats.batches:,} batches" if len(waits) < stats.batches else "all batches"
    return f"{said}{waits_plot(waits)}<p class='note'>Of {shown}: seconds of the epoch, and how long each took.</p>"


# -- the time of a sample ----------------------------------------------------------------------------------------------


def _times(stats: Stats) -> str:
    stages = [stage for stage in stats.stages if stage.samples and stage.kind not in ("source", "fold")]
    rows = [(stage, *_spent(stage, after)) for stage, after in zip_longest(stages, stages[1:])]
    longest = max((work + waited for _, work, waited in rows), default=0.0)
    if not longest:
        return "<p>Nothing has been measured yet.</p>"
    lines = "".join(
        f"<tr><th>{_name(stage)}</th><td class='spent'><i><b style='width:{work / longest * 100:.1f}%'></b>"
        f"<u style='width:{waited / longest * 100:.1f}%'></u></i></td><td>{duration(work)}</td>"
        f"<td>{duration(waited) if waited else ''}</td></tr>"
        for stage, work, waited in rows
    )
    return (
        "<div class='wide'><table class='times'><thead><tr><th>stage</th><th></th><th><b class='key work'></b>work</th>"
        f"<th><b class='key wait'></b>wait</th></tr></thead><tbody>{lines}</tbody></table></div>"
        "<p class='note'>On average, for one sample, or for one batch in stages after <code>batch</code>. Work: in the "
        "function. Wait: finished, until it was taken; stages that share a window share it, so it is shown at the "
        "last of them. Samples that wait are ready before they are needed: that does no harm.</p>"
    )


def _spent(stage: StageStats, after: StageStats | None) -> tuple[float, float]:
    """Work and wait of a sample; the wait only where it is not that of the window of the stage `after` it, too."""
    shared = after is not None and after.waited_seconds == stage.waited_seconds
    return stage.busy_seconds / stage.samples, 0.0 if shared else stage.waited_seconds.sum / stage.samples


# -- errors ------------------------------------------------------------------------------------------------------------


def _outcomes(stats: Stats) -> str:
    lines = list(_outcome_lines(stats))
    if not lines:
        return "<p>None.</p>"
    return f"<div class='wide'><table><tbody>{''.join(lines)}</tbody></table></div>"


def _outcome_lines(stats: Stats) -> Iterator[str]:
    for stage in stats.stages:
        said = outcomes(stage)
        policies = stage.policies
        if policies is not None and policies.retried_after:
            said.append(f"tried again mostly after {policies.retried_after}")
        if policies is not None and policies.refused_retries:
            said.append(f"{amount(policies.refused_retries)} not tried again, since the budget was used up")
        if policies is not None and policies.rate_wait_seconds:
            said.append(f"held up by its rate for {duration(policies.rate_wait_seconds)}")
        if said:
            yield f"<tr><th>{_name(stage)}</th><td>{_text(', '.join(said))}</td></tr>"
