"""A metric and a network of another file, and result.json as typed values."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from helpers import tiny_config
from snippets import module_of
from test_evaluate import _Small, some_images
from test_evaluate_jobs import evaluate_here, launch_here

from rear_scale.config import ClassifierConfig, InputError
from rear_scale.evaluate import job, metrics, networks
from rear_scale.evaluate.metrics.frechet import FrechetDistance
from rear_scale.evaluate.networks.row import NetworkRow, StatisticsArrays
from rear_scale.evaluate.networks.weights import PublishedFile, read_weight_file
from rear_scale.evaluate.result import ImageScores, read_result, summary
from rear_scale.evaluate.training_scores import _named
from rear_scale.world import SingleProcess


def images(folder: Path) -> tuple[Path, str]:
    """30 samples, and the override that names 40 images as their reference."""
    np.savez(folder / "samples.npz", arr_0=some_images(30, 3))
    np.savez(folder / "plain.npz", arr_0=some_images(40, 2))
    return folder / "samples.npz", f"evaluate.reference.plain={folder / 'plain.npz'}"


@pytest.fixture
def registered() -> Iterator[None]:
    """Metrics and networks that a test adds are gone after it."""
    before = list(metrics.METRICS), list(networks.NETWORKS)
    yield
    metrics.METRICS[:], networks.NETWORKS[:] = before


@pytest.mark.usefixtures("registered")
def test_a_metric_of_another_file_is_in_results_summaries_and_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics.register(module_of("## A metric").MeanDistance())  # of docs/extending.md
    samples, reference = images(tmp_path)
    (tmp_path / "inception").touch()
    evaluate_here(monkeypatch, "--samples", samples, reference, f"evaluate.inception_weights={tmp_path / 'inception'}")
    features = [_Small()(some_images(count, seed))["pool"] for count, seed in ((30, 3), (40, 2))]
    own, other = (rows.astype(np.float64).mean(0) for rows in features)
    expected = pytest.approx(((own - other) ** 2).sum(), rel=1e-9)
    found = read_result(tmp_path / "samples.result.json").images
    value = found.networks["inception"].references["plain"]["mean_distance"]
    assert value == expected
    assert summary(found, "")["mean_distance/plain"] == value
    assert summary(found, "seed=1")["mean_distance/plain/seed=1"] == value
    assert _named(found, 30)["mean_distance_n30/plain"] == value
    header, ours, *_ = capsys.readouterr().out.splitlines()
    assert header.split() == [
        "model",
        "FID",
        "sFID",
        "IS",
        "precision",
        "recall",
        "means",
        "samples",
        "against",
        "caveats",
    ]
    assert ours.split()[6:9] == [f"{value:.4f}", "30", "plain"]
    assert ours.endswith("fewer than 50,000 images; images of 12x12")


class Thumbnail:
    """A network whose weights are a matrix, and whose features are a projection of four pixels."""

    name = "thumbnail"
    sizes: ClassVar = {"corners": 6}

    def __init__(self, path: str, device: torch.device) -> None:
        weights = read_weight_file(path, "evaluate.network_weights.thumbnail", THUMBNAIL)
        self.matrix, self.device = weights.state["matrix"], device
        self.weights_sha256, self.is_published = weights.sha256, weights.is_published
        self.identity = f"thumbnail {weights.sha256}"

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        pixels = torch.from_numpy(images[:, ::11, ::11].reshape(len(images), -1)).float()
        return {"corners": (pixels @ self.matrix).numpy()}


THUMBNAIL = PublishedFile("thumbnail.pth", "https://example.org/thumbnail", None)


@pytest.mark.usefixtures("registered")
def test_a_network_of_another_file_is_one_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its weights, statistics, dry run and errors follow from the row."""
    samples, reference = images(tmp_path)
    torch.manual_seed(0)
    torch.save({"matrix": torch.randn(12, 6)}, tmp_path / "thumbnail.pth")
    weights = f"evaluate.network_weights.thumbnail={tmp_path / 'thumbnail.pth'}"
    with pytest.raises(InputError, match=r"evaluate\.network_weights\.thumbnail is not the name of a network here"):
        launch_here(monkeypatch, "--samples", samples, reference, weights, f"evaluate.dinov2_weights={samples}")
    networks.register(
        NetworkRow(
            "thumbnail",
            {"network_weights.thumbnail": THUMBNAIL},
            Thumbnail,
            {"corners": StatisticsArrays("mu_thumbnail", "sigma_thumbnail")},
        )
    )
    metrics.register(FrechetDistance("fd_thumbnail", "thumbnail", "corners", title="FD"))
    statistics = tmp_path / "statistics.npz"
    launch_here(monkeypatch, "--samples", tmp_path / "plain.npz", "--write-statistics", statistics, weights)
    assert {"mu_thumbnail", "sigma_thumbnail"} <= set(np.load(statistics).files)
    launch_here(monkeypatch, "--samples", samples, reference, f"evaluate.reference.statistics={statistics}", weights)
    scores = read_result(tmp_path / "samples.result.json").images.networks["thumbnail"]
    plain, stored = (scores.references[name]["fd_thumbnail"] for name in ("plain", "statistics"))
    assert plain == stored > 0
    assert f"{plain:.3f}" in capsys.readouterr().out
    launch_here(monkeypatch, "--samples", samples, "--dry-run", "evaluate.network_weights.thumbnail=none")
    assert "not found: evaluate.network_weights.thumbnail=none" in capsys.readouterr().out
    with pytest.raises(
        InputError, match=r"not found: evaluate.network_weights.thumbnail=none. Download thumbnail\.pth from"
    ):
        launch_here(monkeypatch, "--samples", samples, reference, "evaluate.network_weights.thumbnail=none")


