"""Distances of images to their nearest neighbours in small sets, in pixel space."""

# n samples, m reference images, F values of an image

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from rear_scale.evaluate.images.image_set import ImageSet


class NearestPixels:
    """An extractor of distances to the nearest image of small sets, in grey levels (0 to 255)."""

    name = "pixels"

    def __init__(self, sets: Mapping[str, ImageSet]) -> None:
        self.pixels = {
            name: np.concatenate([images.read(block)[0] for block in images.blocks]).reshape(images.count, -1)
            for name, images in sets.items()
        }
        self.identity = "nearest pixels " + " ".join(f"{name}={images.identity}" for name, images in sets.items())

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """The root mean square difference to the nearest image of each set, float64 [n], by name of the set."""
        flat = torch.from_numpy(images).flatten(1)
        return {name: nearest_distances(flat, torch.from_numpy(pixels)).numpy() for name, pixels in self.pixels.items()}


def nearest_distances(samples: Tensor, reference: Tensor, chunk: int = 256) -> Tensor:
    """The root mean square difference of each sample to the nearest reference row, float64 [n], in the unit of the rows.

    samples: [n, F]; reference: [m, F].
    """
    reference = reference.double()
    return (
        torch.cat([torch.cdist(part.double(), reference).min(1).values for part in samples.split(chunk)])
        / samples.shape[1] ** 0.5
    )
