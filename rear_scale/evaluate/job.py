"""Scores a set of images. The stored state is features per fixed block of image indices: a killed job continues with the
missing blocks, and sums run in block order, so that the numbers do not depend on the ranks."""

# n images, S side in pixels, F features

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from rear_scale.config import ExperimentConfig, InputError
from rear_scale.evaluate.classifier import ClassifierFeatures, train_classifier
from rear_scale.evaluate.metrics import frechet_distance, nearest_distances
from rear_scale.evaluate.moments import Moments, MomentSums
from rear_scale.evaluate.npz import read_samples
from rear_scale.progress import progress
from rear_scale.shards.images import open_images
from rear_scale.shards.record import file_sha256
from rear_scale.world import World

BLOCK_IMAGES = 500


class Extractor(Protocol):
    identity: str  # a hash of the weights

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Named arrays with one row per image, of images (uint8 [n, S, S, 3])."""
        ...


@dataclass(frozen=True)
class ImageSet:
    """Images to score, wherever they lie."""

    name: str
    identity: str  # a hash of the content
    count: int
    block: Callable[[int, int], np.ndarray]  # (first, end) -> uint8 [n, S, S, 3]
    labels: np.ndarray | None  # int [count]


def from_npz(path: Path) -> ImageSet:
    images, labels = read_samples(path)
    return ImageSet(path.name, file_sha256(path), len(images), lambda start, end: np.array(images[start:end]), labels)


def from_shards(name: str, folder: str) -> ImageSet:
    shards = open_images(folder)
    images, labels = shards.load()
    return ImageSet(
        name,
        hashlib.sha256("".join(shard.sha256 for shard in shards.shards).encode()).hexdigest(),
        len(images),
        lambda start, end: images[start:end],
        labels,
    )


def extract(
    images: ImageSet, extractor: Extractor, cache: Path, batch_size: int, world: World
) -> dict[str, np.ndarray]:
    """All rows of every array of the extractor, in image order. All ranks must call this; each computes some blocks."""
    folder = cache / hashlib.sha256(f"{images.identity} {extractor.identity}".encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, images.count, BLOCK_IMAGES)
    files = [folder / f"block_{number:05d}.npz" for number in range(len(starts))]
    missing = [number for number in range(len(starts)) if not files[number].exists()]
    world.barrier()  # before anyone adds files
    with progress(f"features of {images.name}", len(missing), "block", show=world.is_main and bool(missing)) as bar:
        for number in missing[world.rank :: world.size]:
            pixels = images.block(starts[number], min(starts[number] + BLOCK_IMAGES, images.count))
            batches = [extractor(pixels[start : start + batch_size]) for start in range(0, len(pixels), batch_size)]
            arrays = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
            part = files[number].with_suffix(".part")
            with open(part, "wb") as file:
                np.savez(file, **arrays)
            part.replace(files[number])
            bar.update(min(world.size, len(missing) - bar.n))
    world.barrier()
    blocks = [np.load(file) for file in files]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0].files}


def moments(features: np.ndarray) -> Moments:
    """Of features [n, F], summed block by block."""
    sums = MomentSums(features.shape[1])
    for start in range(0, len(features), BLOCK_IMAGES):
        sums.add(torch.from_numpy(features[start : start + BLOCK_IMAGES]))
    return sums.moments()


def check_evaluation(cfg: ExperimentConfig) -> None:
    """Raises InputError when there is nothing to compare with, or no features to compare by."""
    if not cfg.evaluate.reference:
        raise InputError(
            "evaluate.reference is empty. Set evaluate.reference.NAME=FOLDER to image shards to compare with"
        )
    if cfg.evaluate.classifier is None:
        raise InputError(
            "evaluate.classifier is not set. Set evaluate.classifier.weights and .images, as configs/demo.yaml does"
        )
    for folder in cfg.evaluate.reference.values():
        open_images(folder)


def score_images(cfg: ExperimentConfig, samples: ImageSet, cache: Path, world: World) -> dict[str, Any]:
    """Scores of samples against every reference set, and of the references against each other as a yardstick.

    All ranks must call this. Distances to the nearest image are root mean square differences in grey levels (0 to 255).
    """
    classifier = cfg.evaluate.classifier
    assert classifier is not None
    if world.is_main and not Path(classifier.weights).exists():
        train_classifier(classifier, world.device)
    world.barrier()
    extractor = ClassifierFeatures(classifier, world.device)
    references = {name: from_shards(name, folder) for name, folder in cfg.evaluate.reference.items()}
    _check_sizes(samples, references)
    batch_size = cfg.evaluate.batch_size
    found = extract(samples, extractor, cache, batch_size, world)
    reference_found = {
        name: extract(images, extractor, cache, batch_size, world) for name, images in references.items()
    }
    return {
        "features": f"penultimate layer of the classifier {classifier.weights} (sha256 {extractor.identity[:16]})",
        "samples": _score(samples, found, references, reference_found),
        "references": {
            name: _score(references[name], reference_found[name], references, reference_found) for name in references
        },
    }


def _score(
    images: ImageSet,
    found: dict[str, np.ndarray],
    references: dict[str, ImageSet],
    reference_found: dict[str, dict[str, np.ndarray]],
) -> dict[str, Any]:
    own = moments(found["features"])
    others = {name: reference for name, reference in references.items() if reference.identity != images.identity}
    flat = torch.from_numpy(images.block(0, images.count)).flatten(1)
    return {
        "count": images.count,
        "class_accuracy": None if images.labels is None else float((found["classes"] == images.labels).mean()),
        "frechet_distance": {
            name: frechet_distance(own, moments(reference_found[name]["features"])) for name in others
        },
        "nearest_distance": {
            name: nearest_distances(flat, torch.from_numpy(reference.block(0, reference.count)).flatten(1))
            .mean()
            .item()
            for name, reference in others.items()
        },
    }


def _check_sizes(samples: ImageSet, references: dict[str, ImageSet]) -> None:
    shape = samples.block(0, 1).shape[1:]
    for name, reference in references.items():
        other = reference.block(0, 1).shape[1:]
        if shape != other:
            raise InputError(
                f"{samples.name} holds images of {shape[1]}x{shape[0]}, but evaluate.reference.{name} of {other[1]}x{other[0]}. "
                "Compare with images of the same size"
            )
