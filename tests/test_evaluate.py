from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import run_alone, run_ranks
from PIL import Image
from scipy.linalg import sqrtm

from rear_scale import config
from rear_scale.config import ClassifierConfig, ExperimentConfig, InputError
from rear_scale.evaluate import job
from rear_scale.evaluate.classifier import ClassifierFeatures, train_classifier
from rear_scale.evaluate.metrics import frechet_distance, nearest_distances
from rear_scale.evaluate.moments import MomentSums
from rear_scale.evaluate.npz import read_samples
from rear_scale.interop.npz import write_samples
from rear_scale.shards.images import open_images, write_images
from rear_scale.world import World


def moments(features: np.ndarray):
    return job.moments(np.asarray(features))


def test_streamed_moments_equal_numpy() -> None:
    features = np.random.default_rng(0).standard_normal((1234, 7)).astype(np.float32) * 3 + 100
    found = moments(features)
    assert found.count == 1234
    assert np.allclose(found.mean, features.astype(np.float64).mean(0), rtol=1e-13)
    assert np.allclose(found.covariance, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-9)


def test_blocks_may_be_of_any_size() -> None:
    features = torch.randn(100, 5, dtype=torch.float64)
    whole, parts = MomentSums(5), MomentSums(5)
    whole.add(features)
    for part in features.split(7):
        parts.add(part)
    assert torch.allclose(whole.moments().covariance, parts.moments().covariance, rtol=1e-12)


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


def test_frechet_distance_of_known_gaussians() -> None:
    features = np.random.default_rng(0).standard_normal((400, 6))
    one = moments(features)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-10)
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


def some_images(count: int, seed: int = 0) -> np.ndarray:
    """Images whose class (number mod 3) is the bright third of the picture."""
    images = np.random.default_rng(seed).integers(0, 60, (count, 12, 12, 3), dtype=np.uint8)
    for number in range(count):
        images[number, :, 4 * (number % 3) : 4 * (number % 3) + 4] += 150
    return images


def test_samples_are_written_and_read_in_the_adm_form(tmp_path: Path) -> None:
    images, labels = some_images(25), np.arange(25) % 3
    for name in ("a", "b"):
        write_samples(tmp_path / f"{name}.npz", (images[start : start + 10] for start in (0, 10, 20)), 25, 12, labels)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert np.array_equal(np.load(tmp_path / "a.npz")["arr_0"], images)
    assert zipfile.ZipFile(tmp_path / "a.npz").testzip() is None
    found, found_labels = read_samples(tmp_path / "a.npz")
    assert isinstance(found, np.memmap)
    assert np.array_equal(found, images)
    assert np.array_equal(found_labels, labels)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "numpy.npz", arr_0=images)
        found, found_labels = read_samples(tmp_path / "numpy.npz")
        assert np.array_equal(found, images)
        assert found_labels is None


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"arr_0": np.zeros((2, 8, 8, 3), np.float32)}, "arr_0 is float32"),
        ({"arr_0": np.zeros((2, 3, 8, 8), np.uint8)}, "channels last"),
        ({"arr_0": np.zeros((0, 8, 8, 3), np.uint8)}, "holds no images"),
        ({"images": np.zeros((2, 8, 8, 3), np.uint8)}, "has no arr_0"),
        ({"arr_0": np.zeros((2, 8, 8, 3), np.uint8), "label": np.zeros(3)}, "3 labels for 2 images"),
        ({"arr_0": np.array([{}], dtype=object)}, "cannot be read"),
    ],
)
def test_unsuitable_samples_are_named(tmp_path: Path, arrays: dict[str, np.ndarray], expected: str) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(InputError, match=expected):
        read_samples(tmp_path / "bad.npz")


def test_missing_and_truncated_samples_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not found"):
        read_samples(tmp_path / "none.npz")
    np.savez(tmp_path / "whole.npz", arr_0=some_images(5))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:-50])
    with pytest.raises(InputError, match="Is it complete"):
        read_samples(tmp_path / "cut.npz")


