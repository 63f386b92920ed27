"""The Monge Inception Distance on Gaussians, whose sliced Wasserstein distance is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rear_scale.evaluate.metrics.sliced import random_directions, sliced_distance

IMAGES, WIDTH = 2000, 16


def _gaussian(seed: int, mean: float = 0.0, deviation: float = 1.0) -> torch.Tensor:
    rows = np.random.default_rng(seed).normal(mean, deviation, (IMAGES, WIDTH))
    return torch.from_numpy(rows.astype(np.float32))


@pytest.mark.parametrize(("mean", "deviation"), [(0.5, 1.0), (0.0, 1.5), (0.3, 0.5)])
def test_the_distance_is_that_of_means_and_deviations(mean: float, deviation: float) -> None:
    directions = random_directions(WIDTH, np.random.default_rng(0))
    assert directions.norm(dim=1).numpy() == pytest.approx(1, abs=1e-5)
    one = _gaussian(1)
    # Moved and stretched rows keep their order on every line, so no sorting is needed to tell the distance.
    other = deviation * one + mean
    by_hand = 3 * WIDTH * ((other - one) @ directions.T).double().square().mean().item()
    assert sliced_distance(one, other, directions) == pytest.approx(by_hand, rel=1e-4)
    # Of the distributions themselves: the sum of a direction has the mean square 1 on the sphere.
    truth = 3 * WIDTH * (mean**2 + (deviation - 1) ** 2)
    assert by_hand == pytest.approx(truth, rel=0.1)
    assert sliced_distance(one, _gaussian(2, mean, deviation), directions) == pytest.approx(truth, rel=0.15)


def test_the_distance_of_a_set_with_itself_in_any_order_is_0_and_it_is_symmetric() -> None:
    directions = random_directions(WIDTH, np.random.default_rng(0))
    one, other = _gaussian(1), _gaussian(2, 0.3)
    assert sliced_distance(one, one.flip(0), directions) == pytest.approx(0, abs=1e-9)
    assert sliced_distance(one, other, directions) == sliced_distance(other, one, directions)
    same = sliced_distance(one, _gaussian(3), directions)  # two samples of one distribution
    assert same < 0.1 * sliced_distance(one, other, directions)


def test_the_directions_by_parts_are_all_directions() -> None:
    directions = random_directions(WIDTH, np.random.default_rng(0))[:250]
    one, other = _gaussian(1)[:50], _gaussian(2, 0.3)[:50]
    by_hand = ((one @ directions.T).sort(0).values - (other @ directions.T).sort(0).values).double().square().mean()
    assert sliced_distance(one, other, directions) == pytest.approx(3 * WIDTH * by_hand.item(), rel=1e-6)
