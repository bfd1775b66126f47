"""One picture per script: a bar for each contender, with the lowest and the highest round."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench._harness import Comparison

__all__ = ["draw"]

OURS, LIMIT, RIVAL = "#1f77b4", "#9a9a9a", "#d98c4a"


def draw(bench: str, comparisons: "Sequence[Comparison]", folder: Path) -> Path:
    """Draw all comparisons of a script into one file, and return its path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    heights = [0.6 + 0.35 * len(comparison.timings) for comparison in comparisons]
    figure, axes = pyplot.subplots(
        len(comparisons), 1, figsize=(9, sum(heights) + 0.5 * len(comparisons)), height_ratios=heights, squeeze=False
    )
    for axis, comparison in zip(axes[:, 0], comparisons, strict=True):
        names = list(comparison.timings)[::-1]
        rows = [comparison.row(name) for name in names]
        medians = [row["median"] for row in rows]
        spread = [[row["median"] - row["low"] for row in rows], [row["high"] - row["median"] for row in rows]]
        colors = [LIMIT if name == comparison.limit else OURS if name in comparison.ours else RIVAL for name in names]
        axis.barh(names, medians, xerr=spread, color=colors, error_kw={"elinewidth": 1, "capsize": 2})
        if max(medians) > 30 * max(min(medians), 1e-12):
            axis.set_xscale("log")
        better = "more is better" if comparison.unit.more_is_better else "less is better"
        axis.set_xlabel(f"{comparison.unit.name} ({better})", fontsize=8)
        axis.set_title(comparison.title, fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{bench}.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
