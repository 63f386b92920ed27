"""The experiments of launchers/analyze.py against their definitions, on tiny models."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from analyze_runs import rows_of, subject, write_runs
from helpers import run_alone

from rear_scale.analysis import image_quality
from rear_scale.analysis.cka import Cka, linear_cka
from rear_scale.analysis.embedding import nearest_other_code, replace_wrong
from rear_scale.analysis.errors import Errors, wrong_tokens
from rear_scale.analysis.experiment import Analysed
from rear_scale.analysis.exposure import context_masks, decode_with_truth
from rear_scale.analysis.image_quality import LPIPS, finite_psnr
from rear_scale.analysis.job import analyse
from rear_scale.analysis.memorization import pixel_distances, small_pixels, token_distances
from rear_scale.analysis.table import EXPERIMENTS
from rear_scale.config import EvaluateConfig, InputError, SampleConfig
from rear_scale.sample.decode import Decoder
from rear_scale.tokenizer.compact import CompactTokenizer
from rear_scale.world import World


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> dict[str, Path]:
    return write_runs(tmp_path_factory.mktemp("runs"), tokens)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tokenizer = CompactTokenizer(16, 32, 8, 16)
    tokenizer.codes.normal_()
    path = tmp_path_factory.mktemp("tokenizer") / "weights"
    tokenizer.save(path)
    return path


def drawn(run: Path):
    """The model of a run with logits that differ from token to token: its first weights make almost none."""
    model = EXPERIMENTS["errors"].work(subject(run), _single()).model
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.3)
    return model


def _single() -> World:
    from rear_scale.world import SingleProcess

    return SingleProcess()


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.7, 1.0])
def test_both_protocols_fix_as_many_tokens(ratio: float) -> None:
    ids = torch.arange(400)
    masks = context_masks(ids, ratio, 10)
    count = math.floor(10 * ratio + 1e-9)  # 7 for 0.7, although 0.7 * 10 is below 7 in binary
    assert all((mask.sum(1) == count).all() for mask in masks.values())
    assert masks["perfect"][:, :count].all()
    # Every place is ground truth equally often, and an image has its places whatever the others of its batch.
    assert masks["imperfect"].float().mean(0).sub(ratio).abs().max() < 0.12
    assert torch.equal(context_masks(ids[7:9], ratio, 10)["imperfect"], masks["imperfect"][7:9])
    smaller = context_masks(ids, ratio / 2, 10)["imperfect"]
    assert not (smaller & ~masks["imperfect"]).any()


def test_decoding_with_forced_tokens_is_decoding_and_teacher_forcing(runs: dict[str, Path]) -> None:
    model = drawn(runs["rear"])
    decoder = Decoder(model, SampleConfig(batch_size=6, cuda_graphs=False))
    labels, ids = torch.tensor([0, 1, 2, 3, 4, 0]), torch.arange(6)
    truth = torch.randint(0, 32, (6, 16), generator=torch.Generator().manual_seed(0))
    free, _ = decode_with_truth(decoder, labels, ids, truth, torch.zeros(6, 16, dtype=torch.bool))
    assert torch.equal(free, decoder.generate(labels, ids))
    forced = torch.rand(6, 16, generator=torch.Generator().manual_seed(1)) < 0.5
    tokens, scores = decode_with_truth(decoder, labels, ids, truth, forced)
    assert torch.equal(tokens[forced], truth[forced])
    assert not torch.equal(tokens, truth)
    # The probabilities are those of a pass over the finished sequence.
    expected = model(tokens, labels)["logits"].log_softmax(-1)
    for column, targets in enumerate((tokens, truth)):
        torch.testing.assert_close(
            scores[..., column], expected.gather(-1, targets[..., None])[..., 0], atol=2e-4, rtol=1e-4
        )
    # Up to the first token that is not forced, only the context of ground truth counts.
    all_forced, certain = decode_with_truth(decoder, labels, ids, truth, torch.ones(6, 16, dtype=torch.bool))
    assert torch.equal(all_forced, truth)
    assert torch.equal(certain[..., 0], certain[..., 1])


def test_the_nearest_other_code_is_that_of_an_exhaustive_search() -> None:
    codes = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 41)[:, None]
    nearest = nearest_other_code(codes)
    for code in range(40):
        others = [other for other in range(40) if other != code]
        similarity = [float(torch.cosine_similarity(codes[code], codes[other], dim=0)) for other in others]
        assert int(nearest[code]) == others[int(np.argmax(similarity))]


def test_replacement_changes_only_wrong_predictions_and_keeps_them_wrong() -> None:
    generator = torch.Generator().manual_seed(0)
    truth, predicted = torch.randint(0, 9, (2, 50, 12), generator=generator)
    nearest = nearest_other_code(torch.randn(9, 4, generator=generator))
    uniform = torch.rand(50, 12, generator=generator)
    for ratio in (0.0, 0.4, 1.0):
        found = replace_wrong(predicted, truth, nearest, uniform, ratio)
        for image, place in itertools.product(range(50), range(12)):
            wrong = predicted[image, place] != truth[image, place]
            replaced = wrong and uniform[image, place] < ratio
            assert found[image, place] == (nearest[truth[image, place]] if replaced else predicted[image, place])
        assert torch.equal(found == truth, predicted == truth)


def gram_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Eq. 13 as it is written."""
    n = len(x)
    center = np.eye(n) - np.ones((n, n)) / n
    k, l = (center @ (values @ values.T) @ center for values in (x, y))
    return float((k * l).sum() / np.linalg.norm(k) / np.linalg.norm(l))


