"""Mean and covariance from streamed sums."""

# n rows, F features

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    mean: Tensor  # float64 [F]
    covariance: Tensor  # float64 [F, F], normalised by N - 1
    count: int


class MomentSums:
    """Adds blocks of features in float64. The order of the blocks is part of the result's last bits: keep it fixed."""

    def __init__(self, num_features: int) -> None:
        self.count = 0
        self.total = torch.zeros(num_features, dtype=torch.float64)
        self.products = torch.zeros(num_features, num_features, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """features: float [n, F]."""
        block = features.double()
        self.count += len(block)
        self.total += block.sum(0)
        self.products += block.T @ block

    def moments(self) -> Moments:
        """Needs at least two rows."""
        mean = self.total / self.count
        covariance = (self.products - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return Moments(mean, covariance, self.count)
