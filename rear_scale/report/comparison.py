"""Several runs side by side: curves on shared axes, the settings that differ, scores with their noise, sheets; and a CSV file."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rear_scale.evaluate.metrics import METRICS
from rear_scale.evaluate.metrics.base import Metric
from rear_scale.files import write_text_atomically
from rear_scale.report.charts import Chart, Line, short
from rear_scale.report.curves import COLUMNS, Curve, Curves
from rear_scale.report.page import Choice, Head, Picture, Section, Table, write_page
from rear_scale.report.reading import RunFiles, folder_name
from rear_scale.report.run_page import duration, evenly, is_number, picture_of, rows_of, score_table
from rear_scale.text_table import as_csv

_COLORS = 10
_FEWEST_COLUMNS = 24  # of a curve, however many runs are compared
_MOST_SHEETS = 4  # rows of sheets
_LONGEST_VALUE = 120  # characters of a setting
# Settings that tell runs apart without changing what they compute.
_NAMES = ("run.name", "run.dir")
_OF_SEEDS = (*_NAMES, "run.seed")
_AT_END = ("loss", "val_loss", "val_ctr", "val_ctr_noisy")  # metrics whose last values are compared
_LEFT_OUT = ("images_per_s_per_gpu", "time_left_s")
_FIRST = (
    "val_loss",
    "loss",
    "loss_ar",
    "accuracy",
    "val_ctr",
    "val_ctr_noisy",
    "grad_norm",
    "lr",
    "images_per_s",
    "mfu",
)
# name of an axis -> what stands below the charts
_AXES = {"images": "images seen", "FLOPs": "FLOPs", "hours": "hours of training", "steps": "step"}


@dataclass(frozen=True)
class Score:
    """One number of a result, with the bootstrap interval where the evaluation has computed one."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        interval = (
            f" ({short(self.low)} … {short(self.high)})" if self.low is not None and self.high is not None else ""
        )
        return f"{short(self.value)}{interval}"


@dataclass
class Compared:
    """A run among others."""

    label: str  # unlike those of the others
    files: RunFiles
    color: int

    @cached_property
    def scores(self) -> dict[tuple[str, str], Score]:
        """The numbers of its results by (name/reference, file)."""
        return {
            (name, scored.file): score
            for scored in self.files.results
            if scored.result is not None
            for name, score in scores_of(scored.result.images).items()
        }

    def end_of(self, metric: str) -> tuple[float, float | None] | None:
        """The last validation of a run; of other metrics the mean of the last tenth of the curve, with the deviation of its
        points. None without a value."""
        curve = self.files.curves.curve(metric)
        if curve is None:
            return None
        spread = None if metric.startswith("val_") else self.files.curves.spread_at_end(metric)
        return spread or (float(curve.mean[-1]), None)

    def x_of(self, curve: Curve, axis: str) -> np.ndarray | None:
        """The places of a curve on an axis; None where it is not known."""
        if axis == "FLOPs":
            per_image = self.files.flops_per_image
            return None if per_image is None else curve.images * float(per_image)
        return {"images": curve.images, "hours": curve.hours, "steps": curve.steps}[axis]


