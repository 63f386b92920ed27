"""Scoring of image sets. The networks and references of a config are opened once for all sets."""

# n images, F features

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rear_scale.config import ExperimentConfig, InputError, all_checks
from rear_scale.evaluate.images.image_set import ImageSet, open_image_set
from rear_scale.evaluate.metrics import metrics_of
from rear_scale.evaluate.metrics.base import FeatureSet, Inputs
from rear_scale.evaluate.metrics.moments import Moments
from rear_scale.evaluate.metrics.statistics_file import is_ours, write_statistics
from rear_scale.evaluate.networks import check_network_names, rows_in_use, statistics_arrays
from rear_scale.evaluate.networks.base import Extractor, FeatureNetwork
from rear_scale.evaluate.networks.classifier import (
    ClassifierFeatures,
    check_same_training,
    class_names,
    train_classifier,
)
from rear_scale.evaluate.networks.feature_cache import FeatureBlocks, Part, extract, feature_folder, is_complete
from rear_scale.evaluate.networks.inception import INCEPTION
from rear_scale.evaluate.networks.pixels import NearestPixels
from rear_scale.evaluate.reference import RESIZED, Reference, check_reference, open_reference, read_reference
from rear_scale.evaluate.result import ClassifierScores, ImageScores, SetScores
from rear_scale.evaluate.scores import network_scores, run_metrics
from rear_scale.locks import locked
from rear_scale.progress import say
from rear_scale.shards.classes import check_same_classes
from rear_scale.world import World


def check_evaluation(cfg: ExperimentConfig, statistics: Path | None = None) -> None:
    """Raises InputError when no reference or no network is set, or one of their files is missing.

    statistics: the file that `write_statistics` will write, which needs a network but no reference.
    """
    evaluate = cfg.evaluate
    all_checks(
        lambda: _check_compared(cfg, statistics),
        lambda: _check_features(cfg),
        *(partial(row.check, evaluate) for row in rows_in_use(evaluate)),
        lambda: check_network_names(evaluate),
        *(partial(check_reference, name, path) for name, path in evaluate.reference.items()),
    )


def _check_compared(cfg: ExperimentConfig, statistics: Path | None) -> None:
    if statistics is not None:
        _check_statistics_file(cfg, statistics)
    elif not cfg.evaluate.reference:
        raise InputError(
            "evaluate.reference is empty. Set evaluate.reference.NAME=PATH to an .npz, a folder of images or tar shards to "
            "compare with"
        )


def _check_features(cfg: ExperimentConfig) -> None:
    classifier = cfg.evaluate.classifier
    if classifier is None and not rows_in_use(cfg.evaluate):
        raise InputError(
            "no feature network is set, so images cannot be compared. Set evaluate.inception_weights to the path of "
            f"{INCEPTION.name}, published at {INCEPTION.source} (or for images unlike ImageNet's "
            "evaluate.efficientnet_weights=package, or evaluate.classifier, as configs/demo.yaml has it)"
        )
    if classifier is not None and not Path(classifier.weights).exists() and not Path(classifier.images).exists():
        raise InputError(
            f"not found: evaluate.classifier.images={classifier.images}, which the classifier is trained on, as "
            f"evaluate.classifier.weights={classifier.weights} is not there either. Set one of them, or evaluate.classifier=null"
        )


def missing_inputs(cfg: ExperimentConfig) -> list[str]:
    """The settings that a config lacks for an evaluation, as overrides with a placeholder for the file."""
    evaluate = cfg.evaluate
    found = [] if evaluate.reference else ["evaluate.reference.NAME=REFERENCE"]
    if evaluate.classifier is None and not rows_in_use(evaluate):
        found.append(f"evaluate.inception_weights={INCEPTION.name}")
    return found


def _check_statistics_file(cfg: ExperimentConfig, path: Path) -> None:
    if path.suffix != ".npz" or path.is_dir():
        raise InputError(
            f"--write-statistics {path} {'is a folder' if path.is_dir() else 'does not end in .npz'}. Name a file such as "
            "reference.npz"
        )
    if path.is_file() and path.stat().st_size > 0 and not is_ours(path):
        raise InputError(
            f"--write-statistics {path} exists and does not hold statistics of rear_scale. Choose another file, or move that one"
        )
    if not rows_in_use(cfg.evaluate):
        raise InputError(
            f"--write-statistics {path} needs the features of a published network, and none is set. Set "
            f"evaluate.inception_weights to the path of {INCEPTION.name}, published at {INCEPTION.source}, or "
            "evaluate.dinov2_weights"
        )


