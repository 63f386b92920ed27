"""matplotlib without a display, and its figures as PNG bytes. Whatever draws imports pyplot from here."""

from __future__ import annotations

import io
from collections.abc import Iterable

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

__all__ = ["logarithmic", "plt", "png"]


def png(figure: Figure) -> bytes:
    """The figure as PNG; it is closed."""
    buffer = io.BytesIO()
    # Without the version of matplotlib, which would make equal figures unequal.
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def logarithmic(axes: Axes, values: Iterable[float], unit: str = "g") -> None:
    """Makes the x axis logarithmic, with ticks at its values alone: between few values, those of matplotlib overlap.

    unit: "g" for plain numbers, "M" for thousands and millions with a letter. Values closer than 4% of the axis to one that is
    shown have no tick.
    """
    axes.set_xscale("log")
    shown: list[float] = []
    found = sorted(set(values))
    for value in found:
        if not shown or value / shown[-1] >= (found[-1] / found[0]) ** 0.04:
            shown.append(value)
    compact = EngFormatter(places=1, sep="")
    axes.set_xticks(shown, [compact(value) if unit == "M" else f"{value:g}" for value in shown])
    axes.minorticks_off()
