"""A step of a run made again: the same bits, without a trace in the run folder; faults that are planted are found."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import find, launch, metrics, run_alone, run_ranks, tiny_config, tiny_config_file
from safetensors.torch import load_file, save_file

from rear_scale.checkpoint.folder import open_checkpoint
from rear_scale.config import ExperimentConfig, InputError
from rear_scale.files import file_sha256
from rear_scale.objective import Objective
from rear_scale.replay.command import (
    Replayed,
    again,
    agreement,
    changed,
    default_table,
    hints,
    replay,
    show,
    step_to_show,
)
from rear_scale.replay.moment import checkpoint_before, moment
from rear_scale.replay.steps import Replay
from rear_scale.train import setup
from rear_scale.train.loop import Hooks, train
from rear_scale.world import World, discover

DEEP = ("strategy=single", "model.depth=4", "train.total_steps=7")


def run(world: World, cfg: ExperimentConfig) -> None:
    data = setup.check_data(cfg, world.ranks)
    train(cfg, data.plan, world, *data.open(world), Hooks())


def replayed(world: World, folder: Path, step: int, until_nonfinite: bool = False) -> Replayed:
    asked = moment(folder, step)
    data = setup.check_data(asked.cfg, world.ranks)
    return again(asked, data, world, folder.parent / "t.csv", until_nonfinite=until_nonfinite)


def sought(world: World, folder: Path, step: int) -> Replayed:
    return replayed(world, folder, step, until_nonfinite=True)


def files_of(folder: Path) -> dict[str, tuple[int, str]]:
    """Time of change and content of every file."""
    return {
        str(path): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> Path:
    """A run of four blocks and seven steps, with dropout, in one process; checkpoints at 4 and 7."""
    path = tmp_path_factory.mktemp("deep")
    run_alone(run, tiny_config(path, tokens, *DEEP))
    return path / "run"


@pytest.mark.parametrize(("step", "first"), [(4, 1), (6, 5)])
def test_a_replayed_step_has_the_logged_bits_and_leaves_the_run_alone(
    tmp_path: Path, deep: Path, step: int, first: int, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_of(deep)
    done = run_alone(replayed, deep, step)
    assert files_of(deep) == before
    assert [result.step for result in done.results] == list(range(first, step + 1))
    for result in done.results:
        line = metrics(deep)[result.step - 1]
        assert {name: line[name] for name in result.numbers} == result.numbers
    shown = capsys.readouterr().out
    assert f"step {step}: loss {metrics(deep)[step - 1]['loss']!r}, bit for bit as logged" in shown


def test_the_table_has_every_module_weight_gradient_and_update(deep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = run_alone(replayed, deep, 6)
    model = find(deep).names()
    by_kind: dict[str, set[str]] = {}
    for row in done.rows:
        by_kind.setdefault(row.key.what, set()).add(row.key.name)
    assert by_kind["weight"] == by_kind["weight gradient"] == by_kind["update"] == set(model)
    inner = {f"blocks.3.{name}" for name in ("norm1", "attn.qkv", "attn", "mlp.fc1", "mlp", "adaLN_modulation.1")}
    ends = {"embeddings", "lm_head", "encode_align_mlp", "decode_align_mlp.0", "model[logits]", "model[encode]"}
    assert inner | ends <= by_kind["output"]
    assert by_kind["gradient"] <= by_kind["output"]
    assert inner | ends <= by_kind["gradient"]
    assert {"loss", "loss_ar", "loss_encode", "loss_decode", "accuracy"} == by_kind["loss"]
    # Two micro-steps of six images, and the gradient's norm is that of the log.
    outputs = [row for row in done.rows if row.key.what == "output" and row.key.name == "blocks.3.mlp.fc1"]
    assert [(row.key.micro_step, row.shape[0]) for row in outputs] == [(0, 6), (1, 6)]
    squares = sum(math.prod(row.shape) * row.rms**2 for row in done.rows if row.key.what == "weight gradient")
    assert math.sqrt(squares) == pytest.approx(metrics(deep)[5]["grad_norm"], rel=1e-5)
    # The update is the difference of the weights of two checkpoints' steps.
    last = run_alone(replayed, deep, 7)
    (update,) = [row for row in last.rows if row.key.what == "update" and row.key.name == "lm_head.weight"]
    (before,) = [row for row in last.rows if row.key.what == "weight" and row.key.name == "lm_head.weight"]
    after = find(deep).reader("param")("lm_head.weight")
    assert 0 < update.largest < 1e-3 * 7
    assert after.square().mean().sqrt().item() == pytest.approx(before.rms, abs=update.rms)
    with open(deep.parent / "t.csv") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(last.rows)
    assert {"rank", "micro_step", "name", "what", "rms", "largest", "nonfinite"} <= set(lines[0])
    assert {line["nonfinite"] for line in lines} == {"0.0"}
    shown = capsys.readouterr().out
    assert "output: rms" in shown
    assert "blocks.3.attn.qkv.bias" in shown


def damaged_copy(deep: Path, folder: Path, step: int, name: str, index: tuple[int, ...]) -> Path:
    """A run whose checkpoint of a step has a NaN in a weight, and its checksum."""
    copy = folder / "run"
    source = deep / f"checkpoints/step_{step:08d}"
    target = copy / "checkpoints" / source.name
    target.mkdir(parents=True)
    for path in (deep / "config.yaml", deep / "starts.jsonl", deep / "metrics.jsonl"):
        (copy / path.name).write_bytes(path.read_bytes())
    meta = json.loads((source / "meta.json").read_text())
    for item in meta["files"]:
        tensors = load_file(source / item["file"])
        if f"param/{name}" in tensors:
            tensors[f"param/{name}"][index] = math.nan
        save_file(tensors, target / item["file"])
        item.update(size=(target / item["file"]).stat().st_size, sha256=file_sha256(target / item["file"]))
    (target / "meta.json").write_text(json.dumps(meta))
    return copy


def test_a_nan_in_a_weight_of_the_feed_forward_is_found(
    tmp_path: Path, deep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = damaged_copy(deep, tmp_path, 4, "blocks.3.mlp.fc1.weight", (5, 7))
    done = run_alone(sought, copy, 6)
    assert [result.step for result in done.results] == [5]  # it ends where it has found one
    weight, output = done.faults
    assert (weight.row.key.name, weight.row.key.what, weight.row.first) == ("blocks.3.mlp.fc1.weight", "weight", (5, 7))
    assert (output.row.key.name, output.row.key.what) == ("blocks.3.mlp.fc1", "output")
    assert output.row.first == (0, 0, 5)
    asked = moment(copy, 5)
    made = run_alone(lambda world: prepared(world, asked).batches(5))
    assert output.sample is not None
    assert output.sample.id == made[0].ids[0].item()
    shown = capsys.readouterr().out
    assert "step 5: the weight of blocks.3.mlp.fc1.weight is not finite at [5, 7] of [128, 32]" in shown
    assert f"sample {output.sample.id} (" in shown
    assert f"class {output.sample.label} ({output.sample.class_name})" in shown


def prepared(world: World, asked: Any) -> Replay:
    data = setup.check_data(asked.cfg, world.ranks)
    return Replay(asked, data.plan, world, *data.open(world), checkpoint_before(asked, world))


def test_a_nan_in_a_codebook_entry_is_found_with_the_sample_that_has_the_code(
    tmp_path: Path, deep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = moment(deep, 6)
    made = run_alone(lambda world: prepared(world, asked).batches(5))
    code = int(made[0].tokens[4, 9])
    opened = setup.Data.open

    def poisoned(self, world):
        tokens, codebook = opened(self, world)
        codebook = codebook.clone()
        codebook[code, 3] = math.nan
        return tokens, codebook

    monkeypatch.setattr(setup.Data, "open", poisoned)
    done = run_alone(sought, deep, 6)
    entry, loss = done.faults
    # Directions of unit length: the whole entry is lost.
    assert (entry.row.key.name, entry.row.first, entry.row.nonfinite) == ("codebook", (code, 0), 1 / 32)
    assert loss.row.key.what == "loss"
    assert loss.sample is not None
    index = made[0].ids.tolist().index(loss.sample.id)
    row = made[0].tokens[index]
    assert row[loss.sample.position] == code
    assert not (made[0].tokens[:index] == code).any()


def test_a_loss_that_overflows_names_its_sample(
    tmp_path: Path, deep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = moment(deep, 6)
    made = run_alone(lambda world: prepared(world, asked).batches(6))
    unlucky = made[1].tokens[2].clone()
    loss = Objective.loss

    def lost(self, output, task):
        value, statistics = loss(self, output, task)
        bad = bool((task.tokens == unlucky).all(1).any())
        return value, torch.where(torch.arange(len(statistics)) < 2, math.inf, statistics) if bad else statistics

    monkeypatch.setattr(Objective, "loss", lost)
    done = run_alone(sought, deep, 6)
    (fault,) = done.faults
    assert (fault.row.step, fault.row.key.micro_step, fault.row.key.name) == (6, 1, "loss")
    assert fault.sample is not None
    assert fault.sample.id == made[1].ids[2].item()


def test_a_run_without_faults_says_so(deep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_alone(sought, deep, 6).faults == []
    assert "every value of steps 5 to 6 is finite" in capsys.readouterr().out


def test_the_guard_names_the_command_and_it_needs_no_step(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loss, calls = Objective.loss, []

    def poisoned(self, output, task):
        calls.append(1)
        value, statistics = loss(self, output, task)
        return (value, statistics * math.nan) if len(calls) == 11 else (value, statistics)

    monkeypatch.setattr(Objective, "loss", poisoned)
    folder = tmp_path / "run"
    with pytest.raises(FloatingPointError) as caught:
        run_alone(run, tiny_config(tmp_path, tokens, "strategy=single"))
    command = f"launchers/replay.py {folder} --step 6 --until-nonfinite"
    assert str(caught.value).endswith(command)
    assert json.loads((folder / "status.json").read_text())["reason"].endswith(command)
    assert step_to_show(folder, None, until_nonfinite=True) == 6
    assert step_to_show(folder, 3, until_nonfinite=True) == 3
    # The fault was planted in the process, not in what the run folder holds.
    monkeypatch.setattr(Objective, "loss", loss)
    assert run_alone(sought, folder, 6).faults == []
    assert "but the run recorded that step 6 was not: neither its data" in capsys.readouterr().out
    with pytest.raises(InputError, match="--step is missing. Name the step"):
        step_to_show(folder, None, until_nonfinite=False)


@pytest.mark.parametrize(
    ("step", "overrides", "expected"),
    [
        (0, (), "--step 0 is not a step of .*run. Use a number from 1 to 7"),
        (8, (), "--step 8 is not a step of .*run. Use a number from 1 to 7"),
        (3, ("model.width=64",), "model.width=64, but .*step_00000004 was trained with model.width=32"),
    ],
)
def test_what_cannot_be_replayed_is_refused(deep: Path, step: int, overrides: tuple[str, ...], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        replay(deep, step, overrides, None, discover({}), until_nonfinite=False)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not found: .*config\.yaml\. Name a run folder"):
        moment(tmp_path, 1)


def test_the_beginning_of_a_run_that_continues_another_training_is_not_there(tmp_path: Path, deep: Path) -> None:
    copy = damaged_copy(deep, tmp_path, 4, "lm_head.weight", (0, 0))
    (copy / "fingerprints.json").write_text('{"step": 3}')
    with pytest.raises(InputError, match="began after 3 updates of another training, and has no checkpoint before"):
        run_alone(replayed, copy, 4)


def test_a_damaged_checkpoint_is_passed_over_and_stays(
    tmp_path: Path, deep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = damaged_copy(deep, tmp_path, 4, "lm_head.weight", (0, 0))
    (part,) = (copy / "checkpoints/step_00000004").glob("*.safetensors")
    content = bytearray(part.read_bytes())
    content[-5] ^= 1
    part.write_bytes(content)
    before = files_of(copy)
    done = run_alone(replayed, copy, 6)
    assert [result.step for result in done.results] == [1, 2, 3, 4, 5, 6]
    assert done.results[-1].numbers["loss"] == metrics(deep)[5]["loss"]
    assert "is damaged and not used: " in capsys.readouterr().err
    assert files_of(copy) == before


def test_a_step_after_a_rewind_has_the_data_of_the_rewound_run(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = Objective.loss
    calls: list[int] = []

    def spiked(self, output, task):
        calls.append(1)
        value, statistics = loss(self, output, task)
        return value, statistics + 100.0 if len(calls) == 11 else statistics

    with monkeypatch.context() as patch:
        patch.setattr(Objective, "loss", spiked)
        rewinds = ("guard.on_spike=rewind", "guard.spike_window=3", "train.total_steps=7")
        run_alone(run, tiny_config(tmp_path, tokens, "strategy=single", *rewinds))
    folder = tmp_path / "run"
    assert find(folder).meta["data_offset"] == 2
    line = metrics(folder)[5]
    for last in (True, False):
        # With the checkpoint of the end, and as a run that a kill has ended before it: rewind.json alone knows.
        if not last:
            meta = open_checkpoint(folder / "checkpoints/step_00000007").path / "meta.json"
            meta.unlink()
        done = run_alone(replayed, folder, 6)
        assert [result.step for result in done.results] == [5, 6]
        assert done.results[-1].numbers["loss"] == line["loss"]


def test_a_dry_run_says_where_it_would_begin(deep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(deep, 6, [], None, discover({}), full=True)
    shown = capsys.readouterr().out
    assert f"from: {deep}/checkpoints/step_00000004, 2 updates" in shown
    assert "table: replays/run/step_00000006.csv" in shown
    assert "depth: 4" in shown
    assert default_table(moment(deep, 6)) == Path("replays/run/step_00000006.csv")


def test_other_ranks_are_told_the_command_that_has_the_same_bits(deep: Path) -> None:
    asked = replace(moment(deep, 6), ranks=2)
    assert hints(moment(deep, 6), discover({})) == []
    (line,) = hints(asked, discover({}))
    assert line.endswith(f"same bits: torchrun --nproc-per-node 2 launchers/replay.py {deep} --step 6")
    assert changed(asked, 1) == ["2 ranks there, 1 here"]
    start = {
        **asked.start,
        "source_sha256": "x",
        "versions": {**asked.start["versions"], "torch": "1.0"},
        "device": "H100",
    }
    torch_here = asked.start["versions"]["torch"]
    assert changed(replace(asked, ranks=1, start=start), 1) == [
        f"torch 1.0 there, {torch_here} here",
        "the code",
        f"H100 there, {asked.start['device']} here",
    ]


def _runs_of_two(world: World, folder: Path, tokens: Path, names: tuple[str, ...], more: tuple[str, ...]) -> dict:
    """Of each strategy, a run of three steps and its third again: the differences from the log, and the gradients' norm."""
    found = {}
    for name in names:
        path = folder / name
        path.mkdir(exist_ok=True)
        short = ("train.micro_batch_size=3", "train.total_steps=3", "checkpoint.every_steps=1")
        cfg = tiny_config(path, tokens, f"strategy={name}", *short, *more)
        run(world, cfg)
        done = replayed(world, path / "run", 3)
        lines = metrics(path / "run")
        squares = sum(math.prod(row.shape) * row.rms**2 for row in done.rows if row.key.what == "weight gradient")
        numbers = []
        for result in done.results:
            line = lines[result.step - 1]
            numbers.append({key: line[key] == value for key, value in result.numbers.items()})
        found[name] = numbers, math.sqrt(squares), lines[2]["grad_norm"], len(done.rows)
    return found


