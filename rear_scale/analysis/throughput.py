"""FID against sampling speed (reAR, Figure 5; RAR, Table 5), from results that are there.

A run's FID is that of its evaluation (result.json), its speed what `launchers/bench.py sample` has written into the run's folder
(--out RUN/bench.json). reAR's figure prints no numbers, so the published points are those of RAR's table.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rear_scale.analysis.experiment import Row
from rear_scale.analysis.plots import COLOURS, finish, panels
from rear_scale.config import InputError
from rear_scale.evaluate.published_tables import published_tables
from rear_scale.evaluate.result import read_result
from rear_scale.figures import png

_PUBLISHED_IMAGES = 50_000  # of an FID
PUBLISHED = "rar_table5"  # in configs/published.yaml


def published_rows() -> list[Row]:
    """The published points."""
    table = published_tables()[PUBLISHED]
    return [
        {"method": row.label, "type": row.group, "fid": row.fid, "images": _PUBLISHED_IMAGES,
         "images_per_s": row.images_per_s, "device": "A100", "source": f"{table.source}: {table.note}"}
        for row in table.rows.values()
    ]  # fmt: skip


def own_rows(folders: Iterable[Path]) -> tuple[list[Row], list[str]]:
    """The points of runs in folders, and a line for each run that has one of the two numbers alone.

    Raises InputError for a folder that does not exist.
    """
    rows, lines = [], []
    runs: dict[Path, Path] = {}  # folders may overlap
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"not found: {folder}. Name folders that hold runs, for instance runs/rear_b")
        for run in sorted({path.parent for path in (*folder.rglob("result*.json"), *folder.rglob("bench*.json"))}):
            runs.setdefault(run.resolve(), run)
    for run in runs.values():
        best, speed = _best_fid(run), speed_of(run)
        if best is not None and speed is not None:
            fid, images = best
            rows.append({"method": run.name, "type": "ours", "fid": fid, "images": images, "images_per_s": speed["images_per_s"],
                         "device": speed.get("device"), "source": speed.get("command")})  # fmt: skip
            if images < _PUBLISHED_IMAGES:
                lines.append(f"{run}: its FID is of {images:,} images, published ones are of {_PUBLISHED_IMAGES:,}")
        elif best is not None:
            lines.append(
                f"{run} has an FID and no speed: launchers/bench.py sample --config CONFIG --out {run}/bench.json"
            )
        elif speed is not None:
            lines.append(
                f"{run} has a speed and no FID: launchers/evaluate.py --checkpoint {run} with Inception's weights"
            )
    return rows, lines


def _best_fid(run: Path) -> tuple[float, int] | None:
    """The lowest FID on Inception of the evaluations of a run that have the most images, with their number; None without one."""
    found = []
    for path in sorted(run.glob("result*.json")):
        try:
            result = read_result(path)
        except InputError:
            continue  # another program's file
        numbers, images = result.images.numbers(), result.samples.images
        found += [(number.value, images) for number in numbers if number.name == "fid" and math.isfinite(number.value)]
    return min(found, key=lambda one: (-one[1], one[0]), default=None)


def speed_of(run: Path) -> dict[str, Any] | None:
    """The newest timing of sampling in a run's folder; None without one."""
    for path in sorted(run.glob("bench*.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            values = json.loads(path.read_text())
        except ValueError:
            continue
        speed = values.get("images_per_s") if isinstance(values, dict) and values.get("mode") == "sample" else None
        if isinstance(speed, int | float) and speed > 0:
            return values
    return None


def figure(rows: Sequence[Row]) -> bytes:
    """FID against images per second, with the names of the methods."""
    drawing, [axes] = panels(1, width=6.4, height=4.4)
    kinds = list(dict.fromkeys(row["type"] for row in rows))
    for number, kind in enumerate(kinds):
        own = [row for row in rows if row["type"] == kind]
        marker = "*" if kind == "ours" else "o"
        axes.scatter([row["images_per_s"] for row in own], [row["fid"] for row in own], s=90 if kind == "ours" else 30,
                     marker=marker, color=COLOURS[number % len(COLOURS)], label=kind)  # fmt: skip
        for row in own:
            left = _has_neighbour(row, rows)
            axes.annotate(row["method"], (row["images_per_s"], row["fid"]), xytext=(-5 if left else 4, -8 if left else 4),
                          ha="right" if left else "left", textcoords="offset points", fontsize=7)  # fmt: skip
    axes.set_xscale("log")
    axes.margins(x=0.15)
    finish(axes, "images per second", "FID", "published: one A100, float32, batch 128")
    return png(drawing)


def _has_neighbour(row: Row, rows: Sequence[Row]) -> bool:
    """Whether another point is so close to the right that its name would be written over this one's."""
    return any(
        1 < other["images_per_s"] / row["images_per_s"] < 1.6 and abs(other["fid"] - row["fid"]) < 0.06
        for other in rows
    )
