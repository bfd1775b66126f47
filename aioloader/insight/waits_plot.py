"""The waits of an epoch as a picture: SVG, of a few hundred columns however many batches there were."""

from collections.abc import Sequence
from math import ceil, floor, log10
from typing import Final, TypeAlias

from aioloader.insight.units import duration

__all__ = ["Waited", "waits_plot"]

Waited: TypeAlias = tuple[float, float]
"""When a batch was asked for, in seconds of the epoch, and how many seconds it took."""

WIDTH: Final = 640
HEIGHT: Final = 196
LEFT: Final = 72  # for the labels of a narrow screen, which are larger
BOTTOM: Final = 26
TOP: Final = 14
COLUMNS: Final = 240
LEAST: Final = 1e-6  # seconds; less is drawn as this


def waits_plot(waits: Sequence[Waited]) -> str:
    """A column for each moment, as high as the longest wait in it, over a logarithmic axis."""
    if not waits:
        return ""
    begin, end = waits[0][0], max(waits[-1][0] + waits[-1][1], waits[0][0] + 1e-9)
    columns = _columns(waits, begin, end)
    low = floor(log10(max(LEAST, min(columns.values()))))
    high = max(low + 1, ceil(log10(max(LEAST, *columns.values()))))
    width = (WIDTH - LEFT) / COLUMNS

    def y_of(seconds: float) -> float:
        share = (log10(max(LEAST, seconds)) - low) / (high - low)
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - max(0.0, min(1.0, share)))

    floor_y = HEIGHT - BOTTOM
    bars = "".join(
        f"<rect x='{LEFT + column * width:.1f}' y='{(y := y_of(seconds) - 1):.1f}' width='{max(1.5, width - 0.4):.1f}' "
        f"height='{floor_y - y:.1f}'/>"
        for column, seconds in columns.items()
    )
    grid = "".join(
        f"<line x1='{LEFT}' x2='{WIDTH}' y1='{y_of(10.0**power):.1f}' y2='{y_of(10.0**power):.1f}'/>"
        f"<text{_class(high - power)} x='{LEFT - 8}' y='{y_of(10.0**power) + 4:.1f}' text-anchor='end'>"
        f"{_label(power)}</text>"
        for power in range(low, high + 1)
    )
    times = "".join(
        f"<text x='{LEFT + share * (WIDTH - LEFT):.0f}' y='{HEIGHT - 6}' text-anchor='{anchor}'>"
        f"{duration(begin + share * (end - begin))}</text>"
        for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end"))
    )
    return (
        f"<div class='wide'><svg class='waits' viewBox='0 0 {WIDTH} {HEIGHT}' role='img' "
        f"aria-label='How long each batch took'><g class='grid'>{grid}{times}</g><g class='bars'>{bars}</g></svg></div>"
    )


def _columns(waits: Sequence[Waited], begin: float, end: float) -> dict[int, float]:
    """The longest wait of each column in which there is one."""
    columns: dict[int, float] = {}
    for asked, waited in waits:
        column = min(COLUMNS - 1, int((asked - begin) / (end - begin) * COLUMNS))
        columns[column] = max(columns.get(column, 0.0), waited)
    return columns


def _class(number: int) -> str:
    """Of a label; every second one is left out where there is no place."""
    return " class='between'" if number % 2 else ""


def _label(power: int) -> str:
    seconds = 10.0**power
    return duration(seconds).replace(".0 ", " ") if seconds < 100 else f"{seconds:,.0f} s"