def compare(folders: Sequence[Path]) -> list[Compared]:
    """The runs in the order given, each with a label of its own."""
    columns = max(_FEWEST_COLUMNS, COLUMNS // max(1, len(folders) // 2))
    files = [RunFiles(folder, Curves(folder / "metrics.jsonl", columns)) for folder in folders]
    names = [one.name for one in files]
    labels = [
        name if names.count(name) == 1 else f"{name} ({folder_name(one.folder)})"
        for name, one in zip(names, files, strict=True)
    ]
    labels = [
        label if labels.count(label) == 1 else f"{label} [{number}]" for number, label in enumerate(labels, start=1)
    ]
    return [
        Compared(label, one, number % _COLORS) for number, (label, one) in enumerate(zip(labels, files, strict=True))
    ]


def write_comparison(path: Path, runs: Sequence[Compared]) -> None:
    """Writes the page that compares runs."""
    sections = [
        _runs(runs),
        _settings(runs),
        _curves(runs),
        _scores(runs),
        _over_seeds(runs),
        _sheets(runs),
        _problems(runs),
    ]
    title = " and ".join(run.label for run in runs) if len(runs) <= 3 else f"{len(runs)} runs"
    written = f"Written {time.strftime('%Y-%m-%d %H:%M %z')}."
    write_page(path, title, [section for section in sections if section is not None], Head(lines=[written]))


def _runs(runs: Sequence[Compared]) -> Section:
    header = ["run", "state", "step", "images", "FLOPs", "training", "loss at the end", "validation loss", "images/s"]
    rows = []
    for run in runs:
        files = run.files
        speed = files.curves.last.get("images_per_s")
        rows.append(
            [
                run.label,
                files.state,
                f"{files.step:,}",
                f"{files.images:,}",
                "-" if files.flops is None else f"{files.flops:.3g}",
                duration(files.curves.hours * 3600),
                _at_end(run, "loss"),
                _at_end(run, "val_loss"),
                f"{speed:,.1f}" if isinstance(speed, (int, float)) else "-",
            ]
        )
    note = "Loss at the end: the mean of the last tenth of the run, and the deviation of the points of its curve there."
    return Section("Runs", table=Table(header, rows, frozenset({1})), notes=[note])


def _at_end(run: Compared, metric: str) -> str:
    value, deviation = run.end_of(metric) or (None, None)
    return "-" if value is None else f"{value:.4f}{'' if deviation is None else f' ± {deviation:.2g}'}"


def differing(runs: Sequence[Compared]) -> dict[str, list[str]]:
    """The settings that are not equal in all runs, with their values as texts in the order of the runs."""
    keys = dict.fromkeys(key for run in runs for key in run.files.settings)
    rows = {key: [_text(run.files.settings, key) for run in runs] for key in keys if key not in _NAMES}
    for name, title in (
        ("commit", "(commit)"), ("world_size", "(ranks)"), ("device", "(device)"), ("launcher", "(launcher)"),
    ):  # fmt: skip
        rows[title] = [_text(run.files.starts[-1] if run.files.starts else {}, name)[:48] for run in runs]
    installed = [_versions(run) for run in runs]
    for package in dict.fromkeys(name for versions in installed for name in versions):
        rows[f"(version of {package})"] = [_text(versions, package) for versions in installed]
    return {key: values for key, values in rows.items() if len({*values}) > 1}


def _versions(run: Compared) -> dict[str, Any]:
    versions = run.files.starts[-1].get("versions") if run.files.starts else None
    return versions if isinstance(versions, dict) else {}


def _text(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return "-"
    text = "null" if values[key] is None else str(values[key])
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 1]}…"


def _settings(runs: Sequence[Compared]) -> Section:
    rows = [[key, *values] for key, values in differing(runs).items()]
    if not rows:
        return Section("Settings that differ", ["None: config, code and machines are the same."])
    columns = frozenset(range(1, len(runs) + 1))
    return Section("Settings that differ", table=Table(["setting", *(run.label for run in runs)], rows, columns))


def _curves(runs: Sequence[Compared]) -> Section | None:
    names = list(dict.fromkeys(name for run in runs for name in run.files.curves.names if name not in _LEFT_OUT))
    names = [name for name in _FIRST if name in names] + [name for name in names if name not in _FIRST]
    options = []
    for axis, label in _AXES.items():
        charts = [chart for name in names if (chart := _chart(runs, name, axis, label)) is not None]
        charts += [
            chart
            for name in dict.fromkeys(name for run in runs for line in run.files.evaluations for name in line)
            if name not in ("step", "images_seen") and (chart := _score_chart(runs, name, axis, label)) is not None
        ]
        if charts:
            options.append((axis, charts))
    if not options:
        return None
    without = [run.label for run in runs if run.files.flops_per_image is None]
    notes = [f"Not over FLOPs, because the config cannot be read: {', '.join(without)}."] if without else []
    return Section("Curves", choice=Choice("axis", options), notes=notes)


