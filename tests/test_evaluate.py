"""Whole evaluations: the same numbers on any number of ranks and after a kill, from any source."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import run_alone, run_ranks
from PIL import Image
from test_evaluate_sources import write_tar

from rear_scale import config
from rear_scale.config import ClassifierConfig, ExperimentConfig, InputError
from rear_scale.evaluate.images import image_set as sources
from rear_scale.evaluate.images.image_set import from_arrays, open_image_set
from rear_scale.evaluate.job import Evaluation, check_evaluation
from rear_scale.evaluate.metrics import inception_score
from rear_scale.evaluate.metrics import precision_recall as neighbours
from rear_scale.evaluate.metrics.moments import Moments
from rear_scale.evaluate.metrics.statistics_file import images_of, write_statistics
from rear_scale.evaluate.networks import feature_cache as blocks
from rear_scale.evaluate.networks.classifier import (
    ClassifierFeatures,
    check_same_training,
    class_names,
    train_classifier,
)
from rear_scale.evaluate.networks.feature_cache import FeatureBlocks, Part, extract
from rear_scale.evaluate.networks.inception import Inception, resize_tf1
from rear_scale.evaluate.published import ROWS, our_rows, table_with_published, token_table
from rear_scale.evaluate.result import ImageScores, check_result
from rear_scale.evaluate.targets import EvalTarget, TargetOpener
from rear_scale.sample.npz_writer import write_samples
from rear_scale.shards.images import open_images, write_images
from rear_scale.world import World


def some_images(count: int, seed: int = 0) -> np.ndarray:
    """Images whose class (number mod 3) is the bright third of the picture."""
    images = np.random.default_rng(seed).integers(0, 60, (count, 12, 12, 3), dtype=np.uint8)
    for number in range(count):
        images[number, :, 4 * (number % 3) : 4 * (number % 3) + 4] += 150
    return images


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


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "BLOCK_IMAGES", 20)


def _score(world: World, cfg: ExperimentConfig, samples: Path, cache: Path, block: int = 20) -> dict:
    sources.BLOCK_IMAGES = block
    return Evaluation(cfg, cache, world).score(open_image_set(samples, world)).to_json()


def test_scores_by_a_classifier_do_not_depend_on_ranks_or_kills(tmp_path: Path) -> None:
    cfg = evaluation(tmp_path)
    images = some_images(50, seed=2)
    write_samples(tmp_path / "samples.npz", iter([images]), 50, 12, np.arange(50) % 3)
    expected = run_alone(_score, cfg, tmp_path / "samples.npz", tmp_path / "cache1")
    for scores in run_ranks(2, _score, cfg, tmp_path / "samples.npz", tmp_path / "cache2"):
        assert scores == expected
    files = sorted((tmp_path / "cache1").rglob("block_*.npz"))
    # By the classifier and by pixels.
    assert len(files) == 2 * (3 + 5 + 3)
    files[4].unlink()
    files[7].write_bytes(files[7].read_bytes()[:-30])
    damaged = bytearray(files[2].read_bytes())
    damaged[len(damaged) // 2] ^= 1
    files[2].write_bytes(damaged)
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
    check_evaluation(cfg)
    write_samples(tmp_path / "large.npz", iter([np.zeros((2, 24, 24, 3), np.uint8)]), 2, 24, np.zeros(2))
    with pytest.raises(InputError, match="24x24, but evaluate.reference.(training|validation) holds images of 12x12"):
        run_alone(_score, cfg, tmp_path / "large.npz", tmp_path / "cache")
    values = config.to_dict(cfg)
    values["evaluate"]["reference"] = {}
    with pytest.raises(InputError, match="evaluate.reference is empty"):
        check_evaluation(config.from_dict(values, "test"))
    for overrides, expected in (
        (
            ["evaluate.classifier=null"],
            "no feature network is set, so images cannot be compared. Set evaluate.inception_weights",
        ),
        (["evaluate.inception_weights=nowhere.pth"], "not found: evaluate.inception_weights=nowhere.pth"),
        (["evaluate.reference=nowhere.npz"], "not found: evaluate.reference.nowhere=nowhere.npz"),
        (["evaluate.bootstrap=1"], "evaluate.bootstrap=1 is neither 0"),
        (
            ["evaluate.precision_recall_arithmetic=[fp16]"],
            "evaluate.precision_recall_arithmetic=fp16 is not one of exact, adm_fp16",
        ),
    ):
        with pytest.raises(InputError, match=expected):
            check_evaluation(config.from_dict(config.to_dict(cfg), "test", overrides))


def test_the_classifier_learns_and_refuses_foreign_files(tmp_path: Path) -> None:
    evaluation(tmp_path)
    cfg = ClassifierConfig(str(tmp_path / "weights"), str(tmp_path / "training"), steps=60)
    train_classifier(cfg, torch.device("cpu"), 12)
    images, labels = open_images(tmp_path / "validation").load()
    found = ClassifierFeatures(cfg, torch.device("cpu"))(images)
    assert (found["classes"] == labels).mean() > 0.9
    assert found["features"].shape == (60, 64)
    check_same_training(cfg, 12)
    for field, value in (("steps", 61), ("lr", 1.0), ("seed", 1), ("images", str(tmp_path / "validation"))):
        with pytest.raises(InputError, match=rf"evaluate.classifier.{field}=.* was trained with"):
            check_same_training(dataclasses.replace(cfg, **{field: value}), 12)
    check_same_training(dataclasses.replace(cfg, images=str(tmp_path / "gone")), 12)
    # Class folders, and tars without a manifest, serve as well as shards of one size.
    pixels, classes = open_images(tmp_path / "training").load()
    for number, (image, label) in enumerate(zip(pixels, classes, strict=True)):
        (tmp_path / f"folders/{label}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).resize((24, 24), Image.Resampling.NEAREST).save(
            tmp_path / f"folders/{label}/{number}.png"
        )
    (tmp_path / "tars").mkdir()
    for tar in (tmp_path / "training").glob("*.tar"):
        (tmp_path / "tars" / tar.name).write_bytes(tar.read_bytes())
    for name, named in (("folders", ["0", "1", "2"]), ("tars", None)):
        own = dataclasses.replace(cfg, weights=str(tmp_path / name / "weights"), images=str(tmp_path / name))
        train_classifier(own, torch.device("cpu"), 12)
        assert (ClassifierFeatures(own, torch.device("cpu"))(images)["classes"] == labels).mean() > 0.9
        check_same_training(own, 12)
        with pytest.raises(InputError, match=r"evaluate.classifier.images=.* was trained with"):
            check_same_training(own, 24)
        assert class_names(own) == named
    (tmp_path / "weights").write_bytes(b"no")
    with pytest.raises(InputError, match="cannot be read"):
        ClassifierFeatures(cfg, torch.device("cpu"))


class _Small:
    """A feature network that costs nothing: a fixed projection of the pixels."""

    name, sizes = "inception", {"pool": 8, "spatial": 6}
    weights_sha256, is_published = "0" * 64, False

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.matrix = torch.randn(4 * 4 * 3, 14, generator=generator)
        self.classifier = torch.randn(10, 8, generator=generator, dtype=torch.float64)
        self.identity = f"small {seed}"

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        pixels = resize_tf1(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, 4)
        found = (pixels.flatten(1) @ self.matrix).numpy()
        return {"pool": found[:, :8], "spatial": found[:, 8:]}


def with_references(folder: Path, *overrides: str) -> ExperimentConfig:
    """Against 45 image shards and an .npz of 33 images."""
    if not (folder / "shards").exists():
        pictures = ((Image.fromarray(image), n % 3) for n, image in enumerate(some_images(45, 1)))
        write_images(folder / "shards", pictures, 12, ["a", "b", "c"])
        np.savez(folder / "plain.npz", arr_0=some_images(33, 2))
    references = f"evaluate.reference={{shards: {folder / 'shards'}, plain: {folder / 'plain.npz'}}}"
    return config.load("evaluate.yaml", [references, "evaluate.batch_size=16", *overrides])


def _open(cfg: ExperimentConfig, cache: Path, world: World, seed: int = 0) -> Evaluation:
    found = Evaluation(cfg, cache, world)
    found.networks = [_Small(seed)]
    return found


def _score_small(world: World, cfg: ExperimentConfig, samples: Path, cache: Path) -> dict:
    sources.BLOCK_IMAGES = 20
    neighbours._ROWS, neighbours._COLUMNS = 16, 24
    return _open(cfg, cache, world).score(open_image_set(samples, world)).to_json()


def test_all_scores_do_not_depend_on_ranks_or_kills(tmp_path: Path) -> None:
    options = ["evaluate.bootstrap=20", "evaluate.fid_infinity=true", "evaluate.precision_recall_reference_images=40"]
    cfg = with_references(tmp_path, *options)
    write_samples(tmp_path / "samples.npz", iter([some_images(70, 3)]), 70, 12, np.arange(70) % 3)
    expected = run_alone(_score_small, cfg, tmp_path / "samples.npz", tmp_path / "cache1")
    for size in (2, 3):
        for scores in run_ranks(size, _score_small, cfg, tmp_path / "samples.npz", tmp_path / f"cache{size}"):
            assert scores == expected
    for number, file in enumerate(sorted((tmp_path / "cache1").rglob("*.npz"))):
        if number % 2:
            file.unlink()
    assert run_alone(_score_small, cfg, tmp_path / "samples.npz", tmp_path / "cache1") == expected
    json.dumps(expected)

    found = expected["inception"]
    assert found["samples"] == 70
    assert found["weights_are_published"] is False
    assert expected["labels"]["counts"] == {"0": 24, "1": 23, "2": 23}
    shards, plain = found["references"]["shards"], found["references"]["plain"]
    assert (shards["fid_reference_images"], plain["fid_reference_images"]) == (45, 33)
    assert shards["neighbour_reference_images"] == 40
    for name in ("fid", "sfid"):
        interval = shards["bootstrap"][name]
        assert interval["low"] < interval["high"]
        assert interval["std"] > 0
        line = shards[f"{name}_extrapolated"]
        assert line["samples"][-1] == 70
        assert line["values"][-1] == pytest.approx(shards[name], rel=1e-9)
        # Fewer samples, larger distance: the line falls towards the value at infinity.
        assert line["value"] < shards[name]
    assert found["inception_score"]["bootstrap"]["std"] > 0
    assert set(shards["precision"]) == set(shards["recall"]) == {"exact", "adm_fp16"}
    assert any("the reference file has no statistics" in note for note in plain["notes"])
    rows = our_rows("ours", ImageScores.from_json(expected), (12, 12))
    printed = table_with_published(rows)
    assert "published rows are left out: they are of 50,000 images of 256x256" in printed
    assert f"{shards['fid']:.3f}" in printed
    assert rows[0].caveats[:3] == ["weights are not the published ones", "fewer than 50,000 images", "images of 12x12"]
    assert printed.splitlines()[0].split()[-1] == "caveats"


def test_published_rows_stand_beside_comparable_scores_alone() -> None:
    against = {"fid": 2.0, "sfid": 5.0, "precision": {"adm_fp16": 0.8}, "recall": None, "notes": []}

    def rows(
        size: tuple[int, int] = (256, 256), *, notes: tuple[str, ...] = (), score: Any = None, **other: Any
    ) -> list:
        own = {"weights_sha256": "ab", "weights_are_published": True, "samples": 50_000, "inception_score": score or {}}
        scores = {**own, "references": {"adm": {**against, "notes": list(notes)}}, **other}
        return our_rows(
            "ours", ImageScores.from_json({"inception": scores, "reference_sets": {}, "labels": None}), size
        )

    assert all(row.model in table_with_published(rows()) for row in ROWS.values())
    assert "caveats" not in table_with_published(rows())
    for found, caveat in (
        (rows(samples=1000), "fewer than 50,000 images"),
        (rows(weights_are_published=False), "weights are not the published ones"),
        (rows((24, 24)), "images of 24x24"),
        (rows(notes=("fid: 5 sample images give a singular covariance of 8 features",)), "singular covariance"),
        (rows(notes=("each is resized to the network's input from its own size",)), "the reference has another size"),
        (rows(score={"value": 3.0, "warning": "lacks classes"}), "IS of splits that lack classes"),
    ):
        printed = table_with_published(found)
        assert found[0].caveats == [caveat]
        assert printed.splitlines()[1].endswith(caveat)
        assert "RAR-B" not in printed
        assert "published rows are left out" in printed


def test_the_classifier_alone_has_a_table_with_the_references_as_a_yardstick() -> None:
    found = {
        "features": "a layer",
        "samples": {"count": 9, "class_accuracy": 0.5, "frechet_distance": {"a": 4}, "nearest_distance": {"a": 5, "b": 6}},
        "references": {
            "a": {"count": 7, "class_accuracy": 0.9, "frechet_distance": {"b": 1.0}, "nearest_distance": {"b": 2.0}},
            "b": {"count": 8, "class_accuracy": None, "frechet_distance": {"a": 1.0}, "nearest_distance": {"a": 3.0}},
        },
    }  # fmt: skip
    printed = table_with_published(our_rows("ours", ImageScores.from_json(found), (24, 24)))
    assert [line.split() for line in printed.splitlines()] == [
        ["model", "accuracy", "Fréchet", "nearest", "samples", "against"],
        ["ours", "0.500", "4.00", "5.0", "9", "a"],
        ["ours", "0.500", "-", "6.0", "9", "b"],
        ["a", "images", "0.900", "1.00", "2.0", "7", "b"],
        ["b", "images", "-", "1.00", "3.0", "8", "a"],
    ]
    predicted = token_table(
        {"run, step 4": {"val_clean": {"ctr": 0.5, "perplexity": 2.0, "sequences": 9}}, "other": None}
    )
    assert predicted.splitlines()[1].split() == ["run,", "step", "4", "data.val", "clean", "0.5000", "2.000", "9"]
    assert token_table({"other": None}) == ""


def test_all_missing_inputs_are_named_at_once() -> None:
    cfg = config.load("demo.yaml", [
        "evaluate.reference={a: none/a, b: none/b}", "evaluate.inception_weights=none/i", "evaluate.vgg_weights=none/v",
        "evaluate.dinov2_weights=none/d", "evaluate.classifier={weights: none/w, images: none/c}",
    ])  # fmt: skip
    with pytest.raises(InputError) as caught:
        check_evaluation(cfg)
    for name in (
        "reference.a=none/a",
        "reference.b=none/b",
        "inception_weights",
        "dinov2_weights",
        "classifier.images=none/c",
    ):
        assert f"not found: evaluate.{name}" in str(caught.value), name
    assert "\n" not in str(caught.value)


def test_few_samples_are_scored_and_marked(tmp_path: Path) -> None:
    write_samples(tmp_path / "few.npz", iter([some_images(5, 3)]), 5, 12, np.arange(5) % 3)
    found = run_alone(_score_small, with_references(tmp_path), tmp_path / "few.npz", tmp_path / "cache")
    shards = found["inception"]["references"]["shards"]
    assert shards["fid"] > 0
    assert any("fid: 5 sample images give a singular covariance of 8 features" in note for note in shards["notes"])
    write_samples(tmp_path / "one.npz", iter([some_images(1, 3)]), 1, 12, np.zeros(1))
    found = run_alone(_score_small, with_references(tmp_path), tmp_path / "one.npz", tmp_path / "cache")
    assert found["inception"]["references"]["shards"]["fid"] is None
    assert found["inception"]["references"]["shards"]["precision"] is None


def test_a_resampling_may_leave_out_the_short_last_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception_score, "SPLIT_IMAGES", 10)
    write_samples(tmp_path / "odd.npz", iter([some_images(11, 3)]), 11, 12, np.arange(11) % 3)
    cfg = with_references(tmp_path, "evaluate.bootstrap=10")
    found = run_alone(_score_small, cfg, tmp_path / "odd.npz", tmp_path / "cache")["inception"]["inception_score"]
    assert len(found["per_split"]) == 2
    assert np.isfinite([found["bootstrap"][name] for name in ("low", "high", "std")]).all()


def test_one_image_has_no_distance_by_the_classifier(tmp_path: Path) -> None:
    cfg = evaluation(tmp_path)
    write_samples(tmp_path / "one.npz", iter([some_images(1, 3)]), 1, 12, np.zeros(1))
    found = run_alone(_score, cfg, tmp_path / "one.npz", tmp_path / "cache")
    assert found["samples"]["frechet_distance"] == {"training": None, "validation": None}
    assert found["references"]["training"]["frechet_distance"]["validation"] > 0


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_options_for_large_sets_are_null_or_finite_on_tiny_ones(tmp_path: Path, count: int) -> None:
    write_samples(tmp_path / "few.npz", iter([some_images(count, 3)]), count, 12, np.zeros(count))
    cfg = with_references(tmp_path, "evaluate.bootstrap=3", "evaluate.fid_infinity=true")
    found = run_alone(_score_small, cfg, tmp_path / "few.npz", tmp_path / "cache")
    json.dumps(found, allow_nan=False)
    scores = found["inception"]["references"]["shards"]
    assert (scores["fid_extrapolated"] is None) == (count < 3)
    assert (scores["bootstrap"]["fid"] is None) == (count < 2)


def test_a_set_against_itself_and_its_statistics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg, statistics = with_references(tmp_path), tmp_path / "statistics.npz"

    def write(world: World) -> None:
        _open(cfg, tmp_path / "cache", world).write_statistics(
            open_image_set(tmp_path / "plain.npz", world), statistics
        )

    run_alone(write)
    cfg.evaluate.reference["written"] = str(statistics)
    found = run_alone(_score_small, cfg, tmp_path / "plain.npz", tmp_path / "cache")["inception"]["references"]
    assert found["plain"]["fid"] == found["written"]["fid"] == found["plain"]["sfid"] == 0.0
    assert found["plain"]["precision"]["exact"] == found["plain"]["coverage"]["adm_fp16"] == 1
    assert found["written"]["precision"] is None
    assert found["written"]["fid_reference_images"] == 33
    assert any("only statistics" in note for note in found["written"]["notes"])
    described = run_alone(_score_small, cfg, tmp_path / "plain.npz", tmp_path / "cache")["reference_sets"]["written"]
    assert (described["size"], described["preprocessing"]) == ([12, 12], "as stored")
    write_samples(tmp_path / "small.npz", iter([some_images(5)[:, :8, :8]]), 5, 8, np.zeros(5))
    run_alone(_score_small, cfg, tmp_path / "small.npz", tmp_path / "cache")
    assert "the samples are 8x8, written is 12x12" in capsys.readouterr().err

    def with_other_weights(world: World) -> None:
        _open(cfg, tmp_path / "cache", world, seed=1).score(open_image_set(tmp_path / "plain.npz", world))

    with pytest.raises(InputError, match="made with other weights"):
        run_alone(with_other_weights)


@pytest.mark.parametrize("damage", ["changed", "short", "empty"])
def test_damaged_statistics_of_the_cache_are_computed_again(tmp_path: Path, damage: str) -> None:
    cfg, cache = with_references(tmp_path), tmp_path / "cache"
    before = run_alone(_score_small, cfg, tmp_path / "plain.npz", cache)
    kept = sorted(cache.glob("*/statistics_*.npz"))
    assert kept
    for path in kept:
        data = path.read_bytes()
        middle = len(data) // 2
        damaged = {"changed": data[:middle] + bytes([data[middle] ^ 64]) + data[middle + 1 :], "short": data[:middle]}
        path.write_bytes(damaged.get(damage, b""))
    assert run_alone(_score_small, cfg, tmp_path / "plain.npz", cache) == before


def test_the_published_form_has_statistics_of_more_images_than_it_holds(tmp_path: Path) -> None:
    """VIRTUAL_imagenet256_labeled.npz: distances against its statistics, neighbours against its images."""
    cfg = with_references(tmp_path)
    more = np.concatenate([some_images(33, 2), some_images(40, 5)])
    found = _Small()(more)
    arrays = {"mu": found["pool"].mean(0), "sigma": np.cov(found["pool"].astype(np.float64), rowvar=False)}
    arrays |= {"mu_s": found["spatial"].mean(0), "sigma_s": np.cov(found["spatial"].astype(np.float64), rowvar=False)}
    np.savez(tmp_path / "virtual.npz", arr_0=more[:33], **arrays)
    np.savez(tmp_path / "all.npz", arr_0=more)
    cfg.evaluate.reference |= {name: str(tmp_path / f"{name}.npz") for name in ("virtual", "all")}
    samples = tmp_path / "samples.npz"
    write_samples(samples, iter([some_images(50, 3)]), 50, 12, np.arange(50) % 3)
    scores = run_alone(_score_small, cfg, samples, tmp_path / "cache")["inception"]["references"]
    for name in ("fid", "sfid"):
        assert scores["virtual"][name] == pytest.approx(scores["all"][name], rel=1e-4)
    assert scores["virtual"]["precision"] == scores["plain"]["precision"]
    assert scores["virtual"]["fid_reference_images"] is None
    assert scores["virtual"]["notes"] == []


def test_every_source_of_the_same_images_scores_the_same(tmp_path: Path) -> None:
    cfg, images = with_references(tmp_path), some_images(26, 3)
    write_samples(tmp_path / "samples.npz", iter([images]), 26, 12, np.arange(26) % 3)
    for name in ("folder", "tars"):
        (tmp_path / name).mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "folder" / f"{number:03d}.png")
    write_tar(tmp_path / "tars" / "a.tar", images, 0, with_classes=True)
    scores = [
        run_alone(_score_small, cfg, tmp_path / name, tmp_path / "cache")["inception"]
        for name in ("samples.npz", "folder", "tars")
    ]
    assert scores[0] == scores[2]
    assert scores[0]["references"] == scores[1]["references"]


def test_other_sizes_are_resized_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_samples(tmp_path / "small.npz", iter([some_images(5)[:, :8, :8]]), 5, 8, np.zeros(5))
    found = run_alone(_score_small, with_references(tmp_path), tmp_path / "small.npz", tmp_path / "cache")
    assert found["inception"]["references"]["plain"]["fid"] > 0
    assert "the samples are 8x8, plain is 12x12" in capsys.readouterr().err


@pytest.mark.long  # the classifier's scores, on the same path, have a short one
def test_scores_by_seeded_inception_do_not_depend_on_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    network = Inception()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), tmp_path / "seeded.pth")
    np.savez(tmp_path / "reference.npz", arr_0=some_images(8, 2))
    reference, weights = tmp_path / "reference.npz", tmp_path / "seeded.pth"
    overrides = [f"evaluate.reference={reference}", f"evaluate.inception_weights={weights}", "evaluate.batch_size=4"]
    cfg = config.load("evaluate.yaml", overrides)
    write_samples(tmp_path / "samples.npz", iter([some_images(10, 3)]), 10, 12, np.arange(10) % 3)
    expected = run_alone(_score, cfg, tmp_path / "samples.npz", tmp_path / "cache1", 5)
    assert "are not the published ones" in capsys.readouterr().err
    assert expected["inception"]["references"]["reference"]["fid"] > 0
    assert expected["inception"]["references"]["reference"]["sfid"] > 0
    for scores in run_ranks(2, _score, cfg, tmp_path / "samples.npz", tmp_path / "cache2", 5):
        assert scores == expected


class _Counting:
    """Features that note which images they were asked for."""

    name = identity = "counting"

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        self.seen += images[:, 0, 0, 0].tolist()
        return {"value": images[:, 0, 0, :1].astype(np.float32)}


def _extract(world: World, cache: Path, part: Part | None, network: _Counting) -> FeatureBlocks:
    images = np.arange(95, dtype=np.uint8)[:, None, None, None].repeat(3, 3)
    return extract(from_arrays("numbers", "id", images, None), [network], cache, 7, world, part)[0]


def test_parts_of_a_job_together_make_the_whole(tmp_path: Path) -> None:
    network = _Counting()
    for index in (2, 0, 1):
        found = run_alone(_extract, tmp_path, Part(index, 3), network)
        assert blocks.is_complete([found]) == (index == 1)
    assert sorted(network.seen) == list(range(95))
    assert found.column("value")[:, 0].tolist() == list(range(95))
    rows = found.rows("value")
    assert len(rows) == 95
    for part in (slice(0, 95), slice(18, 23), slice(40, 41), slice(90, 200)):
        assert rows[part][:, 0].tolist() == list(range(95))[part]
    run_alone(_extract, tmp_path, None, network)
    assert len(network.seen) == 95


def test_statistics_are_made_of_images_of_any_size_in_shares(tmp_path: Path) -> None:
    (tmp_path / "photographs").mkdir()
    for number, size in enumerate([(40, 30), (12, 12), (13, 50)] * 8):
        Image.fromarray(np.full((*size, 3), 10 * number, np.uint8)).save(tmp_path / "photographs" / f"{number:02}.png")
    cfg = config.load("evaluate.yaml", ["evaluate.inception_weights=weights", "tokenizer.image_size=16"])
    cfg.evaluate.inception_weights = None
    target = EvalTarget(cfg, None, tmp_path / "photographs", tmp_path / "result.json")
    statistics = tmp_path / "statistics.npz"

    def write(world: World, part: Part | None, samples: Path = tmp_path / "photographs") -> bool:
        images = TargetOpener(world).images(replace(target, samples=samples), cfg.tokenizer.image_size)
        return _open(cfg, tmp_path / "cache", world).write_statistics(images, statistics, part)

    assert not run_alone(write, Part(0, 2))
    assert not statistics.exists()
    assert run_alone(write, Part(1, 2))
    found = images_of(statistics)
    assert (found.count, found.size) == (24, [16, 16])
    assert "centre crop to 16 pixels" in found.preprocessing
    write_samples(tmp_path / "one.npz", iter([some_images(1)]), 1, 12, np.zeros(1))
    with pytest.raises(InputError, match=r"one\.npz holds 1 image, which has no covariance"):
        run_alone(write, None, tmp_path / "one.npz")


def test_statistics_need_a_network_and_a_file_but_no_reference(tmp_path: Path) -> None:
    (tmp_path / "inception").touch()
    cfg = config.load("evaluate.yaml", [f"evaluate.inception_weights={tmp_path / 'inception'}"])
    check_evaluation(cfg, tmp_path / "statistics.npz")
    for path in (tmp_path, tmp_path / "statistics"):
        with pytest.raises(InputError, match=f"--write-statistics {path} (is a folder|does not end in .npz)"):
            check_evaluation(cfg, path)
    with pytest.raises(InputError, match="needs the features of a published network, and none is set"):
        check_evaluation(evaluation(tmp_path), tmp_path / "statistics.npz")


def test_statistics_are_not_written_over_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "inception").touch()
    cfg = config.load("evaluate.yaml", [f"evaluate.inception_weights={tmp_path / 'inception'}"])
    ours, samples, published = (tmp_path / f"{name}.npz" for name in ("ours", "samples", "published"))
    moments = Moments(torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64), 3)
    write_statistics(ours, {"pool": moments}, {"pool": "network"}, {"count": 3})
    check_evaluation(cfg, ours)
    np.savez(samples, arr_0=np.zeros((1, 8, 8, 3), np.uint8))
    np.savez(published, mu=np.zeros(4), sigma=np.eye(4))
    for path in (samples, published):
        with pytest.raises(InputError, match=f"{path.name} exists and does not hold statistics of rear_scale"):
            check_evaluation(cfg, path)


@pytest.mark.parametrize("text", ["[]", "not json", '{"identity": "of samples"}', '{"images": 3}'])
def test_a_result_is_not_written_over_a_file_that_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "samples.json"
    path.touch()
    check_result(path)  # nothing to lose
    path.write_text(text)
    with pytest.raises(InputError, match=r"samples\.json exists and does not hold an evaluation result"):
        check_result(path)
    with pytest.raises(InputError, match=r"is a folder. Name a file such as .*/result\.json"):
        check_result(tmp_path)
