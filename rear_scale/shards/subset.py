"""Nested subsets of a shard folder: the same fraction of the images of each class (data.use_share).

A smaller share is a part of every larger one, and depends on the folder alone, so that runs on repeated and on fresh images can
be compared. All crops of an image are in a subset or none.
"""

# n images, m chosen samples

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rear_scale import rng
from rear_scale.config import InputError
from rear_scale.shards.record import Manifest


def images_of_share(manifest: Manifest, share: float) -> int:
    """The number of images that a share of a folder has: of each class the rounded fraction, and at least one.

    Raises InputError for a share below 1 of a folder whose classes were not counted.
    """
    return manifest.num_images if share == 1 else sum(_of_classes(manifest, share))


def samples_of_share(manifest: Manifest, labels: np.ndarray, share: float) -> Tensor:
    """The ids of the samples of a share, int64 [m], ascending. labels: uint16 [samples], the class of each sample.

    Raises InputError as `images_of_share` does.
    """
    crops = manifest.crops_per_image
    wanted = np.array(_of_classes(manifest, share))
    of_images = np.asarray(labels[: manifest.num_images * crops : crops]).astype(np.int64)
    drawn = rng.random_bits(0, rng.Purpose.SUBSET, torch.arange(len(of_images)), 0, 1)[:, 0].numpy()
    # Sorted by class, and inside of a class in an order that no share and no seed changes; a share is the front of each class.
    order = np.lexsort((drawn, of_images))
    classes = of_images[order]
    positions = np.arange(len(order)) - np.searchsorted(classes, classes)
    images = np.sort(order[positions < wanted[classes]])
    return torch.from_numpy((images[:, None] * crops + np.arange(crops)).reshape(-1))


def _of_classes(manifest: Manifest, share: float) -> list[int]:
    """The number of images of each class in a share."""
    images = [count // manifest.crops_per_image for count in manifest.label_counts]
    if not any(images):
        raise InputError(
            f"data.use_share={share} takes a part of each class, but the images of each class were not counted when the shards "
            "were made. Make the shards again, or use data.use_share=1"
        )
    return [max(1, round(share * count)) if count else 0 for count in images]