def _chart(runs: Sequence[Compared], name: str, axis: str, label: str) -> Chart | None:
    lines = []
    for run in runs:
        curve = run.files.curves.curve(name)
        if curve is None or (x := run.x_of(curve, axis)) is None:
            continue
        known = np.isfinite(x)
        if known.any():
            lines.append(Line(run.label, x[known], curve.mean[known], color=run.color))
    # Nothing is to be seen of skipped updates where there are none.
    return Chart(name, lines, x_label=label) if any(line.mean.any() for line in lines) else None


def _score_chart(runs: Sequence[Compared], name: str, axis: str, label: str) -> Chart | None:
    lines = []
    for run in runs:
        pairs = [(line["step"], line[name]) for line in run.files.evaluations if is_number(line.get(name))]
        curve = next((one for metric in run.files.curves.names if (one := run.files.curves.curve(metric))), None)
        if not pairs or curve is None or (x := run.x_of(curve, axis)) is None:
            continue
        steps, values = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
        lines.append(Line(run.label, np.interp(steps, curve.steps, x), values, color=run.color))
    return Chart(name, lines, x_label=label) if lines else None


def scores_of(images: Any) -> dict[str, Score]:
    """The numbers of a result (ImageScores) by name/reference."""
    scores = {}
    for metric in METRICS:
        for reference, values in images.values(metric).items():
            for name, value in metric.numbers(values).items():
                if value is not None:
                    low, high = _interval(metric, name, values)
                    scores["/".join(filter(None, (name, reference)))] = Score(value, low, high)
    return scores


