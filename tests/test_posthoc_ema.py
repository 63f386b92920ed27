"""Post-hoc EMA: profiles against EDM2's published numbers, averages of every strategy, snapshots and what is made of them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CODEBOOK_DIM, CODEBOOK_SIZE, NUM_CLASSES, find, launch, run_alone, run_ranks, tiny_config
from PIL import Image
from safetensors.torch import load_file
from test_parallel import QUIET, TWO_RANKS, build, run_steps
from test_train import run

import rear_scale
from rear_scale import cli
from rear_scale.checkpoint import snapshots as snapshots_module
from rear_scale.checkpoint.average import MOVING_AVERAGE, averaged
from rear_scale.checkpoint.convert import convert
from rear_scale.checkpoint.folder import Checkpoint, open_checkpoint
from rear_scale.checkpoint.snapshots import SNAPSHOTS, snapshots
from rear_scale.checkpoint.writer import save
from rear_scale.config import CheckpointConfig, ExperimentConfig, InputError, OptimConfig
from rear_scale.evaluate.networks.classifier import Classifier
from rear_scale.evaluate.result import read_result
from rear_scale.optim import posthoc_ema
from rear_scale.parallel.memory import memory_per_rank
from rear_scale.sample.job import default_output, job_identity
from rear_scale.shards.images import write_images
from rear_scale.tokenizer.compact import CompactTokenizer
from rear_scale.train.loop import Hooks
from rear_scale.world import World

LENGTHS = "optim.posthoc_ema=[0.05,0.1]"


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_lengths_are_those_that_edm2_publishes(sigma_rel: float, gamma: float) -> None:
    assert posthoc_ema.gamma_of(sigma_rel) == pytest.approx(gamma, abs=5e-3)
    assert posthoc_ema.sigma_rel_of(posthoc_ema.gamma_of(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-12)
    assert posthoc_ema.sigma_rel_of(0) == pytest.approx(posthoc_ema.LONGEST)


def profile(updates: int, until: int, gamma: float) -> np.ndarray:
    """The weight of each update in the average after `until` of them, by the update rule."""
    weights = np.zeros(updates)
    for step in range(1, until + 1):
        weights *= posthoc_ema.keep(step, gamma)
        weights[step - 1] = 1 - posthoc_ema.keep(step, gamma)
    return weights


def test_the_update_rule_and_the_products_are_those_of_the_profile() -> None:
    updates, gammas = 400, [posthoc_ema.gamma_of(sigma) for sigma in (0.05, 0.1)]
    edges = np.arange(updates + 1) / updates
    for gamma in gammas:
        # The integral of the continuous profile over each update (Eq. 121), and its standard deviation (Eq. 123).
        found = profile(updates, updates, gamma)
        assert found == pytest.approx(np.diff(edges ** (gamma + 1)), abs=1e-12)
        middles = edges[1:] - 0.5 / updates
        deviation = np.sqrt(found @ middles**2 - (found @ middles) ** 2)
        assert deviation == pytest.approx(posthoc_ema.sigma_rel_of(gamma), rel=1e-3)
    # The integral of a product, as a sum over finer steps (Eq. 126).
    fine = (np.arange(200_000) + 0.5) / 200_000
    for t_a, g_a, t_b, g_b in ((0.5, gammas[0], 1.0, gammas[1]), (0.9, gammas[1], 0.3, gammas[1]), (1, 3.0, 1, 5.0)):
        one, other = ((g + 1) * fine**g / t ** (g + 1) * (fine <= t) for t, g in ((t_a, g_a), (t_b, g_b)))
        product = posthoc_ema.profile_product(*map(np.float64, (t_a, g_a, t_b, g_b)))
        assert product == pytest.approx((one * other).mean(), rel=1e-3)


@pytest.mark.parametrize(("sigma_rel", "largest"), [(0.05, 1e-6), (0.1, 1e-6), (0.08, 0.01), (0.15, 0.03), (0.2, 0.06)])
def test_a_profile_is_made_of_snapshots_and_its_error_is_known(sigma_rel: float, largest: float) -> None:
    updates, every = 240, 20
    times = [step for step in range(every, updates + 1, every) for _ in range(2)]
    gammas = [posthoc_ema.gamma_of(sigma) for sigma in (0.05, 0.1)] * (updates // every)
    gamma = posthoc_ema.gamma_of(sigma_rel)
    factors, error = posthoc_ema.factors(times, gammas, updates, gamma)
    parts = [profile(updates, until, own) for until, own in zip(times, gammas, strict=True)]
    wanted = profile(updates, updates, gamma)
    distance = np.linalg.norm(factors @ np.array(parts) - wanted) / np.linalg.norm(wanted)
    assert distance <= error + 1e-9 <= largest
    # Weights that do not change are reproduced, however coarse the profile.
    assert factors.sum() == pytest.approx(1, abs=1e-9)
    # With an earlier end, snapshots that are not there yet have no part in it.
    assert posthoc_ema.factors(times[:2], gammas[:2], every, gammas[0])[0] == pytest.approx([1, 0], abs=1e-9)


def apart(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The distance of all tensors together, relative to those that are expected."""
    distance = sum((found[name] - value).double().square().sum().item() for name, value in expected.items())
    return (distance / sum(value.double().square().sum().item() for value in expected.values())) ** 0.5