class Evaluation:
    """The networks and references of a config. All ranks must construct it and call its methods."""

    def __init__(self, cfg: ExperimentConfig, cache: Path, world: World) -> None:
        self.cfg, self.world = cfg, world
        self.cache = Path(cfg.evaluate.cache_dir) if cfg.evaluate.cache_dir else cache
        self.networks = open_networks(cfg, world)
        self.classifier = _open_classifier(cfg, world)
        self.small_sets: dict[str, ImageSet] = {}  # the references of a classifier, which fit in memory
        self.nearest: NearestPixels | None = None
        if self.classifier is not None:
            self.small_sets = {
                name: open_image_set(path, world, self.classifier.image_size, cfg.evaluate.exif)
                for name, path in cfg.evaluate.reference.items()
            }
            for name, images in self.small_sets.items():
                check_class_names(cfg, f"evaluate.reference.{name}", images)
            self.nearest = NearestPixels(self.small_sets)
        # features of small_sets, by name of the set and of the extractor; None before they are first needed
        self.small_features: dict[str, dict[str, FeatureSet]] | None = None
        self.references: dict[int, list[Reference]] = {}  # by image size of the samples

    def score(self, samples: ImageSet) -> ImageScores:
        """All scores of a set of images against every reference."""
        if self.classifier is not None:
            _check_sizes(samples, self.small_sets)
            check_class_names(self.cfg, samples.name, samples)
        # Open references before the samples, so that a wrong reference fails before 50,000 images are generated.
        references = self._references_for(samples) if self.networks else []
        # Extract the features of all networks in one pass, so that images are generated only once.
        features = self._extract(samples, self.extractors())
        classifier = None if self.classifier is None else self._classifier_scores(samples, features)
        if not self.networks:
            return ImageScores(classifier)
        return ImageScores(
            classifier,
            {
                network.name: network_scores(network, features[network.name], references, self.cfg.evaluate, self.world)
                for network in self.networks
            },
            reference_sets={reference.name: reference.describe() for reference in references},
            labels=_label_counts(features[self.networks[0].name]),
        )

    def _extract(self, images: ImageSet, extractors: Sequence[Extractor]) -> dict[str, FeatureBlocks]:
        """The features of images, by name of the extractor."""
        features = extract(images, extractors, self.cache, self.cfg.evaluate.batch_size, self.world)
        return {extractor.name: blocks for extractor, blocks in zip(extractors, features, strict=True)}

    def extract_part(self, samples: ImageSet, part: Part) -> bool:
        """Whether the features of samples and references are complete, after computing one part of them (for split jobs)."""
        batch_size = self.cfg.evaluate.batch_size
        feature_sets = [extract(samples, self.extractors(), self.cache, batch_size, self.world, part)]
        for name, path in self.cfg.evaluate.reference.items() if self.networks else ():
            _, images = read_reference(name, path, self.networks, samples.height, self.world, self.cfg.evaluate.exif)
            if images is not None:
                feature_sets.append(extract(images, self.networks, self.cache, batch_size, self.world, part))
        self.world.barrier()
        return self.world.on_main(lambda: all(map(is_complete, feature_sets)))

    def remove_features(self, samples: ImageSet) -> None:
        """Removes the stored features of a set. Must be called by one rank, when no other rank reads them any more."""
        for extractor in self.extractors():
            folder = feature_folder(samples, extractor, self.cache, self.cfg.evaluate.batch_size)
            shutil.rmtree(folder, ignore_errors=True)

    def extractors(self) -> Sequence[Extractor]:
        """All extractors of the samples' features."""
        return [*self.networks, *self._small_extractors()]

    def _small_extractors(self) -> list[Extractor]:
        return [part for part in (self.classifier, self.nearest) if part is not None]

    def write_statistics(self, images: ImageSet, path: Path, part: Part | None = None) -> bool:
        """Writes means and covariances of a set's features, as a reference for other evaluations.

        part: compute only this part of the features. Returns whether the file was written, which needs all parts. Raises
        InputError for fewer than two images, which have no covariance.
        """
        if images.count < 2:
            raise InputError(
                f"{images.name} holds {images.count} image, which has no covariance. Use at least two, better many images"
            )
        feature_sets = extract(images, self.networks, self.cache, self.cfg.evaluate.batch_size, self.world, part)
        complete = self.world.on_main(lambda: is_complete(feature_sets))
        if self.world.is_main and complete:
            moments: dict[str, Moments] = {}
            identities: dict[str, str] = {}
            for network, blocks in zip(self.networks, feature_sets, strict=True):
                for feature in [name for name in network.sizes if name in statistics_arrays()]:
                    own = FeatureSet(images.name, blocks, self.world.device).moments(feature)
                    assert own is not None, images.count
                    moments[feature], identities[feature] = own, network.identity
            write_statistics(
                path,
                moments,
                identities,
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

    def _classifier_scores(self, samples: ImageSet, features: dict[str, FeatureBlocks]) -> ClassifierScores:
        """Scores of the samples by the config's own classifier, and those of the references against each other for comparison."""
        settings = self.cfg.evaluate.classifier
        assert self.classifier is not None
        assert settings is not None
        if self.small_features is None:
            extractors = self._small_extractors()
            self.small_features = {
                name: self._feature_sets(name, self._extract(images, extractors))
                for name, images in self.small_sets.items()
            }
        return ClassifierScores(
            f"penultimate layer of the classifier {settings.weights} (sha256 {self.classifier.weights_sha256[:16]})",
            self._small_scores(samples, self._feature_sets(samples.name, features)),
            {name: self._small_scores(images, self.small_features[name]) for name, images in self.small_sets.items()},
        )

    def _feature_sets(self, name: str, features: dict[str, FeatureBlocks]) -> dict[str, FeatureSet]:
        return {extractor: FeatureSet(name, blocks, self.world.device) for extractor, blocks in features.items()}

    def _small_scores(self, images: ImageSet, features: dict[str, FeatureSet]) -> SetScores:
        """The scores of one set against all references other than the set itself."""
        assert self.small_features is not None
        others = [name for name, other in self.small_sets.items() if other.identity != images.identity]
        of_samples: dict[str, Any] = {}
        by_reference: dict[str, dict[str, float | None]] = {}
        for extractor in self._small_extractors():
            metrics = metrics_of(extractor.name)
            sets = [self.small_features[name][extractor.name] for name in others]
            inputs = Inputs(extractor, features[extractor.name], sets, self.cfg.evaluate, self.world)
            values = run_metrics(metrics, inputs)
            of_samples |= values.of_samples
            by_reference |= {
                metric.name: {name: values.by_reference[name][metric.name] for name in others}
                for metric in metrics
                if metric.against_references
            }
        return SetScores(images.count, of_samples, by_reference)


def open_networks(cfg: ExperimentConfig, world: World) -> list[FeatureNetwork]:
    """The networks whose weights are set. Raises InputError for a missing, damaged or foreign weight file."""
    networks = [row.open(cfg.evaluate, world.device) for row in rows_in_use(cfg.evaluate)]
    for network in networks:
        if network.is_published is False and world.is_main:
            say(
                f"warning: the weights of {network.name} (sha256 {network.weights_sha256[:8]}) are not the published ones: "
                "these scores cannot be compared with published scores"
            )
    return networks


def _open_classifier(cfg: ExperimentConfig, world: World) -> ClassifierFeatures | None:
    classifier = cfg.evaluate.classifier
    if classifier is None:
        return None
    path = Path(classifier.weights)
    if world.is_main and not path.exists():
        # Evaluations at the same time must have one classifier: two of them, trained on other machines, differ by rounding.
        with locked(path.with_name(f".{path.name}.lock")):
            if not path.exists():
                train_classifier(classifier, world.device, cfg.tokenizer.image_size)
    world.barrier()
    features = ClassifierFeatures(classifier, world.device)
    world.on_main(lambda: check_same_training(classifier, cfg.tokenizer.image_size))
    return features


def _label_counts(blocks: FeatureBlocks) -> dict[str, Any] | None:
    """The number of images of each class; None when the images have no classes."""
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
            f"{RESIZED} from its own size, so the distance includes a difference in sharpness"
        )
        reference.notes.append(note)
        if world.is_main:
            say(f"warning: {note}")


def check_class_names(cfg: ExperimentConfig, what: str, images: ImageSet) -> None:
    """Raises InputError when a set numbers its classes differently from the images that the classifier was trained on."""
    trained_on = cfg.evaluate.classifier
    if trained_on is None or images.class_names is None:
        return
    names = class_names(trained_on)
    if names is None:
        return  # the training images may be deleted once the classifier is trained
    check_same_classes(f"evaluate.classifier.images={trained_on.images}", names, what, images.class_names)


def _check_sizes(samples: ImageSet, references: dict[str, ImageSet]) -> None:
    for name, reference in references.items():
        if (samples.height, samples.width) != (reference.height, reference.width):
            raise InputError(
                f"{samples.name} holds images of {samples.width}x{samples.height}, but evaluate.reference.{name} holds images of "
                f"{reference.width}x{reference.height}. Compare with images of the same size"
            )
