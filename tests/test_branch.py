"""Branches of a trunk: the same updates as an unbroken run of the branch's length, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import find, launch, metrics, run_alone, start, tiny_config, tiny_config_file, write_token_shards
from test_train import run, without_times

from rear_scale.checkpoint.folder import open_checkpoint
from rear_scale.config import InputError, derive
from rear_scale.files import file_sha256
from rear_scale.train import branch, dry_run
from rear_scale.train.loop import Hooks
from rear_scale.world import Ranks, World

WSD = ["strategy=single", "optim.schedule=wsd", "objective.noise.schedule=constant", "optim.ema_decay=0.5"]
BRANCH = [*WSD, "train.total_steps=8", "optim.decay_share=0.5"]
ALONE = Ranks(0, 0, 1, 1, None, None, "single")


def config(folder: Path, tokens: Path, name: str, *overrides: str) -> Any:
    return tiny_config(folder, tokens, f"run.dir={folder / name}", *overrides)


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> Path:
    """A run of 12 steps with checkpoints of steps 4, 8 and 12, whose rate decays after step 8."""
    folder = tmp_path_factory.mktemp("wsd")
    run_alone(run, config(folder, tokens, "trunk", *WSD, "optim.decay_share=0.34"))
    return folder / "trunk"


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return without_times(metrics(folder))


def everything(folder: Path) -> dict[str, torch.Tensor]:
    found = find(folder)
    return {key: found.reader(key.split("/")[0])(key.split("/")[1]) for key in found.meta["index"]}


def test_a_branch_makes_the_updates_of_an_unbroken_run_of_its_length(tmp_path: Path, tokens: Path, trunk: Path) -> None:
    run_alone(run, config(tmp_path, tokens, "unbroken", *BRANCH))
    branched = config(tmp_path, tokens, "branch", *BRANCH, f"train.branch_from={trunk}@4")
    asked: list[int] = []
    hooks = Hooks(on_resume=[lambda step, path: asked.append(step)])

    def killed(step: int, model: torch.nn.Module) -> None:
        if step == 6:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        run_alone(run, branched, Hooks(on_step=[killed], on_resume=hooks.on_resume))
    # Sheets and scores of the trunk's step are the trunk's.
    assert asked == []
    assert run_alone(run, branched, hooks) == 4
    expected = lines_of(tmp_path / "unbroken")
    assert [line["step"] for line in lines_of(tmp_path / "branch")] == [5, 6, 7, 8]
    assert lines_of(tmp_path / "branch") == expected[4:]
    assert [line["lr"] for line in expected[3:]] == pytest.approx(
        [1e-5 + (5e-3 - 1e-5) * (1 - (done / 4) ** 0.5) for done in range(5)]
    )
    ours, theirs = everything(tmp_path / "branch"), everything(tmp_path / "unbroken")
    assert {key.split("/")[0] for key in ours} == {"param", "exp_avg", "exp_avg_sq", "ema"}
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    # Done, it is left alone, whatever has become of the trunk.
    assert run_alone(run, config(tmp_path, tokens, "branch", *BRANCH, f"train.branch_from={trunk}@4")) == 0


def test_a_branch_says_where_it_comes_from(tmp_path: Path, tokens: Path, trunk: Path) -> None:
    cfg = config(tmp_path, tokens, "branch", *BRANCH, f"train.branch_from={trunk}@4", "train.stop_at_step=5")
    before = {path: path.stat().st_mtime_ns for path in trunk.rglob("*")}
    run_alone(run, cfg)
    source = open_checkpoint(trunk / "checkpoints/step_00000004")
    record = json.loads((tmp_path / "branch/branch.json").read_text())
    values = json.dumps(source.meta["config"], sort_keys=True).encode()
    assert (record["run"], record["step"], record["branch"]) == (str(trunk), 4, None)
    assert record["config_sha256"] == hashlib.sha256(values).hexdigest()
    assert record["checkpoint_sha256"] == file_sha256(source.path / "meta.json")
    assert find(tmp_path / "branch").meta["branch"] == record
    assert f"branch_from: {trunk}@4" in (tmp_path / "branch/config.yaml").read_text()
    # Its first checkpoint takes no space, and the trunk is untouched.
    first = tmp_path / "branch/checkpoints/step_00000004/part-00000.safetensors"
    assert os.path.samefile(first, source.path / first.name)
    assert {path: path.stat().st_mtime_ns for path in trunk.rglob("*")} == before
    # A branch can be a trunk.
    again = config(
        tmp_path, tokens, "again", *BRANCH, "train.total_steps=10", f"train.branch_from={tmp_path / 'branch'}@4"
    )
    run_alone(run, again)
    assert find(tmp_path / "again").meta["branch"]["branch"] == record


def refused(world: World, cfg: Any) -> str:
    with pytest.raises(InputError) as error:
        run(world, cfg)
    return str(error.value)


@pytest.mark.parametrize(
    ("where", "overrides", "message"),
    [
        ("trunk@5", [], "has no checkpoint of step 5, but the steps 4, 8, 12. Branch from one of them"),
        ("nowhere@4", [], "not found: .*nowhere/checkpoints, which train.branch_from="),
        ("trunk@12", ["train.total_steps=20"], "the trunk's rate decays after step 8 .*Branch from a step up to 8"),
        ("trunk@8", ["train.total_steps=8"], "train.total_steps=8 ends the branch before or at its beginning"),
        ("trunk@4", ["train.stop_at_step=4"], "train.stop_at_step=4 ends the branch before or at its beginning"),
        ("trunk@8", ["train.total_steps=10"], "lets the rate decay from step 5 on.*optim.decay_share=0.2 to decay from"),
        ("trunk@4", ["model.depth=1", "objective.heads.decode_tap=1"], "model.depth=1, but .*step_00000004 was trained with"),
        ("trunk@4", ["train.global_batch_size=24"], "train.global_batch_size=24, but .* was trained with"),
        ("trunk@4", ["run.seed=1"], "run.seed=1, but .* was trained with run.seed=0"),
        ("trunk@4", ["optim.lr=1e-3"], "optim.lr=0.001, but .* was trained with optim.lr=0.005"),
    ],
)  # fmt: skip
def test_a_branch_that_cannot_begin_is_refused_and_writes_nothing(
    tmp_path: Path, tokens: Path, trunk: Path, where: str, overrides: list[str], message: str
) -> None:
    cfg = config(tmp_path, tokens, "branch", *BRANCH, f"train.branch_from={trunk.parent / where}", *overrides)
    with pytest.raises(InputError, match=message):
        branch.check(cfg, derive(cfg, 1, 100), None)
    with pytest.raises(InputError, match=message):
        dry_run.show(cfg, ALONE)
    assert not (tmp_path / "branch").exists()


def test_other_data_and_other_schedules_are_refused(tmp_path: Path, tokens: Path, trunk: Path) -> None:
    others = write_token_shards(tmp_path / "others", 100, seed=9)
    cfg = config(tmp_path, others, "branch", *BRANCH, f"train.branch_from={trunk}@4")
    message = run_alone(refused, cfg)
    assert "holds other samples" in message
    assert "resume.allow=[data.train]" in message
    for overrides, rule in (
        ([f"train.branch_from={trunk}@4"], "optim.schedule=paper"),
        (["optim.schedule=wsd", f"train.branch_from={trunk}"], "does not name a run folder and a step"),
        (["optim.schedule=wsd", f"train.branch_from={trunk}@4", "train.init_from=a.safetensors"], "names others"),
        (
            ["optim.schedule=wsd", "optim.warmup_steps=7", "optim.decay_share=0.5"],
            "before the end of optim.warmup_steps=7",
        ),
    ):
        with pytest.raises(InputError, match=rule):
            derive(config(tmp_path, tokens, "branch", "strategy=single", *overrides), 1, 100)
    # A trunk whose rate depends on its length is none.
    run_alone(run, config(tmp_path, tokens, "cosine", "strategy=single", "train.stop_at_step=4"))
    cfg = config(tmp_path, tokens, "branch", *BRANCH, f"train.branch_from={tmp_path / 'cosine'}@4", "optim.ema_decay=0")
    assert "optim.schedule=wsd, but" in run_alone(refused, cfg)


def test_a_damaged_trunk_is_never_replaced_by_new_weights(tmp_path: Path, tokens: Path, trunk: Path) -> None:
    copy = tmp_path / "trunk"
    shutil.copytree(trunk, copy)
    part = copy / "checkpoints/step_00000004/part-00000.safetensors"
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    cfg = config(tmp_path, tokens, "branch", *BRANCH, f"train.branch_from={copy}@4")
    assert "step_00000004 is damaged. Branch from another step" in run_alone(refused, cfg)
    # Mended, the same command begins.
    data[-1] ^= 1
    part.write_bytes(data)
    assert run_alone(run, cfg) == 4


def _kill_after(lines: int, run_folder: Path, *command: str | Path) -> None:
    """Starts a command and kills it when its log has so many lines."""
    log = run_folder / "metrics.jsonl"
    with start(*command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and (not log.exists() or len(log.read_bytes().splitlines()) < lines):
            time.sleep(0.02)
        assert process.poll() is None, "it ended before the kill"
        process.kill()


@pytest.mark.long
def test_trunk_and_branch_continue_after_kill_9(tmp_path: Path, tokens: Path) -> None:
    file = tiny_config_file(tmp_path, tokens)
    command = [
        "python",
        "launchers/train.py",
        "--config",
        file,
        *WSD,
        "checkpoint.keep_every=4",
        "optim.posthoc_ema=[0.1]",
    ]
    every = "checkpoint.ema_every_steps=2"
    trunk = [*command, every, "train.total_steps=40", "optim.decay_share=0"]
    branch = [
        *command,
        every,
        "train.total_steps=60",
        "optim.decay_share=0.5",
        f"train.branch_from={tmp_path / 'trunk'}@28",
    ]
    unbroken = [*command, every, "train.total_steps=60", "optim.decay_share=0.5"]
    for name, words, kills in (("trunk", trunk, (3, 14)), ("branch", branch, (2, 11)), ("unbroken", unbroken, ())):
        words = [*words, f"run.dir={tmp_path / name}"]
        for lines in kills:
            _kill_after(lines, tmp_path / name, *words)
        result = launch(*words)
        assert result.returncode == 0, result.stderr
    lines = lines_of(tmp_path / "unbroken")
    assert lines_of(tmp_path / "trunk")[:30] == lines[:30]
    assert lines_of(tmp_path / "branch") == lines[28:]
    ours, theirs = everything(tmp_path / "branch"), everything(tmp_path / "unbroken")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert [path.name for path in sorted((tmp_path / "branch/ema").iterdir())] == [
        f"step_{step:08d}" for step in range(30, 61, 2)
    ]
