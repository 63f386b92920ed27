"""Mean and covariance from streamed sums."""

# n rows, F features

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of a feature over a set of images."""

    mean: Tensor  # float64 [F]
    covariance: Tensor  # float64 [F, F], normalised by N - 1
    count: int | None  # images; null = not known (published statistics do not say)

    @cached_property
    def factor(self) -> Tensor:
        """float64 [rank, F] whose Gram matrix factor.T @ factor is the covariance: one row per eigenvalue above rounding."""
        values, vectors = torch.linalg.eigh(self.covariance)
        kept = values > values[-1] * len(values) * torch.finfo(torch.float64).eps
        return values[kept].sqrt()[:, None] * vectors.T[kept]

    @property
    def is_singular(self) -> bool:
        """Whether there were too few images for a covariance of full rank."""
        return self.count is not None and self.count <= len(self.mean)


class MomentSums:
    """Adds blocks of features in float64. The order of the blocks is part of the result's last bits: keep it fixed.

    What is summed are differences from `shift`, because squares far from zero would swallow a small variance.
    """

    def __init__(self, num_features: int, device: torch.device | None = None, shift: Tensor | None = None) -> None:
        """shift: float64 [F], near the mean; null = the mean of the first block."""
        self.shift = shift
        self.count = 0
        self.total = torch.zeros(num_features, dtype=torch.float64, device=device)
        self.products = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)

    def add(self, features: Tensor, weights: Tensor | None = None) -> None:
        """features: float [n, F]; weights: float64 [n], how often each row counts (whole numbers)."""
        block = features.to(self.total.device).double()
        if self.shift is None:
            self.shift = block.mean(0)
        block = block - self.shift
        weighted = block if weights is None else block * weights.to(block.device)[:, None]
        self.count += len(block) if weights is None else int(weights.sum())
        self.total += weighted.sum(0)
        self.products += weighted.T @ block

    def add_sums(self, other: MomentSums) -> None:
        """Of the same shift."""
        assert self.shift is other.shift
        self.count += other.count
        self.total += other.total
        self.products += other.products

    def moments(self) -> Moments:
        """Needs at least two rows. On the CPU."""
        assert self.shift is not None
        mean = self.total / self.count
        covariance = (self.products - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return Moments((self.shift + mean).cpu(), covariance.cpu(), self.count)


def moments_of(parts: Iterable[np.ndarray], device: torch.device | None = None) -> Moments:
    """Of features that come in parts (float [n, F] each), in their order."""
    sums: MomentSums | None = None
    for part in parts:
        sums = sums or MomentSums(part.shape[1], device)
        sums.add(torch.from_numpy(part))
    assert sums is not None
    return sums.moments()
