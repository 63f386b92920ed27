"""What is scored: checkpoints and settings of them, reconstructions, and samples during training."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import ROOT, launch, metrics, run_alone, run_ranks, tiny_config
from PIL import Image
from test_evaluate import _Small, some_images, with_references
from test_sample import prepared

from rear_scale.analysis import token_prediction
from rear_scale.checkpoint.folder import Checkpoint
from rear_scale.config import ExperimentConfig, InputError
from rear_scale.evaluate import job, reconstruction, training_scores
from rear_scale.evaluate.images import image_set as sources
from rear_scale.evaluate.images.image_set import Generation, ImageSet, open_image_set
from rear_scale.evaluate.job import Evaluation
from rear_scale.evaluate.networks import feature_cache
from rear_scale.evaluate.networks.dinov2 import DinoV2
from rear_scale.evaluate.networks.feature_cache import Part, extract
from rear_scale.evaluate.networks.inception import Inception
from rear_scale.evaluate.published import our_rows
from rear_scale.evaluate.result import ImageScores
from rear_scale.evaluate.targets import EvalTarget, TargetOpener, eval_targets
from rear_scale.evaluate.training_scores import TrainingScores, check_training_scores, is_due
from rear_scale.run import sinks
from rear_scale.sample import job as sample_job
from rear_scale.sample.job import sample_images
from rear_scale.shards.record import read_manifest
from rear_scale.tokenizer.compact import CompactTokenizer
from rear_scale.train import setup
from rear_scale.train.loop import Hooks, train
from rear_scale.world import World


def reference(folder: Path, count: int = 30) -> Path:
    np.savez(folder / "reference.npz", arr_0=np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), np.uint8))
    return folder / "reference.npz"


def test_targets_are_all_checkpoints_at_all_settings(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, found = prepared(tmp_path, tokens)
    planned = eval_targets(cfg, [(cfg, found)], None, ["sample.guidance.scale=1.5,2.0", "sample.seed=3,4"], None)
    assert [(p.cfg.sample.guidance.scale, p.cfg.sample.seed) for p in planned] == [
        (1.5, 3), (1.5, 4), (2.0, 3), (2.0, 4),
    ]  # fmt: skip
    assert planned[0].output.name == "result_guidance.scale=1.5_seed=3.json"
    (alone,) = eval_targets(cfg, [(cfg, found)], None, [], None)
    assert alone.output == found.path.parent.parent / "result.json"
    earlier = Checkpoint(found.path.with_name("step_00000004"), {**found.meta, "step": 4})
    both = eval_targets(cfg, [(cfg, found), (cfg, earlier)], None, [], None)
    assert [target.output.name for target in both] == [f"result_step={found.step}.json", "result_step=4.json"]
    # The moving average of a run's weights, in a file beside that of the weights.
    files = [Checkpoint(found.path.with_name(name), found.meta) for name in ("a.safetensors", "a_ema.safetensors")]
    both = eval_targets(cfg, [(cfg, file) for file in files], None, ["sample.seed=1"], None)
    assert [target.output.name for target in both] == ["result_a_seed=1.json", "result_a_ema_seed=1.json"]
    (images,) = eval_targets(cfg, [], Path("a/samples.npz"), [], None)
    assert images.output == Path("a/samples.result.json")
    for name in ("scale_4.0", "scale_4.5"):
        (tmp_path / name).mkdir()
        (images,) = eval_targets(cfg, [], tmp_path / name, [], None)
        assert images.output == tmp_path / f"{name}.result.json"
    monkeypatch.chdir(tmp_path / name)
    (images,) = eval_targets(cfg, [], Path("."), [], None)
    assert (images.output, images.name) == (tmp_path / f"{name}.result.json", name)


def test_contradictory_targets_are_named(tmp_path: Path, tokens: Path) -> None:
    cfg, found = prepared(tmp_path, tokens)
    mine = [(cfg, found)]
    for arguments, expected in (
        (([], None, [], None), "nothing to score"),
        ((mine, Path("a.npz"), ["sample.seed=1,2"], None), "one set of images"),
        ((mine, None, ["optim.lr=1,2"], None), "the form is sample.FIELD"),
        ((mine, None, ["sample.seed=1,2"], tmp_path / "out.json"), "there are 2 results"),
        ((mine, None, ["sample.seed=1,1"], None), "result_seed=1.json would be the result of several"),
        ((mine * 2, None, [], None), "result.json would be the result of several"),
    ):
        with pytest.raises(InputError, match=expected):
            eval_targets(cfg, *arguments)


def _score_target(world: World, cfg: ExperimentConfig, found: Checkpoint, cache: Path, write: bool) -> dict:
    target = EvalTarget(cfg, found, None, cache / "result.json")
    if write:
        sample_images(cfg, found, world, sample_job.default_output(cfg, found))
    evaluation = Evaluation(cfg, cache, world)
    evaluation.networks = [_Small()]
    samples = TargetOpener(world).images(target)
    assert samples.name.endswith(".npz") == write
    return evaluation.score(samples).to_json()


def test_generated_images_score_as_the_written_ones_and_leave_nothing_behind(tmp_path: Path, tokens: Path) -> None:
    overrides = ["sample.num_images=23", "sample.batch_size=5", f"evaluate.reference={reference(tmp_path)}"]
    cfg, found = prepared(tmp_path, tokens, *overrides)
    generated = run_alone(_score_target, cfg, found, tmp_path / "one", False)
    assert run_ranks(3, _score_target, cfg, found, tmp_path / "three", False) == [generated] * 3
    assert not list(tmp_path.rglob("*samples*"))
    assert len(list((tmp_path / "one").rglob("block_*.npz"))) == 5 + 1
    written = run_alone(_score_target, cfg, found, tmp_path / "written", True)
    assert written["labels"] == generated["labels"]
    one, other = (scores["inception"]["references"]["reference"] for scores in (written, generated))
    # The same images, added up in another order.
    assert one["fid"] == pytest.approx(other["fid"], rel=1e-5)
    assert one["precision"] == other["precision"]
    assert written["inception"]["inception_score"]["value"] == pytest.approx(
        generated["inception"]["inception_score"]["value"], rel=1e-6
    )


class _Planned:
    """A generated set of three blocks that notes what happens, and when; `fails` names what raises at block 1."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.events, self.drawn = fails, [], [threading.Event() for _ in range(3)]
        blocks = [np.arange(start, start + 4) for start in (0, 4, 8)]
        generation = Generation(self.draw, self.decode)
        self.images = ImageSet("planned", "planned", 8, 8, blocks, self.read, generation=generation)

    def note(self, what: str, block: int) -> None:
        self.events.append((what, block, threading.current_thread() is threading.main_thread()))
        if (what, block) == (self.fails, 1):
            raise InputError(f"{what} of block 1")

    def draw(self, numbers: np.ndarray) -> torch.Tensor:
        self.note("draw", numbers[0] // 4)
        self.drawn[numbers[0] // 4].set()
        return torch.from_numpy(numbers)

    def decode(self, tokens: torch.Tensor, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.note("decode", numbers[0] // 4)
        # The tokens of the next block are drawn meanwhile; after the last one there is none.
        if numbers[0] < 8 and not self.fails:
            assert self.drawn[numbers[0] // 4 + 1].wait(300)
        pixels = np.random.default_rng(numbers[0]).integers(0, 256, (4, 8, 8, 3), np.uint8)
        return pixels + tokens.numpy()[:, None, None, None].astype(np.uint8), numbers

    def read(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        raise AssertionError("a generated block is read in two halves")


class _Pixels:
    name = identity = "pixels"

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        return {"pool": images.reshape(len(images), -1).astype(np.float32)}


def _extracted(world: World, planned: _Planned, cache: Path) -> np.ndarray:
    (found,) = extract(planned.images, [_Pixels()], cache, 3, world)
    return found.rows("pool")[:]


def test_a_block_is_drawn_while_the_one_before_is_decoded_and_seen(tmp_path: Path) -> None:
    planned = _Planned()
    found = run_alone(_extracted, planned, tmp_path)
    expected = [
        np.random.default_rng(start).integers(0, 256, (4, 192), np.uint8)
        + np.arange(start, start + 4, dtype=np.uint8)[:, None]
        for start in (0, 4, 8)
    ]
    assert np.array_equal(found, np.concatenate(expected))
    assert sorted(planned.events) == sorted(
        (what, block, what == "draw") for block in range(3) for what in ("draw", "decode")
    )


class _Bar:
    """A progress bar that notes the images counted and the images whose features are written, at each step."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.counted, self.seen = folder, 0, []

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, images: int) -> None:
        self.counted += images
        self.seen.append((self.counted, 4 * len(list(self.folder.rglob("block_*.npz")))))


def test_the_bar_counts_images_whose_features_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bar = _Bar(tmp_path)
    monkeypatch.setattr(feature_cache, "progress", lambda *_, **__: bar)
    run_alone(_extracted, _Planned(), tmp_path)
    assert bar.counted == 12
    assert len(bar.seen) > 2
    assert all(counted <= written for counted, written in bar.seen)


@pytest.mark.parametrize(("fails", "left"), [("draw", 1), ("decode", 1)])
def test_an_evaluation_that_fails_keeps_the_blocks_before(tmp_path: Path, fails: str, left: int) -> None:
    with pytest.raises(InputError, match=f"{fails} of block 1"):
        run_alone(_extracted, _Planned(fails), tmp_path)
    assert len(list(tmp_path.rglob("block_*.npz"))) == left


class _SmallOther(_Small):
    """A second network, of a feature of its own."""

    name, sizes = "efficientnet", {"average": 8}

    def __init__(self) -> None:
        super().__init__(1)

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        return {"average": super().__call__(images)["pool"]}


def _reconstruct(world: World, cfg: ExperimentConfig, images: Path, cache: Path) -> dict:
    reconstruction.open_networks = lambda cfg, world: (
        [_Small()] * (cfg.evaluate.inception_weights is not None)
        + [_SmallOther()] * (cfg.evaluate.efficientnet_weights is not None)
    )
    return reconstruction.score_reconstruction(cfg, images, cache, world)[1].to_json()


def _tf32(world: World) -> list[bool]:
    """Whether TF32 is on where a tokenizer encodes and decodes under --reconstruct."""
    tokenizer, seen = CompactTokenizer(16, 32, 8, 16), []

    def noting(method: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        def noted(values: torch.Tensor) -> torch.Tensor:
            seen.append(torch.backends.cudnn.allow_tf32 or torch.get_float32_matmul_precision() != "highest")
            return method(values)

        return noted

    tokenizer.encode, tokenizer.decode = noting(tokenizer.encode), noting(tokenizer.decode)
    features = reconstruction.ReconstructionFeatures(tokenizer, [_Small()], {}, "nearest", "")
    features(np.zeros((1, 16, 16, 3), np.uint8))
    return seen


def test_reconstructions_are_made_without_tf32() -> None:
    assert torch.backends.cudnn.allow_tf32
    assert run_alone(_tf32) == [False, False]


def test_reconstructions_are_scored_on_any_number_of_ranks(tmp_path: Path, tokens: Path) -> None:
    torch.manual_seed(0)
    tokenizer = CompactTokenizer(16, 32, 8, 16)
    tokenizer.codes.normal_()
    tokenizer.save(tmp_path / "weights")
    (tmp_path / "images").mkdir()
    for number, image in enumerate(np.random.default_rng(0).integers(0, 256, (20, 24, 16, 3), dtype=np.uint8)):
        Image.fromarray(image).save(tmp_path / "images" / f"{number:02d}.png")
    overrides = [f"tokenizer.weights={tmp_path / 'weights'}", "evaluate.inception_weights=unused"]
    cfg = tiny_config(tmp_path, tokens, *overrides, "evaluate.batch_size=8")
    found = run_alone(_reconstruct, cfg, tmp_path / "images", tmp_path / "one")
    assert run_ranks(2, _reconstruct, cfg, tmp_path / "images", tmp_path / "two") == [found, found]
    pairs = found["reconstruction"]
    assert pairs["images"] == 20
    assert 0 < pairs["psnr"] < 20
    assert pairs["lpips"] is None
    assert 0 < pairs["codebook_used"] <= 1
    assert pairs["codebook_entropy_bits"] <= 5
    assert found["inception"]["references"]["originals"]["fid"] > 0
    assert found["uint8_rounding"] == "truncate"
    cfg.evaluate.efficientnet_weights = "unused"
    both = run_alone(_reconstruct, cfg, tmp_path / "images", tmp_path / "one")
    assert both["inception"] == found["inception"]
    distances = both["efficientnet"]["references"]["originals"]
    assert distances["fd_efficientnet"] > 0
    assert 0 <= distances["recall"]["exact"] <= 1
    cfg.evaluate.inception_weights = None
    only_other = run_alone(_reconstruct, cfg, tmp_path / "images", tmp_path / "one")
    assert only_other["efficientnet"] == both["efficientnet"]
    assert "inception" not in only_other
    cfg.evaluate.efficientnet_weights = None
    alone = run_alone(_reconstruct, cfg, tmp_path / "images", tmp_path / "one")
    assert alone["reconstruction"] == pairs
    assert "inception" not in alone
    (row,) = our_rows("compact", ImageScores.from_json(alone))
    assert row.cells == {"PSNR": f"{pairs['psnr']:.2f}", "LPIPS": "-", "codes used": f"{pairs['codebook_used']:.3f}"}
    assert (row.samples, row.against, row.caveats) == ("20", "-", [])


def test_scores_in_training_come_at_the_first_checkpoint_after_each_multiple(tmp_path: Path, tokens: Path) -> None:
    # 12 images a step, a checkpoint every 4 steps and at the last.
    cfg = tiny_config(tmp_path, tokens, "evaluate.training={every_images: 90, num_images: 10}")
    assert [step for step in (4, 8, 12, 16, 20, 24) if is_due(step, cfg)] == [8, 16, 24]
    # 22 is the last step, after 20: 240 and 264 images, no multiple of 90 between them.
    assert not is_due(22, cfg)


def _train(world: World, cfg: ExperimentConfig) -> None:
    data = setup.check_data(cfg, world.ranks)
    tokens, codebook = data.open(world)
    hook = TrainingScores(cfg, world)
    hook.evaluation = Evaluation(cfg, Path(cfg.run.dir) / "features", world)
    hook.evaluation.networks = [_Small()]
    train(cfg, data.plan, world, tokens, codebook, Hooks(on_checkpoint=[hook]))


def test_scores_in_training_leave_the_training_as_it_is(tmp_path: Path, tokens: Path) -> None:
    cfg, _ = prepared(tmp_path, tokens)
    losses = {}
    for name, section in (("without", "null"), ("with", "{every_images: 24, num_images: 10}")):
        (tmp_path / name).mkdir()
        own = tiny_config(
            tmp_path / name, tokens, f"tokenizer.weights={cfg.tokenizer.weights}", "strategy=single",
            f"evaluate.training={section}", f"evaluate.reference={reference(tmp_path)}", "sample.batch_size=5",
            "checkpoint.every_steps=2", "train.total_steps=6",
        )  # fmt: skip
        run_alone(_train if name == "with" else _train_plainly, own)
        losses[name] = [line["loss"] for line in metrics(tmp_path / name / "run")]
    assert losses["with"] == losses["without"]
    lines = [json.loads(text) for text in (tmp_path / "with/run" / training_scores.FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all(line["fid_n10/reference"] > 0 for line in lines)
    assert lines[0]["images_seen"] == 24
    assert "inception_score_n10" in lines[0]


def _train_plainly(world: World, cfg: ExperimentConfig) -> None:
    data = setup.check_data(cfg, world.ranks)
    tokens, codebook = data.open(world)
    train(cfg, data.plan, world, tokens, codebook, Hooks())


def test_scores_that_a_kill_has_prevented_are_made_once(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = tiny_config(tmp_path, tokens, "evaluate.training={every_images: 12, num_images: 10}")
    file = tmp_path / "run" / training_scores.FILE
    file.parent.mkdir()
    monkeypatch.setattr(
        TrainingScores, "__call__", lambda self, step, path: training_scores._write(file, {"step": step})
    )
    hook = run_alone(lambda world: TrainingScores(cfg, world))
    for step in (4, 4, 8, 8):
        run_alone(lambda world, step=step: hook.make_missing(step, tmp_path))
    assert file.read_text() == '{"step": 4}\n{"step": 8}\n'


def test_scores_in_training_that_cannot_be_made_are_refused_before_it(tmp_path: Path, tokens: Path) -> None:
    cfg = tiny_config(tmp_path, tokens, "evaluate.training={num_images: 10}")
    manifest = read_manifest(tokens)
    with pytest.raises(InputError, match="evaluate.reference is empty"):
        check_training_scores(cfg, manifest)
    check_training_scores(tiny_config(tmp_path, tokens), manifest)
    CompactTokenizer(16, 32, 8, 16).save(tmp_path / "weights")
    (tmp_path / "inception").touch()
    files = (f"tokenizer.weights={tmp_path / 'weights'}", f"evaluate.inception_weights={tmp_path / 'inception'}")
    cfg = tiny_config(
        tmp_path, tokens, "evaluate.training={num_images: 10}", f"evaluate.reference={reference(tmp_path)}", *files
    )
    check_training_scores(cfg, manifest)
    with pytest.raises(InputError, match="tokens of a file with sha256 abababab"):
        check_training_scores(cfg, replace(manifest, tokenizer_sha256="ab" * 32))


def evaluate_here(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    """launchers/evaluate.py in this process, with a network that costs nothing in place of Inception."""
    monkeypatch.setattr(job, "open_networks", lambda cfg, world: [_Small()])
    launch_here(monkeypatch, *arguments)


def launch_here(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    """launchers/evaluate.py in this process."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    try:
        runpy.run_path(str(ROOT / "launchers/evaluate.py"))["main"]()
    finally:
        # A process ends after an error; a test goes on.
        if dist.is_initialized():
            dist.destroy_process_group()


def stand_in_weights(folder: Path) -> str:
    (folder / "inception").touch()
    return f"evaluate.inception_weights={folder / 'inception'}"


def test_statistics_are_a_reference_of_any_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of images of several sizes becomes a reference, without another one; it is used next, with --json."""
    (tmp_path / "photographs").mkdir()
    for number in range(20):
        image = np.random.default_rng(number).integers(0, 256, (20 + number, 24, 3), np.uint8)
        Image.fromarray(image).save(tmp_path / "photographs" / f"{number:02}.png")
    statistics, weights = tmp_path / "statistics.npz", stand_in_weights(tmp_path)
    overrides = ("tokenizer.image_size=16", weights)
    evaluate_here(monkeypatch, "--samples", tmp_path / "photographs", "--write-statistics", statistics, *overrides)
    assert not (tmp_path / "photographs.result.json").exists()
    np.savez(tmp_path / "samples.npz", arr_0=np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), np.uint8))
    capsys.readouterr()
    evaluate_here(
        monkeypatch, "--samples", tmp_path / "samples.npz", f"evaluate.reference.own={statistics}", *overrides, "--json"
    )
    found = json.loads((tmp_path / "samples.result.json").read_text())["images"]
    (line,) = capsys.readouterr().out.splitlines()  # nothing but that
    printed = json.loads(line)
    assert (printed["name"], printed["result"]) == ("samples.npz", str(tmp_path / "samples.result.json"))
    assert printed["scores"]["fid/own"] == found["inception"]["references"]["own"]["fid"]
    assert printed["notes"] == {"own": found["inception"]["references"]["own"]["notes"]}
    assert any("only statistics" in note for note in printed["notes"]["own"])
    assert found["inception"]["references"]["own"]["fid"] > 0
    assert found["inception"]["references"]["own"]["fid_reference_images"] == 20
    assert found["reference_sets"]["own"]["size"] == [16, 16]
    assert "centre crop to 16" in found["reference_sets"]["own"]["preprocessing"]


def test_one_statistics_file_is_not_of_several_sets(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, found = prepared(tmp_path, tokens)
    with pytest.raises(InputError, match=r"statistics\.npz is one file, but there are 2 sets of images"):
        evaluate_here(
            monkeypatch, "--checkpoint", found.path, "--sweep", "sample.seed=1,2",
            "--write-statistics", tmp_path / "statistics.npz", stand_in_weights(tmp_path),
        )  # fmt: skip


def test_a_dry_run_names_every_input_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = ["evaluate.inception_weights", "evaluate.dinov2_weights", "evaluate.vgg_weights", "evaluate.lpips_weights"]
    fields += ["evaluate.reference.adm", "tokenizer.weights"]
    options = {"--samples": "a.npz", "--reconstruct": "images", "--also": "run"}
    evaluate_here(
        monkeypatch, "--dry-run", *(text for pair in options.items() for text in pair),
        *(f"{name}=none" for name in fields), f"evaluate.reference.there={tmp_path}",
    )  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    for name, path in {**dict.fromkeys(fields, "none"), **options}.items():
        assert f"not found: {name}={path}" in lines
    assert f"evaluate.reference.there: {tmp_path} (exists)" in lines


def test_tokens_are_scored_once_a_checkpoint_and_their_damage_costs_no_scores(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, found = prepared(tmp_path, tokens)
    common = (
        "--checkpoint", found.path, f"evaluate.reference={reference(tmp_path)}", stand_in_weights(tmp_path),
        "sample.num_images=4",
    )  # fmt: skip
    asked, logged = [], {}
    predicted = {"train_clean": {"ctr": 0.25, "perplexity": 3.5, "sequences": 100, "draws": 0}}
    monkeypatch.setattr(token_prediction, "score_tokens", lambda cfg, model, world: asked.append(cfg) or predicted)
    monkeypatch.setattr(sinks, "log_summary", lambda cfg, run, values, step: logged.update(values))
    evaluate_here(monkeypatch, *common, "--sweep", "sample.seed=1,2")
    assert len(asked) == 1
    for seed in (1, 2):
        result = json.loads((tmp_path / f"run/result_seed={seed}.json").read_text())
        assert result["tokens"] == predicted
        assert logged[f"fid/reference/seed={seed}"] == result["images"]["inception"]["references"]["reference"]["fid"]
    assert {name.split("/")[0] for name in logged} >= {"fid", "sfid", "inception_score", "precision_exact"}
    *scores, _, header, row = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in scores[1:3]] == [["tiny", "seed=1"], ["tiny", "seed=2"]]
    assert row.split()[-3:] == ["0.2500", "3.500", "100"]

    def damaged(*arguments: object) -> None:
        raise InputError("a shard is damaged")

    monkeypatch.setattr(token_prediction, "score_tokens", damaged)
    with pytest.raises(InputError, match="a shard is damaged"):
        evaluate_here(monkeypatch, *common)
    assert capsys.readouterr().out.startswith("model ")
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["images"]["inception"]["samples"] == 4
    assert result["tokens"] is None


def test_images_of_foreign_tokens_are_not_scored(tmp_path: Path, tokens: Path) -> None:
    cfg, found = prepared(tmp_path, tokens)
    other = Checkpoint(found.path, {**found.meta, "tokenizer_sha256": "ab" * 32})

    def images(world: World) -> None:
        TargetOpener(world).images(EvalTarget(cfg, other, None, tmp_path / "result.json"))

    with pytest.raises(InputError, match="tokens of a file with sha256 abababab"):
        run_alone(images)


def test_dinov2_has_the_public_names_and_its_position_table_is_resized() -> None:
    with torch.device("meta"):
        network = DinoV2()
    state = network.state_dict()
    assert state["pos_embed"].shape == (1, 1370, 1024)
    assert state["patch_embed.proj.weight"].shape == (1024, 3, 14, 14)
    assert state["blocks.23.ls2.gamma"].shape == (1024,)
    assert len(state) == 4 + 24 * 14 + 2
    assert sum(value.numel() for value in state.values()) == 304_368_640 - 1024 + 0
    torch.manual_seed(0)
    small = DinoV2(width=32, depth=2, num_heads=4).eval()
    torch.nn.init.normal_(small.pos_embed)
    positions = small.positions(16)
    assert positions.shape == (1, 257, 32)
    assert torch.equal(positions[:, 0], small.pos_embed[:, 0])
    images = torch.randint(0, 256, (3, 3, 40, 40), dtype=torch.uint8)
    with torch.inference_mode():
        features = small(images)
        assert features.shape == (3, 32)
        assert torch.allclose(features[1:2], small(images[1:2]), atol=1e-5)


def seeded_inception(folder: Path) -> Path:
    torch.manual_seed(0)
    network = Inception()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), folder / "seeded.pth")
    return folder / "seeded.pth"


def test_one_job_scores_several_settings_of_a_checkpoint(tmp_path: Path, tokens: Path) -> None:
    """The launcher, from the checkpoint, with Inception: two results with their provenance, and the table."""
    cfg, found = prepared(tmp_path, tokens)
    run = found.path.parent.parent
    result = launch(
        "python", "launchers/evaluate.py", "--checkpoint", run, "--sweep", "sample.seed=3,4",
        f"evaluate.reference={reference(tmp_path, 3)}", f"evaluate.inception_weights={seeded_inception(tmp_path)}",
        "sample.num_images=3", "sample.batch_size=2",
        f"data.train={tmp_path / 'nowhere'}", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "published rows are left out" in result.stdout
    results = [json.loads((run / f"result_seed={seed}.json").read_text()) for seed in (3, 4)]
    scores = [found["images"]["inception"]["references"]["reference"]["fid"] for found in results]
    assert scores[0] != scores[1]
    assert all(f"{score:.3f}" in result.stdout for score in scores)
    one = results[0]
    assert one["sample"]["seed"] == 3
    assert one["samples"]["uint8_rounding"] == "truncate"
    assert one["images"]["labels"]["counts"]
    assert one["provenance"]["world_size"] == 1
    assert one["checkpoint"]["sha256"]
    assert one["images"]["inception"]["weights_sha256"]
    assert len(one["images"]["reference_sets"]["reference"]["identity"]) == 64
    assert one["config"]["model"]["depth"] == 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "error: there is nothing to score"),
        (["--samples", "none.npz"], "error: evaluate.reference is empty"),
        (["--samples", "none.npz", "--also", "run"], "error: --also run adds to --checkpoint, which is missing"),
        (["--samples", "none.npz", "--sweep", "sample.seed=1,2"], "error: --sweep sample.seed=1,2 needs --checkpoint"),
        (["--samples", "none.npz", "evaluate.reference=none.npz"], "error: no feature network is set"),
        (
            ["--samples", "none.npz", "--out", "x.npz"],
            "error: --out x.npz does not end in .json. Name a file such as x.json",
        ),
        (["--reconstruct", "images", "--part", "0/2"], "error: --part cannot be combined with --reconstruct"),
    ],
)
def test_bad_requests_are_one_line(tmp_path: Path, arguments: list[str], expected: str) -> None:
    result = launch("python", "launchers/evaluate.py", *arguments, cwd=tmp_path)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(expected)


def test_plain_images_have_no_checkpoint(tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", arr_0=some_images(4))

    def check(world: World) -> None:
        target = EvalTarget(ExperimentConfig(), None, tmp_path / "images.npz", tmp_path / "out.json")
        assert TargetOpener(world).images(target).count == 4
        assert (target.name, target.run) == ("images.npz", None)
        assert open_image_set(tmp_path / "images.npz", world).uint8_rounding is None

    run_alone(check)


class _Counting(_Small):
    seen = 0

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        self.seen += len(images)
        return super().__call__(images)


def test_parts_of_a_job_share_out_the_references_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "BLOCK_IMAGES", 10)
    np.savez(tmp_path / "samples.npz", arr_0=some_images(25, 3))
    cfg = with_references(tmp_path)

    def share(world: World, index: int) -> tuple[int, bool]:
        evaluation, network = Evaluation(cfg, tmp_path / "features", world), _Counting()
        evaluation.networks = [network]
        samples = open_image_set(tmp_path / "samples.npz", world)
        done = evaluation.extract_part(samples, Part(index, 3))
        seen = network.seen
        if done:
            evaluation.score(samples)
            assert network.seen == seen, "the scores found every feature there"
        return seen, done

    # 25 samples, 45 and 33 reference images, in blocks of 10.
    assert [run_alone(share, index) for index in range(3)] == [
        (10 + 20 + 13, False),
        (10 + 15 + 10, False),
        (5 + 10 + 10, True),
    ]


def test_the_job_array_gives_each_task_its_part(tmp_path: Path) -> None:
    """With an srun that only says what it was asked."""
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    script = ROOT / "launchers/slurm/evaluate.sbatch"
    job = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "REAR_LOGS": str(tmp_path / "logs"),
    }
    task = {
        "SLURM_ARRAY_TASK_ID": "6", "SLURM_ARRAY_TASK_MIN": "4", "SLURM_ARRAY_TASK_MAX": "11", "SLURM_ARRAY_TASK_COUNT": "8",
    }  # fmt: skip
    for extra, expected in ((task, " --part 2/8 --samples x"), ({}, " launchers/evaluate.py --samples x")):
        environment = {**job, "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_ON_NODE": "96", **extra}
        result = subprocess.run(["bash", script, "--samples", "x"], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip().endswith(expected)
        assert "--ntasks=4 --ntasks-per-node=4 --cpus-per-task=24 " in result.stdout
    # --array=4,6,11
    gaps = {**job, **task, "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_ON_NODE": "96"}
    result = subprocess.run(["bash", script, "--samples", "x"], env=gaps, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert "error: --array is a list of 3 tasks with gaps" in result.stderr
    assert "--array=0-2" in result.stderr
