"""Bootstrap intervals of scores, from resamplings of the scored images; the references stay as they are."""

# n images

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_INTERVAL = (2.5, 97.5)  # percentiles
_SHARE_DRAWS = 1000


def resampling(seed: int, draw: int, count: int) -> np.ndarray:
    """int64 [n]: how often each image counts in one draw of n images with replacement."""
    return np.random.default_rng([seed, 2, draw]).multinomial(count, np.full(count, 1 / count))


def share_draws(seed: int) -> np.random.Generator:
    """The random numbers for `share_interval`."""
    return np.random.default_rng([seed, 3])


def share_interval(share: float, count: int, generator: np.random.Generator) -> dict[str, float]:
    """The interval of the mean of `count` 0/1 flags, whose bootstrap distribution is binomial."""
    return interval(share, generator.binomial(count, share, _SHARE_DRAWS) / count)


def interval(value: float, draws: Sequence[float] | np.ndarray) -> dict[str, float]:
    """The basic bootstrap interval, 95 %: percentiles mirrored about the value, because resampling biases distances upwards."""
    low, high = np.percentile(draws, _INTERVAL)
    return {"low": float(2 * value - high), "high": float(2 * value - low), "std": float(np.std(draws, ddof=1))}
