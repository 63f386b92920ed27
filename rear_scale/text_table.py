"""Tables as text for a terminal."""

from __future__ import annotations

from collections.abc import Container, Sequence
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
