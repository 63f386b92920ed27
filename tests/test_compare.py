"""Differences that are planted between two runs are found, and named first; two runs that are the same are equal."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import NUM_CLASSES, ROOT, metrics, run_alone, run_ranks, tiny_config, write_token_shards

from rear_scale.config import ExperimentConfig, InputError
from rear_scale.objective import Objective
from rear_scale.parallel.ddp import DDPStrategy
from rear_scale.replay import aspects, tensors
from rear_scale.replay.aspects import Aspect
from rear_scale.replay.moment import moment
from rear_scale.replay.steps import Result
from rear_scale.shards import writer
from rear_scale.shards.order import BatchOrder
from rear_scale.train import setup, start
from rear_scale.train.loop import Hooks, train
from rear_scale.world import SingleProcess, World

SAMPLE = int(BatchOrder(100, 12, 0).global_batch(1)[0][3])  # of the first batch
SINGLE = ("strategy=single", "train.total_steps=3")


def run(world: World, cfg: ExperimentConfig) -> None:
    data = setup.check_data(cfg, world.ranks)
    train(cfg, data.plan, world, *data.open(world), Hooks())


def made(folder: Path, tokens: Path, *overrides: str) -> Path:
    folder.mkdir()
    run_alone(run, tiny_config(folder, tokens, *SINGLE, *overrides))
    return folder / "run"


def compared(a: Path, b: Path) -> dict[str, Aspect]:
    return {one.name: one for one in aspects.aspects(aspects.record(a), aspects.record(b))}


def verdict(a: Path, b: Path) -> str:
    return aspects.verdict(list(compared(a, b).values()))


def by_tensors(world: World, a: Path, b: Path, step: int) -> tensors.Tensors:
    ours, theirs, _ = tensors._same_layout(moment(a, step), moment(b, step))
    return tensors.in_world(ours, theirs, [setup.check_data(one.cfg, world.ranks) for one in (ours, theirs)], world)


def parted(a: Path, b: Path) -> tensors.Tensors:
    step = tensors.step_to_compare(aspects.record(a), aspects.record(b))
    assert step is not None
    return run_alone(by_tensors, a, b, step)


def named(found: tensors.Tensors) -> list[tuple[str, str]]:
    return [(one.row.key.what, one.row.key.name) for one in found.found]


def launched(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, words)])
    try:
        runpy.run_path(str(ROOT / "launchers/compare.py"))["main"]()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> Path:
    return made(tmp_path_factory.mktemp("first") / "a", tokens)


def test_two_runs_of_one_config_are_equal(
    tmp_path: Path, tokens: Path, first: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    again = made(tmp_path / "b", tokens)
    assert {one.state for one in compared(first, again).values()} == {"equal"}
    assert launched(monkeypatch, first, again) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1] == "equal"
    assert "the same in 3 logged steps, up to 3" in shown
    assert launched(monkeypatch, first, again, "--tensors", "--dry-run") == 0
    assert "--tensors would replay both up to step 3" in capsys.readouterr().out


def test_another_seed(tmp_path: Path, tokens: Path, first: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    other = made(tmp_path / "b", tokens, "run.seed=1")
    assert verdict(first, other) == "different, first in config: run.seed: 0 | 1"
    found = compared(first, other)
    assert {name for name, one in found.items() if one.state == "different"} == {
        "config",
        "first weights",
        "order of data",
        "losses",
    }
    assert found["losses"].lines[0].startswith("first at step 1: ")
    assert launched(monkeypatch, first, other) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "different, first in config: run.seed: 0 | 1"


@pytest.mark.long
def test_another_dropout_and_the_module_where_it_shows(tmp_path: Path, tokens: Path, first: Path) -> None:
    other = made(tmp_path / "b", tokens, "model.dropout=0.2")
    assert verdict(first, other) == "different, first in config: model.dropout: 0.1 | 0.2"
    assert compared(first, other)["first weights"].state == "equal"
    found = parted(first, other)
    # The gates of AdaLN start at zero: the loss of step 1 is the same, but what is behind the gates is not.
    assert metrics(first)[0]["loss"] == metrics(other)[0]["loss"]
    assert found.step == 1
    assert named(found)[0] == ("output", "blocks.0.attn")
    assert [what for what, _ in named(found)] == ["output", "gradient", "update"]
    assert all(one.largest and one.largest > 1e-6 for one in found.found)


def relabelled_set(folder: Path, sample: int) -> Path:
    """The set of 100 samples with another label of one of them."""

    def relabelled(folder: Path, index: int, tokens: np.ndarray, labels: np.ndarray, **named: Any) -> Any:
        labels = labels.copy()
        labels[sample] = (labels[sample] + 1) % NUM_CLASSES
        return write(folder, index, tokens, labels, **named)

    write = writer.write_shard
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "write_shard", relabelled)
        return write_token_shards(folder, 100)


def test_one_label_of_a_shard(tmp_path: Path, first: Path) -> None:
    other = made(tmp_path / "b", relabelled_set(tmp_path / "set", SAMPLE))
    found = compared(first, other)
    assert {name for name, one in found.items() if one.state == "different"} == {"data", "losses"}
    assert verdict(first, other).startswith("different, first in data: fingerprint: ")
    assert found["data"].lines[1].startswith(f"shard-000000.tar: sample {SAMPLE} has class ")


def test_one_weight_of_the_start(tmp_path: Path, tokens: Path, first: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = start.first_weights

    def nudged(cfg: ExperimentConfig, model: Any, world: World) -> None:
        begin(cfg, model, world)
        if Path(cfg.run.dir).parent.name == "b":
            with torch.no_grad():
                model.blocks[1].attn.qkv.weight[3, 5] += 1e-3

    monkeypatch.setattr(start, "first_weights", nudged)
    other = made(tmp_path / "b", tokens)
    parameters = len(json.loads((first / "fingerprints.json").read_text())["weights"])
    line = f"blocks.1.attn.qkv.weight differs (1 of {parameters} parameters)"
    assert verdict(first, other) == f"different, first in first weights: {line}"
    found = parted(first, other)
    assert found.step == 1
    weight = found.found[0]
    assert (weight.row.key.what, weight.row.key.name, weight.index) == ("weight", "blocks.1.attn.qkv.weight", (3, 5))
    assert weight.largest == pytest.approx(1e-3, rel=1e-4)
    assert named(found)[1] == ("output", "blocks.1.attn.qkv")


def test_another_micro_batch_is_rounding(tmp_path: Path, tokens: Path) -> None:
    still = ("model.dropout=0", "model.attn_dropout=0")
    a, b = made(tmp_path / "a", tokens, *still), made(tmp_path / "b", tokens, *still, "train.micro_batch_size=3")
    found = compared(a, b)
    assert verdict(a, b) == "different, first in config of the computation: train.micro_batch_size: 6 | 3"
    assert {one.state for name, one in found.items() if name not in ("config of the computation", "losses")} == {
        "equal"
    }
    assert found["losses"].state == "rounding"
    assert "within rounding (at most 1e-05 over 20 steps)" in found["losses"].lines[0]
    ours, theirs, notes = tensors._same_layout(moment(a, 3), moment(b, 3))
    assert theirs.cfg.train.micro_batch_size == 6
    assert notes == ["B had train.micro_batch_size=3 on 1 ranks and is replayed as A: train.micro_batch_size=6 on 1"]


@pytest.mark.long
def test_replays_are_the_same_where_runs_are_and_see_other_data(tmp_path: Path, tokens: Path, first: Path) -> None:
    found = parted(first, made(tmp_path / "same", tokens))
    assert (found.step, found.notes) == (None, ["the replays of steps 1 to 3 are the same in every bit"])
    found = parted(first, made(tmp_path / "label", relabelled_set(tmp_path / "set", SAMPLE)))
    # Batches are sorted by class, so that the sample has another place.
    assert named(found)[0] in [("input", name) for name in ("sample ids", "tokens", "classes")]
    still = ("model.dropout=0", "model.attn_dropout=0")
    found = parted(
        made(tmp_path / "c", tokens, *still), made(tmp_path / "d", tokens, *still, "train.micro_batch_size=3")
    )
    assert found.step is None
    assert found.notes[-1].endswith("are the same in every bit")


@pytest.mark.long
def test_another_micro_batch_under_dropout_says_why_it_is_more(tmp_path: Path, tokens: Path, first: Path) -> None:
    other = made(tmp_path / "b", tokens, "train.micro_batch_size=3")
    losses = compared(first, other)["losses"]
    assert losses.state == "different"
    assert losses.lines[-1].startswith("dropout masks belong to (step, micro-step, rank)")


@pytest.mark.long
def test_another_precision(tmp_path: Path, tokens: Path, first: Path) -> None:
    other = made(tmp_path / "b", tokens, "train.precision=bf16")
    assert verdict(first, other) == "different, first in config: train.precision: fp32 | bf16"
    losses = compared(first, other)["losses"]
    assert "rounding (0.002 over" in losses.lines[0] or "rounding (at most 0.002 over" in losses.lines[0]
    found = parted(first, other)
    assert found.step == 1
    assert named(found)[0][0] == "output"


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> Path:
    """A run of eight steps."""
    return made(tmp_path_factory.mktemp("eight") / "a", tokens, *EIGHT)


EIGHT = ("guard.on_nonfinite=skip", "train.total_steps=8")


@pytest.mark.long
def test_a_skipped_update(tmp_path: Path, tokens: Path, eight: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, calls = Objective.loss, []

    def poisoned(self, output, task):
        calls.append(1)
        value, statistics = loss(self, output, task)
        return (value * torch.nan, statistics * torch.nan) if len(calls) in (13, 14) else (value, statistics)

    with monkeypatch.context() as patch:
        patch.setattr(Objective, "loss", poisoned)
        b = made(tmp_path / "b", tokens, *EIGHT)
    line = "step 7: loss or gradient not finite, so no update, in B alone"
    assert verdict(eight, b) == f"different, first in updates: {line}"
    assert compared(eight, b)["losses"].lines[0].startswith("first at step 7: ")
    found = parted(eight, b)
    assert found.step is None
    assert found.notes[0].startswith(f"the replay of {b} has loss ")
    assert "at step 7, but None is logged" in found.notes[0]


@pytest.mark.long
def test_an_update_that_is_skipped_in_silence(tmp_path: Path, tokens: Path, eight: Path) -> None:
    """Only the losses tell of it, from the next step on; a replay of the step does not have what was logged."""
    with pytest.MonkeyPatch.context() as patch:
        step = DDPStrategy.step
        calls: list[int] = []

        def forgetful(self, lr):
            calls.append(1)
            self.skip() if len(calls) == 7 else step(self, lr)

        patch.setattr(DDPStrategy, "step", forgetful)
        b = made(tmp_path / "b", tokens, *EIGHT)
    found = compared(eight, b)
    assert {name for name, one in found.items() if one.state == "different"} == {"losses"}
    assert found["losses"].lines[0].startswith("first at step 8: ")
    first, second, *_ = parted(eight, b).notes
    assert "at step 8, but " in first
    assert second.startswith(f"without the update of step 7, the replay of {b} has what is logged at step 8")


def test_updates_are_left_out_between_the_last_step_as_logged_and_the_first_that_is_not() -> None:
    def result(step: int, loss: float) -> Result:
        return Result(step, {"loss": loss, "grad_norm": 1.0})

    results = [result(step, 1 / step) for step in range(5, 10)]
    logged = {step: {"loss": 1 / step, "grad_norm": 1.0} for step in (6, 8)}
    assert tensors._around_the_first_unlike(logged, results) is None
    assert tensors._around_the_first_unlike({**logged, 8: {"loss": 3.0}}, results) == (6, 8)
    assert tensors._around_the_first_unlike({6: {"loss": 3.0}}, results) is None  # nothing before it is as logged
    made: list[int] = []

    class Run:
        world, moment = SingleProcess(), SimpleNamespace(run="r", logged={6: {"loss": 1 / 6}, 8: {"loss": 3.0}})

        def without_update(self, skipped: int, last: int) -> Result:
            made.append(skipped)
            return result(last, 3.0 if skipped == 6 else 4.0)

    assert "without the update of step 6" in tensors._skipped_in_silence(Run(), results)[0]
    assert made == [7, 6]


def test_runs_without_a_step_in_common_are_not_said_to_be_equal(
    tmp_path: Path, first: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = edited(first, tmp_path, {}, None, 1.0)
    lines = [{**line, "step": line["step"] + 100} for line in metrics(first)]
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert launched(monkeypatch, first, other) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("not known to be equal: no step is logged by both")


def edited(first: Path, folder: Path, change: dict[str, Any], event: dict[str, Any] | None, factor: float) -> Path:
    """A copy of a run with other values in its config, an event, and other losses from step 2 on."""
    copy = folder / "run"
    shutil.copytree(first, copy)
    text = (copy / "config.yaml").read_text()
    for line, other in change.items():
        assert text.count(line) == 1, line
        text = text.replace(line, other)
    (copy / "config.yaml").write_text(text)
    if event is not None:
        (copy / "events.jsonl").write_text(json.dumps(event) + "\n")
    lines = [{**line, "loss": line["loss"] * (factor if line["step"] > 1 else 1)} for line in metrics(first)]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return copy


@pytest.mark.parametrize(
    ("change", "event", "factor", "expected", "losses"),
    [
        ({"  dropout: 0.1": "  dropout: 0.2"}, None, 1.001, "config: model.dropout: 0.1 | 0.2", "more than rounding (1e-05"),
        ({"  precision: fp32\n  fp8": "  precision: bf16\n  fp8"}, None, 1.001, "config: train.precision: fp32 | bf16",
         "within rounding (at most 0.002"),
        ({"micro_batch_size: 6": "micro_batch_size: 3"}, None, 1 + 1e-6,
         "config of the computation: train.micro_batch_size: 6 | 3", "within rounding (at most 1e-05"),
        ({}, {"event": "nonfinite", "step": 7}, 1.0,
         "updates: step 7: loss or gradient not finite, so no update, in B alone", None),
        ({}, {"event": "loss_spike", "step": 2, "rewind": True}, 1.01, "updates: step 2: a spike, rewound", "more than"),
        ({}, {"event": "loss_spike", "step": 2, "rewind": False}, 1.01, "losses: first at step 2: ", "more than"),
    ],
    ids=["dropout", "precision", "micro-batch", "skipped", "rewound", "logged"],
)  # fmt: skip
def test_what_folders_record_is_named_in_the_order_in_which_it_matters(
    tmp_path: Path,
    first: Path,
    change: dict[str, Any],
    event: dict[str, Any] | None,
    factor: float,
    expected: str,
    losses: str | None,
) -> None:
    found = compared(first, edited(first, tmp_path, change, event, factor))
    assert aspects.verdict(list(found.values())).startswith(f"different, first in {expected}")
    if losses is None:
        assert found["losses"].state == "equal"
    else:
        assert losses in found["losses"].lines[0]
        assert (found["losses"].state == "rounding") is losses.startswith("within")


def test_runs_from_before_fingerprints_are_compared_by_what_there_is(
    tmp_path: Path, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = edited(first, tmp_path, {}, None, 1.0)
    (old / "fingerprints.json").unlink()
    line = json.loads((old / "starts.jsonl").read_text())
    del line["source_sha256"], line["threads"]
    (old / "starts.jsonl").write_text(json.dumps({**line, "commit": "abc-changed"}) + '\n{"comm')
    found = compared(first, old)
    states = {name: one.state for name, one in found.items()}
    assert states["first weights"] == states["order of data"] == "not recorded"
    assert states["data"] == states["tokenizer"] == "equal"  # its checkpoints say that much
    assert states["code"] == "different"
    (old / "starts.jsonl").unlink()
    assert compared(first, old)["code"].state == compared(first, old)["versions"].state == "not recorded"
    assert launched(monkeypatch, first, old) == 0


def test_what_is_no_run_is_refused(tmp_path: Path, first: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"not found: .*config\.yaml\. Name two run folders"):
        launched(monkeypatch, first, tmp_path)
    with pytest.raises(InputError, match="--step and --dry-run belong to --tensors"):
        launched(monkeypatch, first, first, "--step", "3")


def test_every_field_that_changes_a_run_counts_and_paths_do_not() -> None:
    assert (
        aspects.effect("run.seed") == aspects.effect("optim.lr") == aspects.effect("objective.noise.max") == "different"
    )
    assert aspects.effect("train.micro_batch_size") == aspects.effect("strategy.name") == "rounding"
    for key in ("run.dir", "run.name", "data.train", "train.init_from", "sample.seed", "wandb.mode", "train.log_every"):
        assert aspects.effect(key) == "equal", key


def _two(world: World, folder: Path, tokens: Path, a: str, b: str) -> tensors.Tensors:
    for name, strategy in (("a", a), ("b", b)):
        (folder / name).mkdir(exist_ok=True)
        own = ("train.total_steps=5", f"strategy={strategy}", f"model.dropout={0.1 if name == 'a' else 0.2}")
        run(world, tiny_config(folder / name, tokens, *own))
    return by_tensors(world, folder / "a/run", folder / "b/run", 3)


@pytest.mark.long
@pytest.mark.parametrize(("a", "b"), [("fsdp2", "fsdp2"), ("zero1", "zero1"), ("ddp", "fsdp2")])
def test_two_ranks_name_the_same_module(tmp_path: Path, tokens: Path, a: str, b: str) -> None:
    found, other = run_ranks(2, _two, tmp_path, tokens, a, b)
    assert named(found) == named(other)
    assert found.step == 1
    assert ("output", "blocks.0.attn") in named(found)
