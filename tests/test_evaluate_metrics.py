"""Scores of features and images, where their value is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import run_ranks
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist

from rear_scale.config import InputError
from rear_scale.evaluate.metrics import precision_recall as neighbours
from rear_scale.evaluate.metrics.distances import codebook_use, frechet_distance, psnr
from rear_scale.evaluate.metrics.inception_score import InceptionScoreSums, unbalanced_splits
from rear_scale.evaluate.metrics.moments import Moments, MomentSums, moments_of
from rear_scale.evaluate.metrics.precision_recall import overlap, radii
from rear_scale.evaluate.networks.pixels import nearest_distances
from rear_scale.world import World


def moments(features: np.ndarray) -> Moments:
    return moments_of([features])


def test_streamed_moments_equal_numpy() -> None:
    features = np.random.default_rng(0).standard_normal((1234, 7)).astype(np.float32) * 3 + 100
    found = moments_of(features[start : start + 100] for start in range(0, 1234, 100))
    assert found.count == 1234
    assert np.allclose(found.mean, features.astype(np.float64).mean(0), rtol=1e-13)
    assert np.allclose(found.covariance, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-9)


def test_a_small_variance_far_from_zero_is_kept() -> None:
    features = np.random.default_rng(0).standard_normal((600, 5)) * 1e-3 + 1e4
    found = moments_of(features[start : start + 100] for start in range(0, 600, 100))
    assert np.allclose(found.covariance, np.cov(features, rowvar=False), rtol=1e-9, atol=1e-15)
    constant = moments_of([np.full((10, 5), 1e4)] * 3)
    assert not constant.covariance.any()
    expected = found.covariance.trace() + (found.mean - 1e4).square().sum()
    assert frechet_distance(found, constant) == pytest.approx(expected.item(), rel=1e-9)


def test_weights_count_rows_several_times() -> None:
    features = torch.randn(50, 5)
    weights = torch.arange(50) % 3
    weighted, repeated = MomentSums(5), MomentSums(5)
    weighted.add(features, weights.double())
    repeated.add(features.repeat_interleave(weights, 0))
    assert weighted.count == repeated.count
    assert torch.allclose(weighted.moments().covariance, repeated.moments().covariance, rtol=1e-12)


@pytest.mark.parametrize("count", [500, 20])
def test_frechet_distance_equals_the_matrix_root_formula(count: int) -> None:
    generator = np.random.default_rng(0)
    a, b = (
        generator.standard_normal((count, 30)),
        generator.standard_normal((count, 30)) @ generator.standard_normal((30, 30)) + 1,
    )
    one, other = moments(a), moments(b)
    s1, s2 = one.covariance.numpy(), other.covariance.numpy()
    expected = ((one.mean - other.mean) ** 2).sum().item() + np.trace(s1 + s2 - 2 * sqrtm(s1 @ s2).real)
    # With fewer samples than features the covariances are singular, where the matrix root is only good to 1e-5.
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-9 if count > 30 else 1e-5)
    assert frechet_distance(one, other) == pytest.approx(frechet_distance(other, one), rel=1e-10)
    assert one.is_singular == (count <= 30)


def test_frechet_distance_of_known_gaussians() -> None:
    features = np.random.default_rng(0).standard_normal((400, 6))
    one = moments(features)
    assert frechet_distance(one, one) == 0.0
    assert frechet_distance(one, moments(features.copy())) == 0.0
    assert frechet_distance(one, moments(features + 2)) == pytest.approx(6 * 4, rel=1e-10)
    # Twice the deviation: (2 - 1)^2 of the trace, and the means differ by one mean.
    doubled = moments(features * 2)
    assert frechet_distance(one, doubled) == pytest.approx(
        (one.covariance.trace() + one.mean.square().sum()).item(), rel=1e-10
    )


def test_nearest_distance_is_the_smallest_root_mean_square() -> None:
    samples, reference = torch.randint(256, (10, 12)), torch.randint(256, (30, 12))
    expected = ((samples[:, None].double() - reference.double()) ** 2).mean(2).sqrt().min(1).values
    assert torch.allclose(nearest_distances(samples, reference, chunk=3), expected, atol=1e-6)
    assert nearest_distances(reference[:4], reference).max() == 0


def test_psnr_and_codebook_use_of_known_cases() -> None:
    a = np.zeros((3, 4, 4, 3), np.uint8)
    b = a.copy()
    b[1], b[2] = 1, 255
    # uint8 differences must not wrap around.
    assert psnr(a, b).tolist() == pytest.approx([math.inf, 20 * math.log10(255), 0])
    even = codebook_use(np.array([5, 5, 0, 5, 5, 0, 0, 0]))
    assert even.used == 0.5
    assert even.entropy == pytest.approx(2.0, abs=1e-6)


def inception_score(logits: torch.Tensor) -> InceptionScoreSums:
    sums = InceptionScoreSums(*logits.shape)
    sums.add(logits, torch.arange(len(logits)))
    return sums


def test_inception_score_is_the_number_of_equally_likely_certain_classes() -> None:
    logits = torch.nn.functional.one_hot(torch.arange(12_000) % 8, 8).double() * 1e4
    score = inception_score(logits).score()
    assert score.value == pytest.approx(8, rel=1e-12)
    assert len(score.per_split) == 3
    assert inception_score(torch.zeros(100, 8)).score().value == pytest.approx(1, rel=1e-12)
    assert math.isnan(inception_score(torch.zeros(100, 8)).score().std)


def test_weights_of_the_inception_score_count_images_several_times() -> None:
    logits, weights = torch.randn(300, 6, dtype=torch.float64), torch.arange(300) % 3
    weighted = InceptionScoreSums(300, 6)
    weighted.add(logits, torch.arange(300), weights.double())
    repeated = inception_score(logits.repeat_interleave(weights, 0))
    assert weighted.score().value == pytest.approx(repeated.score().value, rel=1e-12)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (np.arange(50_000) % 1000, []),
        (np.arange(50_000) // 50, list(range(10))),
        (np.random.default_rng(0).integers(0, 1000, 50_000), []),
        (np.random.default_rng(0).integers(0, 1000, 700), []),
        (np.where(np.arange(50_000) // 5000 % 2, 500, 0) + np.arange(50_000) % 500, list(range(10))),
    ],
    ids=["cyclic", "sorted", "random", "short", "half of the classes"],
)
def test_splits_of_other_classes_are_found(labels: np.ndarray, expected: list[int]) -> None:
    assert unbalanced_splits(labels) == expected


def brute_force(reference: np.ndarray, samples: np.ndarray) -> dict[str, float]:
    """From full distance matrices in float64."""
    own = [np.sort(cdist(x, x, "sqeuclidean"), 1)[:, 3] for x in (reference, samples)]
    between = cdist(reference, samples, "sqeuclidean")
    in_reference = between <= own[0][:, None]
    return {
        "precision": in_reference.any(0).mean(),
        "recall": (between <= own[1]).any(1).mean(),
        "density": in_reference.sum() / (3 * len(samples)),
        "coverage": in_reference.any(1).mean(),
    }


@pytest.mark.parametrize("sizes", [(40, 60), (130, 90)])
def test_neighbour_scores_equal_full_matrices(monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int]) -> None:
    # Parts smaller than the sets, and not dividing them.
    monkeypatch.setattr(neighbours, "_ROWS", 32)
    monkeypatch.setattr(neighbours, "_COLUMNS", 48)
    monkeypatch.setattr(neighbours, "_ADM_BLOCK", 96)
    generator = np.random.default_rng(0)
    reference, samples = (generator.standard_normal((size, 12)).astype(np.float32) for size in sizes)
    expected = brute_force(reference, samples)
    for mode, slack in (("exact", 1e-12), ("adm_fp16", 0.1)):
        found = overlap(reference, samples, radii(reference, mode), radii(samples, mode), mode)
        for name, value in expected.items():
            assert getattr(found, name) == pytest.approx(value, abs=slack), (mode, name)


def test_identical_and_distant_sets_are_told_apart() -> None:
    features = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
    for mode in ("exact", "adm_fp16"):
        own = radii(features, mode)
        same = overlap(features, features, own, own, mode)
        assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
        far = overlap(features, features + 100, own, radii(features + 100, mode), mode)
        assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)


def test_halves_that_overflow_are_done_in_single_precision() -> None:
    features = np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32) * 60
    assert np.square(features).sum(1).max() > 65504
    assert torch.equal(radii(features, "adm_fp16"), radii(features, "exact"))
    small = features / 60
    assert not torch.equal(radii(small, "adm_fp16"), radii(small, "exact"))


def test_three_images_have_no_third_neighbour() -> None:
    with pytest.raises(InputError, match="3 images have no 3rd neighbour"):
        radii(np.zeros((3, 4), np.float32), "exact")


def _neighbours(world: World, reference: np.ndarray, samples: np.ndarray) -> list:
    neighbours._ROWS, neighbours._COLUMNS = 32, 48
    found = []
    for mode in ("exact", "adm_fp16"):
        own = [radii(rows, mode, world) for rows in (reference, samples)]
        both = overlap(reference, samples, *own, mode, world)
        found += [own[0].tolist(), own[1].tolist(), both.sample_inside.tolist(), both.density, both.coverage]
    return found


def test_neighbour_scores_do_not_depend_on_ranks() -> None:
    generator = np.random.default_rng(0)
    reference, samples = (generator.standard_normal((size, 20)).astype(np.float32) for size in (130, 90))
    one, two = run_ranks(1, _neighbours, reference, samples), run_ranks(3, _neighbours, reference, samples)
    assert two == one * 3
