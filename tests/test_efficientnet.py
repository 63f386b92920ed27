"""EfficientNet-Lite0's features, and the distances that are taken on them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_evaluate_jobs import launch_here

from rear_scale.config import InputError
from rear_scale.evaluate.metrics.kernel import kernel_distance
from rear_scale.evaluate.networks.efficientnet import EfficientNetFeatures, packaged_weights
from rear_scale.evaluate.result import read_result

GOLDEN = json.loads((Path(__file__).parent / "golden/efficientnet_lite0.json").read_text())


@pytest.fixture(scope="module")
def network() -> EfficientNetFeatures:
    return EfficientNetFeatures(str(packaged_weights()), torch.device("cpu"))


def test_features_are_those_of_the_package_for_pytorch(network: EfficientNetFeatures) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    images[1] = np.linspace(0, 255, 224, dtype=np.uint8)[:, None, None]
    found = network(images)["average"]
    assert found.shape == (2, 1280)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[:, ::64], GOLDEN["every_64th"], atol=2e-5)
    np.testing.assert_allclose(found.mean(1), GOLDEN["mean"], rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), GOLDEN["norm"], rtol=1e-5)
    assert network.is_published


def test_another_file_and_images_of_one_channel_are_refused(network: EfficientNetFeatures, tmp_path: Path) -> None:
    torch.save({"_conv_stem.weight": torch.zeros(32, 3, 3, 3)}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"w\.pth has no _bn0\.weight"):
        EfficientNetFeatures(str(tmp_path / "w.pth"), torch.device("cpu"))
    with pytest.raises(InputError, match=r"uint8 \(2, 8, 8, 1\)"):
        network(np.zeros((2, 8, 8, 1), np.uint8))


def test_the_kernel_distance_is_the_sum_over_pairs() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 3)), rng.normal(0.5, size=(4, 3))

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float(x @ y / 3 + 1) ** 3

    def within(rows: np.ndarray) -> float:
        return float(np.mean([kernel(x, y) for i, x in enumerate(rows) for j, y in enumerate(rows) if i != j]))

    expected = within(a) + within(b) - 2 * np.mean([kernel(x, y) for x in a for y in b])
    assert kernel_distance(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(expected, rel=1e-12)


def test_the_kernel_distance_has_no_bias_at_few_images() -> None:
    """The mean over many pairs of small sets of one distribution is zero within its error; a shift is far outside it."""
    generator = torch.Generator().manual_seed(0)

    def draws(shift: float) -> torch.Tensor:
        pairs = torch.randn(2000, 2, 10, 8, generator=generator)
        return torch.tensor([kernel_distance(a, b + shift) for a, b in pairs])

    same, shifted = draws(0.0), draws(0.5)
    assert same.mean().abs() < 3 * same.std() / 2000**0.5
    assert shifted.mean() > 20 * shifted.std() / 2000**0.5


def pictures(count: int, seed: int, blur: int = 1) -> np.ndarray:
    """uint8 [count, 32, 32, 3]: a bright square somewhere on a dark ground, averaged over `blur` x `blur` pixels."""
    rng = np.random.default_rng(seed)
    images = np.full((count, 32, 32, 3), 30, np.float32)
    for image, (top, left), size in zip(
        images, rng.integers(2, 16, (count, 2)), rng.integers(6, 14, count), strict=True
    ):
        image[top : top + size, left : left + size] = rng.integers(120, 256, 3)
    pooled = images.reshape(count, 32 // blur, blur, 32 // blur, blur, 3).mean((2, 4))
    return pooled.repeat(blur, 1).repeat(blur, 2).astype(np.uint8)


def test_an_evaluation_orders_coarser_images_and_names_what_it_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "real.npz", arr_0=pictures(12, 0))
    scores = {}
    for blur in (1, 4):
        samples = tmp_path / f"{blur}.npz"
        np.savez(samples, arr_0=pictures(12, 1, blur))
        reference = f"evaluate.reference.real={tmp_path / 'real.npz'}"
        launch_here(monkeypatch, "--samples", samples, reference, "evaluate.efficientnet_weights=package")
        scores[blur] = read_result(tmp_path / f"{blur}.result.json").images.networks["efficientnet"]
    sharp, coarse = (scores[blur].references["real"] for blur in (1, 4))
    assert 0 < sharp["fd_efficientnet"] < 0.7 * coarse["fd_efficientnet"]
    assert sharp["kd_efficientnet"]["value"] < 0.5 * coarse["kd_efficientnet"]["value"]
    assert sharp["kd_efficientnet"]["subsets"] == 1
    assert sharp["precision"]["exact"] > coarse["precision"]["exact"]
    assert scores[1].weights_are_published
    out = capsys.readouterr().out
    assert "FD (EfficientNet)" in out
    assert f"{sharp['kd_efficientnet']['value']:.5f}" in out


def test_the_package_that_is_not_installed_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "real.npz", arr_0=pictures(4, 0))
    monkeypatch.setattr("rear_scale.evaluate.networks.efficientnet.find_spec", lambda name: None)
    reference = f"evaluate.reference.real={tmp_path / 'real.npz'}"
    with pytest.raises(
        InputError, match="not found: evaluate.efficientnet_weights=package. Download efficientnet-lite0.*pip"
    ):
        launch_here(monkeypatch, "--samples", tmp_path / "real.npz", reference, "evaluate.efficientnet_weights=package")