def test_cka_in_feature_space_is_that_of_gram_matrices() -> None:
    generator = np.random.default_rng(0)
    x = generator.standard_normal((50, 7)) + 3  # means that centering has to remove
    y = x[:, :4] @ generator.standard_normal((4, 5)) + 0.5 * generator.standard_normal((50, 5)) - 2
    sums = {"x": x.sum(0), "y": y.sum(0), "xx": x.T @ x, "yy": y.T @ y, "xy": x.T @ y}
    assert linear_cka(sums, 50) == pytest.approx(gram_cka(x, y), rel=1e-10)
    assert 0.2 < linear_cka(sums, 50) < 0.99
    rotation = np.linalg.qr(generator.standard_normal((5, 5)))[0] * 3
    assert gram_cka(x, y @ rotation) == pytest.approx(linear_cka(sums, 50))


def _cka(world: World, run: Path, out: Path) -> tuple[Analysed, list[float]]:
    one = subject(run, "evaluate.batch_size=2", "analyze.images=11")
    (found,) = analyse(EXPERIMENTS["cka"], [one], world, out)
    # The same from all features at once.
    work = Cka(one, world)
    truth, labels, ids = work.rows(work.val, work.ids)
    output = work.predict(work.task(truth, ids), labels)
    expected = []
    for target in (truth[:, :-1], truth[:, 1:]):
        y = work.codebook[target.flatten()].double().numpy()
        expected += [gram_cka(output[f"tap{tap}"].flatten(0, 1).double().numpy(), y) for tap in work.taps]
    return found, expected


def test_cka_of_layers_is_streamed_exactly_and_its_peak_named(runs: dict[str, Path], tmp_path: Path) -> None:
    found, expected = run_alone(_cka, runs["rear"], tmp_path)
    assert [*found.arrays["current"], *found.arrays["next"]] == pytest.approx(expected, rel=1e-6)
    assert int(found.arrays["count"]) == 11 * 15
    tables = EXPERIMENTS["cka"].tables(found)
    assert len(tables[""]) == 2 * 3  # two targets, the embeddings and two blocks
    assert tables["peaks"][0]["peak_tap"] == int(np.argmax(expected[:3]))
    (line,) = EXPERIMENTS["cka"].lines([found])
    assert f"objective.heads.decode_tap={int(np.argmax(expected[3:5]))}" in line
    assert EXPERIMENTS["cka"].figures([found])[""].startswith(b"\x89PNG")


