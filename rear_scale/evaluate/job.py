"""Scores sets of images by the networks and references of a config, which are opened once for all sets."""

# n images, F features

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rear_scale.config import ExperimentConfig, InputError
from rear_scale.evaluate.images.image_set import ImageSet, open_image_set
from rear_scale.evaluate.metrics.distances import frechet_distance
from rear_scale.evaluate.metrics.statistics_file import is_ours, write_statistics
from rear_scale.evaluate.networks.base import Extractor, FeatureNetwork, InceptionFeatures
from rear_scale.evaluate.networks.classifier import (
    ClassifierFeatures,
    NearestPixels,
    check_same_training,
    train_classifier,
)
from rear_scale.evaluate.networks.dinov2 import DinoV2Features
from rear_scale.evaluate.networks.feature_cache import FeatureBlocks, Part, extract, feature_folder, is_complete
from rear_scale.evaluate.networks.weights import DINOV2_VITL14, INCEPTION, check_weight_file
from rear_scale.evaluate.reference import Reference, block_moments, check_reference, open_reference, read_reference
from rear_scale.evaluate.scores import network_scores
from rear_scale.progress import say
from rear_scale.shards.classes import check_same_classes
from rear_scale.shards.images import open_images
from rear_scale.world import World


def check_evaluation(cfg: ExperimentConfig, statistics: Path | None = None) -> None:
    """Raises InputError when there is nothing to compare with, or no features to compare by.

    statistics: the file that `write_statistics` will make, which needs no reference but a network.
    """
    evaluate = cfg.evaluate
    if statistics is not None:
        _check_statistics_file(cfg, statistics)
    elif not evaluate.reference:
        raise InputError(
            "evaluate.reference is empty. Set evaluate.reference.NAME=PATH to an .npz, a folder of images or tar shards to "
            "compare with"
        )
    if evaluate.classifier is None and evaluate.inception_weights is None and evaluate.dinov2_weights is None:
        raise InputError(
            "there are no features to compare by. Set evaluate.inception_weights to the path of "
            f"{INCEPTION.name}, published at {INCEPTION.source} (or evaluate.classifier, as configs/demo.yaml does)"
        )
    if evaluate.inception_weights is not None:
        check_weight_file(evaluate.inception_weights, "evaluate.inception_weights", INCEPTION)
    if evaluate.dinov2_weights is not None:
        check_weight_file(evaluate.dinov2_weights, "evaluate.dinov2_weights", DINOV2_VITL14)
    for name, path in evaluate.reference.items():
        check_reference(name, path)


def _check_statistics_file(cfg: ExperimentConfig, path: Path) -> None:
    if path.suffix != ".npz" or path.is_dir():
        raise InputError(
            f"--write-statistics {path} {'is a folder' if path.is_dir() else 'does not end in .npz'}. Name a file such as "
            "reference.npz"
        )
    if path.is_file() and path.stat().st_size > 0 and not is_ours(path):
        raise InputError(
            f"--write-statistics {path} is there and holds no statistics of ours. Name another file, or move that one"
        )
    if cfg.evaluate.inception_weights is None and cfg.evaluate.dinov2_weights is None:
        raise InputError(
            f"--write-statistics {path} is of the features of a published network, and none is set. Set "
            f"evaluate.inception_weights to the path of {INCEPTION.name}, published at {INCEPTION.source}, or "
            "evaluate.dinov2_weights"
        )


