"""The values of a step by module as a table for a terminal, and all of them as a CSV file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rear_scale.files import write_text_atomically
from rear_scale.replay.recorder import Row, names_of, totals
from rear_scale.text_table import aligned, as_csv

COLUMNS = (
    "step",
    "rank",
    "micro_step",
    "order",
    "name",
    "what",
    "shape",
    "rms",
    "largest",
    "nonfinite",
    "first_nonfinite",
)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Writes every row under COLUMNS. micro_step is empty for values of the whole step; rms and largest are those of finite
    entries, nonfinite is the fraction of the others and first_nonfinite the index of the first of them."""
    lines = []
    for row in rows:
        key = row.key
        micro_step = None if key.micro_step < 0 else key.micro_step
        shape, first = ("x".join(map(str, row.shape)), " ".join(map(str, row.first or ())))
        lines.append(
            (row.step, key.rank, micro_step, key.order, key.name, key.what, shape, row.rms, row.largest, row.nonfinite, first)
        )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, as_csv(COLUMNS, lines))


def in_words(rows: Sequence[Row]) -> str:
    """Two tables: outputs of modules with their gradients, and weights with their gradients and updates. All ranks, micro-steps
    and calls of a module count together."""
    passes = _table(rows, "module", ("output", "gradient"), names_of(rows, "output"))
    weights = _table(
        rows, "weight", ("weight", "weight gradient", "update"), names_of(rows, "weight gradient", "weight")
    )
    return f"{passes}\n\n{weights}"


def _table(rows: Sequence[Row], first: str, kinds: Sequence[str], names: Sequence[str]) -> str:
    by_place: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        by_place.setdefault((row.key.name, row.key.what), []).append(row)
    head = [first, *(column for kind in kinds for column in (f"{kind}: rms", "largest", "non-finite"))]
    lines = [head]
    for name in names:
        line = [name]
        for kind in kinds:
            of_kind = by_place.get((name, kind))
            if of_kind is None:
                line += ["-"] * 3
                continue
            rms, largest, lost = totals(of_kind)
            line += [f"{rms:.3e}", f"{largest:.3e}", "0" if lost == 0 else f"{lost:.2e}"]
        lines.append(line)
    return aligned(lines)
