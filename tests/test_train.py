from __future__ import annotations

import errno
import gc
import json
import math
import threading
from pathlib import Path

import pytest
import torch
from helpers import TIMES, find, metrics, run_alone, tiny_config, write_token_shards

from rear_scale.checkpoint import writer as writer_module
from rear_scale.checkpoint.folder import saved_steps
from rear_scale.checkpoint.writer import Writer
from rear_scale.config import ExperimentConfig, InputError, groups_by_class, settled
from rear_scale.objective import MicroBatch, Objective
from rear_scale.run.folder import RunFolder
from rear_scale.train import garbage, setup
from rear_scale.train.loop import Hooks, train
from rear_scale.world import World, discover


def run(world: World, cfg: ExperimentConfig, hooks: Hooks | None = None) -> int:
    data = setup.check_data(cfg, world.ranks)
    return train(cfg, data.plan, world, *data.open(world), hooks or Hooks())


def without_times(lines: list[dict]) -> list[dict]:
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def folder(tmp_path: Path, name: str) -> Path:
    (tmp_path / name).mkdir()
    return tmp_path / name


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> Path:
    """A finished run of 12 steps with dropout, in one process."""
    path = tmp_path_factory.mktemp("unbroken")
    run_alone(run, tiny_config(path, tokens, "strategy=single"))
    return path / "run"


def test_a_run_learns_and_reports_every_step(unbroken: Path) -> None:
    lines = metrics(unbroken)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[-1]["loss_ar"] < lines[0]["loss_ar"] - 0.2
    expected = {
        "step",
        "images_seen",
        "loss",
        "loss_ar",
        "loss_encode",
        "loss_decode",
        "accuracy",
        "grad_norm",
        "lr",
        "noise_max",
    }
    expected |= {"skipped_updates", "slowest_host"}
    assert set(lines[0]) == expected | {"mfu", *TIMES}
    first = lines[0]
    assert first["images_seen"] == 12
    assert first["loss"] == pytest.approx(first["loss_ar"] + first["loss_encode"] + first["loss_decode"], rel=1e-6)
    assert first["loss_ar"] == pytest.approx(math.log(32), rel=0.01)
    assert (first["lr"], lines[1]["lr"], lines[-1]["lr"]) == pytest.approx((2.5e-3, 5e-3, 1e-5))
    assert (first["noise_max"], lines[8]["noise_max"], lines[9]["noise_max"]) == pytest.approx((1.0, 1 / 9, 0.0))
    assert first["mfu"] is None


def test_a_run_folder_says_what_ran(unbroken: Path) -> None:
    assert json.loads((unbroken / "status.json").read_text()) == {"state": "done", "step": 12, "reason": ""}
    (start,) = [json.loads(line) for line in (unbroken / "starts.jsonl").read_text().splitlines()]
    assert {"command", "commit", "versions", "host", "device", "world_size"} <= set(start)
    assert start["versions"]["torch"] == torch.__version__
    assert "total_steps: 12" in (unbroken / "config.yaml").read_text()
    assert sorted(path.name for path in (unbroken / "checkpoints").iterdir()) == [
        "latest",
        "step_00000004",
        "step_00000008",
        "step_00000012",
    ]
    meta = find(unbroken).meta
    assert (meta["step"], meta["images_seen"], meta["config"]["run"]["name"]) == (12, 144, "tiny")


def test_a_resumed_run_is_bitwise_the_unbroken_one(tmp_path: Path, tokens: Path, unbroken: Path) -> None:
    run_alone(run, tiny_config(tmp_path, tokens, "strategy=single", "train.stop_at_step=6"))
    stopped = tmp_path / "run"
    assert json.loads((stopped / "status.json").read_text()) == {
        "state": "done",
        "step": 6,
        "reason": "train.stop_at_step=6",
    }
    # What a kill leaves: steps after the checkpoint, and half a line.
    with open(stopped / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 7, "loss": 1.0}) + '\n{"step": 8, "lo')
    assert run_alone(run, tiny_config(tmp_path, tokens, "strategy=single")) == 6
    assert without_times(metrics(stopped)) == without_times(metrics(unbroken))
    for kind in ("param", "exp_avg", "exp_avg_sq"):
        ours, theirs = (find(path).reader(kind) for path in (stopped, unbroken))
        for name in find(unbroken).names():
            assert torch.equal(ours(name), theirs(name)), (kind, name)
    assert len((stopped / "starts.jsonl").read_text().splitlines()) == 2