class Evaluation:
    """The networks and references of a config. All ranks must make it and call its methods."""

    def __init__(self, cfg: ExperimentConfig, cache: Path, world: World) -> None:
        self.cfg, self.world = cfg, world
        self.cache = Path(cfg.evaluate.cache_dir) if cfg.evaluate.cache_dir else cache
        self.networks = open_networks(cfg, world)
        self.classifier = _open_classifier(cfg, world)
        self.small_sets: dict[str, ImageSet] = {}  # the references of a classifier, which fit in memory
        self.nearest: NearestPixels | None = None
        if self.classifier is not None:
            self.small_sets = {
                name: open_image_set(path, world, exif=cfg.evaluate.exif)
                for name, path in cfg.evaluate.reference.items()
            }
            for name, images in self.small_sets.items():
                check_class_names(cfg, f"evaluate.reference.{name}", images)
            self.nearest = NearestPixels(self.small_sets)
        self.references: dict[int, list[Reference]] = {}  # by size of the samples

    def score(self, samples: ImageSet) -> dict[str, Any]:
        """All scores of a set of images against every reference."""
        if self.classifier is not None:
            _check_sizes(samples, self.small_sets)
            check_class_names(self.cfg, samples.name, samples)
        # Before the samples: a reference that does not fit fails before 50,000 images are made.
        references = self._references_for(samples) if self.networks else []
        # All networks at once: a generated set is then generated once.
        extract(samples, self.extractors(), self.cache, self.cfg.evaluate.batch_size, self.world)
        scores = {} if self.classifier is None else self._classifier_scores(samples)
        if self.networks:
            found = extract(samples, self.networks, self.cache, self.cfg.evaluate.batch_size, self.world)
            for network, blocks in zip(self.networks, found, strict=True):
                scores[network.name] = network_scores(network, blocks, references, self.cfg.evaluate, self.world)
            scores["reference_sets"] = {reference.name: reference.describe() for reference in references}
            scores["labels"] = _label_counts(found[0])
        return scores

    def extract_part(self, samples: ImageSet, part: Part) -> bool:
        """Computes a share of the features, of samples and references, for a job that is split.

        Returns whether all shares are there now.
        """
        batch_size = self.cfg.evaluate.batch_size
        found = [extract(samples, self.extractors(), self.cache, batch_size, self.world, part)]
        for name, path in self.cfg.evaluate.reference.items() if self.networks else ():
            _, images = read_reference(name, path, self.networks, samples.height, self.world, self.cfg.evaluate.exif)
            if images is not None:
                found.append(extract(images, self.networks, self.cache, batch_size, self.world, part))
        self.world.barrier()
        return bool(self.world.from_main(all(map(is_complete, found)) if self.world.is_main else None))

    def folder(self, samples: ImageSet, extractor: Extractor) -> Path:
        """Where the features of a set are kept."""
        return feature_folder(samples, extractor, self.cache, self.cfg.evaluate.batch_size)

    def extractors(self) -> Sequence[Extractor]:
        """Of the samples."""
        return [*self.networks, *(part for part in (self.classifier, self.nearest) if part is not None)]

    def write_statistics(self, images: ImageSet, path: Path, part: Part | None = None) -> bool:
        """Means and covariances of a set, as a reference for other evaluations.

        With a part, only that share of the features is computed. Returns whether the file was written, which takes all
        shares. Raises InputError for less than two images: they have no covariance.
        """
        if images.count < 2:
            raise InputError(
                f"{images.name} holds {images.count} image, which has no covariance. Make statistics of many images"
            )
        found = extract(images, self.networks, self.cache, self.cfg.evaluate.batch_size, self.world, part)
        complete = bool(self.world.from_main(is_complete(found) if self.world.is_main else None))
        if self.world.is_main and complete:
            kinds = [
                (network, blocks, kind)
                for network, blocks in zip(self.networks, found, strict=True)
                for kind in network.sizes
            ]
            write_statistics(
                path,
                {kind: block_moments(blocks, kind, self.world.device) for _, blocks, kind in kinds},
                {kind: network.identity for network, _, kind in kinds},
                {
                    "identity": images.identity,
                    "count": images.count,
                    "preprocessing": images.preprocessing,
                    "size": [images.height, images.width],
                },
            )
            say(
                f"{path}: statistics of {images.count:,} images of {images.width}x{images.height} ({images.preprocessing})"
            )
        self.world.barrier()
        return complete

    def _references_for(self, samples: ImageSet) -> list[Reference]:
        cfg, size = self.cfg.evaluate, samples.height
        if size not in self.references:
            self.references[size] = [
                open_reference(name, path, cfg, self.networks, self.cache, size, self.world)
                for name, path in cfg.reference.items()
            ]
            for reference in self.references[size]:
                _warn_about_size(samples, reference, self.world)
        return self.references[size]

    def _classifier_scores(self, samples: ImageSet) -> dict[str, Any]:
        """By the config's own classifier, and of the references against each other as a yardstick."""
        assert self.classifier is not None
        assert self.nearest is not None
        extractors: list[Extractor] = [self.classifier, self.nearest]
        batch_size = self.cfg.evaluate.batch_size
        sets = {"": samples, **self.small_sets}
        found = {name: extract(images, extractors, self.cache, batch_size, self.world) for name, images in sets.items()}
        moments = {
            name: block_moments(blocks[0], "features", self.world.device)
            for name, blocks in found.items()
            if blocks[0].count >= 2
        }

        def score(name: str) -> dict[str, Any]:
            classes, nearest = found[name]
            labels = classes.column("label")
            others = [other for other in self.small_sets if self.small_sets[other].identity != sets[name].identity]
            return {
                "count": sets[name].count,
                "class_accuracy": None if labels is None else float((classes.column("classes") == labels).mean()),
                "frechet_distance": {
                    other: frechet_distance(moments[name], moments[other])
                    if name in moments and other in moments
                    else None
                    for other in others
                },
                "nearest_distance": {other: float(nearest.column(other).mean()) for other in others},
            }

        weights = self.cfg.evaluate.classifier.weights
        return {
            "features": f"penultimate layer of the classifier {weights} (sha256 {self.classifier.weights_sha256[:16]})",
            "samples": score(""),
            "references": {name: score(name) for name in self.small_sets},
        }


