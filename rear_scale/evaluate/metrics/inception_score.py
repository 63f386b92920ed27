"""The Inception Score over consecutive splits in image order, as in the ADM evaluation."""

# n images, C classes of the network (1,008)

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from rear_scale.evaluate.metrics.base import Column, FeatureSet, Inputs, SampleMetric

SPLIT_IMAGES = 5000


@dataclass(frozen=True)
class InceptionScore:
    """An Inception Score with its values per split."""

    value: float  # mean over the splits, among which a shorter last split has the same weight
    std: float  # standard deviation over the splits; NaN with one split
    per_split: list[float]  # values of the splits that have images
    one_split: float  # value with all images as one split


class InceptionScoreSums:
    """Running float64 sums for the Inception Score: exp of the mean KL divergence of p(y|x) from its mean (Salimans et al. 2016,
    arXiv:1606.03498).

    Image i belongs to split i // 5000 for any order of the additions; only the last bits depend on that order. There is no
    epsilon: a class of probability 0 contributes 0.
    """

    def __init__(self, count: int, num_classes: int) -> None:
        """count: the total number of images."""
        splits = -(-count // SPLIT_IMAGES)
        self.images = torch.zeros(splits, dtype=torch.float64)
        self.probabilities = torch.zeros(splits, num_classes, dtype=torch.float64)
        self.negative_entropy = torch.zeros(splits, dtype=torch.float64)

    def add(self, logits: Tensor, ids: Tensor, weights: Tensor | None = None) -> None:
        """Adds images. logits: float [n, C]; ids: int64 [n], image numbers; weights: float64 [n], how often each image counts."""
        log_p = logits.double().log_softmax(1)
        p = log_p.exp()
        # With log_softmax, 0 * log 0 is 0: p underflows to 0 while log_p stays finite.
        negative_entropy = (p * log_p).sum(1)
        weights = torch.ones(len(ids), dtype=torch.float64) if weights is None else weights
        splits = ids // SPLIT_IMAGES
        for split in torch.unique(splits).tolist():
            rows = splits == split
            weight = weights[rows].to(p.device)
            self.images[split] += weights[rows].sum()
            self.probabilities[split] += (p[rows.to(p.device)] * weight[:, None]).sum(0).cpu()
            self.negative_entropy[split] += (negative_entropy[rows.to(p.device)] * weight).sum().cpu()

    def score(self) -> InceptionScore:
        # A bootstrap draw may leave a short last split without images.
        per_split = [
            _score(*parts)
            for parts in zip(self.images, self.probabilities, self.negative_entropy, strict=True)
            if parts[0] > 0
        ]
        return InceptionScore(
            value=math.fsum(per_split) / len(per_split),
            std=float(np.std(per_split, ddof=1)) if len(per_split) > 1 else math.nan,
            per_split=per_split,
            one_split=_score(self.images.sum(), self.probabilities.sum(0), self.negative_entropy.sum()),
        )


def _score(images: Tensor, probabilities: Tensor, negative_entropy: Tensor) -> float:
    mean = probabilities / images
    return (negative_entropy / images - torch.special.xlogy(mean, mean).sum()).exp().item()


def unbalanced_splits(labels: np.ndarray) -> list[int]:
    """The splits whose class distribution differs from that of all images (labels int [n]).

    The measure is the total variation distance; the limit is twice its expected value for random labels. A file sorted by
    class lowers the score several times.
    """
    _, classes = np.unique(labels, return_inverse=True)
    overall = np.bincount(classes) / len(classes)
    unbalanced = []
    for split, start in enumerate(range(0, len(classes), SPLIT_IMAGES)):
        part = classes[start : start + SPLIT_IMAGES]
        distance = np.abs(np.bincount(part, minlength=len(overall)) / len(part) - overall).sum() / 2
        at_random = math.sqrt(len(overall) / (2 * math.pi * len(part)))
        if distance > 2 * at_random:
            unbalanced.append(split)
    return unbalanced


class _Classifies(Protocol):
    classifier: Tensor  # float64 [C, F]: features @ classifier.T are the logits


class InceptionScoreMetric(SampleMetric):
    """The Inception Score metric, from the features before the network's output layer; with the value for one split."""

    name = "inception_score"
    network = "inception"
    feature = "pool"
    columns = (Column("IS", 1, lambda values: values.get("inception_score", {}).get("value"), "inception_score", 1),)
    resamples = True

    def score(self, inputs: Inputs) -> dict[str, Any]:
        inception_score = self._score(inputs)
        described = asdict(inception_score) | {
            "std": None if len(inception_score.per_split) < 2 else inception_score.std,
            "split_images": SPLIT_IMAGES,
        }
        warning = self._warning(inputs.samples, cast("_Classifies", inputs.network))
        return described if warning is None else {**described, "warning": warning}

    def resampled(self, inputs: Inputs, weights: np.ndarray) -> dict[str | None, float | None]:
        return {None: self._score(inputs, weights).value}

    def numbers(self, values: Mapping[str, Any]) -> dict[str, float | None]:
        return {self.name: values.get(self.name, {}).get("value")}

    def training_numbers(self, values: Mapping[str, Any]) -> dict[str, float | None]:
        return {self.name: values.get(self.name, {}).get("one_split")}

    def _score(self, inputs: Inputs, weights: np.ndarray | None = None) -> InceptionScore:
        """The score of the samples. weights: int64 [n], how often each image counts; None = once."""
        network = cast("_Classifies", inputs.network)
        sums = InceptionScoreSums(inputs.samples.count, len(network.classifier))
        for ids, features in inputs.samples.parts(self.feature):
            chosen = None if weights is None else torch.from_numpy(weights[ids]).double()
            sums.add(_logits(network, features), torch.from_numpy(ids), chosen)
        return sums.score()

    def _warning(self, samples: FeatureSet, network: _Classifies) -> str | None:
        labels, known = samples.column("label"), "classes"
        if labels is None:
            predicted = [(ids, _logits(network, part).argmax(1)) for ids, part in samples.parts(self.feature)]
            order = np.argsort(np.concatenate([ids for ids, _ in predicted]))
            labels = np.concatenate([classes.cpu().numpy() for _, classes in predicted])[order]
            known = "predicted classes (the images have no labels)"
        unbalanced = unbalanced_splits(labels)
        if not unbalanced:
            return None
        return (
            f"the {known} of splits {unbalanced} are not distributed as those of all images, which lowers the score: mix the "
            f"classes in the order of the images (image i of class i mod C), or use the one-split value"
        )


def _logits(network: _Classifies, features: np.ndarray) -> Tensor:
    """Logits float64 [n, C] from features [n, F]."""
    return torch.from_numpy(features).to(network.classifier.device).double() @ network.classifier.T
