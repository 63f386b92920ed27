"""Means over training seeds with their 95% intervals (Student's t)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and the ends of its interval; None = one seed alone, which has no interval."""

    mean: float
    low: float | None
    high: float | None
    seeds: int


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean of values of independent seeds, with the interval of Student's t."""
    mean = statistics.fmean(values)
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return Interval(mean, None, None, len(values))
    half = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half, len(values))


def difference_interval(first: Sequence[float], second: Sequence[float]) -> Interval:
    """The difference of two means of independent seeds, with Welch's interval. seeds: those of the smaller group."""
    difference = statistics.fmean(first) - statistics.fmean(second)
    seeds = min(len(first), len(second))
    if seeds < 2 or not all(map(math.isfinite, (*first, *second))):
        return Interval(difference, None, None, seeds)
    errors = [statistics.variance(values) / len(values) for values in (first, second)]
    if sum(errors) == 0:
        return Interval(difference, difference, difference, seeds)
    # Welch-Satterthwaite, rounded down to whole degrees of freedom, which widens the interval.
    freedom = sum(errors) ** 2 / sum(
        error**2 / (len(values) - 1) for error, values in zip(errors, (first, second), strict=True)
    )
    half = t_quantile(max(1, math.floor(freedom))) * math.sqrt(sum(errors))
    return Interval(difference, difference - half, difference + half, seeds)


@cache
def t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """The t with P(|T| < t) = confidence, for Student's distribution with this many degrees of freedom."""
    low, high = 0.0, 1.0
    while _within(high, freedom) < confidence:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < confidence else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """P(|T| < t), by the finite series for whole degrees of freedom (Abramowitz & Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    square = math.cos(angle) ** 2
    term = 1.0 if freedom % 2 == 0 else math.cos(angle)
    total = 0.0 if freedom == 1 else term
    for k in range(2 + freedom % 2, freedom - 1, 2):
        term *= square * (k - 1) / k
        total += term
    total *= math.sin(angle)
    return total if freedom % 2 == 0 else 2 / math.pi * (angle + total)
