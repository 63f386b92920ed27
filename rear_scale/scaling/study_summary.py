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
from rear_scale.scaling.study_series import Place, described, longest, methods, places, twins

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
_DRAWS = 200
_CURVE_POINTS = 60  # of a loss curve, so that those of long runs stay legible


def write_summary(runner: Runner, collected: Collected, command: str) -> Path:
    """The path of study.md, after writing it and the figures beside it. command: the line that gathered the results."""
    folder = runner.study.folder
    done = [row for row in collected.rows if row["state"] == "done"]
    placed = places(runner.study, collected)
    parts = [f"# {runner.study.title}", _provenance(runner, collected, done, command)]
    if done:
        parts.append(_table(done, collected.varied))
        gaps = _gaps(placed)
        if gaps:
            parts.append(_gap_section(gaps))
        parts += _law_sections(placed)
        parts.append(_figures(folder, placed, gaps))
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


def _gaps(found: Sequence[Place]) -> dict[str, list[Gap]]:
    """The gaps ar - rear of each quantity, for settings that have both objectives. Differences are those of equal seeds."""
    gaps: dict[str, list[Gap]] = {}
    for ar, rear in twins(found, "ar", "rear"):
        place, row = rear[0], ar[0].row
        series = " ".join(described(place.variant | place.others | place.length))
        label = ", ".join([*(value for _, value in sorted(place.size)), *([series] if series else [])])
        for quantity in (*_TOKEN_SCORES, *_IMAGE_SCORES[:4]):
            pairs = [
                (first.row.get(quantity), second.row.get(quantity)) for first, second in zip(ar, rear, strict=True)
            ]
            differences = [first - second for first, second in pairs if first is not None and second is not None]
            if differences:
                gaps.setdefault(quantity, []).append(Gap(label, row["parameters"], row["flops"], differences, series))
    return gaps


def _gap_section(gaps: Mapping[str, Sequence[Gap]]) -> str:
    lines = [["", "setting", "parameters", "seeds", "AR - reAR", "90% interval over seeds"], ["---"] * 6]
    for quantity, of_quantity in gaps.items():
        for gap in sorted(of_quantity, key=lambda one: one.parameters):
            width = gap.half_width
            interval = "-" if width is None else f"{gap.mean - width:.4g} to {gap.mean + width:.4g}"
            lines.append(
                [quantity, gap.label, f"{gap.parameters:,}", str(len(gap.differences)), f"{gap.mean:.4g}", interval]
            )
    return (
        "## Gap between AR and reAR\n\nOf losses and distances, more than 0 is in favour of reAR; of ratios, less.\n\n"
        + (_as_markdown(lines))
    )


def _law_sections(found: Sequence[Place]) -> list[str]:
    """Power laws of each method against parameters with the largest size as predicted by the others, and, where lengths or data
    vary too, the law of parameters and images."""
    lines = [
        ["method", "quantity", "law", "90% intervals", "the largest, predicted by the others", "result"],
        ["---"] * 6,
    ]
    of_data = [["method", "quantity", "law", "constants", "90% intervals"], ["---"] * 5]
    notes: list[str] = []
    for own in methods(found).values():
        for quantity in ("loss", "loss_noisy", *_IMAGE_SCORES[:2]):
            known = [place for place in own if place.row.get(quantity) is not None]
            if len({place.row["parameters"] for place in known}) < 2:
                continue
            try:
                _check_one_method(known)
                most = longest(known)
                if len({place.row["parameters"] for place in most}) > 1:
                    lines.append([own[0].label, quantity, *_fitted([place.row for place in most], quantity)])
            except InputError as error:
                notes.append(f"- {own[0].label}, {quantity}: {error}")
            if len({place.data for place in known}) > 1:
                try:
                    of_data.append([own[0].label, quantity, *_fitted_to_data([place.row for place in known], quantity)])
                except InputError as error:
                    notes.append(f"- {own[0].label}, {quantity}, of parameters and images: {error}")
    if len(lines) == len(of_data) == 2 and not notes:
        return []
    parts = ["## Laws\n\nE + A / N^a of the parameters N, of runs of the greatest length."]
    parts += [_as_markdown(lines)] if len(lines) > 2 else []
    if len(of_data) > 2:
        parts += [
            "E + A / N^a + B / D^b of parameters and images D, or of the effective data of repeated images, of all lengths.",
            _as_markdown(of_data),
        ]
    parts += ["\n".join(notes)] if notes else []
    return ["\n\n".join(parts)]


def _check_one_method(known: Sequence[Place]) -> None:
    """Raises InputError where two cells have the same size, length, data and seed, so that something else differs."""
    cells: dict[tuple[int, ...], str] = {}
    for place in known:
        name = place.row["cell"]
        other = cells.setdefault((place.row["parameters"], *place.data, place.row[SEED]), name)
        if other != name:
            raise InputError(f"{other} and {name} have one size, length and seed, so that no law holds both of them")


def _check_it_depends(found: law.Law, columns: Mapping[str, np.ndarray]) -> None:
    """Raises InputError where the values do not fall with an input by more than the scatter of single cells."""
    if name := found.idle(**columns):
        of = {"x": "parameters", "N": "parameters", "D": "images"}[name]
        raise InputError(
            f"no law, because the values do not fall with the {of} by more than twice the scatter of single cells, which is "
            f"{found.residual:.2g} of the value"
        )


