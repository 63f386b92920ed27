"""Columns of a text table."""

from __future__ import annotations

import pytest

from rear_scale.text_table import aligned

ROWS = [["name", "count", "against"], ["a", "1,000", "images"], ["longer", "7"], ["", "-", ""]]


@pytest.mark.parametrize(
    ("left", "lines"),
    [
        ((0,), ["name    count  against", "a       1,000   images", "longer      7", "            -"]),
        ((0, 2), ["name    count  against", "a       1,000  images", "longer      7", "            -"]),
        ((), ["  name  count  against", "     a  1,000   images", "longer      7", "            -"]),
    ],
)
def test_cells_stand_under_each_other(left: tuple[int, ...], lines: list[str]) -> None:
    assert aligned(ROWS, left).split("\n") == lines


def test_a_table_without_rows_is_empty() -> None:
    assert aligned([]) == ""
