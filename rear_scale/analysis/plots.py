"""Parts of the figures of experiments."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rear_scale.analysis.experiment import Row
from rear_scale.figures import plt
from rear_scale.intervals import mean_interval

mpl.rcParams["text.parse_math"] = False  # names of runs are text, whatever dollar signs they hold

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b")


def panels(
    count: int, *, width: float = 4.2, height: float = 3.4, columns: int | None = None
) -> tuple[Figure, list[Axes]]:
    """A figure with so many axes in rows of `columns` (None = in one row); sizes of one panel in inches."""
    columns = min(columns or count, count)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), layout="constrained", squeeze=False
    )
    flat = list(axes.flat)
    for unused in flat[count:]:
        unused.remove()
    return figure, flat[:count]


def colour(number: int) -> str:
    """The colour of the n-th model."""
    return COLOURS[number % len(COLOURS)]


def models_of(rows: Sequence[Row]) -> list[str]:
    """The models of rows, in the order of their first appearance."""
    return list(dict.fromkeys(row["model"] for row in rows))


def line(
    axes: Axes, rows: Sequence[Row], x: str, y: str, label: str, colour: str, style: str = "-", by: str | None = None
) -> None:
    """Draws the mean over seeds of column y against that of column x, with a band for its 95% interval where there are seeds.

    by: the column whose values tell the points of a seed apart; None = x itself.
    """
    by = by or x
    rows = [row for row in rows if row.get(y) is not None]
    points = [[row for row in rows if row[by] == at] for at in sorted({row[by] for row in rows})]
    if not points:
        return
    places = [mean_interval([row[x] for row in point]).mean for point in points]
    means = [mean_interval([row[y] for row in point]) for point in points]
    axes.plot(places, [one.mean for one in means], style, label=label, color=colour, marker="o", ms=3.5, lw=1.4)
    if all(one.low is not None for one in means):
        lows, highs = [one.low or 0.0 for one in means], [one.high or 0.0 for one in means]
        axes.fill_between(places, lows, highs, color=colour, alpha=0.15, lw=0)


def finish(axes: Axes, x: str, y: str, title: str = "", *, legend: bool = True) -> None:
    """Labels axes."""
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.grid(alpha=0.3)
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
