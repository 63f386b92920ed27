"""Figures, returned as PNG bytes."""

# n images, S side in pixels

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from PIL import Image

mpl.use("Agg")

from matplotlib import pyplot as plt

from rear_scale.sample.grid import contact_sheet


def curves(series: Mapping[str, Sequence[Mapping[str, Any]]], quantity: str, title: str) -> bytes:
    """A plot with one curve per name: `quantity` over images seen, from the lines of metrics.jsonl, without missing values."""
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for name, metrics in series.items():
        points = [(line["images_seen"], line[quantity]) for line in metrics if line.get(quantity) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1.4)
    axes.set(xlabel="images seen", ylabel=quantity, title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    return _png(figure)


def grid(images: np.ndarray, columns: int) -> bytes:
    """A contact sheet of images (uint8 [n, S, S, 3]) in rows of `columns`."""
    buffer = io.BytesIO()
    Image.fromarray(contact_sheet(images, columns)).save(buffer, format="PNG")
    return buffer.getvalue()


def class_rows(images: np.ndarray, labels: np.ndarray, per_class: int) -> np.ndarray:
    """The first `per_class` images of each class (uint8 [classes * per_class, S, S, 3]), class by class."""
    chosen = [np.flatnonzero(labels == label)[:per_class] for label in np.unique(labels)]
    return images[np.concatenate(chosen)]


def _png(figure: plt.Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    return buffer.getvalue()
