"""The tables of an experiment: CSV files, and means over seeds."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rear_scale.analysis.experiment import Row
from rear_scale.files import write_text_atomically
from rear_scale.intervals import Interval, difference_interval, mean_interval
from rear_scale.text_table import as_csv

ABOUT = ("model", "run", "seed", "step")
_NAMES = ("model", "run")
COUNTS = ("images", "counted", "predictions", "short_classes")  # columns of sizes, which are no measures


def columns_of(rows: Sequence[Row]) -> list[str]:
    """The columns of rows, in the order of their first appearance."""
    return list(dict.fromkeys(column for row in rows for column in row))


def csv_text(rows: Sequence[Row]) -> str:
    """The text of a CSV file: floats with all their digits, an empty cell for None."""
    columns = columns_of(rows)
    return as_csv(columns, ([_cell(row.get(name)) for name in columns] for row in rows))


def _cell(value: Any) -> Any:
    return repr(float(value)) if isinstance(value, float) else value


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Writes a CSV file; none for no rows."""
    if rows:
        write_text_atomically(path, csv_text(rows))


def read_csv(path: Path) -> list[Row]:
    """The rows of a CSV file, with numbers where a cell holds one, None where it is empty, and names as text: a run may be called
    007."""
    with open(path, newline="") as file:
        return [
            {name: text if name in _NAMES else _value(text) for name, text in row.items() if name is not None}
            for row in csv.DictReader(file)
        ]


def _value(text: str | None) -> Any:
    if not text:
        return None
    try:
        return float(text) if not text.lstrip("-").isdigit() else int(text)
    except ValueError:
        return text


def measures_of(rows: Sequence[Row], keys: Sequence[str]) -> list[str]:
    """The columns that hold measured numbers."""
    named = {*ABOUT, *keys}
    return [
        column
        for column in columns_of(rows)
        if column not in named
        and column not in COUNTS
        and not column.endswith("_error")
        and any(isinstance(row.get(column), int | float) for row in rows)
        and not any(isinstance(row.get(column), str | bool) for row in rows)
    ]


def over_seeds(rows: Sequence[Row], keys: Sequence[str]) -> list[Row]:
    """One row for each model, key and measure: the mean over seeds with its 95% interval, and with two models the difference.

    The difference is that of the first model to the second one, in rows of the model "FIRST - SECOND".
    """
    models = list(dict.fromkeys(row["model"] for row in rows))
    found: list[Row] = []
    for key in dict.fromkeys(tuple(row.get(name) for name in keys) for row in rows):
        here = [row for row in rows if tuple(row.get(name) for name in keys) == key]
        for measure in measures_of(rows, keys):
            values = {
                model: [row[measure] for row in here if row["model"] == model and row.get(measure) is not None]
                for model in models
            }
            intervals = {model: mean_interval(of_model) for model, of_model in values.items() if of_model}
            if len(models) == 2 and all(values.values()):
                intervals[" - ".join(models)] = difference_interval(*values.values())
            found += [
                {"model": model, **dict(zip(keys, key, strict=True)), "measure": measure, **_cells(interval)}
                for model, interval in intervals.items()
            ]
    return found


def _cells(interval: Interval) -> Row:
    return {"mean": interval.mean, "low": interval.low, "high": interval.high, "seeds": interval.seeds}


def shown(value: Any) -> str:
    """A cell as text for a person."""
    if value is None:
        return "-"
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.4g}"
    return str(value)
