"""Columns of a text table."""

from __future__ import annotations

import pytest

from rear_scale.text_table import aligned, as_csv

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


def test_csv_has_every_digit_and_an_empty_cell_for_none() -> None:
    assert as_csv(["a", "b"], [(0.1 + 0.2, None), ("x,y", 3)]) == 'a,b\n0.30000000000000004,\n"x,y",3\n'