def evaluation(folder: Path) -> ExperimentConfig:
    """Reference sets of 90 and 60 images, and a classifier to train on the first."""
    for name, count, seed in (("training", 90, 0), ("validation", 60, 1)):
        if not (folder / name).exists():
            images = ((Image.fromarray(image), n % 3) for n, image in enumerate(some_images(count, seed)))
            write_images(folder / name, images, 12, ["a", "b", "c"])
    return config.load(
        "demo.yaml",
        [
            f"evaluate.reference={{training: {folder / 'training'}, validation: {folder / 'validation'}}}",
            f"evaluate.classifier={{weights: {folder / 'classifier'}, images: {folder / 'training'}, steps: 60}}",
            "evaluate.batch_size=16",
        ],
    )


def _score(world: World, cfg: ExperimentConfig, samples: Path, cache: Path) -> dict:
    job.BLOCK_IMAGES = 20
    return job.score_images(cfg, job.from_npz(samples), cache, world)


def test_scores_do_not_depend_on_ranks_or_kills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "BLOCK_IMAGES", 20)
    cfg = evaluation(tmp_path)
    images = some_images(50, seed=2)
    write_samples(tmp_path / "samples.npz", iter([images]), 50, 12, np.arange(50) % 3)
    expected = run_alone(_score, cfg, tmp_path / "samples.npz", tmp_path / "cache1")
    for scores in run_ranks(2, _score, cfg, tmp_path / "samples.npz", tmp_path / "cache2"):
        assert scores == expected
    blocks = sorted((tmp_path / "cache1").rglob("block_*.npz"))
    assert len(blocks) == 3 + 5 + 3
    blocks[4].unlink()
    assert run_alone(_score, cfg, tmp_path / "samples.npz", tmp_path / "cache1") == expected
    found = expected["samples"]
    assert found["count"] == 50
    assert found["class_accuracy"] > 0.9
    assert set(found["frechet_distance"]) == set(found["nearest_distance"]) == {"training", "validation"}
    assert set(expected["references"]["training"]["frechet_distance"]) == {"validation"}


def test_copies_have_distance_zero_and_noise_scores_worse(tmp_path: Path) -> None:
    cfg = evaluation(tmp_path)
    copies, labels = open_images(tmp_path / "validation").load()
    noise = np.random.default_rng(5).integers(0, 256, copies.shape, dtype=np.uint8)
    scores = {}
    for name, images in (("copies", copies), ("noise", noise)):
        write_samples(tmp_path / f"{name}.npz", iter([images]), 60, 12, labels)
        scores[name] = run_alone(_score, cfg, tmp_path / f"{name}.npz", tmp_path / "cache")["samples"]
    assert scores["copies"]["nearest_distance"]["validation"] == 0
    assert scores["copies"]["frechet_distance"]["validation"] == pytest.approx(0, abs=1e-6)
    assert scores["noise"]["frechet_distance"]["validation"] > 10 * scores["copies"]["frechet_distance"]["training"]
    assert scores["noise"]["class_accuracy"] < 0.7


def test_images_of_another_size_and_missing_settings_are_named(tmp_path: Path) -> None:
    cfg = evaluation(tmp_path)
    job.check_evaluation(cfg)
    write_samples(tmp_path / "large.npz", iter([np.zeros((2, 24, 24, 3), np.uint8)]), 2, 24, np.zeros(2))
    with pytest.raises(InputError, match="24x24, but evaluate.reference.(training|validation) of 12x12"):
        run_alone(_score, cfg, tmp_path / "large.npz", tmp_path / "cache")
    values = config.to_dict(cfg)
    values["evaluate"]["reference"] = {}
    with pytest.raises(InputError, match="evaluate.reference is empty"):
        job.check_evaluation(config.from_dict(values, "test"))
    with pytest.raises(InputError, match="evaluate.classifier is not set"):
        job.check_evaluation(config.from_dict(config.to_dict(cfg), "test", ["evaluate.classifier=null"]))


def test_the_classifier_learns_and_refuses_foreign_files(tmp_path: Path) -> None:
    evaluation(tmp_path)
    cfg = ClassifierConfig(str(tmp_path / "weights"), str(tmp_path / "training"), steps=60)
    train_classifier(cfg, torch.device("cpu"))
    images, labels = open_images(tmp_path / "validation").load()
    found = ClassifierFeatures(cfg, torch.device("cpu"))(images)
    assert (found["classes"] == labels).mean() > 0.9
    assert found["features"].shape == (60, 64)
    (tmp_path / "weights").write_bytes(b"no")
    with pytest.raises(InputError, match="cannot be read"):
        ClassifierFeatures(cfg, torch.device("cpu"))
