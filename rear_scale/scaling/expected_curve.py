"""Expected loss curves: mean and band of the loss of a config by images seen, from runs of it, in configs/curves/NAME.yaml.

A run whose settings agree with those of a curve is compared with it while it trains; it is told once when its loss leaves the
band, and never stopped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from rear_scale.config import CONFIG_DIR, ExperimentConfig, InputError, to_dict
from rear_scale.config.derived import completed
from rear_scale.config.fields import declaration
from rear_scale.config.values import leaves
from rear_scale.files import write_text_atomically
from rear_scale.progress import say
from rear_scale.run.folder import RunFolder
from rear_scale.untrusted import parse_json

FOLDER = CONFIG_DIR / "curves"
EVENT = "left_expected_curve"  # in events.jsonl
# Half of the band in standard deviations of a single run's logged loss, and at least this fraction of the mean.
_DEVIATIONS, _LEAST = 4.0, 0.01
_WINDOW = 11  # logged losses over which the variance among runs is averaged: a few runs give a poor one at each
_IN_A_ROW = 3  # logged losses outside of the band before a run is told so
# Settings that change a run without changing what its loss is expected to be.
_NOT_COMPARED = ("run.seed", "data.mode", "train.compile", "optim.ema_decay")


@dataclass(frozen=True)
class ExpectedCurve:
    """The loss of a config by images seen. Lists have one entry per logged step."""

    name: str
    runs: int
    origin: Mapping[str, Any]  # command, commit and machine of the runs
    settings: Mapping[str, Any]  # dotted key -> value, of all that determines the loss
    images: Sequence[int]
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]

    def fits(self, cfg: ExperimentConfig) -> bool:
        """Whether a config agrees in every setting that determines the loss. Fields that are newer than the curve must have their
        defaults."""
        return settings_of(to_dict(cfg)) == settings_of(_nested(self.settings))

    def band(self, images: int) -> tuple[float, float] | None:
        """The ends of the band after so many images, interpolated; None outside of the curve."""
        if not self.images[0] <= images <= self.images[-1]:
            return None
        return tuple(float(np.interp(images, self.images, end)) for end in (self.low, self.high))  # type: ignore[return-value]


def settings_of(values: dict[str, Any]) -> dict[str, Any]:
    """The settings that determine the loss, by dotted key: those that no resumed run may change, but for the seed and its like.

    values: a config as nested values, perhaps of an earlier version.
    """
    found = {}
    for key, value in leaves(completed(values)).items():
        own = declaration(ExperimentConfig, key)
        if value != {} and own is not None and not own.may_change and key not in _NOT_COMPARED:
            found[key] = value
    return found


def make_curve(name: str, runs: Sequence[Path]) -> ExpectedCurve:
    """The curve of some runs of one config.

    Raises InputError for fewer than two, for unequal settings or equal seeds, and for runs that have not ended.
    """
    if len(runs) < 2:
        raise InputError(f"{len(runs)} run has no spread. Name at least two runs with different seeds, better three")
    configs = [_config_of(run) for run in runs]
    settings = [settings_of(values) for values in configs]
    for run, other in zip(runs[1:], settings[1:], strict=True):
        keys = sorted(key for key in settings[0].keys() | other.keys() if settings[0].get(key) != other.get(key))
        if keys:
            key = keys[0]
            raise InputError(
                f"{runs[0]} and {run} are not runs of one config: {key}={settings[0].get(key)} and {other.get(key)}. "
                "Name runs that differ in run.seed alone"
            )
    seeds = [values["run"]["seed"] for values in configs]
    if len({*seeds}) < len(seeds):
        raise InputError(
            f"run.seed={seeds[0]} is that of several runs, which are one run. Name runs with different seeds"
        )
    losses = [_losses(run) for run in runs]
    images = sorted(set.intersection(*({*found} for found in losses)))
    if len(images) < _WINDOW:
        raise InputError(
            f"the runs have {len(images)} logged steps in common, but a curve needs {_WINDOW}. Log more with train.log_every"
        )
    table = np.array([[found[number] for number in images] for found in losses])
    mean, half = table.mean(0), _half_width(table)
    rounded = [np.round(line, 5).tolist() for line in (mean, mean - half, mean + half)]
    return ExpectedCurve(name, len(runs), _origin(runs), settings[0], images, *rounded)


def _half_width(table: np.ndarray) -> np.ndarray:
    """Half of the band, float64 [steps]: for a further run's loss, whose own spread adds to that of the mean."""
    variance = table.var(0, ddof=1)
    padded = np.pad(variance, _WINDOW // 2, mode="edge")
    smooth = np.convolve(padded, np.full(_WINDOW, 1 / _WINDOW), mode="valid")
    return np.maximum(_DEVIATIONS * np.sqrt(smooth * (1 + 1 / len(table))), _LEAST * np.abs(table.mean(0)))


def _config_of(run: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load((run / "config.yaml").read_text())
        state = json.loads((run / "status.json").read_text())["state"]
    except (OSError, ValueError, KeyError, yaml.YAMLError) as error:
        raise InputError(
            f"{run} is not the folder of a run ({error}). Name folders that launchers/train.py wrote"
        ) from error
    if state != "done":
        raise InputError(f"{run} is {state}, not done. Continue it first, or leave it out")
    return values


def _losses(run: Path) -> dict[int, float]:
    """The logged loss by images seen."""
    lines = [parse_json(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    return {line["images_seen"]: line["loss"] for line in lines if line.get("loss") is not None}


def _origin(runs: Sequence[Path]) -> dict[str, Any]:
    """Commands, commits and machines of the runs, from their last starts."""
    starts = [json.loads((run / "starts.jsonl").read_text().splitlines()[-1]) for run in runs]
    origin = {
        name: sorted({str(start.get(name)) for start in starts})
        for name in ("command", "commit", "device", "world_size")
    }
    # Where the checkout lay says nothing about a curve.
    return {**origin, "command": [re.sub(r"\S*/(?=launchers/)", "", command) for command in origin["command"]]}


def write_curve(curve: ExpectedCurve, path: Path) -> None:
    """Writes a curve as YAML."""
    values = {**asdict(curve), "settings": dict(curve.settings), "origin": dict(curve.origin)}
    text = yaml.safe_dump(values, sort_keys=False, width=130, default_flow_style=None)
    head = f"# Expected loss of {curve.name} by images seen, with its band; made by launchers/study.py curve.\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, head + text)


def read_curve(path: Path) -> ExpectedCurve:
    """The curve in a file. Raises InputError for one that holds none."""
    try:
        values = yaml.safe_load(path.read_text())
        curve = ExpectedCurve(**values)
        lengths = {
            len(getattr(curve, field.name))
            for field in fields(curve)
            if field.name in ("images", "mean", "low", "high")
        }
        if len(lengths) != 1 or lengths == {0} or list(curve.images) != sorted(curve.images):
            raise ValueError("its lists are unequal, empty or not in order")
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise InputError(f"{path} holds no expected curve ({error}). Make it with launchers/study.py curve") from error
    return curve


def curve_for(cfg: ExperimentConfig, folder: Path = FOLDER) -> ExpectedCurve | None:
    """The stored curve whose settings a config has; None = there is none."""
    curves = (read_curve(path) for path in sorted(folder.glob("*.yaml")))
    return next((curve for curve in curves if curve.fits(cfg)), None)


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        inner = values
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return values


class BandWatch:
    """Compares the logged losses of a run with its expected curve, on rank 0. Says once that the run has left the band, and
    records it in events.jsonl; a resumed run is not told again."""

    def __init__(self, cfg: ExperimentConfig, run: RunFolder, folder: Path = FOLDER) -> None:
        self.run, self.curve = run, _curve_or_none(cfg, folder)
        self.sides: list[int] = []  # of the losses logged last: 1 above the band, -1 below, 0 inside
        self.told = EVENT in _text(run.path / "events.jsonl")

    def __call__(self, metrics: Mapping[str, Any]) -> None:
        """To be called with the metrics of each logged step."""
        loss = metrics["loss"]
        band = None if self.curve is None or self.told else self.curve.band(metrics["images_seen"])
        if band is None or loss is None:
            return
        low, high = band
        self.sides = [*self.sides, (loss > high) - (loss < low)][-_IN_A_ROW:]
        if abs(sum(self.sides)) == _IN_A_ROW:
            self._tell(metrics["step"], loss, low, high)

    def _tell(self, step: int, loss: float, low: float, high: float) -> None:
        assert self.curve is not None
        self.told = True
        where = "above" if loss > high else "below"
        what = f"the loss {loss:.4f} is {where} the band {low:.4f} to {high:.4f} of curve {self.curve.name}"
        say(f"step {step}: {what}, of {self.curve.runs} runs, at {_IN_A_ROW} logged steps in a row. Training continues")
        self.run.note(EVENT, step, what=what, loss=loss, low=low, high=high, curve=self.curve.name)


def _curve_or_none(cfg: ExperimentConfig, folder: Path) -> ExpectedCurve | None:
    """As curve_for. A damaged file is reported, because training does not depend on it."""
    try:
        return curve_for(cfg, folder)
    except InputError as error:
        say(f"{error}. Training goes on without it")
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
