"""Tables as text: aligned for a terminal, and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Container, Iterable, Sequence
from itertools import zip_longest


def aligned(rows: Sequence[Sequence[str]], left: Container[int] = (0,)) -> str:
    """The text of a table, one line per row, each column as wide as its longest cell; a row may lack its last cells.

    left: the left-aligned columns; the others, which hold numbers, are right-aligned.
    """
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if at in left else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def as_csv(columns: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """The text of a CSV file with a line of names. Floats have all their digits, and the cell of a None is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()
