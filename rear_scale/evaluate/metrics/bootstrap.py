"""Bootstrap intervals of scores, by resampling the scored images; the references are not resampled."""

# n images

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_INTERVAL = (2.5, 97.5)  # percentiles
_FRACTION_DRAWS = 1000


def resampling(seed: int, draw: int, count: int) -> np.ndarray:
    """Bootstrap weights int64 [n]: how often each image occurs in one draw of n images with replacement."""
    return np.random.default_rng([seed, 2, draw]).multinomial(count, np.full(count, 1 / count))


def fraction_draws(seed: int) -> np.random.Generator:
    """The random generator for `fraction_interval`."""
    return np.random.default_rng([seed, 3])


def fraction_interval(fraction: float, count: int, generator: np.random.Generator) -> dict[str, float]:
    """The interval of the mean of `count` 0/1 flags, whose bootstrap distribution is binomial."""
    return interval(fraction, generator.binomial(count, fraction, _FRACTION_DRAWS) / count)


def interval(value: float, draws: Sequence[float] | np.ndarray) -> dict[str, float]:
    """The basic bootstrap interval (95%): percentiles mirrored at the value, because resampling biases distances upwards."""
    low, high = np.percentile(draws, _INTERVAL)
    return {"low": float(2 * value - high), "high": float(2 * value - low), "std": float(np.std(draws, ddof=1))}
