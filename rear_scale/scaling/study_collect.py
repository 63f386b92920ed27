"""The results of a study: study.csv, with one row per cell, from the run folders of the study and of others."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rear_scale.checkpoint.open import load_config
from rear_scale.config import ExperimentConfig, InputError, to_dict
from rear_scale.config.values import leaves
from rear_scale.evaluate.result import Result, read_result
from rear_scale.files import write_text_atomically
from rear_scale.progress import say
from rear_scale.run.folder import is_config_of_run, read_metrics
from rear_scale.run.requeue import read_status
from rear_scale.scaling.study_grid import NAMES, Cell, identity, is_fixed, varied
from rear_scale.scaling.study_plan import CellPlanner
from rear_scale.scaling.study_run import RESULT, THROUGHPUT, UNGUIDED, Runner
from rear_scale.shards.codebook import is_packed
from rear_scale.shards.record import read_manifest
from rear_scale.text_table import as_csv

Row = dict[str, Any]
FIRST = ("cell",)
COSTS = ("parameters", "images", "unique_images", "flops", "gpu_hours")
TOKENS = ("loss", "loss_noisy", "ctr", "ctr_noisy", "perplexity", "perplexity_noisy")
LAST = ("commit", "config_sha256", "run", "state")
# Open choices of a config (null, auto), which a run settles when it begins.
_SETTLED = ("data.group_by_class", "model.modulation", "train.compile", "model.num_classes")
_DATA = ("data.train", "data.val")
# Fields of the section sample that say nothing about the quality of samples
_NOT_OF_SCORES = ("batch_size", "seed", "also_write", "grid_every_images", "cuda_graphs")


@dataclass(frozen=True)
class Collected:
    """The rows of a study."""

    cells: Sequence[Cell]
    rows: list[Row]
    columns: list[str]
    varied: list[str]  # the columns that say which cell a row is

    def text(self) -> str:
        """The rows as CSV. An empty field = there is no such value."""
        return as_csv(self.columns, ([row.get(name) for name in self.columns] for row in self.rows))


def collect(runner: Runner, others: Sequence[Path] = ()) -> Collected:
    """The rows of all cells. others: folders below which other people's runs lie; a run with the config of a cell that has no
    finished run of its own is taken for it. Raises InputError for a folder that does not exist."""
    for folder in others:
        if not folder.is_dir():
            raise InputError(f"--runs {folder} is not a folder. Name one with run folders in it")
    columns, planner = varied(runner.cells), CellPlanner()
    found = _runs_below(others)
    rows = []
    for number, cell in enumerate(runner.cells):
        own = {key: values[number] for key, values in columns.items()}
        rows.append({"cell": cell.name, **own, **_of_run(runner, cell, planner, found)})
    scores = dict.fromkeys(key for row in rows for key in row)
    known = {*FIRST, *columns, *COSTS, *TOKENS, *LAST}
    order = [*FIRST, *columns, *COSTS, *TOKENS, "fid", "fid_guided"]
    order += [key for key in scores if key not in known and key not in order]
    return Collected(runner.cells, rows, [*order, *LAST], list(columns))


def write_csv(runner: Runner, collected: Collected) -> Path:
    """The path of study.csv, after writing it."""
    path = runner.study.folder / "study.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, collected.text())
    return path


def _of_run(runner: Runner, cell: Cell, planner: CellPlanner, others: Mapping[Path, ExperimentConfig]) -> Row:
    """All columns of a cell but its name and its words."""
    run, results = runner.run_folder(cell), runner.run_folder(cell)
    trained = runner.run_folder(runner.trained_by(cell))
    state = _state(runner, cell)
    plan = planner(cell.cfg)
    made = {stage.products[0].name for stage in runner.stages_of(cell) if runner.stages.is_finished(stage)}
    own = True
    if state != "done" and (other := _matching(cell, others, plan.steps)) is not None:
        run = results = trained = other
        state, own = read_status(other)[0], False
    seen = read_status(trained)[1] * cell.cfg.train.global_batch_size or (plan.images if state == "done" else 0)
    row: Row = {
        "parameters": plan.size.parameters,
        "images": seen,
        "unique_images": None if plan.unique_images is None else min(plan.unique_images, seen),
        "flops": seen * plan.size.flops_per_image,
        "gpu_hours": _gpu_hours(trained),
    }
    # A result that this study did not make to the end is of other settings, as after a change of the study, or of other people.
    scored = [
        result
        for name in (RESULT, UNGUIDED)
        if (not own or name in made) and (result := _result(results / name)) is not None
    ]
    if not own:
        scored = [result for result in scored if _is_scored_alike(result, cell.cfg, run)]
    row |= _tokens(scored, trained if state == "done" or "latest" in made else None)
    for result in scored:
        row |= _images(result)
    if (not own or THROUGHPUT in made) and (results / THROUGHPUT).is_file():
        row["images_per_s"] = json.loads((results / THROUGHPUT).read_text())["images_per_s"]
    row |= {"commit": _commit(trained), "config_sha256": identity(cell.cfg), "run": str(run), "state": state}
    return row


def _is_scored_alike(result: Result, cfg: ExperimentConfig, run: Path) -> bool:
    """Whether somebody else's result has as many samples as the cell's would, made in the same way but for guidance that is off.
    Says so where it has not."""
    theirs, ours = dict(result.sample or {}), asdict(cfg.sample)
    if not _guided(theirs):
        theirs["guidance"] = ours["guidance"]
    keys = [key for key in ours if key not in _NOT_OF_SCORES and key in theirs and theirs[key] != ours[key]]
    if keys:
        say(f"left out: the scores of {run}, made with sample.{keys[0]}={theirs[keys[0]]}, not {ours[keys[0]]}")
    return not keys


def _state(runner: Runner, cell: Cell) -> str:
    """done, failed with its reason, started, or missing."""
    if runner.is_done(cell):
        return "done"
    if (reason := runner.failure(cell)) is not None:
        return f"failed: {reason}"
    return "started" if runner.run_folder(cell).exists() else "missing"


def _result(path: Path) -> Result | None:
    if not path.is_file():
        return None
    try:
        return read_result(path)
    except InputError as error:
        say(f"left out: {error}")
        return None


def _tokens(results: Iterable[Result], run: Path | None) -> Row:
    """The predictions of validation tokens: loss (nats per token), correct token ratio and perplexity, clean and noisy.

    run: whose last validation has the loss, where no result has it; None = a run that is not finished.
    """
    row: Row = dict.fromkeys(TOKENS)
    for result in results:
        for context, suffix in (("val_clean", ""), ("val_noisy", "_noisy")):
            scores = (result.tokens or {}).get(context)
            if scores is not None:
                perplexity = scores["perplexity"]  # None = it was not finite
                row[f"loss{suffix}"] = None if perplexity is None else math.log(perplexity)
                row[f"ctr{suffix}"], row[f"perplexity{suffix}"] = scores["ctr"], perplexity
        if row["perplexity"] is not None:
            return row
    if run is not None:
        row["loss"] = next((line["val_loss_ar"] for line in reversed(metrics_of(run)) if line.get("val_loss_ar")), None)
    return row


def _images(result: Result) -> Row:
    """The scores of images by their names. Those of guided samples end in _guided; those against a reference that is not the
    first of the config have its name behind a slash."""
    suffix = "_guided" if _guided(result.sample or {}) else ""
    references = list(result.evaluate.get("reference") or {})
    row: Row = {}
    for number in result.images.numbers():
        behind = f"/{number.reference}" if number.reference in references[1:] else ""
        row[f"{number.name}{suffix}{behind}"] = number.value
    return row


def _guided(sample: Mapping[str, Any]) -> bool:
    guidance = sample.get("guidance") or {"schedule": "constant", "scale": 1.0}
    return guidance["scale"] != (0 if guidance["schedule"] == "linear" else 1)


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The logged steps of a run; none where it has not begun."""
    try:
        return read_metrics(run)
    except (OSError, ValueError):
        return []


