"""Means and covariances from running sums."""

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
    count: int | None  # number of images; None = not known (published statistics do not state it)

    @cached_property
    def factor(self) -> Tensor:
        """A factor of the covariance, float64 [rank, F]: factor.T @ factor is the covariance. One row per eigenvalue that is
        larger than rounding errors."""
        values, vectors = torch.linalg.eigh(self.covariance)
        kept = values > values[-1] * len(values) * torch.finfo(torch.float64).eps
        return values[kept].sqrt()[:, None] * vectors.T[kept]

    @property
    def is_singular(self) -> bool:
        """Whether the covariance has too few images for full rank."""
        return self.count is not None and self.count <= len(self.mean)


class MomentSums:
    """Running float64 sums of features. The last bits depend on the order of the blocks, so that order must be fixed.

    Differences from `shift` are summed, because with large means the squares would cancel and lose a small variance.
    """

    def __init__(self, num_features: int, device: torch.device | None = None, shift: Tensor | None = None) -> None:
        """shift: float64 [F], near the mean; None = the mean of the first block."""
        self.shift = shift
        self.count = 0
        self.total = torch.zeros(num_features, dtype=torch.float64, device=device)
        self.products = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)

    def add(self, features: Tensor, weights: Tensor | None = None) -> None:
        """Adds rows. features: float [n, F]; weights: float64 [n], how often each row counts (integers); None = once."""
        block = features.to(self.total.device).double()
        if self.shift is None:
            self.shift = block.mean(0)
        block = block - self.shift
        weighted = block if weights is None else block * weights.to(block.device)[:, None]
        self.count += len(block) if weights is None else int(weights.sum())
        self.total += weighted.sum(0)
        self.products += weighted.T @ block

    def add_sums(self, other: MomentSums) -> None:
        """Adds other sums with the same shift."""
        assert self.shift is other.shift
        self.count += other.count
        self.total += other.total
        self.products += other.products

    def moments(self) -> Moments:
        """The moments, on the CPU. Needs at least two rows."""
        assert self.shift is not None
        mean = self.total / self.count
        covariance = (self.products - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return Moments((self.shift + mean).cpu(), covariance.cpu(), self.count)


def moments_of(parts: Iterable[np.ndarray], device: torch.device | None = None) -> Moments:
    """The moments of features that come in blocks (float [n, F] each)."""
    sums: MomentSums | None = None
    for part in parts:
        sums = sums or MomentSums(part.shape[1], device)
        sums.add(torch.from_numpy(part))
    assert sums is not None
    return sums.moments()