def _check_two(folder: Path, tokens: Path, names: tuple[str, ...], more: tuple[str, ...] = ()) -> None:
    for name, (numbers, norm, logged, rows) in run_ranks(2, _runs_of_two, folder, tokens, names, more)[0].items():
        assert all(all(equal.values()) for equal in numbers), (name, numbers)
        assert norm == pytest.approx(logged, rel=1e-5), name
        assert rows > 200, name


def test_two_ranks_have_the_logged_bits_and_one_rank_has_them_within_rounding(tmp_path: Path, tokens: Path) -> None:
    _check_two(tmp_path, tokens, ("fsdp2",))
    folder = tmp_path / "fsdp2/run"
    # Dropout too: the masks belong to places among the ranks of the run.
    done = run_alone(replayed, folder, 3)
    expected = metrics(folder)[2]["loss"]
    assert done.results[-1].numbers["loss"] == pytest.approx(expected, rel=1e-5)
    (line,) = agreement(done, 1)
    if not line.endswith("bit for bit as logged"):
        assert line.endswith("What differs from the run: 2 ranks there, 1 here")
        assert "more than" not in line


@pytest.mark.long
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_strategy_of_two_ranks_has_the_logged_bits(tmp_path: Path, tokens: Path, precision: str) -> None:
    names = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
    _check_two(tmp_path, tokens, names, (f"train.precision={precision}", "optim.ema_decay=0.9"))


@pytest.mark.long
def test_the_launcher_replays_under_each_launcher(tmp_path: Path, tokens: Path) -> None:
    config = tiny_config_file(tmp_path, tokens)
    for strategy, start in (("single", ["python"]), ("zero1", ["deepspeed", "--num_gpus", "2"]),
                            ("ddp", ["torchrun", "--nproc-per-node", "2"])):  # fmt: skip
        folder = tmp_path / strategy
        words = [f"run.dir={folder}", f"strategy={strategy}", "train.total_steps=6"]
        assert launch(*start, "launchers/train.py", "--config", config, *words).returncode == 0
        result = launch(*start, "launchers/replay.py", folder, "--step", "6", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert "bit for bit as logged" in result.stdout
        assert (tmp_path / f"replays/{strategy}/step_00000006.csv").exists()
    result = launch("python", "launchers/replay.py", tmp_path / "ddp", "--step", "6", cwd=tmp_path)
    assert "torchrun --nproc-per-node 2 launchers/replay.py" in result.stderr
    assert "within rounding" in result.stdout or "bit for bit" in result.stdout