def _averages(world: World, folder: Path, tokens: Path, cells: list[tuple[str, ...]]) -> dict[tuple, dict[str, Any]]:
    """Per strategy: averages after saving, loading and a skipped update, and how far they are from those kept beside them."""
    found: dict[tuple, dict[str, Any]] = {}
    for cell in cells:
        sizes = f"train.micro_batch_size={12 // world.size}"
        cfg = tiny_config(folder, tokens, *QUIET, sizes, LENGTHS, "optim.ema_decay=0.7", *cell)
        strategy = build(world, cfg)
        expected: dict[str, torch.Tensor] = {}
        for step in range(1, 5):
            run_steps(world, cfg, strategy, step, step, skip=step == 2, lr=1e-3)
            applied = step - (step >= 2)
            for key, value in strategy.tensors("param"):
                if step != 2:
                    for state, sigma in zip(posthoc_ema.state_names(cfg.optim), cfg.optim.posthoc_ema, strict=True):
                        name, beta = f"{state}/{key}", (1 - 1 / applied) ** (posthoc_ema.gamma_of(sigma) + 1)
                        before = expected.get(name, torch.zeros(()))
                        expected[name] = beta * before + (1 - beta) * value.cpu()
            if step == 3:
                meta = {"optimizer_step": applied, "config": {}}
                path = save(folder / "-".join(cell), 3, strategy, world, meta, CheckpointConfig())
        states = posthoc_ema.averages(cfg.optim)
        values = {f"{state}/{key}": value.cpu().clone() for state in states for key, value in strategy.tensors(state)}
        resumed = build(world, cfg, open_checkpoint(path))
        run_steps(world, cfg, resumed, 4, 4, lr=1e-3)
        same = all(
            torch.equal(value.cpu(), values[f"{state}/{key}"])
            for state in states
            for key, value in resumed.tensors(state)
        )
        far = max((values[name] - value).abs().max().item() for name, value in expected.items())
        found[cell] = {"far": far, "same": same, "values": values}
    return found


def test_averages_are_those_of_applied_updates_and_resume(tmp_path: Path, tokens: Path) -> None:
    # tests/test_parallel.py has the strategies of two ranks.
    result = run_alone(_averages, tmp_path, tokens, [("strategy=single",)])["strategy=single",]
    assert result["far"] <= 1e-6
    assert result["same"]
    stored = {key.split("/")[0] for key in open_checkpoint(tmp_path / "strategy=single/step_00000003").meta["index"]}
    assert stored == {"param", "exp_avg", "exp_avg_sq", "ema", "posthoc_ema_1", "posthoc_ema_2"}


@pytest.mark.long
@pytest.mark.parametrize(
    ("ranks", "cells"),
    [
        (2, [(f"strategy={name}",) for name in TWO_RANKS] + [("strategy=zero2", "strategy.cpu_offload=true")]),
        (4, [("strategy=hsdp",)]),
    ],
)
def test_averages_are_the_same_for_every_strategy(
    tmp_path: Path, tokens: Path, ranks: int, cells: list[tuple[str, ...]]
) -> None:
    single = run_alone(_averages, tmp_path, tokens, [("strategy=single",)])["strategy=single",]
    for cell, result in run_ranks(ranks, _averages, tmp_path, tokens, cells)[0].items():
        assert result["far"] <= 1e-6, cell
        assert result["same"], cell
        assert apart(result["values"], single["values"]) <= 1e-5, cell


