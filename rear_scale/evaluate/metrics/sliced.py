"""The Monge Inception Distance (MIND): sliced optimal transport between the features of two sets of images.

Berthet et al. 2026, arXiv:2605.06797, with the scale of torch-fidelity's implementation: 3 F times the mean over random
directions of the squared Wasserstein distance of the projections. It needs neither means nor covariances, and fewer images than
a Fréchet distance; like that one it falls with their number, so only scores of equally many images compare.
"""

# n images, F values of a feature

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rear_scale.evaluate.metrics.base import Inputs, ReferenceMetric, ReferenceSet
from rear_scale.evaluate.networks.base import exact_arithmetic

_DIRECTIONS = 1000
_AT_ONCE = 100  # directions
_IMAGES = 5000  # of each set at most: the number that the paper proposes


def sliced_distance(a: Tensor, b: Tensor, directions: Tensor) -> float:
    """The distance of two sets of features, float [n, F] each, by directions float [M, F] of unit length. 0 for equal sets."""
    assert a.shape == b.shape, (a.shape, b.shape)
    total = 0.0
    for part in directions.split(_AT_ONCE):
        first, second = ((rows @ part.T).sort(dim=0).values for rows in (a, b))
        total += (first - second).double().square().mean(0).sum().item()
    return 3 * a.shape[1] * total / len(directions)


def random_directions(width: int, generator: np.random.Generator) -> Tensor:
    """Directions float32 [M, F], uniform on the sphere."""
    normal = generator.standard_normal((_DIRECTIONS, width))
    return torch.from_numpy((normal / np.linalg.norm(normal, axis=1, keepdims=True)).astype(np.float32))


class SlicedDistance(ReferenceMetric):
    """The distance on one feature, from as many images of both sets, at most 5,000 evenly chosen ones of each. The directions
    depend on evaluate.seed alone. Holds the feature of both sets in memory."""

    def __init__(self, name: str, network: str, feature: str) -> None:
        self.name, self.network, self.feature = name, network, feature

    def score(self, inputs: Inputs, reference: ReferenceSet) -> dict[str, Any] | None:
        other = reference.rows(self.feature)
        count = 0 if other is None else min(len(other), inputs.samples.count, _IMAGES)
        if count < 2:
            return None
        sets = [inputs.samples.rows(self.feature, count), reference.rows(self.feature, count)]
        features = [torch.from_numpy(np.asarray(rows[0:count], np.float32)) for rows in sets if rows is not None]
        directions = random_directions(features[0].shape[1], np.random.default_rng([inputs.cfg.seed, 5]))
        with exact_arithmetic():
            value = sliced_distance(*(part.to(inputs.world.device) for part in (*features, directions)))
        return {"value": value, "images": count}

    def numbers(self, values: Mapping[str, Any]) -> dict[str, float | None]:
        return {self.name: (values.get(self.name) or {}).get("value")}
