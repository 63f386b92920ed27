"""What a run goes through: killed at any moment, resumed on other ranks and under other strategies, out of disk space."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from helpers import TIMES, find, launch, metrics, run_ranks, start, tiny_config, tiny_config_file
from test_parallel import QUIET, build, run_steps

from rear_scale.checkpoint.folder import open_checkpoint
from rear_scale.checkpoint.writer import save
from rear_scale.world import World

# Where each strategy is saved, and the numbers of ranks (1 to 4) where each exists.
SAVED_AT = {"single": 1, "hsdp": 4, "ddp": 2, "fsdp2": 2, "zero1": 2, "zero2": 2, "zero3": 2}
ANY = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
RESUMED_AT = {1: ("single", *ANY), 2: ANY, 3: ANY, 4: ("hsdp", *ANY)}
# Large enough to see at once if it went to the wrong group.
DECAY = "optim.weight_decay=1.0"


def matrix_config(folder: Path, tokens: Path, strategy: str, world_size: int):
    return tiny_config(
        folder, tokens, *QUIET, DECAY, f"strategy={strategy}", f"train.micro_batch_size={12 // world_size}"
    )


def _save(world: World, folder: Path, tokens: Path, names: list[str], last: int) -> dict[str, list[float]]:
    """Three steps and a checkpoint of each strategy, then the losses up to the last step."""
    found = {}
    for name in names:
        cfg = matrix_config(folder, tokens, name, world.size)
        strategy = build(world, cfg)
        run_steps(world, cfg, strategy, 1, 3, lr=2e-3)
        save(folder / name, 3, strategy, world, {"optimizer_step": 3, "config": {}}, cfg.checkpoint)
        found[name] = [loss for loss, _ in run_steps(world, cfg, strategy, 4, last, lr=2e-3)]
    return found


def _resume(
    world: World, folder: Path, tokens: Path, cells: list[tuple[str, str]], last: int
) -> dict[tuple, list[float]]:
    found = {}
    for saved, name in cells:
        cfg = matrix_config(folder, tokens, name, world.size)
        strategy = build(world, cfg, open_checkpoint(folder / saved / "step_00000003"))
        found[saved, name] = [loss for loss, _ in run_steps(world, cfg, strategy, 4, last, lr=2e-3)]
    return found


def _check_matrix(folder: Path, tokens: Path, cells: dict[int, list[tuple[str, str]]], last: int) -> None:
    unbroken: dict[str, list[float]] = {}
    for world_size in (1, 2, 4):
        names = [name for name, size in SAVED_AT.items() if size == world_size]
        unbroken.update(run_ranks(world_size, _save, folder, tokens, names, last)[0])
    worst = 0.0
    for world_size, pairs in cells.items():
        for (saved, name), losses in run_ranks(world_size, _resume, folder, tokens, pairs, last)[0].items():
            error = np.abs(np.array(losses) / unbroken[saved] - 1).max()
            worst = max(worst, error)
            assert error <= 1e-5, (saved, "resumed under", name, "at", world_size, error)
            if (name, world_size) == (saved, SAVED_AT[saved]):
                assert losses == unbroken[saved], (name, world_size)
    print(f"{sum(map(len, cells.values()))} cells, largest relative difference {worst:.2g}")


def test_resuming_each_strategy_under_some(tmp_path: Path, tokens: Path) -> None:
    """Each saved strategy on three ranks (where nothing divides evenly), and every second one on four."""
    saved = list(SAVED_AT)
    cells = {
        world_size: [
            (saved[(number + world_size) % 7], RESUMED_AT[world_size][number % 5]) for number in range(0, 7, every)
        ]
        for world_size, every in ((3, 1), (4, 2))
    }
    _check_matrix(tmp_path, tokens, cells, last=8)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_resuming_each_strategy_under_each(tmp_path: Path, tokens: Path) -> None:
    cells = {size: list(itertools.product(SAVED_AT, names)) for size, names in RESUMED_AT.items()}
    _check_matrix(tmp_path, tokens, cells, last=13)


def without_times(folder: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name not in TIMES} for line in metrics(folder / "run")]


def _kill_and_restart(folder: Path, tokens: Path, kills: int, seed: int, steps: int) -> None:
    """A run that is killed at random moments, with a save every few steps; dropout on, two ranks, moving average too."""
    arguments = [
        f"train.total_steps={steps}", "checkpoint.every_steps=2", "checkpoint.keep_last=2", "optim.ema_decay=0.9",
        "train.log_every=1", "strategy=fsdp2",
    ]  # fmt: skip
    commands = {}
    for name in ("unbroken", "killed"):
        (folder / name).mkdir()
        config_file = tiny_config_file(folder / name, tokens)
        commands[name] = [
            "torchrun",
            "--nproc-per-node",
            "2",
            "launchers/train.py",
            "--config",
            config_file,
            *arguments,
        ]
    result = launch(*commands["unbroken"], fresh=True, timeout=3600)
    assert result.returncode == 0, result.stderr
    draw = random.Random(seed)
    counts = {"rank": 0, "group": 0, "while writing": 0}
    log = folder / "killed/run/metrics.jsonl"
    root, status = folder / "killed/run/checkpoints", folder / "killed/run/status.json"
    lost = 0
    while sum((counts["rank"], counts["group"])) < kills:
        before, last = checkpoint_steps(root), modified(status)
        # Every tenth start is a real one, with its imports; the others are forked and reach their training at once.
        fresh = (counts["rank"] + counts["group"]) % 10 == 0
        process = start(
            *commands["killed"],
            fresh=fresh,
            start_new_session=True,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        # Some steps after its start, and then at any moment of a step.
        wait_until(process, lambda last=last: modified(status) != last)
        wanted = max(before, default=0) + draw.randint(1, 6)
        wait_until(process, lambda wanted=wanted: len(log.read_bytes().splitlines() if log.exists() else []) >= wanted)
        time.sleep(draw.random() * 0.2)
        counts["while writing"] += bool(list(root.glob("step_*.tmp")))
        whole = draw.random() < 0.5
        ranks = ranks_of(process, fresh=fresh)
        if whole or not ranks:
            for child in [*ranks, process.pid]:
                kill(child)
            counts["group"] += 1
        else:
            kill(draw.choice(ranks))
            counts["rank"] += 1
        process.communicate(timeout=120)
        print(counts, "at step", max(checkpoint_steps(root), default=0), flush=True)
        # What was visible stays, and what is visible is whole.
        after = checkpoint_steps(root)
        lost += bool(before) and max(after, default=0) < max(before)
        for step in after:
            found = open_checkpoint(root / f"step_{step:08d}")
            lost += sum((found.path / item["file"]).stat().st_size != item["size"] for item in found.meta["files"])
        if after and max(after) >= steps:
            break
    result = launch(*commands["killed"], fresh=True, timeout=3600)
    assert result.returncode == 0, result.stderr
    assert "damaged" not in result.stderr
    print(f"{counts['rank'] + counts['group']} kills: {counts}; torn or lost checkpoints: {lost}")
    assert lost == 0
    assert without_times(folder / "killed") == without_times(folder / "unbroken")


def wait_until(process: subprocess.Popen, condition: Callable[[], bool]) -> None:
    while not condition() and process.poll() is None:
        time.sleep(0.01)


def modified(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def checkpoint_steps(root: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in root.glob("step_????????"))


def ranks_of(process: subprocess.Popen, *, fresh: bool) -> list[int]:
    try:
        # Its own children alone: what a rank starts has the rank's command line until it becomes another program.
        children = psutil.Process(process.pid).children()
        return [
            child.pid
            for child in children
            # A forked rank has the command line of the server, and nothing but ranks is forked here.
            if not fresh or any(word.endswith("launchers/train.py") for word in child.cmdline())
        ]
    except psutil.Error:
        return []


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_a_hundred_kills_lose_nothing(tmp_path: Path, tokens: Path) -> None:
    _kill_and_restart(tmp_path, tokens, kills=100, seed=1, steps=500)


def test_a_full_disk_stops_no_training(tmp_path: Path, tokens: Path) -> None:
    """A real small file system, where there is the right to mount one."""
    root = tmp_path / "run/checkpoints"
    root.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", root], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a file system here: {mounted.stderr.strip()}")
    try:
        config_file = tiny_config_file(tmp_path, tokens)
        command = [
            "python", "launchers/train.py", "--config", config_file, "strategy=single", "checkpoint.keep_last=100",
        ]  # fmt: skip
        result = launch(*command, "train.stop_at_step=4")
        assert result.returncode == 0, result.stderr
        ballast = root / "ballast"
        ballast.write_bytes(b"0" * (shutil.disk_usage(root).free - 100_000))
        result = launch(*command)
        assert "the checkpoint of step 8 was not written: " in result.stderr
        assert "Training continues; older checkpoints are intact" in result.stderr
        # All steps were trained, but the last one could not be saved.
        assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 13))
        assert result.returncode != 0
        status = json.loads((tmp_path / "run/status.json").read_text())
        assert (status["state"], status["step"]) == ("failed", 4)
        assert "the checkpoint of the last step was not written" in status["reason"]
        ballast.unlink()
        result = launch(*command)
        assert result.returncode == 0, result.stderr
        assert find(tmp_path / "run").step == 12
    finally:
        subprocess.run(["umount", root], check=True)