def test_memory_counts_the_averages(tmp_path: Path, tokens: Path) -> None:
    for strategy, ranks in (("single", 1), ("zero2", 2), ("fsdp2", 2)):
        cfg = tiny_config(tmp_path, tokens, f"strategy={strategy}")
        more = replace(cfg, optim=replace(cfg.optim, posthoc_ema=[0.05, 0.1]))
        before, after = (memory_per_rank(one, ranks, 1) for one in (cfg, more))
        assert after.optimizer == 2 * before.optimizer, strategy  # two states of AdamW, and two averages
        assert replace(after, optimizer=before.optimizer) == before


def snapshot_config(folder: Path, tokens: Path, name: str, *overrides: str) -> ExperimentConfig:
    """Updates that move the weights by a multiple of their size, so that averages differ."""
    return tiny_config(
        folder, tokens, f"run.dir={folder / name}", "strategy=single", "optim.posthoc_ema=[0.05,0.1,0.15]", "optim.ema_decay=0.5",
        "train.total_steps=24", "checkpoint.every_steps=8", "checkpoint.ema_every_steps=2", "optim.lr=2e-3",
        "train.micro_batch_size=12", "train.log_every=24", "model.depth=1", *overrides,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> Path:
    """A run of 24 steps with snapshots of every second one, in which the length 0.15 is tracked directly too."""
    folder = tmp_path_factory.mktemp("posthoc")
    run_alone(run, snapshot_config(folder, tokens, "run"))
    return folder / "run"


def without_the_third(checkpoint: Checkpoint) -> None:
    """Hides the average of length 0.15 from what is made of snapshots: in their files it stays."""
    for source in (checkpoint, *snapshots(checkpoint.run)):
        path = source.path / "meta.json"
        meta = json.loads(path.read_text())
        meta["index"] = {key: file for key, file in meta["index"].items() if not key.startswith("posthoc_ema_3/")}
        path.write_text(json.dumps(meta))


def relative(found: Checkpoint, state: str, expected: Checkpoint, of: str) -> float:
    """The distance of all weights together, relative to what is expected."""
    one, other = found.reader(state), expected.reader(of)
    return apart({name: one(name) for name in expected.names()}, {name: other(name) for name in expected.names()})


def test_an_average_made_of_snapshots_is_that_which_was_tracked(
    tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracked = find(finished)
    assert [one.step for one in snapshots(finished)] == list(range(2, 25, 2))
    # What was tracked is found again exactly, also at an earlier step.
    for state, sigma in (("posthoc_ema_1", 0.05), ("posthoc_ema_2", 0.1), ("posthoc_ema_3", 0.15)):
        assert relative(averaged(tracked, sigma), "param", tracked, state) <= 1e-6
    earlier = open_checkpoint(finished / "checkpoints/step_00000016")
    assert relative(averaged(earlier, 0.1), "param", earlier, "posthoc_ema_2") <= 1e-6
    capsys.readouterr()
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    found = find(copy)
    without_the_third(found)
    hidden = averaged(find(copy), 0.15)
    error = relative(hidden, "param", tracked, "posthoc_ema_3")
    apart = relative(tracked, "posthoc_ema_2", tracked, "posthoc_ema_3")
    print(f"0.15 of 0.05 and 0.1: {error:.2e}; from 0.1 to 0.15 it is {apart:.2e}")
    assert error <= 1e-3
    assert error <= apart / 20
    assert "average of sigma_rel=0.15 from 12 snapshots; its profile is off by 1." in capsys.readouterr().err
    assert relative(averaged(find(copy), MOVING_AVERAGE), "param", tracked, "ema") == 0


def _train(world: World, cfg: ExperimentConfig) -> None:
    run(world, cfg)


def test_two_ranks_and_resumed_runs_give_the_same_snapshots(tmp_path: Path, tokens: Path, finished: Path) -> None:
    def killed(step: int, model: torch.nn.Module) -> None:
        if step == 11:
            raise RuntimeError("killed")

    cfg = snapshot_config(tmp_path, tokens, "resumed")
    with pytest.raises(RuntimeError, match="killed"):
        run_alone(run, cfg, Hooks(on_step=[killed]))
    # Those of steps after the checkpoint are repeated; unfinished ones of a killed process go.
    (tmp_path / "resumed/ema/step_00000012.tmp").mkdir()
    run_alone(run, cfg)
    assert sorted(path.name for path in (tmp_path / "resumed" / SNAPSHOTS).iterdir()) == [
        f"step_{step:08d}" for step in range(2, 25, 2)
    ]
    for ours, theirs in zip(snapshots(tmp_path / "resumed"), snapshots(finished), strict=True):
        assert [item["sha256"] for item in ours.meta["files"]] == [item["sha256"] for item in theirs.meta["files"]]
    # Dropout masks depend on ranks.
    cells = []
    for name, size in (("single", 12), ("fsdp2", 6)):
        overrides = [*QUIET, f"strategy={name}", f"train.micro_batch_size={size}", "train.total_steps=8"]
        cells.append(snapshot_config(tmp_path, tokens, name, *overrides))
    run_alone(run, cells[0])
    run_ranks(2, _train, cells[1])
    assert len(list((tmp_path / "fsdp2/ema/step_00000008").glob("part-*"))) == 2
    for one, two in zip(snapshots(tmp_path / "single"), snapshots(tmp_path / "fsdp2"), strict=True):
        for state in ("posthoc_ema_1", "posthoc_ema_3"):
            names = [key.partition("/")[2] for key in one.meta["index"] if key.startswith(state)]
            ours, theirs = ({name: source.reader(state)(name) for name in names} for source in (one, two))
            assert apart(theirs, ours) <= 1e-5, (one.step, state)
    made = [averaged(find(tmp_path / name), 0.08) for name in ("single", "fsdp2")]
    assert relative(made[0], "param", made[1], "param") <= 1e-5


def test_a_branch_uses_the_snapshots_of_its_trunk(
    tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wsd = ["optim.schedule=wsd", "objective.noise.schedule=constant", "checkpoint.every_steps=4", "train.total_steps=8"]
    run_alone(run, snapshot_config(tmp_path, tokens, "trunk", *wsd, "optim.decay_share=0"))
    run_alone(run, snapshot_config(tmp_path, tokens, "branch", *wsd, f"train.branch_from={tmp_path / 'trunk'}@4"))
    run_alone(run, snapshot_config(tmp_path, tokens, "unbroken", *wsd))
    assert [one.step for one in snapshots(tmp_path / "branch")] == [6, 8]
    capsys.readouterr()
    made = averaged(find(tmp_path / "branch"), 0.12)
    assert "from 4 snapshots" in capsys.readouterr().err
    assert relative(made, "param", averaged(find(tmp_path / "unbroken"), 0.12), "param") == 0
    shutil.rmtree(tmp_path / "trunk")
    averaged(find(tmp_path / "branch"), 0.12)
    assert "from 2 snapshots" in capsys.readouterr().err


def test_the_library_opens_an_average(tmp_path: Path, finished: Path) -> None:
    tracked = find(finished)
    for ema, state in ((0.1, "posthoc_ema_2"), (True, "ema"), (False, "param")):
        model = rear_scale.load(finished, device="cpu", ema=ema).model
        read = tracked.reader(state)
        for name, value in model.named_parameters():
            assert torch.allclose(value, read(name), rtol=1e-5, atol=1e-7), (ema, name)
    for wrong in (0.3, 0, -1.0, "0.1"):
        with pytest.raises(InputError, match=f"ema={wrong} is not a length between 0 and 0.2887"):
            rear_scale.load(finished, ema=wrong)
    convert(finished, None, [], "consolidated", tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="^ema: .* is a file of weights alone.*or leave ema out"):
        rear_scale.load(tmp_path / "a.safetensors", ema=0.1)


@pytest.mark.long
def test_every_command_takes_an_average(tmp_path: Path, tokens: Path) -> None:
    """sample.py, evaluate.py, convert.py and the library: the same weights, and results under names of their own."""
    torch.manual_seed(0)
    tokenizer = CompactTokenizer(16, CODEBOOK_SIZE, CODEBOOK_DIM, 16)
    tokenizer.codes.normal_()
    with torch.no_grad():
        tokenizer.decoder[-1].weight.mul_(10)
    tokenizer.save(tmp_path / "weights")
    images = np.random.default_rng(0).integers(0, 256, (10, 16, 16, 3), np.uint8)
    labelled = ((Image.fromarray(image), number % NUM_CLASSES) for number, image in enumerate(images))
    write_images(tmp_path / "images", labelled, 16, [str(number) for number in range(NUM_CLASSES)])
    Classifier(16, NUM_CLASSES).save(tmp_path / "classifier")
    cfg = snapshot_config(
        tmp_path,
        tokens,
        "run",
        f"tokenizer.weights={tmp_path / 'weights'}",
        f"evaluate.classifier={{weights: {tmp_path / 'classifier'}, images: {tmp_path / 'images'}}}",
        f"evaluate.reference={{photographs: {tmp_path / 'images'}}}",
        "evaluate.replace_draws=1",
        "sample.num_images=20",
        "sample.batch_size=10",
        "optim.lr=2e-2",
    )
    run_alone(run, cfg)
    folder, file = tmp_path / "run", tmp_path / "average.safetensors"

    def command(name: str, *words: str | Path) -> None:
        done = launch("python", f"launchers/{name}.py", *words)
        assert done.returncode == 0, done.stderr

    command("convert", folder, "--ema", "0.12", "--to", "consolidated", "--out", file)
    made = {}
    for name, words in {
        "weights": ["--checkpoint", folder],
        "0.12": ["--checkpoint", folder, "--ema", "0.12"],
        "file": ["--checkpoint", file],
        "moving": ["--checkpoint", folder, "--ema"],
    }.items():
        command("sample", "--out", tmp_path / f"{name}.npz", *words)
        command("evaluate", *words, *(["--out", tmp_path / "of_file.json"] if name == "file" else []))
        with np.load(tmp_path / f"{name}.npz") as opened:
            made[name] = opened["arr_0"]
    assert np.array_equal(made["0.12"], made["file"])
    assert len({made[name].tobytes() for name in ("weights", "0.12", "moving")}) == 3
    classes = [number % NUM_CLASSES for number in range(20)]
    assert np.array_equal(rear_scale.load(folder, device="cpu", ema=0.12).sample(classes), made["0.12"])
    results = {
        name: read_result(path)
        for name, path in {
            "weights": folder / "result.json",
            "0.12": folder / "result_ema=0.12.json",
            "moving": folder / "result_ema.json",
            "file": tmp_path / "of_file.json",
        }.items()
    }
    assert results["0.12"].images == results["file"].images
    assert results["0.12"].tokens == results["file"].tokens
    assert results["0.12"].tokens != results["weights"].tokens != results["moving"].tokens
    records = {name: one.checkpoint.average for name, one in results.items() if one.checkpoint is not None}
    assert records["0.12"] is not None
    assert records["0.12"]["sigma_rel"] == 0.12
    assert records["moving"] == {"moving": True}
    assert records["weights"] is None


def test_an_average_is_converted_and_named_apart(tmp_path: Path, tokens: Path, finished: Path) -> None:
    convert(finished, None, [], "consolidated", tmp_path / "a.safetensors", ema=0.1)
    tracked, weights = find(finished), load_file(tmp_path / "a.safetensors")
    assert sorted(weights) == sorted(tracked.names())
    read = tracked.reader("posthoc_ema_2")
    assert all(torch.allclose(value, read(name), rtol=1e-5, atol=1e-7) for name, value in weights.items())
    CompactTokenizer(16, 32, 8, 16).save(tmp_path / "weights")
    cfg = snapshot_config(tmp_path, tokens, "other", f"tokenizer.weights={tmp_path / 'weights'}")
    plain, made, other = tracked, averaged(tracked, 0.1), averaged(tracked, 0.12)
    assert len({job_identity(cfg, one) for one in (plain, made, other, averaged(tracked, MOVING_AVERAGE))}) == 4
    assert default_output(cfg, made).parent == finished / "samples"
    with pytest.raises(InputError, match="--to portable keeps averages beside the weights"):
        convert(finished, None, [], "portable", tmp_path / "p", ema=0.1)
    with pytest.raises(InputError, match="is a file of weights alone"):
        convert(tmp_path / "a.safetensors", None, [], "consolidated", tmp_path / "b.safetensors", ema=0.1)


@pytest.mark.parametrize(
    ("words", "value"), [([], None), (["--ema"], MOVING_AVERAGE), (["--ema", "0.1"], 0.1), (["--ema=0.25"], 0.25)]
)
def test_the_option_is_read_and_written_back(words: list[str], value: float | None) -> None:
    parser = cli.make_parser("")
    cli.add_ema_option(parser)
    assert parser.parse_intermixed_args(words).ema == value
    assert parser.parse_intermixed_args(cli.ema_words(value)).ema == value


@pytest.mark.parametrize("word", ["0", "0.3", "-1", "nan", "runs/demo"])
def test_a_length_that_no_profile_has_is_refused(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = cli.make_parser("")
    cli.add_ema_option(parser)
    with pytest.raises(SystemExit):
        parser.parse_intermixed_args([f"--ema={word}"])
    assert "is not a length between 0 and 0.2887" in capsys.readouterr().err


def test_what_no_average_can_be_made_of_is_refused(tmp_path: Path, tokens: Path, finished: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    part = copy / "ema/step_00000006/part-00000.safetensors"
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    with pytest.raises(InputError, match=r"step_00000006/part-00000.safetensors does not match its checksum"):
        averaged(find(copy), 0.1)
    none = [
        "optim.posthoc_ema=[]",
        "checkpoint.ema_every_steps=null",
        "optim.ema_decay=0",
        "resume.allow=[optim.ema_decay]",
    ]
    run_alone(run, snapshot_config(tmp_path, tokens, "plain", *none, "train.total_steps=2"))
    plain = find(tmp_path / "plain")
    with pytest.raises(InputError, match="hold no averages that it can be made from"):
        averaged(plain, 0.1)
    with pytest.raises(InputError, match="has no moving average"):
        averaged(plain, MOVING_AVERAGE)
    shutil.copytree(finished / SNAPSHOTS / "step_00000002", plain.run / SNAPSHOTS / "step_00000002")
    meta = plain.run / SNAPSHOTS / "step_00000002/meta.json"
    averaged(plain, 0.1)
    with pytest.raises(
        InputError, match=r"--ema 0.01: 1 snapshots of the lengths 0.05, 0.1, 0.15 cannot make this one"
    ):
        averaged(plain, 0.01)
    # Of the same model, but another run: its weights are not those of this one's past.
    intact = meta.read_text()
    meta.write_text(intact.replace('"seed": 0', '"seed": 1', 1))
    with pytest.raises(InputError, match=r"step_00000002 is a snapshot of another run than .* \(run.seed=0, but"):
        averaged(plain, 0.1)
    meta.write_text(intact)
    meta.write_text(meta.read_text().replace("/blocks.0.attn.qkv.weight", "/blocks.0.attn.other.weight"))
    with pytest.raises(InputError, match="(is of another model than|lacks)"):
        averaged(plain, 0.1)
    for text, rule in (
        ("optim.posthoc_ema=[0.1,0.1]", "is not a list of at most four different lengths"),
        ("optim.posthoc_ema=[0.5]", "is not a list of at most four different lengths"),
        ("checkpoint.ema_every_steps=5", "stores the averages of optim.posthoc_ema, which is empty"),
    ):
        with pytest.raises(InputError, match=rule):
            tiny_config(tmp_path, tokens, text)


def test_training_goes_on_without_a_snapshot_that_cannot_be_written(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = snapshots_module.SnapshotWriter.write
    monkeypatch.setattr(
        snapshots_module.SnapshotWriter,
        "write",
        lambda self, step, *rest: "no room" if step == 4 else write(self, step, *rest),
    )
    cfg = snapshot_config(tmp_path, tokens, "run", "train.total_steps=6")
    run_alone(run, cfg)
    assert "the snapshot of step 4 was not written: no room. Training continues" in capsys.readouterr().err
    assert [one.step for one in snapshots(tmp_path / "run")] == [2, 6]
    assert "snapshot_failed" in (tmp_path / "run/events.jsonl").read_text()


def test_fractions_are_those_of_each_average() -> None:
    optim = OptimConfig(ema_decay=0.9, posthoc_ema=[0.1])
    assert posthoc_ema.new_fractions(optim, 1) == pytest.approx({"ema": 0.1, "posthoc_ema_1": 1.0})
    assert posthoc_ema.new_fractions(optim, 100)["posthoc_ema_1"] == pytest.approx(1 - 0.99**7.94, rel=1e-3)
    assert posthoc_ema.new_fractions(OptimConfig(), 100) == {}