def test_a_finished_run_is_left_alone(tmp_path: Path, tokens: Path) -> None:
    cfg = tiny_config(tmp_path, tokens, "strategy=single", "train.total_steps=2")
    assert run_alone(run, cfg) == 2
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    assert run_alone(run, cfg) == 0
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_a_run_killed_before_its_last_word_is_done_all_the_same(tmp_path: Path, tokens: Path) -> None:
    cfg = tiny_config(tmp_path, tokens, "strategy=single", "train.stop_at_step=2")
    run_alone(run, cfg)
    status = tmp_path / "run/status.json"
    expected = status.read_text()
    for left in ('{"state": "running", "step": 2, "reason": ""}', "", None):
        if left is None:
            status.unlink()
        else:
            status.write_text(left)
        assert run_alone(run, cfg) == 0
        assert status.read_text() == expected
    # An earlier end than the one that was reached says nothing of how it was reached.
    assert run_alone(run, tiny_config(tmp_path, tokens, "strategy=single", "train.stop_at_step=1")) == 0
    assert status.read_text() == expected


@pytest.mark.parametrize(
    ("error", "message", "reason"),
    [
        (KeyboardInterrupt(), "the same command continues from step 4", "ended by Ctrl-C"),
        (RuntimeError("no more data"), "no more data", "RuntimeError: no more data"),
    ],
    ids=["ctrl_c", "error"],
)
def test_an_error_completes_the_checkpoint_that_is_being_written(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, message: str, reason: str
) -> None:
    raised, write = threading.Event(), Writer._write

    def slow(writer: Writer) -> None:
        assert raised.wait(300)
        write(writer)

    def fail(step: int, model: object) -> None:
        if step == 6:
            raised.set()
            raise error

    monkeypatch.setattr(Writer, "_write", slow)
    with pytest.raises(type(error), match=f"^{message}$"):
        run_alone(run, tiny_config(tmp_path, tokens, "strategy=single"), Hooks([fail]))
    assert saved_steps(tmp_path / "run") == [4]
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["step"], status["reason"]) == ("failed", 4, reason)


def test_another_micro_batch_keeps_the_trajectory(tmp_path: Path, tokens: Path) -> None:
    losses = {}
    for size in (12, 6, 3):
        overrides = [
            "strategy=single",
            f"train.micro_batch_size={size}",
            "model.dropout=0",
            "model.attn_dropout=0",
            "train.total_steps=5",
        ]
        path = folder(tmp_path, str(size))
        run_alone(run, tiny_config(path, tokens, *overrides))
        losses[size] = [line["loss"] for line in metrics(path / "run")]
    assert losses[6] == pytest.approx(losses[12], rel=1e-5)
    assert losses[3] == pytest.approx(losses[12], rel=1e-5)


def _losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder / "run")]


@pytest.mark.parametrize("mode", ["mmap", "stream"])
def test_grouped_batches_train_alike_and_resume_exactly(
    tmp_path: Path, tokens: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    still = ["strategy=single", "model.dropout=0", "model.attn_dropout=0", "train.total_steps=5", f"data.mode={mode}"]
    forms = {
        "drawn": "data.group_by_class=false",
        "grouped": "data.group_by_class=true",
        "resumed": "data.group_by_class=true",
    }
    seen: dict[str, list[MicroBatch]] = {name: [] for name in forms}
    micro_batch = Objective.micro_batch
    for name, form in forms.items():
        path = folder(tmp_path, name)

        def noted(self, *arguments, name=name):
            seen[name].append(micro_batch(self, *arguments))
            return seen[name][-1]

        monkeypatch.setattr(Objective, "micro_batch", noted)
        if name == "resumed":
            run_alone(run, tiny_config(path, tokens, *still, form, "train.stop_at_step=2"))
        # Without a word on the second command, the checkpoint's choice stands.
        run_alone(run, tiny_config(path, tokens, *still, *([form] if name != "resumed" else [])))
    losses = {name: _losses(tmp_path / name) for name in forms}
    assert losses["grouped"] == pytest.approx(losses["drawn"], rel=1e-5)
    assert losses["resumed"] == losses["grouped"]
    distinct = {name: sum(len(batch.classes.unique()) for batch in batches[:10]) for name, batches in seen.items()}
    assert distinct["grouped"] < distinct["drawn"]
    for step in range(5):
        ids = {name: torch.cat([batch.ids for batch in seen[name][2 * step : 2 * step + 2]]) for name in seen}
        assert sorted(ids["grouped"].tolist()) == sorted(ids["drawn"].tolist())


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), True),
        (("data.mode=stream",), False),
        (("model.modulation=per_sample",), False),
        (("model.conditioning=in_context",), False),
        (("model.architecture=alitok",), False),
        (("data.group_by_class=false",), False),
        (("data.mode=stream", "data.group_by_class=true"), True),
    ],
)
def test_new_runs_group_where_modulation_is_per_class(
    tmp_path: Path, tokens: Path, overrides: tuple[str, ...], expected: bool
) -> None:
    cfg = tiny_config(tmp_path, tokens, *overrides)
    assert settled(cfg, None).data.group_by_class is expected
    assert groups_by_class(cfg) is expected


