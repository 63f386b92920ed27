"""Scores of two sets of features, in float64."""

# n samples, m reference images, F features

from __future__ import annotations

import torch
from torch import Tensor

from rear_scale.evaluate.moments import Moments


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Fréchet distance of the Gaussians with these moments (FID, where the features are Inception's).

    Heusel et al. 2017, arXiv:1706.08500. The trace of the root of S1 S2 is the nuclear norm of S1^1/2 S2^1/2, which needs
    symmetric eigenvalues only and holds for singular covariances.
    """
    root_trace = torch.linalg.svdvals(_root(a.covariance) @ _root(b.covariance)).sum()
    traces = a.covariance.trace() + b.covariance.trace()
    return ((a.mean - b.mean).square().sum() + traces - 2 * root_trace).item()


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    # Rounding may leave a zero eigenvalue slightly negative.
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def nearest_distances(samples: Tensor, reference: Tensor, chunk: int = 256) -> Tensor:
    """float64 [n]: root mean square difference of each sample to the nearest reference row, in the rows' own unit.

    samples: [n, F]; reference: [m, F].
    """
    reference = reference.double()
    return (
        torch.cat([torch.cdist(part.double(), reference).min(1).values for part in samples.split(chunk)])
        / samples.shape[1] ** 0.5
    )
