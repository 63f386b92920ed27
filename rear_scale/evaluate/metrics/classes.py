"""Scores of small images by the config's own classifier, and their distance to the nearest images of the references."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rear_scale.evaluate.metrics.base import Column, Inputs, ReferenceMetric, ReferenceSet, SampleMetric
from rear_scale.evaluate.metrics.distances import frechet_distance


class ClassAccuracy(SampleMetric):
    """The fraction of images that the classifier assigns to their class; None where the images have no classes."""

    name = "class_accuracy"
    network = "classifier"
    label, digits = "class accuracy of the samples", 3
    columns = (Column("accuracy", 3, lambda values: values.get("class_accuracy")),)

    def score(self, inputs: Inputs) -> float | None:
        labels, classes = inputs.samples.column("label"), inputs.samples.column("classes")
        assert classes is not None, "the classifier gives a class to each image"
        return None if labels is None else float((classes == labels).mean())


class ClassifierDistance(ReferenceMetric):
    """The Fréchet distance on the classifier's penultimate layer."""

    name = "frechet_distance"
    network = "classifier"
    label, digits = "Fréchet distance to the {reference} images", 2
    columns = (Column("Fréchet", 2, lambda values: values.get("frechet_distance")),)

    def score(self, inputs: Inputs, reference: ReferenceSet) -> float | None:
        own, other = inputs.samples.moments("features"), reference.moments("features")
        return None if own is None or other is None else frechet_distance(own, other)

    def numbers(self, values: Mapping[str, Any]) -> dict[str, float | None]:
        return {"classifier_frechet_distance": values.get(self.name)}


class NearestDistance(ReferenceMetric):
    """The mean distance to the nearest image of a reference, in grey levels."""

    name = "nearest_distance"
    network = "pixels"
    label, digits = "distance to the nearest {reference} image", 1
    columns = (Column("nearest", 1, lambda values: values.get("nearest_distance")),)

    def score(self, inputs: Inputs, reference: ReferenceSet) -> float:
        distances = inputs.samples.column(reference.name)
        assert distances is not None
        return float(distances.mean())
