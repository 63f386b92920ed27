"""Checkpoints for the tests of analyses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers import tiny_config, write_token_shards

from rear_scale.analysis.experiment import Subject
from rear_scale.analysis.job import analyse
from rear_scale.analysis.table import EXPERIMENTS
from rear_scale.checkpoint.open import open_with_config
from rear_scale.checkpoint.writer import write_portable
from rear_scale.config import to_dict
from rear_scale.model import build_model
from rear_scale.world import World


def write_runs(root: Path, tokens: Path) -> dict[str, Path]:
    """Runs with checkpoints of random weights: reAR, and AR with the same data."""
    val = write_token_shards(root / "val", 23, seed=5)
    found = {}
    for name, overrides in {"rear": [], "ar": ["objective=ar", "run.seed=1"]}.items():
        folder = root / name
        folder.mkdir()
        cfg = tiny_config(folder, tokens, f"data.val={val}", f"run.name={name}", *overrides)
        model = build_model(cfg)
        model.init_weights(cfg.run.seed)
        path = folder / "run/checkpoints/step_00000002"
        path.parent.mkdir(parents=True)
        write_portable(path, 2, {"param": dict(model.state_dict())}, {"optimizer_step": 2, "config": to_dict(cfg)})
        found[name] = folder / "run"
    return found


def subject(run: Path, *overrides: str, model: str = "reAR") -> Subject:
    checkpoint, cfg = open_with_config(run, None, list(overrides))
    return Subject(cfg, checkpoint, model)


def rows_of(world: World, name: str, run: Path, out: Path, *overrides: str) -> dict[str, list[dict[str, Any]]]:
    """The tables of an experiment on one checkpoint."""
    experiment = EXPERIMENTS[name]
    (found,) = analyse(experiment, [subject(run, *overrides)], world, out)
    return dict(experiment.tables(found))