def starts_of(run: Path) -> list[dict[str, Any]]:
    """The recorded starts of a run."""
    return _lines(run / "starts.jsonl")


def evaluations_of(run: Path) -> list[dict[str, Any]]:
    """The scores of a run during its training (evaluate.training)."""
    return _lines(run / "evaluations.jsonl")


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError):
        return []


def _gpu_hours(run: Path) -> float | None:
    """The measured time of a run's steps on its GPUs; None on other devices, and on GPUs whose peak rate is not known."""
    before, total = 0, 0.0
    lines = [line for line in metrics_of(run) if line.get("step_time_s") and line.get("images_per_s_per_gpu")]
    for line in lines:
        gpus = round(line["images_per_s"] / line["images_per_s_per_gpu"])
        total += (line["step"] - before) * line["step_time_s"] * gpus / 3600
        before = line["step"]
    return total if any(line.get("mfu") is not None for line in lines) else None


def _commit(run: Path) -> str | None:
    starts = starts_of(run)
    return starts[-1].get("commit") if starts else None


def _runs_below(folders: Sequence[Path]) -> dict[Path, ExperimentConfig]:
    """The configs of all run folders below some folders."""
    found = {}
    for folder in folders:
        for path in sorted(folder.rglob("config.yaml")):
            if is_config_of_run(path):
                try:
                    found[path.parent] = load_config(str(path), [])
                except InputError as error:
                    say(f"left out: {error}")
    return found


def _matching(cell: Cell, runs: Mapping[Path, ExperimentConfig], steps: int) -> Path | None:
    """A run that has trained what a cell trains: a finished one, if there is any. steps: the length of the cell."""
    fitting = [run for run, cfg in runs.items() if _same_training(cell.cfg, cfg)]
    finished = [run for run in fitting if read_status(run)[:2] == ("done", steps)]
    # A run that ended early (train.stop_at_step) says that it is done, too.
    unfinished = [run for run in fitting if read_status(run)[0] != "done"]
    return next(iter([*finished, *unfinished]), None)


def _same_training(wanted: ExperimentConfig, cfg: ExperimentConfig) -> bool:
    first, second = (leaves(to_dict(one)) for one in (wanted, cfg))
    for key in first.keys() | second.keys():
        if key in NAMES or not is_fixed(key) or key in _DATA:
            continue
        open_choice = key in _SETTLED and first.get(key) in (None, "auto", 1000)
        if first.get(key) != second.get(key) and not open_choice:
            return False
    return _same_data(wanted.data.train, cfg.data.train)


def _same_data(first: str | None, second: str | None) -> bool:
    """Whether two folders of shards are one, or copies."""
    if first is None or second is None or first == second:
        return first == second
    if not (is_packed(first) and is_packed(second)):
        return Path(first).resolve() == Path(second).resolve()
    return read_manifest(first).fingerprint == read_manifest(second).fingerprint
