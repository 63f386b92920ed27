"""Post-hoc EMA of EDM2 (Karras et al. 2023, arXiv:2312.02696, section 3 and appendix C), as pure functions.

Training keeps averages of the weights with power-function profiles (Eq. 121) for a few lengths, and stores snapshots of them.
An average of any other length is a linear combination of the snapshots, whose factors are found afterwards by least squares on
the profiles (Eq. 125 to 127). Lengths are given by sigma_rel, the standard deviation of a profile relative to the training time
(Eq. 123).

Times count applied updates. A profile of the update rule (`keep`) weights the weights after update k by the integral of the
continuous profile over (k - 1, k], so the formulas of the paper hold here without an approximation.
"""

# n snapshots

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from rear_scale.config import OptimConfig

LONGEST = 1 / math.sqrt(12)  # sigma_rel of gamma = 0, the mean over the whole run
_PREFIX = "posthoc_ema_"
# Directions in which profiles of the snapshots differ by less than float64 tells apart are left out of the solution.
_RELATIVE_CUTOFF = 1e-12


def state_names(optim: OptimConfig) -> tuple[str, ...]:
    """The names of the averages of optim.posthoc_ema among the stored states, in its order."""
    return state_names_of(len(optim.posthoc_ema))


def state_names_of(count: int) -> tuple[str, ...]:
    """The names of so many averages."""
    return tuple(f"{_PREFIX}{number}" for number in range(1, count + 1))


def averages(optim: OptimConfig) -> tuple[str, ...]:
    """The names of all averages of the weights among the stored states: "ema" of optim.ema_decay, and `state_names`."""
    return (*(("ema",) if optim.ema_decay else ()), *state_names(optim))


def is_average(state_name: str) -> bool:
    """Whether a state of a checkpoint is an average of the weights, as opposed to a state of an optimizer."""
    return state_name == "ema" or state_name.startswith(_PREFIX)


def new_fractions(optim: OptimConfig, updates: int) -> dict[str, float]:
    """The fraction of the new weights in each of `averages`, 1 - beta, at an update (from 1)."""
    fractions = {"ema": 1 - optim.ema_decay} if optim.ema_decay else {}
    for name, sigma_rel in zip(state_names(optim), optim.posthoc_ema, strict=True):
        fractions[name] = 1 - keep(updates, gamma_of(sigma_rel))
    return fractions


def keep(updates: int, gamma: float) -> float:
    """beta of Eq. 122 at an update (from 1): the fraction of the average that is kept, (1 - 1 / t) ** (gamma + 1)."""
    return (1 - 1 / updates) ** (gamma + 1)


def sigma_rel_of(gamma: float) -> float:
    """Eq. 123: the standard deviation of the profile t ** gamma on [0, 1]."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def gamma_of(sigma_rel: float) -> float:
    """The exponent of a profile (algorithm 2): the largest root of gamma^3 + 7 gamma^2 + (16 - s) gamma + 12 - s, with
    s = sigma_rel ** -2."""
    s = sigma_rel**-2
    return float(np.roots([1, 7, 16 - s, 12 - s]).real.max())


def factors(times: Sequence[float], gammas: Sequence[float], time: float, gamma: float) -> tuple[np.ndarray, float]:
    """The factors (float64 [n]) of snapshots for the profile of `gamma` at `time`, and the relative error of the profile.

    times, gammas: those of the snapshots, none later than `time`. Algorithm 3 of the paper minimizes the squared distance of
    the profiles. Here the factors also add up to 1, as every profile does, so that what does not change in training is
    reproduced exactly: without this, an error of the profile also scales the weights. The error is the distance over the
    norm of the wanted profile; 0 = exact.
    """
    t, g = np.asarray(times, np.float64), np.asarray(gammas, np.float64)
    products = profile_product(t[:, None], g[:, None], t[None], g[None])
    last, wide = np.asarray(time, np.float64), np.asarray(gamma, np.float64)
    wanted = profile_product(t, g, last, wide)
    # Profiles are scaled to norm 1, because early snapshots have much larger ones.
    norms = np.sqrt(np.diag(products))
    inverse = np.linalg.pinv(products / norms[:, None] / norms, rcond=_RELATIVE_CUTOFF, hermitian=True)
    free, ones = inverse @ (wanted / norms) / norms, inverse @ (1 / norms) / norms
    x = free + ones * (1 - free.sum()) / ones.sum()
    norm = profile_product(last, wide, last, wide)
    squared = 1 - (2 * wanted @ x - x @ products @ x) / norm
    return x, math.sqrt(max(0.0, float(squared)))


def profile_product(t_a: np.ndarray, gamma_a: np.ndarray, t_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """The integral over the product of two profiles at their times (Eq. 126, algorithm 3), broadcast as numpy does."""
    exponent = np.where(t_a < t_b, gamma_b, -gamma_a)
    numerator = (gamma_a + 1) * (gamma_b + 1) * (t_a / t_b) ** exponent
    return np.asarray(numerator / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b)))
