"""Scores of several training seeds, each with several sampling seeds: their variance in two parts, and differences of two such
sets.

A score of training seed i and sampling seed j is taken as mean + training_i + sampling_ij, with independent effects (a
random-effects model). Training seeds are what a claim about a method varies over, so an interval rests on their means: Welch's
interval, with the degrees of freedom of Satterthwaite 1946. That is too narrow where one method has two seeds and the other more,
or twice as many and more: up to 12% of panels without a difference then call one. There, the interval is that of Cochran and Cox
(1950, section 4.14), which calls at most 6%. The FID Lottery (arXiv:2606.20536) shows why sampling seeds alone
do not suffice.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rear_scale.scaling.scipy_part import scipy_part

_LEVEL = 0.05  # of the test, and 1 - the coverage of the interval
_POWER = 0.8
_MOST_SEEDS = 1000


@dataclass(frozen=True)
class SeedNoise:
    """The scores of one method."""

    mean: float  # over training seeds, of the means over their sampling seeds
    seeds: int  # training seeds
    seed_variance: float | None  # variance of the means of training seeds; None = one seed
    sampling_sd: float | None  # None = one sampling seed each
    training_sd: (
        float | None
    )  # the part of the seeds' spread that sampling does not explain; None = one of both is unknown


def seed_noise(scores: Sequence[Sequence[float]]) -> SeedNoise:
    """The mean and the parts of the variance of scores by training seed and sampling seed.

    Each training seed has at least one score, and all count alike. A part that would come out negative is 0.
    """
    assert scores, "no training seeds"
    assert all(scores), scores
    means = np.array([np.mean(row) for row in scores])
    seed_variance = float(means.var(ddof=1)) if len(scores) > 1 else None
    freedom = sum(len(row) - 1 for row in scores)
    if not freedom:
        return SeedNoise(float(means.mean()), len(scores), seed_variance, None, None)
    sampling = sum(float(np.square(np.array(row) - np.mean(row)).sum()) for row in scores) / freedom
    training_sd = None
    if seed_variance is not None:
        of_sampling = sampling * float(np.mean([1 / len(row) for row in scores]))
        training_sd = math.sqrt(max(0.0, seed_variance - of_sampling))
    return SeedNoise(float(means.mean()), len(scores), seed_variance, math.sqrt(sampling), training_sd)


@dataclass(frozen=True)
class Difference:
    """The second method's mean minus the first's."""

    value: float
    low: float | None  # of the 95% interval; None = one of the methods has one training seed
    high: float | None
    seeds_needed: (
        int | None
    )  # training seeds of each that show a difference of this size with 80% power; None = over 1,000

    @property
    def verdict(self) -> str:
        """`larger`, `smaller` or `not distinguishable`: what holds for the second method against the first at the 5% level."""
        if self.low is not None and self.low > 0:
            return "larger"
        if self.high is not None and self.high < 0:
            return "smaller"
        return "not distinguishable"  # also where a score is not a number

    @property
    def words(self) -> str:
        """The verdict, and where the difference is not distinguishable, the seeds that would show one of this size."""
        if self.low is None:
            return f"{self.verdict}: one training seed says nothing about the next"
        if self.low == self.high == 0:
            return f"{self.verdict}: all scores are equal"
        if self.verdict != "not distinguishable":
            return self.verdict
        needed = f"{self.seeds_needed:,}" if self.seeds_needed is not None else f"more than {_MOST_SEEDS:,}"
        return f"{self.verdict}; {needed} seeds each would show a difference of this size"


def difference(first: SeedNoise, second: SeedNoise) -> Difference:
    """The difference of two methods with its 95% interval. Raises InputError where scipy is missing."""
    value = second.mean - first.mean
    rounding = (
        8 * np.finfo(np.float64).eps * max(abs(first.mean), abs(second.mean))
    )  # by which means of equal scores differ
    if abs(value) <= rounding:
        value = 0.0
    if first.seed_variance is None or second.seed_variance is None:
        return Difference(value, None, None, None)
    parts = first.seed_variance / first.seeds, second.seed_variance / second.seeds
    half = 0.0
    if not sum(parts) <= rounding**2:
        half = _errors(parts, (first.seeds, second.seeds)) * math.sqrt(sum(parts))
    needed = seeds_needed(value, first.seed_variance, second.seed_variance)
    return Difference(value, value - half, value + half, needed)


def _errors(parts: tuple[float, float], seeds: tuple[int, int]) -> float:
    """Half of the width of the interval in standard errors. parts: the variances of both means."""
    fewer, more = sorted(seeds)
    if fewer < more and (fewer == 2 or more >= 2 * fewer):
        each = [part * _quantile(1 - _LEVEL / 2, count - 1) for part, count in zip(parts, seeds, strict=True)]
        return sum(each) / sum(parts)
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / (seeds[0] - 1) + parts[1] ** 2 / (seeds[1] - 1))
    return _quantile(1 - _LEVEL / 2, freedom)


def seeds_needed(value: float, first: float, second: float) -> int | None:
    """The training seeds of each method with which a difference is found in 80% of panels; None = more than 1,000.

    first, second: the variances of the methods' seeds, which count as known.
    """
    variance = first + second
    if variance == 0:
        return 2
    freedom_per_seed = variance**2 / (first**2 + second**2)

    def shows(seeds: int) -> bool:
        freedom = freedom_per_seed * (seeds - 1)
        wanted = _quantile(1 - _LEVEL / 2, freedom) + _quantile(_POWER, freedom)
        return abs(value) >= wanted * math.sqrt(variance / seeds)

    seeds = 2 + bisect_left(range(2, _MOST_SEEDS + 1), True, key=shows)
    return seeds if seeds <= _MOST_SEEDS else None


def _quantile(share: float, freedom: float) -> float:
    """Of Student's t distribution."""
    return float(scipy_part("special").stdtrit(freedom, share))
