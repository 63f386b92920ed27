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


def class_rows(images: np.ndarray, labels: np.ndarray, per_class: int) -> np.ndarray:
    """The first `per_class` images of each class (uint8 [classes * per_class, S, S, 3]), class by class."""
    chosen = [np.flatnonzero(labels == label)[:per_class] for label in np.unique(labels)]
    return images[np.concatenate(chosen)]
