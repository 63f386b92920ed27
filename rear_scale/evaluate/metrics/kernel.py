"""The kernel distance on the features of a network: KID, where these are Inception's.

Bińkowski et al. 2018, arXiv:1801.01401: the unbiased estimate of the squared maximum mean discrepancy under the kernel
(x . y / F + 1)^3, averaged over subsets. Unlike a Fréchet distance it has no bias at few images.
"""

# n images, F values of a feature

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rear_scale.evaluate.metrics.base import Column, Inputs, ReferenceMetric, ReferenceSet
from rear_scale.evaluate.networks.base import exact_arithmetic

_SUBSETS = 100
_SUBSET_IMAGES = 1000


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """The unbiased estimate for two sets of features (float [n, F] and [m, F], at least two rows each); may be negative.

    Products are taken in the precision of the features, sums in float64.
    """
    assert min(len(a), len(b)) > 1, (len(a), len(b))
    within = sum(_off_diagonal_mean(_kernel(rows, rows)) for rows in (a, b))
    return within - 2 * _kernel(a, b).mean().item()


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    """The kernel of each pair of rows, float64 [n, m]."""
    return ((a @ b.T).double() / a.shape[1] + 1).pow(3)


def _off_diagonal_mean(kernel: Tensor) -> float:
    count = len(kernel)
    return (kernel.sum() - kernel.diagonal().sum()).item() / (count * (count - 1))


class KernelDistance(ReferenceMetric):
    """The kernel distance on one feature: the mean over 100 pairs of subsets of 1,000 images, and their standard deviation.

    Sets of at most 1,000 images are compared once, as they are. Holds the feature of both sets in memory.
    """

    digits = 5

    def __init__(
        self, name: str, network: str, feature: str, title: str | None = None, images: int | None = None
    ) -> None:
        """title: the title of its column in the printed table; None = no column. images: so many evenly chosen ones of each set,
        where it has more; None = all."""
        self.name, self.network, self.feature, self.images = name, network, feature, images
        if title is not None:
            self.columns = (Column(title, self.digits, lambda values: (values.get(name) or {}).get("value")),)

    def score(self, inputs: Inputs, reference: ReferenceSet) -> dict[str, Any] | None:
        other = reference.rows(self.feature, self.images)
        if other is None or min(len(other), inputs.samples.count) < 2:
            return None
        own = inputs.samples.rows(self.feature, self.images)
        features = [torch.from_numpy(np.asarray(rows[0 : len(rows)], np.float32)) for rows in (own, other)]
        # One stream per comparison, so that the subsets of one reference do not depend on how many others there are.
        generator = np.random.default_rng([inputs.cfg.seed, 4])
        count = 1 if max(map(len, features)) <= _SUBSET_IMAGES else _SUBSETS
        values = []
        with exact_arithmetic():
            for _ in range(count):
                a, b = (_subset(rows, generator).to(inputs.world.device) for rows in features)
                values.append(kernel_distance(a, b))
        return {
            "value": float(np.mean(values)),
            "subset_std": float(np.std(values, ddof=1)) if count > 1 else None,
            "subsets": count,
        }

    def numbers(self, values: Mapping[str, Any]) -> dict[str, float | None]:
        return {self.name: (values.get(self.name) or {}).get("value")}


def _subset(rows: Tensor, generator: np.random.Generator) -> Tensor:
    """A random subset of at most 1,000 rows, without replacement."""
    return rows[torch.from_numpy(generator.permutation(len(rows))[:_SUBSET_IMAGES])]
