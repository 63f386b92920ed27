"""Differences of sets of scores by training seed and sampling seed, drawn with known variances."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rear_scale.scaling.seed_noise import difference, seed_noise, seeds_needed


def _drawn(
    generator: np.random.Generator, mean: float, training: float, sampling: float, seeds: int
) -> list[list[float]]:
    """Scores of some training seeds with two sampling seeds each."""
    of_seeds = generator.normal(mean, training, (seeds, 1))
    return (of_seeds + generator.normal(0, sampling, (seeds, 2))).tolist()


def _share(verdict: str, gap: float, seeds: int, spreads: tuple[float, float], cases: int) -> float:
    """The share of simulated panels with a verdict. spreads: standard deviations of the training seeds of both methods."""
    generator = np.random.default_rng(0)
    found = 0
    for _ in range(cases):
        methods = [_drawn(generator, mean, sd, 0.5, seeds) for mean, sd in zip((0.0, gap), spreads, strict=True)]
        found += difference(*map(seed_noise, methods)).verdict == verdict
    return found / cases


@pytest.mark.parametrize("spreads", [(1.0, 1.0), (0.2, 1.0), (0.0, 0.0)])
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_panels_without_a_difference_call_one_in_at_most_7_percent(seeds: int, spreads: tuple[float, float]) -> None:
    called = 1 - _share("not distinguishable", 0.0, seeds, spreads, cases=500)
    assert called <= 0.07
    if seeds == 5:
        assert called >= 0.02  # the level is used, and not only kept


def test_a_true_difference_is_found_with_the_seeds_that_it_needs() -> None:
    variance = 1.0 + 0.5**2 / 2  # of the mean of a seed
    seeds = seeds_needed(2.0, variance, variance)
    assert seeds is not None
    assert 4 <= seeds <= 8
    assert 0.75 <= _share("larger", 2.0, seeds, (1.0, 1.0), cases=500) <= 0.9
    assert _share("smaller", -2.0, seeds, (1.0, 1.0), cases=200) >= 0.7
    assert _share("larger", 2.0, 2, (1.0, 1.0), cases=200) < 0.5


def test_95_percent_intervals_cover_the_difference() -> None:
    generator = np.random.default_rng(1)
    inside = 0
    for _ in range(500):
        found = difference(*(seed_noise(_drawn(generator, mean, 1.0, 0.5, 3)) for mean in (0.0, 3.0)))
        assert found.low is not None
        assert found.high is not None
        inside += found.low <= 3.0 <= found.high
    assert 0.93 <= inside / 500 <= 0.99


def test_the_variance_is_split_into_training_and_sampling() -> None:
    generator = np.random.default_rng(2)
    found = seed_noise((generator.normal(0, 3.0, (4000, 1)) + generator.normal(0, 2.0, (4000, 2))).tolist())
    assert found.training_sd == pytest.approx(3.0, rel=0.03)
    assert found.sampling_sd == pytest.approx(2.0, rel=0.03)
    assert found.seed_variance == pytest.approx(9.0 + 4.0 / 2, rel=0.05)
    # By hand: means 1 and 5, whose variance is 8; within a seed 2 each, of which the means hold a half.
    by_hand = seed_noise([[0.0, 2.0], [4.0, 6.0]])
    assert (by_hand.mean, by_hand.seed_variance) == (3.0, 8.0)
    assert by_hand.sampling_sd == pytest.approx(2**0.5)
    assert by_hand.training_sd == pytest.approx(7**0.5)
    assert seed_noise([[0.0, 10.0], [10.0, 0.0]]).training_sd == 0.0


def test_the_interval_is_that_of_welch() -> None:
    from scipy import stats

    first, second = [[1.0], [2.0], [4.0]], [[3.0], [3.5], [7.0], [8.0]]
    found = difference(seed_noise(first), seed_noise(second))
    other = stats.ttest_ind(np.ravel(second), np.ravel(first), equal_var=False).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((other.low, other.high))


def test_verdicts_in_words() -> None:
    same = seed_noise([[1.0], [1.1], [0.9]])
    assert difference(same, seed_noise([[2.0], [2.1], [1.9]])).words == "larger"
    assert difference(same, seed_noise([[0.0], [0.1], [-0.1]])).words == "smaller"
    near = difference(same, seed_noise([[1.05], [1.15], [0.95]]))
    assert near.words == f"not distinguishable; {near.seeds_needed} seeds each would show a difference of this size"
    assert near.seeds_needed > 30
    assert "more than 1,000 seeds" in difference(same, seed_noise([[1.0001], [1.1], [0.9]])).words
    assert "one training seed says nothing" in difference(same, seed_noise([[9.0, 9.1]])).words
    exact = difference(seed_noise([[1.0], [1.0]]), seed_noise([[2.0], [2.0]]))  # scores without any spread
    assert (exact.low, exact.high, exact.verdict) == (1.0, 1.0, "larger")


@pytest.mark.parametrize(("seeds", "spreads"), [((2, 3), (1.0, 0.2)), ((2, 10), (1.0, 0.5)), ((3, 20), (1.0, 0.5))])
def test_panels_of_unequal_numbers_of_seeds_call_no_more(seeds: tuple[int, int], spreads: tuple[float, float]) -> None:
    """Welch's interval alone calls 9 to 12% there."""
    generator, called = np.random.default_rng(0), 0
    for _ in range(500):
        methods = [_drawn(generator, 0.0, sd, 0.0, count) for sd, count in zip(spreads, seeds, strict=True)]
        called += difference(*map(seed_noise, methods)).verdict != "not distinguishable"
    assert called <= 0.07 * 500


def test_scores_that_are_equal_or_no_numbers_show_no_difference() -> None:
    same = difference(seed_noise([[0.1]] * 3), seed_noise([[0.1]] * 2))
    assert same.verdict == "not distinguishable"
    assert (
        difference(seed_noise([[0.1]] * 3), seed_noise([[0.1]] * 3)).words
        == "not distinguishable: all scores are equal"
    )
    # Means of three and of seven equal scores differ in the last bit.
    one, two = seed_noise([[0.1 * 3 / 3]] * 2), seed_noise([[0.3 / 3 + 1e-17]] * 2)
    assert difference(one, replace(two, mean=float(np.nextafter(one.mean, 1)))).verdict == "not distinguishable"
    assert difference(seed_noise([[1.0], [2.0]]), seed_noise([[np.nan], [1.0]])).verdict == "not distinguishable"
