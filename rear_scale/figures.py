"""matplotlib without a display, and its figures as PNG bytes. Whatever draws imports pyplot from here."""

from __future__ import annotations

import io

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

__all__ = ["plt", "png"]


def png(figure: Figure) -> bytes:
    """The figure as PNG; it is closed."""
    buffer = io.BytesIO()
    # Without the version of matplotlib, which would make equal figures unequal.
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()