def open_networks(cfg: ExperimentConfig, world: World) -> list[FeatureNetwork]:
    networks: list[FeatureNetwork] = []
    if cfg.evaluate.inception_weights is not None:
        networks.append(InceptionFeatures(cfg.evaluate.inception_weights, world.device))
    if cfg.evaluate.dinov2_weights is not None:
        networks.append(DinoV2Features(cfg.evaluate.dinov2_weights, world.device))
    for network in networks:
        if network.is_published is False and world.is_main:
            say(
                f"warning: the weights of {network.name} (sha256 {network.weights_sha256[:8]}) are not the published ones: "
                "their numbers compare with nobody else's"
            )
    return networks


def _open_classifier(cfg: ExperimentConfig, world: World) -> ClassifierFeatures | None:
    classifier = cfg.evaluate.classifier
    if classifier is None:
        return None
    if world.is_main and not Path(classifier.weights).exists():
        train_classifier(classifier, world.device)
    world.barrier()
    features = ClassifierFeatures(classifier, world.device)
    world.on_main(lambda: check_same_training(classifier))
    return features


def _label_counts(blocks: FeatureBlocks) -> dict[str, Any] | None:
    """How many images each class has; null when the images bring no classes."""
    labels = blocks.column("label")
    if labels is None:
        return None
    classes, counts = np.unique(labels, return_counts=True)
    return {"classes": len(classes), "fewest": int(counts.min()), "most": int(counts.max()),
            "counts": {str(label): int(count) for label, count in zip(classes, counts, strict=True)}}  # fmt: skip


def _warn_about_size(samples: ImageSet, reference: Reference, world: World) -> None:
    if reference.size is not None and reference.size != (samples.height, samples.width):
        height, width = reference.size
        note = (
            f"the samples are {samples.width}x{samples.height}, {reference.name} is {width}x{height}: each is "
            "resized to the network's input from its own size, so the distance holds the difference in sharpness too"
        )
        reference.notes.append(note)
        if world.is_main:
            say(f"warning: {note}")


def check_class_names(cfg: ExperimentConfig, what: str, images: ImageSet) -> None:
    """Raises InputError when a set numbers its classes otherwise than the images that the classifier was trained on."""
    trained_on = cfg.evaluate.classifier
    # The images may be gone once the classifier is there.
    if trained_on is None or images.class_names is None or not (Path(trained_on.images) / "index.json").is_file():
        return
    names = open_images(trained_on.images).class_names
    check_same_classes(f"evaluate.classifier.images={trained_on.images}", names, what, images.class_names)


def _check_sizes(samples: ImageSet, references: dict[str, ImageSet]) -> None:
    for name, reference in references.items():
        if (samples.height, samples.width) != (reference.height, reference.width):
            raise InputError(
                f"{samples.name} holds images of {samples.width}x{samples.height}, but evaluate.reference.{name} of "
                f"{reference.width}x{reference.height}. Compare with images of the same size"
            )
