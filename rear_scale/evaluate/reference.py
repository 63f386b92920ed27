"""References for scores of samples: published statistics with or without their images, or images of any form."""

# n images, F features

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rear_scale.config import EvaluateConfig, InputError
from rear_scale.evaluate.images.image_set import ImageSet, is_tar, open_image_set
from rear_scale.evaluate.images.npz import array_names, read_sha256
from rear_scale.evaluate.metrics import distance_on
from rear_scale.evaluate.metrics.base import FeatureSet, Rows
from rear_scale.evaluate.metrics.moments import Moments
from rear_scale.evaluate.metrics.precision_recall import NEIGHBOURS
from rear_scale.evaluate.metrics.statistics_file import MadeOf, images_of, read_statistics, write_statistics
from rear_scale.evaluate.networks import statistics_arrays
from rear_scale.evaluate.networks.base import FeatureNetwork
from rear_scale.evaluate.networks.feature_cache import FeatureBlocks, extract, is_whole
from rear_scale.world import World

RESIZED = "resized to the network's input"  # in the notes of references whose size is not that of the samples


@dataclass
class Reference:
    """One reference set. Its features and their statistics are computed once and kept in the cache."""

    name: str
    path: str
    identity: str
    stored: Mapping[str, Moments]  # statistics in the reference file, by feature
    images: ImageSet | None  # None = the file holds statistics alone
    blocks: Mapping[str, FeatureBlocks]  # features of the images, by feature; empty without images
    networks: Mapping[str, str]  # the identity of the network of each feature
    device: torch.device
    notes: list[str] = field(default_factory=list)
    made_of: MadeOf | None = None  # the origin of stored statistics, if the file states it
    _moments: dict[str, Moments] = field(default_factory=dict)
    kept: dict[Any, Any] = field(default_factory=dict)  # values that metrics cache for the next samples

    def moments(self, feature: str) -> Moments | None:
        """Mean and covariance of a feature; None without statistics and with fewer than two images. Not a collective."""
        if feature in self.stored:
            return self.stored[feature]
        if feature not in self.blocks or self.images is None or self.images.count < 2:
            return None
        if feature not in self._moments:
            self._moments[feature] = self._image_moments(feature, self.images.count)
        return self._moments[feature]

    def _image_moments(self, feature: str, count: int) -> Moments:
        """Mean and covariance of a feature of the images, from the cache if an earlier evaluation has written them."""
        blocks = self.blocks[feature]
        cached = blocks.folder / f"statistics_{feature}.npz"
        has_arrays = feature in statistics_arrays()
        if has_arrays and is_whole(cached):
            size = blocks.array(0, feature).shape[1]
            return read_statistics(cached, self.networks, {feature: size})[feature]
        moments = FeatureSet(self.name, blocks, self.device).moments(feature)
        assert moments is not None, (feature, count)
        if has_arrays:
            write_statistics(cached, {feature: moments}, self.networks, {"identity": self.identity, "count": count})
        return moments

    def rows(self, feature: str, most: int | None = None) -> Rows | None:
        """A feature of all images, or of at most `most` evenly spaced images. None when there are no images."""
        if feature not in self.blocks:
            return None
        return FeatureSet(self.name, self.blocks[feature], self.device).rows(feature, most)

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width in pixels of the images, or of those that the statistics were made of; None when not known."""
        if self.images is not None:
            return self.images.height, self.images.width
        if self.made_of is None or self.made_of.size is None:
            return None
        height, width = self.made_of.size
        return height, width

    def describe(self) -> dict[str, Any]:
        images = self.images
        made_of = None if self.made_of is None else self.made_of.preprocessing
        return {
            "path": self.path,
            "identity": self.identity,
            "stored_statistics": sorted(map(distance_on, self.stored)),
            "images": None if images is None else images.count,
            "size": None if self.size is None else list(self.size),
            "preprocessing": made_of if images is None else images.preprocessing,
        }


def check_reference(name: str, path: str) -> None:
    """Raises InputError when the path of a reference does not exist. Called before any expensive work."""
    if not Path(path).exists():
        raise InputError(
            f"not found: evaluate.reference.{name}={path}. Set an .npz (statistics, images or both), a folder of images, or a "
            "folder of tar shards. ADM publishes VIRTUAL_imagenet256_labeled.npz at "
            "https://github.com/openai/guided-diffusion/tree/main/evaluations"
        )


def open_reference(
    name: str, path: str, cfg: EvaluateConfig, networks: Sequence[FeatureNetwork], cache: Path, size: int, world: World
) -> Reference:
    """A reference with its features. All ranks must call this; each extracts a part of the features.

    size: the image size of the samples, to which image files are cropped. Raises InputError for files that cannot be read or
    do not fit.
    """
    stored, images = read_reference(name, path, networks, size, world, cfg.exif)
    identities, sizes = _features(networks)
    extracted = extract(images, networks, cache, cfg.batch_size, world) if images else []
    blocks = {feature: part for network, part in zip(networks, extracted, strict=False) for feature in network.sizes}
    identity = images.identity if images else world.on_main(lambda: read_sha256(path))
    notes = []
    published = [feature for feature, arrays in statistics_arrays().items() if arrays.is_published]
    if images is None:
        notes.append("the reference holds only statistics, no images: no precision and recall")
    for feature in sizes:
        if feature not in stored and images is not None:
            if Path(path).is_file() and feature in published:
                notes.append(
                    f"the reference file has no statistics: {distance_on(feature)} uses those of its {images.count:,} images"
                )
            if images.count <= NEIGHBOURS:
                notes.append(f"{images.count} images are too few for precision and recall")
    made_of = images_of(path) if stored else None
    notes = list(dict.fromkeys(notes))
    return Reference(name, path, identity, stored, images, blocks, identities, world.device, notes, made_of)


def read_reference(
    name: str, path: str, networks: Sequence[FeatureNetwork], size: int, world: World, exif: str
) -> tuple[Mapping[str, Moments], ImageSet | None]:
    """The statistics stored in a reference, by feature, and its images (None = statistics alone). All ranks must call this.

    Raises InputError for a file with neither of them, and for statistics of other networks.
    """
    if not Path(path).is_file() or is_tar(Path(path)):
        return {}, open_image_set(path, world, size, exif)
    stored = read_statistics(Path(path), *_features(networks))
    if "arr_0" in array_names(path):
        return stored, open_image_set(path, world, size, exif)
    if not stored:
        raise InputError(
            f"evaluate.reference.{name}={path} has neither arr_0 nor statistics of the features in use "
            f"(it holds {', '.join(array_names(path)) or 'nothing'}). Set another file"
        )
    return stored, None


def _features(networks: Sequence[FeatureNetwork]) -> tuple[dict[str, str], dict[str, int]]:
    """The identity of the network of each feature, and the number of values of each feature."""
    return (
        {feature: network.identity for network in networks for feature in network.sizes},
        {feature: number for network in networks for feature, number in network.sizes.items()},
    )
