"""Distances of two sets of features or images, in float64; and codebook use."""

# n samples, F features, S side in pixels, K codes

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from rear_scale.evaluate.metrics.moments import Moments


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Fréchet distance of the Gaussians with these moments (FID, where the features are Inception's).

    Heusel et al. 2017, arXiv:1706.08500. The trace of the root of S1 S2 is the nuclear norm of S1^1/2 S2^1/2, which needs
    symmetric eigenvalues only and holds for singular covariances. Equal moments give exactly 0.
    """
    if torch.equal(a.mean, b.mean) and torch.equal(a.covariance, b.covariance):
        return 0.0
    root_trace = torch.linalg.svdvals(a.factor @ b.factor.T).sum()
    traces = a.covariance.trace() + b.covariance.trace()
    return ((a.mean - b.mean).square().sum() + traces - 2 * root_trace).item()


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """PSNR in dB of pairs of images (uint8 [n, S, S, 3] each), float64 [n]; infinite for equal images.

    Peak 255, one value per image: papers report the mean of these values, not the PSNR of the mean error.
    """
    assert a.dtype == b.dtype == np.uint8, (a.dtype, b.dtype)
    errors = np.square(a.astype(np.float64) - b).mean((1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255**2 / errors)


# As in the released evaluation. It lowers the entropy by up to 1e-8 * K / ln 2 bits, in published figures too.
_ENTROPY_EPSILON = 1e-8


@dataclass(frozen=True)
class CodebookUse:
    """The use of a codebook by a set of tokens."""

    used: float  # fraction of the codes that occur
    entropy: float  # of their distribution, in bits; at most log2 K


def codebook_use(counts: np.ndarray) -> CodebookUse:
    """The use of a codebook. counts: int [K], how often each code occurs."""
    fractions = counts[counts > 0] / counts.sum()
    return CodebookUse(len(fractions) / len(counts), float(-(fractions * np.log2(fractions + _ENTROPY_EPSILON)).sum()))
