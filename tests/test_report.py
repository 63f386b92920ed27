from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from rear_scale.report.figures import class_rows, curves, grid
from rear_scale.report.page import Picture, Section, Table, write_page


def test_a_page_holds_everything_itself(tmp_path: Path) -> None:
    picture = Picture(grid(np.zeros((4, 8, 8, 3), np.uint8), 2), "four <black> squares")
    sections = [Section("Scores & more", ["text"], Table(["name", "value"], [["a<b", "1"]]), [picture], "command --x")]
    write_page(tmp_path / "page.html", "A title", sections)
    text = (tmp_path / "page.html").read_text()
    for expected in (
        "A title",
        "Scores &amp; more",
        "a&lt;b",
        "four &lt;black&gt; squares",
        "command --x",
        "data:image/png;base64,",
    ):
        assert expected in text
    for outside in ("http://", "https://", 'src="/', "href="):
        assert outside not in text


def test_curves_leave_missing_values_out() -> None:
    metrics = {"a": [{"images_seen": 1, "loss": 2.0}, {"images_seen": 2, "loss": None}], "b": [{"images_seen": 1}]}
    with Image.open(io.BytesIO(curves(metrics, "loss", "title"))) as image:
        assert image.width > 300


def test_class_rows_take_the_first_of_each_class() -> None:
    labels = np.array([1, 0, 1, 0, 1, 0])
    images = np.arange(6, dtype=np.uint8)[:, None, None, None] + np.zeros((6, 2, 2, 3), np.uint8)
    assert class_rows(images, labels, 2)[:, 0, 0, 0].tolist() == [1, 3, 0, 2]