def test_a_run_from_before_grouping_goes_on_as_it_began(tmp_path: Path, tokens: Path) -> None:
    """Its checkpoint's config lacks the field."""
    still = ["strategy=single", "train.total_steps=4", "checkpoint.every_steps=2"]
    run_alone(run, tiny_config(folder(tmp_path, "whole"), tokens, *still, "data.group_by_class=false"))
    old = folder(tmp_path, "old")
    run_alone(run, tiny_config(old, tokens, *still, "data.group_by_class=false", "train.stop_at_step=2"))
    (meta_file,) = (old / "run/checkpoints").glob("step_00000002/meta.json")
    meta = json.loads(meta_file.read_text())
    del meta["config"]["data"]["group_by_class"]
    meta_file.write_text(json.dumps(meta))
    with pytest.raises(InputError, match="data.group_by_class=True, but .* was trained with data.group_by_class=False"):
        run_alone(run, tiny_config(old, tokens, *still, "data.group_by_class=true"))
    run_alone(run, tiny_config(old, tokens, *still))
    assert _losses(old) == _losses(tmp_path / "whole")
    assert find(old / "run").meta["config"]["data"]["group_by_class"] is False


def test_garbage_is_collected_at_fixed_steps_while_training(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(garbage, "_EVERY_STEPS", 2)
    gc.unfreeze()  # what conftest.py has frozen
    collected, enabled, frozen = [], [], []
    collect = gc.collect
    monkeypatch.setattr(gc, "collect", lambda: collected.append(len(enabled)) or collect())
    hooks = Hooks([lambda step, model: (enabled.append(gc.isenabled()), frozen.append(gc.get_freeze_count()))])
    run_alone(run, tiny_config(tmp_path, tokens, "strategy=single", "train.total_steps=5"), hooks)
    assert enabled == [False] * 5
    assert min(frozen) > 0
    assert collected == [0, 2, 4]
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    # What the program itself has frozen stays so.
    gc.freeze()
    frozen.clear()
    run_alone(run, tiny_config(folder(tmp_path, "more"), tokens, "strategy=single", "train.total_steps=1"), hooks)
    assert frozen[0] > 0
    assert gc.get_freeze_count() > 0


def test_the_twin_without_regularization_has_no_such_terms(tmp_path: Path, tokens: Path) -> None:
    run_alone(run, tiny_config(tmp_path, tokens, "strategy=single", "objective=ar", "train.total_steps=1"))
    (line,) = metrics(tmp_path / "run")
    assert (line["loss_encode"], line["loss_decode"], line["noise_max"]) == (None, None, 0.0)
    assert line["loss"] == line["loss_ar"]
    assert not [name for name in find(tmp_path / "run").names() if "align" in name]


def test_a_changed_field_is_refused_unless_allowed(tmp_path: Path, tokens: Path) -> None:
    run_alone(run, tiny_config(tmp_path, tokens, "strategy=single", "train.stop_at_step=1"))
    with pytest.raises(InputError, match="model.dropout=0.2, but .*step_00000001 was trained with model.dropout=0.1"):
        run_alone(run, tiny_config(tmp_path, tokens, "strategy=single", "model.dropout=0.2"))
    changed = tiny_config(
        tmp_path, tokens, "strategy=single", "model.dropout=0.2", "resume.allow=[model.dropout]", "train.stop_at_step=2"
    )
    assert run_alone(run, changed) == 1


def test_other_data_is_refused_on_resume(tmp_path: Path, tokens: Path) -> None:
    other = write_token_shards(tmp_path / "other", 100, seed=1)
    run_alone(run, tiny_config(tmp_path, tokens, "strategy=single", "train.stop_at_step=1"))
    with pytest.raises(InputError, match="data.train=.*other holds other samples"):
        run_alone(run, tiny_config(tmp_path, other, "strategy=single"))
    moved = write_token_shards(tmp_path / "moved", 100)
    assert run_alone(run, tiny_config(tmp_path, moved, "strategy=single", "train.stop_at_step=2")) == 1


def test_a_folder_in_use_is_refused(tmp_path: Path, tokens: Path) -> None:
    with RunFolder(tmp_path / "run").locked(), pytest.raises(InputError, match="is in use by another process"):
        run_alone(run, tiny_config(tmp_path, tokens, "strategy=single"))


def test_a_gradient_that_is_not_finite_stops_before_the_update(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = Objective.loss
    calls = []

    def poisoned(self, output, clean):
        calls.append(1)
        value, statistics = loss(self, output, clean)
        return (value * math.nan if len(calls) == 11 else value), statistics

    monkeypatch.setattr(Objective, "loss", poisoned)
    with pytest.raises(
        FloatingPointError,
        match="step 6: the gradient norm is nan, with finite losses on all ranks. The update was not applied",
    ):
        run_alone(run, tiny_config(tmp_path, tokens, "strategy=single"))
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 4)
    assert find(tmp_path / "run").step == 4
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5]
    assert run_alone(run, tiny_config(tmp_path, tokens, "strategy=single")) == 8


