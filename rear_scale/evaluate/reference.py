"""What samples are compared with: published statistics with their images, statistics alone, or images of any form."""

# n images, F features

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rear_scale.config import EvaluateConfig, InputError
from rear_scale.evaluate.images.image_set import ImageSet, is_tar, open_image_set
from rear_scale.evaluate.images.npz import array_names, read_sha256
from rear_scale.evaluate.metrics.moments import Moments, moments_of
from rear_scale.evaluate.metrics.precision_recall import NEIGHBOURS, Rows, radii
from rear_scale.evaluate.metrics.statistics_file import KINDS, MadeOf, images_of, read_statistics, write_statistics
from rear_scale.evaluate.networks.base import FeatureNetwork
from rear_scale.evaluate.networks.feature_cache import FeatureBlocks, extract, is_whole
from rear_scale.world import World


@dataclass
class Reference:
    """One reference set. Its features are computed once and kept in the cache, its statistics and radii with them."""

    name: str
    path: str
    identity: str
    stored: Mapping[str, Moments]  # by kind of features; what the file brings along
    images: ImageSet | None
    blocks: Mapping[str, FeatureBlocks]  # by kind of features; of the images, where there are any
    networks: Mapping[str, str]  # the identity of each kind's network
    notes: list[str] = field(default_factory=list)
    made_of: MadeOf | None = None  # of stored statistics, where they say it
    _moments: dict[str, Moments] = field(default_factory=dict)
    _radii: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def moments(self, kind: str, device: torch.device) -> Moments | None:
        """Of one kind of features; null when neither statistics nor images give them. One rank may call this alone."""
        if kind in self.stored:
            return self.stored[kind]
        if kind not in self.blocks or self.images is None or self.images.count < 2:
            return None
        if kind not in self._moments:
            blocks = self.blocks[kind]
            cached = blocks.folder / f"statistics_{kind}.npz"
            if is_whole(cached):
                size = blocks.array(0, kind).shape[1]
                self._moments[kind] = read_statistics(cached, self.networks, {kind: size})[kind]
            else:
                self._moments[kind] = block_moments(blocks, kind, device)
                images = {"identity": self.identity, "count": self.images.count}
                write_statistics(cached, {kind: self._moments[kind]}, self.networks, images)
        return self._moments[kind]

    def rows(self, kind: str, most: int | None) -> Rows | None:
        """Features of the images for nearest neighbours: all, or `most` evenly spaced ones. Null when there are no images."""
        if kind not in self.blocks:
            return None
        rows = self.blocks[kind].rows(kind)
        if most is None or len(rows) <= most:
            return rows
        chosen = np.arange(most) * len(rows) // most
        return np.concatenate([rows[int(number) : int(number) + 1] for number in chosen])

    def radii(self, kind: str, mode: str, rows: Rows, world: World) -> Tensor:
        """All ranks must call this."""
        if (kind, mode) not in self._radii:
            self._radii[kind, mode] = radii(rows, mode, world)
        return self._radii[kind, mode]

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width in pixels of the images, or of those behind the statistics; null when that is not known."""
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
            "stored_statistics": sorted(KINDS[kind].metric for kind in self.stored),
            "images": None if images is None else images.count,
            "size": None if self.size is None else list(self.size),
            "preprocessing": made_of if images is None else images.preprocessing,
        }


def block_moments(blocks: FeatureBlocks, kind: str, device: torch.device) -> Moments:
    """Added up block by block in their order."""
    return moments_of((blocks.array(number, kind) for number in range(len(blocks.ids))), device)


def check_reference(name: str, path: str) -> None:
    """Raises InputError, before anything is spent, when there is nothing at a reference's path."""
    if not Path(path).exists():
        raise InputError(
            f"not found: evaluate.reference.{name}={path}. Name an .npz (statistics, images or both), a folder of images, or a "
            "folder of tar shards. ADM publishes VIRTUAL_imagenet256_labeled.npz at "
            "https://github.com/openai/guided-diffusion/tree/main/evaluations"
        )


def open_reference(
    name: str, path: str, cfg: EvaluateConfig, networks: Sequence[FeatureNetwork], cache: Path, size: int, world: World
) -> Reference:
    """A reference with its features. All ranks must call this; they share the extraction.

    size: of the samples, to which image files are cropped. Raises InputError for files that cannot be read or do not fit.
    """
    stored, images = read_reference(name, path, networks, size, world, cfg.exif)
    identities, sizes = _kinds(networks)
    found = extract(images, networks, cache, cfg.batch_size, world) if images else []
    blocks = {kind: part for network, part in zip(networks, found, strict=False) for kind in network.sizes}
    identity = images.identity if images else world.on_main(lambda: read_sha256(path))
    notes = []
    if images is None:
        notes.append("it holds statistics alone: no precision and recall")
    for kind in sizes:
        if kind not in stored and images is not None:
            if Path(path).is_file() and kind != "cls":
                notes.append(f"its file has no statistics: {KINDS[kind].metric} is against its {images.count:,} images")
            if images.count <= NEIGHBOURS:
                notes.append(f"{images.count} images are too few for precision and recall")
    made_of = images_of(path) if stored else None
    return Reference(name, path, identity, stored, images, blocks, identities, list(dict.fromkeys(notes)), made_of)


def read_reference(
    name: str, path: str, networks: Sequence[FeatureNetwork], size: int, world: World, exif: str
) -> tuple[Mapping[str, Moments], ImageSet | None]:
    """Stored statistics by kind of features, and the images (null for statistics alone). All ranks must call this.

    Raises InputError for a file with neither, and for one that does not fit the networks.
    """
    if not Path(path).is_file() or is_tar(Path(path)):
        return {}, open_image_set(path, world, size, exif)
    stored = read_statistics(Path(path), *_kinds(networks))
    if "arr_0" in array_names(path):
        return stored, open_image_set(path, world, size, exif)
    if not stored:
        raise InputError(
            f"evaluate.reference.{name}={path} has neither arr_0 nor statistics of the features in use "
            f"(it holds {', '.join(array_names(path)) or 'nothing'}). Name another file"
        )
    return stored, None


def _kinds(networks: Sequence[FeatureNetwork]) -> tuple[dict[str, str], dict[str, int]]:
    """By kind of features: the identity of its network, and how many features there are."""
    return (
        {kind: network.identity for network in networks for kind in network.sizes},
        {kind: number for network in networks for kind, number in network.sizes.items()},
    )