def test_forced_tokens_are_wrong_and_uniform_among_wrong_ones() -> None:
    truth = torch.full((40_000,), 3)
    bits = torch.randint(0, 2**32, (40_000,), generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(wrong_tokens(truth, bits, 8), minlength=8)
    assert counts[3] == 0
    assert (counts[[0, 1, 2, 4, 5, 6, 7]] / 40_000 - 1 / 7).abs().max() < 0.01


def _errors(world: World, run: Path, out: Path) -> tuple[dict[str, list[dict]], dict[str, np.ndarray]]:
    one = subject(run, "analyze.images=5", "analyze.wrong_tokens=15")
    (found,) = analyse(EXPERIMENTS["errors"], [one], world, out)
    work = Errors(one, world)
    truth, labels, ids = work.rows(work.val, work.ids)
    correct = work.predict(work.task(truth, ids), labels)["logits"].argmax(-1) == truth
    return dict(EXPERIMENTS["errors"].tables(found)), {"correct": correct.numpy()}


def test_errors_count_each_place_and_distance(runs: dict[str, Path], tmp_path: Path) -> None:
    tables, expected = run_alone(_errors, runs["ar"], tmp_path)
    assert [row["ctr"] for row in tables["positions"]] == pytest.approx(expected["correct"].mean(0).tolist())
    # With a wrong token at each of the first 15 of 16 places, 16 - d predictions of each image are d steps behind one.
    assert [row["predictions"] for row in tables[""]] == [5 * (16 - distance) for distance in range(1, 16)]
    for row in tables[""]:
        right = expected["correct"][:, row["distance"] :].sum() / row["predictions"]
        assert row["ctr_after_right"] == pytest.approx(right)
        assert row["ctr_change"] == pytest.approx(row["ctr_after_wrong"] - right)


def test_psnr_of_equal_images_is_finite() -> None:
    a = np.zeros((2, 4, 4, 3), np.uint8)
    b = a.copy()
    b[1, 0, 0, 0] = 1
    assert finite_psnr(a, b) == pytest.approx([10 * math.log10(255**2 * 48)] * 2)


def test_distances_to_training_images_are_those_of_their_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, references = (torch.randint(0, 3, (count, 8), generator=generator) for count in (4, 6))
    expected = [[float((q != r).double().mean()) for r in references] for q in queries]
    assert token_distances(queries, references).tolist() == expected
    images = np.random.default_rng(0).integers(0, 256, (3, 130, 130, 3), dtype=np.uint8)
    small = small_pixels(images, torch.device("cpu"))
    assert small.shape == (3, 3 * 44 * 44)  # averaged by 3 to 44 pixels
    assert float(small[0, 0]) == pytest.approx(images[0, :3, :3, 0].mean())
    expected = [
        [float(np.sqrt(np.square(a - b).mean())) for b in small.double().numpy()] for a in small.double().numpy()
    ]
    np.testing.assert_allclose(pixel_distances(small, small).numpy(), expected, atol=1e-4)


class _Distance:
    identity = "seeded"

    def __call__(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.abs(a.astype(float) - b).mean((1, 2, 3)) / 255


def _image_experiments(world: World, run: Path, tokenizer: Path, out: Path) -> dict[str, dict[str, list[dict]]]:
    settings = [f"tokenizer.weights={tokenizer}", "sample.batch_size=16", "analyze.images=7", "analyze.ratios=[0,0.5]",
                "analyze.replacement_ratios=[0,0.5,1]", "analyze.train_images=40"]  # fmt: skip
    found = {
        name: rows_of(world, name, run, out / name, *settings) for name in ("exposure", "embedding", "memorization")
    }
    image_quality.open_lpips = lambda cfg, world: _Distance()
    found["lpips"] = rows_of(world, "embedding", run, out / "lpips", *settings)
    wrong = out / "images.npz"
    np.savez(wrong, arr_0=np.random.default_rng(0).integers(0, 256, (23, 16, 16, 3), dtype=np.uint8))
    with pytest.raises(InputError, match="analyze.originals=.* does not hold the images of data.val"):
        rows_of(world, "embedding", run, out / "wrong", *settings, f"analyze.originals={wrong}")
    return found


def test_experiments_on_images(
    runs: dict[str, Path], tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(image_quality, "open_lpips", image_quality.open_lpips)  # put back at the end
    found = run_alone(_image_experiments, runs["rear"], tokenizer, tmp_path)
    assert "no LPIPS: evaluate.vgg_weights is not set" in capsys.readouterr().err
    perfect, imperfect, half, mixed = found["exposure"][""]
    assert [(row["protocol"], row["ratio"]) for row in (perfect, mixed)] == [("perfect", 0.0), ("imperfect", 0.5)]
    same = ("ctr", "perplexity", "psnr_decoded")
    assert [perfect[name] for name in same] == [imperfect[name] for name in same]  # nothing is forced
    assert min(half["ctr"], mixed["ctr"]) >= 0.5 > perfect["ctr"]
    assert half["psnr_decoded"] > perfect["psnr_decoded"]
    replaced = found["embedding"][""]
    assert len({row["ctr"] for row in replaced}) == 1
    assert replaced[0]["similarity"] < replaced[1]["similarity"] < replaced[2]["similarity"]
    assert replaced[0]["perplexity_change"] == 0 < replaced[2]["perplexity_change"]
    assert "lpips_decoded" not in replaced[0]
    with_lpips = found["lpips"][""]
    assert [row["psnr_decoded"] for row in with_lpips] == [row["psnr_decoded"] for row in replaced]
    assert all(row["lpips_decoded"] > 0 for row in with_lpips)
    samples, held_out = found["memorization"][""]
    assert (samples["images"], held_out["images"]) == (7, 7)
    assert 0 < held_out["tokens"] < samples["tokens"] <= 1  # random weights, but held-out images of the same kind
    assert len(found["memorization"]["nearest"]) == 14


def test_a_missing_file_of_lpips_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], runs: dict[str, Path]
) -> None:
    (tmp_path / "vgg16.pth").touch()
    lacking = tmp_path / "lin.pth"
    settings = [f"evaluate.vgg_weights={tmp_path / 'vgg16.pth'}", f"evaluate.lpips_weights={lacking}"]
    assert image_quality.open_lpips(subject(runs["ar"], *settings).cfg.evaluate, _single()) is None
    assert f"no LPIPS: not found: evaluate.lpips_weights={lacking}" in capsys.readouterr().err


def test_the_lin_weights_of_an_installed_package_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lpips/weights/v0.1").mkdir(parents=True)
    (tmp_path / "lpips/__init__.py").write_text("raise AssertionError('it is not imported')")
    (tmp_path / "lpips/weights/v0.1/vgg.pth").touch()
    monkeypatch.syspath_prepend(tmp_path)
    cfg = EvaluateConfig(lpips_weights="package", vgg_weights="package")
    assert LPIPS.paths(cfg) == {
        "evaluate.vgg_weights": "package",  # the package has none
        "evaluate.lpips_weights": str(tmp_path / "lpips/weights/v0.1/vgg.pth"),
    }


def test_cka_of_features_that_do_not_vary_is_no_number() -> None:
    generator = np.random.default_rng(0)
    y = generator.standard_normal((60, 3))
    for x in (np.full((60, 4), 0.1), np.zeros((60, 4))):
        sums = {"x": x.sum(0), "y": y.sum(0), "xx": x.T @ x, "yy": y.T @ y, "xy": x.T @ y}
        assert math.isnan(linear_cka(sums, 60))
    # Features of float32 that vary in their last digits still have one.
    x = np.float32(1) + np.float32(1e-6) * y.astype(np.float32)
    x = x.astype(np.float64)
    sums = {"x": x.sum(0), "y": y.sum(0), "xx": x.T @ x, "yy": y.T @ y, "xy": x.T @ y}
    assert linear_cka(sums, 60) == pytest.approx(gram_cka(x, y), rel=1e-2)


def _diverged(world: World, run: Path, tokenizer: Path, out: Path, value: float) -> dict[str, list[dict]]:
    """The first tables of all experiments on a model whose head is lost."""
    settings = [f"tokenizer.weights={tokenizer}", "sample.batch_size=8", "analyze.images=3", "analyze.ratios=[0,0.5]",
                "analyze.replacement_ratios=[0,1]", "analyze.train_images=10", "analyze.wrong_tokens=2",
                "analyze.images_per_class=1", "evaluate.replace_draws=1", "run.name='$a_{'"]  # fmt: skip
    found = {}
    for name, experiment in EXPERIMENTS.items():
        work = experiment.work(subject(run, *settings, model="$a_{"), world)
        with torch.no_grad():
            work.model.lm_head.weight.mul_(value)
            if name == "cka":
                work.model.embeddings.weight.fill_(value)
        lost = dataclasses.replace(experiment, work=lambda subject, world, work=work: work)
        (one,) = analyse(lost, [work.subject], world, out / name)
        found[name] = experiment.tables(one)[""]
        assert all(picture.startswith(b"\x89PNG") for picture in experiment.figures([one]).values())
        assert isinstance(experiment.lines([one]), list)
    return found


@pytest.mark.parametrize("value", [math.nan, pytest.param(1e30, marks=pytest.mark.long)])
def test_a_diverged_model_is_analysed_to_the_end(
    runs: dict[str, Path], tokenizer: Path, tmp_path: Path, value: float
) -> None:
    found = run_alone(_diverged, runs["rear"], tokenizer, tmp_path, value)
    perplexity = found["generalization"][0]["perplexity"]
    assert math.isnan(perplexity) if math.isnan(value) else perplexity == math.inf
    assert set(found) == set(EXPERIMENTS)
    assert any(math.isnan(row["cka"]) for row in found["cka"])


def test_another_order_of_decoding_is_another_experiment(runs: dict[str, Path], tokenizer: Path) -> None:
    weights = f"tokenizer.weights={tokenizer}"

    def identity(run: Path, *overrides: str) -> dict:
        return EXPERIMENTS["exposure"].work(subject(run, weights, *overrides), _single()).identity

    plain = identity(runs["ar"])
    assert "sample_order" not in plain
    assert identity(runs["ar"], "sample.order=spiral_in") == {**plain, "sample_order": "spiral_in"}
