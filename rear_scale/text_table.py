"""Tables as text for a terminal."""

from __future__ import annotations

from collections.abc import Container, Sequence
from itertools import zip_longest


def aligned(rows: Sequence[Sequence[str]], left: Container[int] = (0,)) -> str:
    """One line per row with its columns as wide as their longest cell; a row may lack its last cells.

    left: the columns whose cells begin at the left; the cells of the others, which are numbers, end at the right.
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
