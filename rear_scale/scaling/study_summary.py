"""study.md: what a study found, in tables and figures, with the command, the commit and the machine that made it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from rear_scale.config import InputError
from rear_scale.files import atomic_open, write_text_atomically
from rear_scale.scaling import law, study_figures
from rear_scale.scaling.study_collect import Collected, Row, evaluations_of, metrics_of, starts_of
from rear_scale.scaling.study_figures import Curve, Gap
from rear_scale.scaling.study_grid import SEED
from rear_scale.scaling.study_run import Runner

# The scores of images that a summary shows, the first of them in figures.
_IMAGE_SCORES = (
    "fid",
    "classifier_frechet_distance",
    "fid_guided",
    "classifier_frechet_distance_guided",
    "inception_score_guided",
    "class_accuracy",
    "class_accuracy_guided",
    "images_per_s",
)
_TOKEN_SCORES = ("loss", "loss_noisy", "ctr", "ctr_noisy")
_OBJECTIVE = "objective"
_DRAWS = 200
_CURVE_POINTS = 60  # of a loss curve, so that those of long runs stay legible


def write_summary(runner: Runner, collected: Collected, command: str) -> Path:
    """The path of study.md, after writing it and the figures beside it. command: the line that gathered the results."""
    folder = runner.study.folder
    done = [row for row in collected.rows if row["state"] == "done"]
    parts = [f"# {runner.study.title}", _provenance(runner, collected, done, command)]
    if done:
        parts.append(_table(done, collected.varied))
        if _pairs(done, collected.varied):
            parts.append(_gap_section(done, collected.varied))
        parts += _law_sections(done)
        parts.append(_figures(folder, done, collected.varied))
    left = [row for row in collected.rows if row["state"] != "done"]
    if left:
        parts.append("## Not there\n\n" + "\n".join(f"- {row['cell']}: {row['state']}" for row in left))
    path = folder / "study.md"
    write_text_atomically(path, "\n\n".join(part for part in parts if part) + "\n")
    return path


def _provenance(runner: Runner, collected: Collected, done: Sequence[Row], command: str) -> str:
    starts = [start for row in done for start in starts_of(Path(row["run"]))]
    machines = dict.fromkeys(
        f"{start.get('world_size')} x {start.get('device')} ({start.get('host')})" for start in starts
    )
    commits = dict.fromkeys(row["commit"] for row in done if row["commit"])
    lines = [
        f"- command: `{command}`",
        f"- cells: {len(done)} of {len(collected.rows)} are done",
        f"- commit: {', '.join(commits) or 'not known'}",
        f"- ranks and machine: {', '.join(machines) or 'not known'}",
    ]
    return "\n".join(lines)


def _table(rows: Sequence[Row], varied: Sequence[str]) -> str:
    """One line for each setting, with the mean over seeds and, for several, the standard deviation."""
    keys = [key for key in varied if key != SEED]
    scores = [name for name in (*_TOKEN_SCORES, *_IMAGE_SCORES) if any(row.get(name) is not None for row in rows)]
    header = [*keys, "seeds", "parameters", "images", *scores]
    lines = [header, ["---"] * len(header)]
    for words, group in _by_setting(rows, keys).items():
        first = group[0]
        lines.append([*words, str(len(group)), f"{first['parameters']:,}", f"{first['images']:,}",
                      *(_spread([row.get(name) for row in group]) for name in scores)])  # fmt: skip
    return "## Results\n\n" + _as_markdown(lines)


def _by_setting(rows: Sequence[Row], keys: Sequence[str]) -> dict[tuple[str, ...], list[Row]]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(str(row.get(key)) for key in keys), []).append(row)
    return groups


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    if len(known) == 1:
        return f"{known[0]:.4g}"
    return f"{statistics.mean(known):.4g} ± {statistics.stdev(known):.2g}"


def _pairs(rows: Sequence[Row], varied: Sequence[str]) -> dict[str, list[Gap]]:
    """The gaps ar - rear of each quantity, for settings that have both objectives. Differences are those of equal seeds."""
    if _OBJECTIVE not in varied:
        return {}
    # Fields that the objective sets differ between the two by themselves.
    keys = [key for key in varied if key not in (_OBJECTIVE, SEED) and not key.startswith("objective.")]
    found: dict[str, list[Gap]] = {}
    for quantity in (*_TOKEN_SCORES, *_IMAGE_SCORES[:4]):
        for words, group in _by_setting(rows, keys).items():
            known = [row for row in group if row.get(quantity) is not None]
            ar, rear = ({row[SEED]: row for row in known if row[_OBJECTIVE] == name} for name in ("ar", "rear"))
            seeds = sorted(ar.keys() & rear.keys())
            if seeds:
                differences = [ar[seed][quantity] - rear[seed][quantity] for seed in seeds]
                row = ar[seeds[0]]
                found.setdefault(quantity, []).append(
                    Gap(", ".join(words), row["parameters"], row["flops"], differences)
                )
    return found


def _gap_section(rows: Sequence[Row], varied: Sequence[str]) -> str:
    lines = [["", "setting", "parameters", "seeds", "AR - reAR", "90% interval over seeds"], ["---"] * 6]
    for quantity, gaps in _pairs(rows, varied).items():
        for gap in sorted(gaps, key=lambda one: one.parameters):
            width = gap.half_width
            interval = "-" if width is None else f"{gap.mean - width:.4g} to {gap.mean + width:.4g}"
            lines.append(
                [quantity, gap.label, f"{gap.parameters:,}", str(len(gap.differences)), f"{gap.mean:.4g}", interval]
            )
    return (
        "## Gap between AR and reAR\n\nOf losses and distances, more than 0 is in favour of reAR; of ratios, less.\n\n"
        + (_as_markdown(lines))
    )


def _law_sections(rows: Sequence[Row]) -> list[str]:
    """Power laws of each objective against parameters, and the largest size as predicted by the others."""
    lines = [
        ["objective", "quantity", "law", "90% intervals", "the largest, predicted by the others", "result"],
        ["---"] * 6,
    ]
    notes: list[str] = []
    for objective in dict.fromkeys(str(row.get(_OBJECTIVE, "all")) for row in rows):
        own = [row for row in rows if str(row.get(_OBJECTIVE, "all")) == objective]
        most = max((row["images"], row["unique_images"] or 0) for row in own)
        own = [row for row in own if (row["images"], row["unique_images"] or 0) == most]
        for quantity in ("loss", "loss_noisy", *_IMAGE_SCORES[:2]):
            known = [row for row in own if row.get(quantity) is not None]
            if len({row["parameters"] for row in known}) > 1:
                try:
                    lines.append([objective, quantity, *_fitted(known, quantity)])
                except InputError as error:
                    notes.append(f"- {objective}, {quantity}: {error}")
    text = "## Laws\n\nE + A / N^a of the parameters N, of runs of the greatest length.\n\n"
    if len(lines) > 2:
        text += _as_markdown(lines)
    if not notes and len(lines) == 2:
        return []
    return [text + ("\n\n" if len(lines) > 2 and notes else "") + "\n".join(notes)]


def _fitted(rows: Sequence[Row], quantity: str) -> list[str]:
    """The constants of a power law, their intervals, and the held-out largest size beside its prediction."""
    x = np.array([row["parameters"] for row in rows], np.float64)
    y = np.array([row[quantity] for row in rows], np.float64)
    found = law.fit(law.POWER, y, _DRAWS, x=x)
    constants = ", ".join(f"{name} = {value:.3g}" for name, value in found.constants.items())
    intervals = ", ".join(
        f"{name} {low:.3g} to {high:.3g}" for name in found.constants for low, high in [found.interval(name)]
    )
    try:
        _, held = law.without_largest(law.POWER, y, "x", _DRAWS, x=x)
    except InputError:
        return [constants, intervals, "too few sizes without it", _spread(y[x == x.max()].tolist())]
    one = held[0]
    verdict = f"{sum(each.inside for each in held)} of {len(held)} inside"
    return [constants, intervals, f"{one.predicted:.4g} ({one.low:.4g} to {one.high:.4g})",
            f"{_spread([each.result for each in held])}: {verdict}"]  # fmt: skip


def _figures(folder: Path, rows: Sequence[Row], varied: Sequence[str]) -> str:
    """The figures as files, and the lines that show them."""
    curves = _curves(rows, varied, "val_loss_ar") or _curves(rows, varied, "loss_ar")
    quantity = "validation loss" if _curves(rows, varied, "val_loss_ar") else "training loss"
    made: dict[str, bytes | None] = {}
    if curves:
        made["loss_curves"] = study_figures.loss_curves(curves, quantity)
        made["isoflop"] = study_figures.isoflop_profiles(curves, f"{quantity} on the way")
    for score in _IMAGE_SCORES:
        points = _points(rows, score)
        if len({size for pairs in points.values() for size, _ in pairs}) > 1:
            made["scores_by_size"] = study_figures.scores_by_size(points, score)
            break
    if series := _during_training(rows):
        made["scores_by_epoch"] = study_figures.scores_by_epoch(*series)
    gaps = {name: found for name, found in _pairs(rows, varied).items() if len({gap.parameters for gap in found}) > 1}
    if gaps:
        made["gap"] = study_figures.gap_by_size(gaps, "AR - reAR")
    lines = []
    for name, png in made.items():
        if png is not None:
            with atomic_open(folder / f"{name}.png") as file:
                file.write(png)
            lines.append(f"![{name.replace('_', ' ')}]({name}.png)")
    return "## Figures\n\n" + "\n\n".join(lines) if lines else ""


def _curves(rows: Sequence[Row], varied: Sequence[str], quantity: str) -> list[Curve]:
    keys = [key for key in varied if key != SEED and "." not in key] or [key for key in varied if key != SEED]
    keys += [
        key for key in varied if key in ("train.total_steps", "train.epochs", "data.use_share") and key not in keys
    ]
    found = []
    for row in rows:
        lines = metrics_of(Path(row["run"]))
        points = [(line["images_seen"], line[quantity]) for line in lines if line.get(quantity) is not None]
        step = max(1, len(points) // _CURVE_POINTS)
        points = points[step - 1 :: step]
        if points:
            group = " ".join(str(row.get(key)) for key in keys) or "all"
            images, values = map(list, zip(*points, strict=True))
            found.append(Curve(group, row["parameters"], row["flops"] / max(1, row["images"]), images, values))
    return found


def _points(rows: Sequence[Row], score: str) -> dict[str, list[tuple[float, float]]]:
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.get(score) is not None:
            points.setdefault(str(row.get(_OBJECTIVE, "all")), []).append((row["parameters"], row[score]))
    return points


def _during_training(rows: Sequence[Row]) -> tuple[Mapping[str, list[tuple[float, float]]], str] | None:
    """Scores that runs have logged on the way (evaluate.training) by epoch, and the name of the score."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for line in evaluations_of(Path(row["run"])):
            name = next((key for key in line if key.startswith(("fid", "classifier_frechet_distance"))), None)
            if name is not None and row["unique_images"]:
                series.setdefault(row["cell"], []).append((line["images_seen"] / row["unique_images"], line[name]))
    return (series, "score during training") if series else None


def _as_markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