def test_hooks_are_called_after_steps_and_checkpoints(tmp_path: Path, tokens: Path) -> None:
    steps, saved = [], []
    hooks = Hooks([lambda step, model: steps.append(step)], [lambda step, path: saved.append((step, path.name))])
    run_alone(run, tiny_config(tmp_path, tokens, "strategy=single", "train.total_steps=5"), hooks)
    assert steps == [1, 2, 3, 4, 5]
    assert saved == [(4, "step_00000004"), (5, "step_00000005")]


def test_a_resumed_run_continues_its_page_in_wandb(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is an optional extra")
    monkeypatch.setenv("WANDB_SILENT", "true")
    asked, logged = [], []

    def init(start=wandb.init, **settings):
        asked.append(settings)
        page = start(**settings)
        monkeypatch.setattr(page, "log", logged.append)
        return page

    monkeypatch.setattr(wandb, "init", init)
    for end in (2, 3):
        run_alone(
            run, tiny_config(tmp_path, tokens, "strategy=single", f"train.stop_at_step={end}", "wandb.mode=offline")
        )
    identity = (tmp_path / "run/wandb_id").read_text()
    assert [settings["id"] for settings in asked] == [identity, identity]
    assert all((settings["mode"], settings["resume"]) == ("offline", "allow") for settings in asked)
    assert list((tmp_path / "run/wandb").glob(f"offline-run-*-{identity}"))
    # The same numbers as in the file.
    assert logged == metrics(tmp_path / "run")


def test_chosen_steps_are_traced(tmp_path: Path, tokens: Path) -> None:
    run_alone(run, tiny_config(tmp_path, tokens, "strategy=single", "train.total_steps=4", "profile.steps=[2,3]"))
    trace = json.loads((tmp_path / "run/profile/rank_00000.json").read_text())
    names = [event.get("name") for event in trace["traceEvents"]]
    # One update each.
    assert sum("Optimizer.step" in str(name) for name in names) == 2


def test_shards_that_do_not_fit_are_refused_before_any_process_group(tmp_path: Path, tokens: Path) -> None:
    with pytest.raises(InputError, match="tokenizer.codebook_size=64, but the shards in .* have 32"):
        setup.check_data(tiny_config(tmp_path, tokens, "tokenizer.codebook_size=64"), discover({}))
    with pytest.raises(InputError, match="not found"):
        setup.check_data(tiny_config(tmp_path, tmp_path / "nothing"), discover({}))


@pytest.mark.parametrize("error", [OSError(errno.EDQUOT, "Disk quota exceeded"), MemoryError("no room")])
def test_checkpoints_that_cannot_be_written_stop_the_last_step_alone(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    cfg = tiny_config(tmp_path, tokens, "strategy=single", "train.total_steps=4", "checkpoint.every_steps=1")
    write = writer_module.save_tensors

    def failing(path: Path, tensors: dict) -> None:
        if "step_00000001" not in str(path):
            raise error
        write(path, tensors)

    monkeypatch.setattr(writer_module, "save_tensors", failing)
    with pytest.raises(OSError, match="the checkpoint of the last step was not written: rank 0: ") as raised:
        run_alone(run, cfg)
    assert str(error) in str(raised.value)
    assert raised.value.errno is None  # rear_scale.cli ends with exit code 1 then
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 1)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]
    monkeypatch.undo()
    assert run_alone(run, cfg) == 3
    assert find(tmp_path / "run").step == 4
