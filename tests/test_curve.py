"""Expected curves: made from runs of known spread, found for a config that agrees, and left by a run that differs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import tiny_config

from rear_scale.config import ExperimentConfig, InputError, to_dict
from rear_scale.run.folder import RunFolder
from rear_scale.scaling import curve
from rear_scale.scaling.expected_curve import BandWatch, curve_for, make_curve, read_curve

STEPS = range(10, 410, 10)


def _loss(step: int) -> float:
    return 2.0 + 40.0 / (step + 10)


def _lines(seed: int, spread: float = 0.01) -> list[dict]:
    generator = np.random.default_rng(seed)
    return [
        {"step": step, "images_seen": 64 * step, "loss": _loss(step) + generator.normal(0, spread)} for step in STEPS
    ]


def _write(run: Path, cfg: ExperimentConfig, seed: int, state: str = "done") -> Path:
    run.mkdir(parents=True)
    values = to_dict(cfg)
    values["run"]["seed"] = seed
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    (run / "status.json").write_text(json.dumps({"state": state}))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in _lines(seed)))
    (run / "starts.jsonl").write_text(
        json.dumps({"command": "/x/launchers/train.py", "commit": "abc", "device": "cpu", "world_size": 2}) + "\n"
    )
    return run


@pytest.fixture
def cfg(tmp_path: Path, tokens: Path) -> ExperimentConfig:
    return tiny_config(tmp_path, tokens)


@pytest.fixture
def runs(tmp_path: Path, cfg: ExperimentConfig) -> list[Path]:
    return [_write(tmp_path / f"run{seed}", cfg, seed) for seed in range(3)]


@pytest.fixture
def folder(tmp_path: Path, runs: list[Path]) -> Path:
    """A folder of curves with that of the runs."""
    path = tmp_path / "curves/tiny.yaml"
    curve.main([*map(str, runs), "--name", "tiny", "--out", str(path)])
    return path.parent


def test_a_curve_is_the_mean_of_its_runs_with_a_band(folder: Path, runs: list[Path], cfg: ExperimentConfig) -> None:
    made = read_curve(folder / "tiny.yaml")
    assert made == make_curve("tiny", runs)
    assert (made.runs, list(made.images)) == (3, [64 * step for step in STEPS])
    assert np.abs(np.array(made.mean) - [_loss(step) for step in STEPS]).max() < 0.03
    half = (np.array(made.high) - made.low) / 2
    assert np.all((half > 0.02) & (half < 0.09))  # 4 sd of 0.01, times the root of 4/3
    assert (made.origin["command"], made.origin["commit"]) == (["launchers/train.py"], ["abc"])
    assert made.band(640) == (made.low[0], made.high[0])
    assert made.band(960) == pytest.approx(((made.low[0] + made.low[1]) / 2, (made.high[0] + made.high[1]) / 2))
    assert made.band(639) is None
    assert made.band(64 * 500) is None


def test_a_curve_is_for_configs_that_agree(folder: Path, tmp_path: Path, tokens: Path) -> None:
    for overrides in (
        ["run.seed=7"],
        ["run.name=other", "strategy=single", "checkpoint.every_steps=3"],
        ["sample.seed=3"],
    ):
        assert curve_for(tiny_config(tmp_path, tokens, *overrides), folder) is not None, overrides
    for override in ("optim.lr=0.5", "train.global_batch_size=32", "train.total_steps=77", "model.depth=1"):
        assert curve_for(tiny_config(tmp_path, tokens, override), folder) is None, override


def test_a_curve_that_is_older_than_a_field_is_for_its_default(folder: Path, tmp_path: Path, tokens: Path) -> None:
    path = folder / "tiny.yaml"
    values = yaml.safe_load(path.read_text())
    assert values["settings"].pop("optim.schedule") == "paper"
    path.write_text(yaml.safe_dump(values))
    assert curve_for(tiny_config(tmp_path, tokens), folder) is not None


def _watched(folder: Path, tmp_path: Path, cfg: ExperimentConfig, lines: list[dict]) -> list[dict]:
    """The events of a run that logs these lines."""
    run = tmp_path / "watched"
    run.mkdir(exist_ok=True)
    watch = BandWatch(cfg, RunFolder(run), folder)
    for line in lines:
        watch(line)
    events = run / "events.jsonl"
    return [json.loads(line) for line in events.read_text().splitlines()] if events.exists() else []


def test_a_run_like_the_others_is_told_nothing(folder: Path, tmp_path: Path, cfg: ExperimentConfig) -> None:
    for seed in range(100, 120):
        assert _watched(folder, tmp_path, cfg, _lines(seed)) == []


def test_a_run_that_leaves_the_band_is_told_once(
    folder: Path, tmp_path: Path, cfg: ExperimentConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = _lines(5)
    lines[3] = {**lines[3], "loss": 9.0}  # once is a spike, and none of this
    for line in lines[20:]:
        line["loss"] += 0.2
    capsys.readouterr()
    (event,) = _watched(folder, tmp_path, cfg, lines)
    assert (event["event"], event["step"], event["curve"]) == ("left_expected_curve", STEPS[22], "tiny")
    (said,) = capsys.readouterr().err.splitlines()
    assert f"step {STEPS[22]}: the loss" in said
    assert "is above the band" in said
    assert len(_watched(folder, tmp_path, cfg, lines)) == 1  # after a resume


def test_a_run_without_a_curve_or_with_a_damaged_one_trains(
    folder: Path, tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_config(tmp_path, tokens, "optim.lr=0.5")
    assert _watched(folder, tmp_path, other, [{**line, "loss": 99.0} for line in _lines(0)]) == []
    (folder / "tiny.yaml").write_text("images: [1, 2]\n")
    assert _watched(folder, tmp_path, other, _lines(0)) == []
    assert "holds no expected curve" in capsys.readouterr().err


def test_runs_that_make_no_curve_are_refused(
    runs: list[Path], tmp_path: Path, tokens: Path, cfg: ExperimentConfig
) -> None:
    other = _write(tmp_path / "other", tiny_config(tmp_path, tokens, "optim.lr=0.5"), 3)
    running = _write(tmp_path / "running", cfg, 4, "running")
    again = _write(tmp_path / "again", cfg, 0)
    empty = tmp_path / "empty"
    for given, words in (
        (runs[:1], "1 run has no spread"),
        ([*runs, other], "not runs of one config: optim.lr=.* and 0.5"),
        ([*runs, running], "is running, not done"),
        ([*runs, again], "run.seed=0 is that of several runs"),
        ([*runs, empty], "is not the folder of a run"),
    ):
        with pytest.raises(InputError, match=words):
            make_curve("tiny", given)