def stored_result(**images: Any) -> dict[str, Any]:
    """As an evaluation writes it."""
    return {
        "images": images,
        "tokens": {"val_clean": {"ctr": 0.5}},
        "checkpoint": {"path": "run/checkpoints/step_00000004", "step": 4, "sha256": ["ab"], "average": None},
        "samples": {
            "path": "generated", "identity": "id", "images": 9, "size": [16, 16], "preprocessing": "as stored",
            "uint8_rounding": "truncate",
        },
        "sample": {"seed": 1}, "dtype": "fp32", "evaluate": {"replace_rate": 0.1}, "config": {}, "seconds": 1.5,
        "provenance": {"commit": None},
    }  # fmt: skip


_INCEPTION = {
    "weights_sha256": "ab", "weights_are_published": None, "samples": 9,
    "inception_score": {"value": 2.0, "std": None, "one_split": 2.5},
    "references": {"adm": {"samples": 9, "fid": 3.0, "sfid": None, "precision": {"exact": 0.5}, "recall": None}},
}  # fmt: skip
_DINOV2 = {
    "weights_sha256": "cd", "weights_are_published": None, "samples": 9,
    "references": {"adm": {"samples": 9, "fd_dinov2": 6.0, "precision": {"exact": 0.25}}},
}  # fmt: skip
_SET = {"count": 9, "class_accuracy": 0.5, "frechet_distance": {"val": 4.0}, "nearest_distance": {"val": 5.0}}
_ALONE = {"count": 7, "class_accuracy": None, "frechet_distance": {}, "nearest_distance": {}}


@pytest.mark.parametrize(
    ("images", "numbers"),
    [
        (
            {
                "inception": _INCEPTION, "dinov2": _DINOV2, "reference_sets": {"adm": {}}, "labels": None,
                "published": {"fid": 1.95},
            },
            {
                "fid/adm": 3.0, "inception_score": 2.0, "precision_exact/adm": 0.5, "fd_dinov2/adm": 6.0,
                "dinov2_precision_exact/adm": 0.25,
            },
        ),
        (
            {"features": "a layer", "samples": _SET, "references": {"val": _ALONE}},
            {"class_accuracy": 0.5, "classifier_frechet_distance/val": 4.0, "nearest_distance/val": 5.0},
        ),
        (
            {
                "inception": _INCEPTION, "reference_sets": {"adm": {}}, "uint8_rounding": "nearest", "tokenizer_sha256": "cd",
                "reconstruction": {"images": 9, "psnr": 20.0, "lpips": None, "codebook_entropy_bits": 3.0},
            },
            {"fid/adm": 3.0, "inception_score": 2.0, "precision_exact/adm": 0.5, "psnr": 20.0},
        ),
    ],
)  # fmt: skip
def test_a_result_is_read_as_it_was_written(tmp_path: Path, images: dict[str, Any], numbers: dict[str, float]) -> None:
    values = stored_result(**images)
    (tmp_path / "result.json").write_text(json.dumps(values))
    found = read_result(tmp_path / "result.json")
    assert found.to_json() == values
    assert summary(found.images, "") == numbers
    assert found.checkpoint.step == 4
    assert found.samples.images == 9
    # Results of an earlier version have the rounding rule under another name, and no averages.
    text = (
        json.dumps(values)
        .replace(', "average": null', "")
        .replace("uint8_rounding", "quantiser")
        .replace("truncate", "trunc255")
    )
    (tmp_path / "result.json").write_text(text.replace('nearest"', 'round"'))
    assert read_result(tmp_path / "result.json") == found


def test_scores_during_training_are_those_of_one_split() -> None:
    scores = ImageScores.from_json({"inception": _INCEPTION, "reference_sets": {}, "labels": None})
    assert _named(scores, 9) == {"fid_n9/adm": 3.0, "inception_score_n9": 2.5}


@pytest.mark.parametrize("text", ["{}", "[]", '{"images": {}}', "no json"])
def test_what_is_no_result_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "result.json"
    with pytest.raises(InputError, match=r"not found: .*result\.json, the result of an evaluation"):
        read_result(path)
    path.write_text(text)
    with pytest.raises(InputError, match=r"result\.json does not hold an evaluation result. Make it again"):
        read_result(path)


def test_evaluations_at_the_same_time_train_one_classifier(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a study that has just begun, whose scores would be of different classifiers."""
    weights, trained = tmp_path / "made/classifier.safetensors", []

    def train(classifier: ClassifierConfig, *rest: object) -> None:
        trained.append(classifier)
        time.sleep(0.3)
        weights.write_text("weights")

    monkeypatch.setattr(job, "train_classifier", train)
    monkeypatch.setattr(job, "ClassifierFeatures", lambda *rest: weights.read_text())
    monkeypatch.setattr(job, "check_same_training", lambda *rest: None)
    cfg = tiny_config(tmp_path, tokens, f"evaluate.classifier={{weights: {weights}, images: {tmp_path}}}")
    world = SingleProcess()
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: job._open_classifier(cfg, world), range(2)))
    assert found == ["weights", "weights"]
    assert len(trained) == 1
    assert [path.name for path in weights.parent.iterdir()] == [weights.name]
