"""The launchers as users start them: real processes, real exit codes."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from helpers import (
    BIN,
    ROOT,
    TIMES,
    command_line,
    environment,
    find,
    launch,
    metrics,
    run_alone,
    start,
    tiny_config,
    tiny_config_file,
)
from safetensors.torch import load_file

from rear_scale.train import setup
from rear_scale.train.loop import Hooks, train
from rear_scale.world import discover, free_port

TRAIN = "launchers/train.py"


def fresh_config(tmp_path: Path, name: str, tokens: Path) -> Path:
    (tmp_path / name).mkdir()
    return tiny_config_file(tmp_path / name, tokens)


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder / "run")]


def _without_compilers(folder: Path) -> dict[str, str]:
    """The variables of a shell that finds no program but Python's own and those that DeepSpeed asks for."""
    programs = folder / "bin"
    programs.mkdir()
    for name in ("python", "python3", "bash", "sh", "env", "hostname", "uname", "which", "git", "rm", "ldconfig"):
        found = BIN / name if (BIN / name).exists() else shutil.which(name)
        if found:
            (programs / name).symlink_to(found)
    return {
        "PATH": str(programs),
        "CC": "/nonexistent",
        "CXX": "/nonexistent",
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
    }


def test_every_way_to_start_prints_the_same_losses(tmp_path: Path, tokens: Path) -> None:
    """DeepSpeed with only Python's own programs and a shell in PATH, where there is nothing that compiles."""
    hidden = _without_compilers(tmp_path)
    assert shutil.which("c++", path=hidden["PATH"]) is None
    quiet = ["model.dropout=0", "model.attn_dropout=0", "train.total_steps=3"]
    starts = {
        "python": ["python", TRAIN],
        "torchrun": ["torchrun", "--nproc-per-node", "2", TRAIN],
        "deepspeed": ["deepspeed", "--num_gpus", "2", TRAIN],
    }
    configs = {name: fresh_config(tmp_path, name, tokens) for name in (*starts, "srun")}
    for name, words in starts.items():
        # Both launchers are the real ones; `python` is what they are compared to.
        result = launch(
            *words, "--config", configs[name], *quiet,
            fresh=name != "python", **(hidden if name == "deepspeed" else {}),
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
    # srun starts its tasks at once and tells each of them its place.
    tasks = [
        start(
            "python", TRAIN, "--config", configs["srun"], *quiet,
            env=environment(
                SLURM_PROCID=str(rank),
                SLURM_LOCALID=str(rank),
                SLURM_STEP_ID="0",
                SLURM_STEP_NUM_TASKS="2",
                SLURM_STEP_TASKS_PER_NODE="2",
                SLURM_STEP_NODELIST="127.0.0.1",
                MASTER_PORT=str(port),
            ),
            stderr=subprocess.PIPE,
        )
        for port in [free_port()]
        for rank in range(2)
    ]  # fmt: skip
    for task in tasks:
        assert task.wait(120) == 0, task.stderr.read()
    expected = losses(tmp_path / "python")
    assert len(expected) == 3
    assert losses(tmp_path / "torchrun") == losses(tmp_path / "deepspeed") == losses(tmp_path / "srun")
    assert losses(tmp_path / "torchrun") == pytest.approx(expected, rel=1e-5)


@pytest.mark.long  # tests/test_kills.py kills ranks before their file calls
def test_a_kill_of_the_whole_group_is_survived(tmp_path: Path, tokens: Path) -> None:
    """kill -9 of launcher and ranks under deepspeed, dropout on; the same command ends as an unbroken run does."""
    commands = {}
    for name in ("unbroken", "killed"):
        config = fresh_config(tmp_path, name, tokens)
        commands[name] = [
            "deepspeed",
            "--num_gpus",
            "2",
            TRAIN,
            "--config",
            config,
            "train.total_steps=80",
            "checkpoint.every_steps=20",
        ]
    assert launch(*commands["unbroken"], fresh=True).returncode == 0
    process = subprocess.Popen(
        command_line(*commands["killed"]),
        env=environment(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    latest = tmp_path / "killed/run/checkpoints/latest"
    deadline = time.monotonic() + 120
    while not latest.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    status = json.loads((tmp_path / "killed/run/status.json").read_text())
    assert status["state"] == "running"
    assert len(metrics_or_partial(tmp_path / "killed/run")) < 80
    result = launch(*commands["killed"], fresh=True)
    assert result.returncode == 0, result.stderr
    assert "resumed from" in result.stderr
    unbroken, killed = (
        [
            {name: value for name, value in line.items() if name not in TIMES}
            for line in metrics(tmp_path / name / "run")
        ]
        for name in ("unbroken", "killed")
    )
    assert killed == unbroken
    assert json.loads((tmp_path / "killed/run/status.json").read_text())["state"] == "done"


def metrics_or_partial(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines()


def test_a_checkpoint_becomes_one_file(tmp_path: Path, tokens: Path) -> None:
    config = fresh_config(tmp_path, "run", tokens)
    command = ["python", TRAIN, "--config", config, "strategy=single", "train.total_steps=2", "optim.ema_decay=0.5"]
    assert launch(*command).returncode == 0
    run = tmp_path / "run/run"
    found = find(run)
    for kind, flags in (("param", []), ("ema", ["--ema"])):
        out = tmp_path / f"{kind}.safetensors"
        result = launch("python", "launchers/convert.py", run, "--to", "consolidated", "--out", out, *flags)
        assert result.returncode == 0, result.stderr
        weights = load_file(out)
        assert sorted(weights) == sorted(found.names())
        assert all(torch.equal(value, found.reader(kind)(name)) for name, value in weights.items())


# Runs a launcher and prints its CPU time in seconds and its peak of memory in KiB when it ends, which is by os._exit. Not the
# peak of getrusage, which counts the process that started this one too.
_MEASURED = """
import os, resource, runpy, sys

end = os._exit

def report_and_end(code):
    own = resource.getrusage(resource.RUSAGE_SELF)
    print(own.ru_utime + own.ru_stime, open("/proc/self/status").read().split("VmHWM:")[1].split()[0], flush=True)
    end(code)

os._exit = report_and_end
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_dry_run_of_a_large_config_is_quick_and_small(tmp_path: Path) -> None:
    result = launch("python", "-c", _MEASURED, TRAIN, "--config", "rear_xl.yaml", "--dry-run", fresh=True)
    assert result.returncode == 0, result.stderr
    assert "not found: data.train" in result.stdout
    seconds, peak_kib = map(float, result.stdout.split()[-2:])
    assert seconds < 20
    assert 0 < peak_kib < 2 * 2**20


@pytest.mark.parametrize("launcher", ["sample", "evaluate"])
def test_dry_runs_of_a_checkpoint_change_nothing(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], launcher: str
) -> None:
    cfg = tiny_config(
        tmp_path, tokens, "strategy=single", "train.total_steps=1", f"tokenizer.weights={tmp_path / 'none'}"
    )
    data = setup.check_data(cfg, discover({}))
    run_alone(lambda world: train(cfg, data.plan, world, *data.open(world), Hooks()))
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["launcher", "--checkpoint", "run", "sample.seed=7", "--dry-run", "--full"])
    runpy.run_path(str(ROOT / f"launchers/{launcher}.py"))["main"]()
    out = capsys.readouterr().out
    assert f"not found: tokenizer.weights={tmp_path / 'none'}" in out
    assert "seed: 7" in out
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


def test_packages_that_do_not_fit_are_said(tmp_path: Path) -> None:
    """With an environment whose python does all that it is asked but for one thing."""
    for name in ("launchers/setup.sh", "constraints.txt", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\ncase "$*" in *"pip check"*) echo "torch 1 needs that 2"; exit 1;; esac\n')
    python.chmod(0o755)
    result = subprocess.run(
        ["bash", tmp_path / "launchers/setup.sh"], capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 1
    assert "torch 1 needs that 2" in result.stderr
    assert "error: the packages in .venv do not fit together" in result.stderr
    assert not (tmp_path / ".venv/installed").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            [TRAIN, "--config", "rear_xl.yaml", "model.depht=3"],
            "error: model.depht is not a config key; did you mean model.depth?",
        ),
        ([TRAIN, "--config", "rear_xl.yaml"], "error: not found: data/imagenet256/maskgit_vqgan/train/index.json"),
        ([TRAIN], "error: --config is missing"),
        (["launchers/sample.py"], "error: --checkpoint is missing"),
        (["launchers/sample.py", "--checkpoint", "nowhere"], "error: not found: --checkpoint nowhere"),
        (["launchers/evaluate.py", "--checkpoint", "nowhere"], "error: not found: --checkpoint nowhere"),
        (["launchers/pretokenize.py", "--config", "demo.yaml"], "error: pretokenize.images is not set"),
        (
            ["launchers/train_tokenizer.py", "--config", "rear_xl.yaml"],
            "error: tokenizer.training and tokenizer.weights",
        ),
        (["launchers/demo.py", "--seeds", "0"], "error: --seeds=0 must be at least 1"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, arguments: list[str], expected: str) -> None:
    result = launch("python", *arguments, cwd=tmp_path)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(expected)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    if "not found: data" not in expected:
        assert not written
        return
    # The run folder is known: it says why, too.
    assert {path.name for path in written} == {"status.json", "events.jsonl"}
    status = json.loads((tmp_path / "runs/rear_xl/status.json").read_text())
    assert (status["state"], status["reason"]) == ("failed", f"InputError: {line.removeprefix('error: ')}")


@pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=pytest.mark.long)])
def test_of_several_ranks_only_the_first_prints_the_error(tmp_path: Path, fresh: bool) -> None:
    command = ["torchrun", "--nproc-per-node", "2", TRAIN, "--config", "demo.yaml", "optim.lr=-1"]
    result = launch(*command, fresh=fresh, cwd=tmp_path)
    assert result.returncode != 0
    assert result.stderr.count("error: optim.lr=-1.0 must be above 0") == 1


@pytest.mark.parametrize("launcher", sorted(path.name for path in (ROOT / "launchers").glob("*.py")))
def test_every_launcher_explains_itself(launcher: str) -> None:
    result = launch("python", f"launchers/{launcher}", "--help")
    assert result.returncode == 0
    assert ("--dry-run" in result.stdout) is (launcher != "runs.py")  # which writes nothing
    assert "usage:" in result.stdout


@pytest.mark.long
@pytest.mark.parametrize("launcher", sorted(path.name for path in (ROOT / "launchers").glob("*.py")))
def test_every_launcher_starts_with_imports_of_its_own(launcher: str) -> None:
    """In a new process, in which nothing is imported before."""
    result = launch("python", f"launchers/{launcher}", "--help", fresh=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("launcher", ["pretokenize", "train_tokenizer", "demo"])
def test_dry_runs_say_what_is_missing_and_do_nothing(tmp_path: Path, launcher: str) -> None:
    config = [] if launcher == "demo" else ["--config", "demo.yaml"]
    result = launch("python", f"launchers/{launcher}.py", *config, "--dry-run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert ("deepspeed --num_gpus" if launcher == "demo" else "not ") in result.stdout
    assert not list(tmp_path.iterdir())


def test_sampling_and_ddp_do_not_import_other_engines() -> None:
    """What runs alone and what only samples must not need the engines."""
    code = (
        "import sys, rear_scale.sample.job, rear_scale.parallel.ddp; print({'deepspeed', 'wandb'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "set()"


def test_ranks_end_with_a_killed_torchrun(tmp_path: Path, tokens: Path) -> None:
    """They are in sessions of their own; left alone, they would keep the run folder locked."""
    config = fresh_config(tmp_path, "run", tokens)
    command = command_line(
        "torchrun", "--nproc-per-node", "2", TRAIN, "--config", config, "train.total_steps=100000", "strategy=ddp"
    )
    process = subprocess.Popen(command, env=environment(), start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (tmp_path / "run/run/metrics.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    left = [found for found in psutil.process_iter(["cmdline"]) if str(config) in (found.info["cmdline"] or [])]
    assert not psutil.wait_procs(left, 60)[1]
