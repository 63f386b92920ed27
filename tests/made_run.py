"""Run folders as training leaves them, made in a moment: no model, no process."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
from helpers import write_checkpoint
from PIL import Image

from rear_scale.config import load, to_yaml

VERSIONS = {"python": "3.11.9", "rear_scale": "0.1.0", "torch": "2.13.0"}


def metric_line(step: int, batch: int = 16, **changes: Any) -> dict[str, Any]:
    """One line of metrics.jsonl of a run on a CPU."""
    draw = random.Random(step)
    loss = 2 + 3 * math.exp(-step / 400) + 0.1 * draw.random()
    return {
        "step": step, "images_seen": step * batch, "loss": loss, "loss_ar": loss - 0.5, "loss_encode": 0.25,
        "loss_decode": 0.25, "accuracy": 0.5 - loss / 20, "grad_norm": 1 + draw.random(), "lr": 1e-4 * min(1, step / 50),
        "noise_max": max(0.0, 1 - step / 300), "skipped_updates": 0, "images_per_s": 100.0 + draw.random(),
        "images_per_s_per_gpu": 50.0, "step_time_s": 0.16, "data_wait_s": 0.01, "forward_s": 0.05, "backward_s": 0.08,
        "optimizer_s": 0.01, "checkpoint_s": 0.0, "own_time_min_s": 0.05, "own_time_max_s": 0.06, "slowest_rank": 1,
        "slowest_host": "node2", "mfu": None, "peak_mem_gib": 1.5, "time_left_s": 32.0, **changes,
    }  # fmt: skip


def start_line(step: int = 0, **changes: Any) -> dict[str, Any]:
    """One line of starts.jsonl."""
    return {
        "time": "2026-01-02T03:04:05+0000", "command": "/x/launchers/train.py --local_rank=0 --config demo.yaml",
        "commit": "c" * 40, "versions": VERSIONS, "host": "node1", "device": "cpu", "world_size": 4,
        "launcher": "environment", "step": step,
        "hosts": {"node1": 2, "node2": 2}, "folder": "/work", "after": None, **changes,
    }  # fmt: skip


def write_run(
    folder: Path, steps: int = 100, *overrides: str, state: str = "done", reason: str = "", **changes: Any
) -> Path:
    """A run folder with config, metrics, starts, status, two checkpoints and a sheet. changes: of every line of metrics."""
    folder.mkdir(parents=True)
    cfg = load("demo.yaml", [f"run.dir={folder}", "run.name=made", *overrides])
    (folder / "config.yaml").write_text(to_yaml(cfg))
    write_lines(folder / "metrics.jsonl", [metric_line(step, **changes) for step in range(1, steps + 1)])
    write_lines(folder / "starts.jsonl", [start_line()])
    (folder / "status.json").write_text(json.dumps({"state": state, "step": steps, "reason": reason}))
    for step in (steps // 2, steps):
        write_checkpoint(folder, step)
        write_sheet(folder / f"grids/step_{step:08d}.png", seed=step)
    return folder


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_sheet(path: Path, seed: int = 0, size: tuple[int, int] = (96, 48)) -> None:
    path.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    Image.fromarray(pixels.repeat(8, 0).repeat(8, 1)).save(path)