def _interval(metric: Metric, name: str, values: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """The bootstrap interval of a number; (None, None) where there is none."""
    own = values.get(metric.name)
    places: list[Any] = [values.get("bootstrap"), own.get("bootstrap") if isinstance(own, dict) else None]
    for place in places:
        if not isinstance(place, dict):
            continue
        # Under the name of the metric, as the one of a number alone, or by arithmetic: {"precision": {"exact": {...}}}.
        by_arithmetic = [
            around
            for key, intervals in place.items()
            if isinstance(intervals, dict)
            for mode, around in intervals.items()
            if name.endswith(f"{key}_{mode}")
        ]
        for around in (place.get(metric.name), place, *by_arithmetic):
            if isinstance(around, dict) and {"low", "high"} <= around.keys():
                return around["low"], around["high"]
    return None, None


def _scores(runs: Sequence[Compared]) -> Section | None:
    keys = dict.fromkeys(key for run in runs for key in run.scores)
    if not keys:
        return None
    several = len({file for _, file in keys}) > 1
    rows = [
        [f"{name}{f' ({file})' if several else ''}", *(str(run.scores.get((name, file), "-")) for run in runs)]
        for name, file in sorted(keys, key=lambda key: [*keys].index(key))
    ]
    scored = [[row for one in run.files.results if one.result for row in rows_of(one)] for run in runs]
    counted = score_table([row for of_run in scored for row in of_run])
    labels = [run.label for run, of_run in zip(runs, scored, strict=True) for _ in of_run]
    counts = Table(
        ["run", *counted.header],
        [[label, *row] for label, row in zip(labels, counted.rows, strict=True)],
        frozenset({1, *(column + 1 for column in counted.words)}),
    )
    text = "In parentheses: the 95% bootstrap interval, where the evaluation computed one (evaluate.bootstrap=100)."
    return Section(
        "Scores", [text], Table(["score", *(run.label for run in runs)], rows), tables=[("With their counts", counts)]
    )


def _over_seeds(runs: Sequence[Compared]) -> Section | None:
    """Mean and deviation of runs that differ in their seed alone."""
    groups: dict[str, list[Compared]] = {}
    for run in runs:
        alike = {key: value for key, value in run.files.settings.items() if key not in _OF_SEEDS}
        groups.setdefault(repr(sorted(alike.items())), []).append(run)
    several = [group for group in groups.values() if len(group) > 1 and group[0].files.settings]
    if not several:
        return None
    names = dict.fromkeys(name for group in several for run in group for name in _numbers(run))
    rows = [[name, *(_mean_of([_numbers(run).get(name) for run in group]) for group in several)] for name in names]
    titles = [", ".join(run.label for run in group) for group in several]
    text = "Runs that differ in run.seed alone: mean ± deviation over their seeds."
    return Section("Over seeds", [text], Table(["", *titles], rows))


def _numbers(run: Compared) -> dict[str, float]:
    """The numbers of a run that are averaged over seeds."""
    at_end = {name: run.end_of(name) for name in _AT_END}
    numbers = {f"{name} at the end": found[0] for name, found in at_end.items() if found is not None}
    return numbers | {f"{name} ({file})": score.value for (name, file), score in run.scores.items()}


def _mean_of(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return short(known[0]) if known else "-"
    return f"{short(statistics.mean(known))} ± {statistics.stdev(known):.2g} (n = {len(known)})"


def _sheets(runs: Sequence[Compared]) -> Section | None:
    by_images = [
        {step * _batch(run): path for step, path in run.files.sheets if _batch(run)} if run.files.sheets else {}
        for run in runs
    ]
    if not any(by_images):
        return None
    shared = sorted(set.intersection(*(set(one) for one in by_images)))
    moments: list[Callable[[dict[int, Path]], Path | None]]
    if shared:
        chosen = evenly(shared, _MOST_SHEETS)
        titles = [f"after {images:,} images" for images in chosen]
        moments = [lambda one, images=images: one.get(images) for images in chosen]  # type: ignore[misc]
    else:
        titles = ["the last sheet of each run"]
        moments = [lambda one: one[max(one)] if one else None]
    rows = []
    for title, moment in zip(titles, moments, strict=True):
        pictures: list[Picture | None] = []
        for run, one in zip(runs, by_images, strict=True):
            path = moment(one)
            caption = run.label if shared or not one else f"{run.label}, {max(one):,} images"
            pictures.append(None if path is None else picture_of(path, caption, run.files.problems))
        rows.append((title, pictures))
    others = [key for key in differing(runs) if key in ("sample.seed", "sample.labels", "sample.order", "sample.top_k")]
    others += [key for key in differing(runs) if key.startswith("sample.guidance.")]
    text = "The same classes and seeds: images at the same place begin from the same random numbers."
    if others:
        text = f"Not of the same settings of sampling: {', '.join(others)} differ."
    return Section("Samples", [text], rows_of_pictures=rows)


def _batch(run: Compared) -> int:
    batch = run.files.settings.get("train.global_batch_size")
    return batch if isinstance(batch, int) else 0


def _problems(runs: Sequence[Compared]) -> Section | None:
    lines = [f"{run.label}: {problem}" for run in runs for problem in dict.fromkeys(run.files.problems)]
    return Section("Not read", lines) if lines else None


def write_csv(path: Path, runs: Sequence[Compared]) -> None:
    """Writes one row for each run: totals, the ends of its curves, its scores, and the settings that differ."""
    settings = differing(runs)
    rows: list[dict[str, Any]] = []
    for number, run in enumerate(runs):
        files = run.files
        row: dict[str, Any] = {
            "run": run.label,
            "folder": str(files.folder),
            "state": files.state,
            "step": files.step,
            "images": files.images,
            "flops": files.flops,
            "hours": files.curves.hours,
        }
        for name in _AT_END:
            value, deviation = run.end_of(name) or (None, None)
            row |= {name: value} | ({} if deviation is None else {f"{name}_deviation": deviation})
        for (name, file), score in run.scores.items():
            row |= {f"{name} ({file})": score.value}
            if score.low is not None:
                row |= {f"{name} ({file}) low": score.low, f"{name} ({file}) high": score.high}
        rows.append(row | {key: values[number] for key, values in settings.items()})
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = as_csv(
        [_cell(column) for column in columns], ([_cell(row.get(column)) for column in columns] for row in rows)
    )
    write_text_atomically(path, text.encode("utf-8", "replace").decode())


def _cell(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula."""
    return (
        f"'{value}"
        if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") and value != "-"
        else value
    )
