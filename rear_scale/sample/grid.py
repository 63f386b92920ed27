"""Contact sheets: many images in one picture."""

# n images, S side in pixels

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from rear_scale.files import atomic_file

_GAP = 2  # pixels
_CELL = 64  # pixels; smaller images are enlarged to at least half of this


def contact_sheet(images: np.ndarray, columns: int) -> np.ndarray:
    """A picture uint8 [height, width, 3] of images (uint8 [n, S, S, 3]) in rows of `columns`, on white.

    Small images are enlarged by an integer factor, without smoothing.
    """
    size = images.shape[1]
    scale = max(1, _CELL // size)
    rows = -(-len(images) // columns)
    cells = np.full((rows * columns, size, size, 3), 255, np.uint8)
    cells[: len(images)] = images
    cells = np.pad(cells.repeat(scale, 1).repeat(scale, 2), ((0, 0), (0, _GAP), (0, _GAP), (0, 0)), constant_values=255)
    side = cells.shape[1]
    return cells.reshape(rows, columns, side, side, 3).transpose(0, 2, 1, 3, 4).reshape(rows * side, columns * side, 3)


def write_sheet(path: Path, images: np.ndarray, columns: int) -> None:
    """Writes the `contact_sheet` of images, as PNG unless the path has the suffix of another format."""
    form = Image.registered_extensions().get(path.suffix.lower(), "PNG")
    with atomic_file(path) as temporary:
        Image.fromarray(contact_sheet(images, columns)).save(temporary, format=form)