def _fitted_to_data(rows: Sequence[Row], quantity: str) -> list[str]:
    """The name, the constants and the intervals of the law of parameters and images. Raises InputError where the cells do not
    tell its constants apart."""
    columns = {
        "N": np.array([row["parameters"] for row in rows], np.float64),
        "D": np.array([row["images"] for row in rows], np.float64),
    }
    form = law.THREE_TERM
    if all(row["unique_images"] for row in rows):
        unique = np.array([row["unique_images"] for row in rows], np.float64)
        if (unique < columns["D"]).any():
            form, columns = law.REPEATED_DATA, {**columns, "U": unique}
    found = law.fit(form, [row[quantity] for row in rows], 0, 0, **columns)
    _check_it_depends(found, columns)
    note = law.warning(law.condition(form, found.constants, **columns))
    if note is not None:
        raise InputError(note)
    found = law.fit(form, [row[quantity] for row in rows], _DRAWS, 0, **columns)
    return [form.name, *_constants(found)]


def _constants(found: law.Law) -> list[str]:
    """The constants of a law, and their intervals, as text."""
    intervals = [(name, *found.interval(name)) for name in found.constants]
    return [
        ", ".join(f"{name} = {value:.3g}" for name, value in found.constants.items()),
        ", ".join(f"{name} {low:.3g} to {high:.3g}" for name, low, high in intervals),
    ]


def _fitted(rows: Sequence[Row], quantity: str) -> list[str]:
    """The constants of a power law, their intervals, and the held-out largest size beside its prediction."""
    x = np.array([row["parameters"] for row in rows], np.float64)
    y = np.array([row[quantity] for row in rows], np.float64)
    _check_it_depends(law.fit(law.POWER, y, x=x), {"x": x})
    found = law.fit(law.POWER, y, _DRAWS, x=x)
    constants, intervals = _constants(found)
    try:
        _, held = law.without_largest(law.POWER, y, "x", _DRAWS, x=x)
    except InputError:
        return [constants, intervals, "too few sizes without it", _spread(y[x == x.max()].tolist())]
    one = held[0]
    verdict = f"{sum(each.inside for each in held)} of {len(held)} inside"
    return [constants, intervals, f"{one.predicted:.4g} ({one.low:.4g} to {one.high:.4g})",
            f"{_spread([each.result for each in held])}: {verdict}"]  # fmt: skip


def _figures(folder: Path, found: Sequence[Place], gaps: Mapping[str, Sequence[Gap]]) -> str:
    """The figures as files, and the lines that show them."""
    rows = [*{place.row["cell"]: place.row for place in found}.values()]
    validated = _curves(found, "val_loss_ar")
    curves = validated or _curves(found, "loss_ar")
    quantity = "validation loss" if validated else "training loss"
    made: dict[str, bytes | None] = {}
    if curves:
        made["loss_curves"] = study_figures.loss_curves(curves, quantity)
        made["isoflop"] = study_figures.isoflop_profiles(curves, f"{quantity} on the way")
    for score in _IMAGE_SCORES:
        points = _points(found, score)
        if points:
            made["scores_by_size"] = study_figures.scores_by_size(points, score)
            break
    if series := _during_training(rows):
        made["scores_by_epoch"] = study_figures.scores_by_epoch(*series)
    drawn = {name: of_name for name, of_name in gaps.items() if len({gap.parameters for gap in of_name}) > 1}
    if drawn:
        made["gap"] = study_figures.gap_by_size(drawn, "AR - reAR")
    lines = []
    for name, png in made.items():
        if png is not None:
            with atomic_open(folder / f"{name}.png") as file:
                file.write(png)
            lines.append(f"![{name.replace('_', ' ')}]({name}.png)")
    return "## Figures\n\n" + "\n\n".join(lines) if lines else ""


def _curves(found: Sequence[Place], quantity: str) -> list[Curve]:
    curves = []
    for place in {place.row["cell"]: place for place in reversed(found)}.values():
        row = place.row
        lines = metrics_of(Path(row["run"]))
        points = [(line["images_seen"], line[quantity]) for line in lines if line.get(quantity) is not None]
        step = max(1, len(points) // _CURVE_POINTS)
        points = points[step - 1 :: step]
        if points:
            group = " ".join([place.label, *described(place.size), *described(place.length)])
            images, values = map(list, zip(*points, strict=True))
            per_image = row["flops"] / max(1, row["images"])
            curves.append(Curve(group, row["parameters"], per_image, images, values, place.label))
    return curves[::-1]


def _points(found: Sequence[Place], score: str) -> dict[str, list[tuple[float, float]]]:
    """(parameters, score) of the longest runs of each method that has the score at several sizes."""
    points: dict[str, list[tuple[float, float]]] = {}
    for own in methods(found).values():
        known = [place for place in own if place.row.get(score) is not None]
        pairs = [(place.row["parameters"], place.row[score]) for place in longest(known)] if known else []
        if len({size for size, _ in pairs}) > 1:
            points[own[0].label] = pairs
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
