"""Sheets of images, returned as PNG bytes."""

# n images, S side in pixels

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from rear_scale.sample.grid import contact_sheet


def grid(images: np.ndarray, columns: int) -> bytes:
    """A contact sheet of images (uint8 [n, S, S, 3]) in rows of `columns`."""
    buffer = io.BytesIO()
    Image.fromarray(contact_sheet(images, columns)).save(buffer, format="PNG")
    return buffer.getvalue()


def class_rows(images: np.ndarray, labels: np.ndarray, per_class: int, classes: int) -> np.ndarray:
    """The first `per_class` images of each class 0 .. classes - 1, class by class, and white ones where a class has fewer: uint8
    [classes * per_class, S, S, 3]."""
    rows = np.full((classes, per_class, *images.shape[1:]), 255, np.uint8)
    for label in range(classes):
        chosen = np.flatnonzero(labels == label)[:per_class]
        rows[label, : len(chosen)] = images[chosen]
    return rows.reshape(-1, *images.shape[1:])
