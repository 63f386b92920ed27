"""Runs side by side: what differs, on shared axes, with their noise."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import write_checkpoint
from made_run import metric_line, start_line, write_lines, write_run
from test_report import EVIL, Seen

from rear_scale.config import InputError
from rear_scale.report import command
from rear_scale.report.comparison import compare, write_comparison, write_csv


def result(fid: float, step: int = 100, count: int = 50_000) -> dict[str, Any]:
    """A result.json with an interval of the FID."""
    scores = {
        "fid": fid, "sfid": 5.0, "precision": {"exact": 0.8}, "recall": {"exact": 0.6}, "notes": [],
        "bootstrap": {"draws": 100, "fid": {"low": fid - 0.05, "high": fid + 0.05, "std": 0.02},
                      "precision": {"exact": {"low": 0.79, "high": 0.81, "std": 0.01}}},
    }  # fmt: skip
    inception = {
        "weights_sha256": "0" * 64, "weights_are_published": True, "samples": count, "references": {"adm": scores},
        "inception_score": {"mean": 300.0, "std": 2.0},
    }  # fmt: skip
    return {
        "images": {"inception": inception, "reference_sets": {}, "labels": {}},
        "tokens": {"val_clean": {"ctr": 0.42, "perplexity": 7.0, "sequences": 100}},
        "checkpoint": {"path": "x", "step": step, "sha256": []},
        "samples": {"path": "generated", "identity": "x", "images": count, "size": [256, 256], "preprocessing": "none",
                    "uint8_rounding": "truncate"},
        "sample": {"guidance": {"schedule": "constant", "scale": 4.0}}, "dtype": "bf16", "evaluate": {}, "config": None,
        "seconds": 1.0, "provenance": {},
    }  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three runs: two of one config with different seeds, one with another learning rate on another machine; with scores."""
    folders, tmp_path = [], tmp_path_factory.mktemp("runs")
    for number, overrides in enumerate((["run.seed=0"], ["run.seed=1"], ["run.seed=0", "optim.lr=0.002"])):
        folder = write_run(tmp_path / f"run{number}", 60, f"run.name=run{number}", *overrides)
        lines = [metric_line(step, val_loss=3.0 + number + step / 1000) for step in range(1, 61)]
        write_lines(folder / "metrics.jsonl", lines)
        (folder / "result.json").write_text(json.dumps(result(2.0 + number)))
        write_lines(folder / "evaluations.jsonl", [{"step": 30, "images_seen": 480, "fid_n100/adm": 50.0 + number}])
        folders.append(folder)
    write_lines(folders[2] / "starts.jsonl", [start_line(versions={"torch": "2.14.0"}, commit="d" * 40, world_size=8)])
    return folders


@pytest.fixture(scope="module")
def page(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return page_of(runs, tmp_path_factory.mktemp("page") / "compare.html")


def page_of(folders: list[Path], out: Path) -> Seen:
    write_comparison(out, compare(folders))
    return Seen(out.read_text())


def test_a_comparison_shows_what_differs_and_nothing_else(page: Seen) -> None:
    settings = page.text.partition("Settings that differ")[2].partition("Curves")[0]
    named = re.findall(r"[a-z]+\.[a-z_]+|\([a-z_ ]+\)", settings)
    assert named == [
        "run.seed", "optim.lr", "(commit)", "(ranks)", "(version of python)", "(version of rear_scale)", "(version of torch)",
    ]  # fmt: skip
    for expected in ("run0 and run1 and run2", "2.14.0", "0.002", "dddddd"):
        assert expected in page.text, expected
    assert "train.total_steps" not in settings


def test_curves_share_their_axes(page: Seen) -> None:
    charts = [json.loads(value) for name, value in page.attributes if name == "data-chart"]
    by_axis: dict[str, list[dict[str, Any]]] = {}
    for chart in charts:
        by_axis.setdefault(chart["axis"], []).append(chart)
    assert list(by_axis) == ["images seen", "FLOPs", "hours of training", "step"]
    (validation, *_), names = by_axis["images seen"], [line["label"] for line in charts[0]["lines"]]
    assert names == ["run0", "run1", "run2"]
    assert [line["x"][-1] for line in validation["lines"]] == [960] * 3
    assert [line["y"][-1] for line in validation["lines"]] == pytest.approx([3.06, 4.06, 5.06])
    assert by_axis["hours of training"][0]["lines"][0]["x"][-1] == pytest.approx(60 * 0.16 / 3600, rel=1e-4)
    flops = by_axis["FLOPs"][0]["lines"][0]["x"]
    assert flops[-1] == pytest.approx(60 * flops[0])
    trends = [chart for chart in by_axis["images seen"] if chart["lines"][0]["y"] == [50]]
    assert [line["x"] for line in trends[0]["lines"]] == [[480]] * 3
    labels = [value for name, value in page.attributes if name == "for"]
    assert len(labels) == 4
    assert sum(name == "checked" for name, _ in page.attributes) == 1


def test_scores_stand_side_by_side_with_their_noise(page: Seen) -> None:
    for expected in (
        "fid/adm 2 (1.95 … 2.05) 3 (2.95 … 3.05) 4 (3.95 … 4.05)",
        "(0.79 … 0.81)",
        "50,000",
        "run0, run1",
        "mean ± deviation over their seeds",
        "fid/adm (result.json) 2.5 ± 0.71 (n = 2)",
        "val_loss at the end 3.56 ± 0.71 (n = 2)",
    ):
        assert expected in page.text, expected


def test_sheets_of_the_same_images_stand_beside_each_other(page: Seen, runs: list[Path], tmp_path: Path) -> None:
    assert page.tags.count("img") == 6
    assert page.text.count("after ") == 2
    assert "The same classes and seeds" in page.text
    # Without a common number of images, the last ones; and seeds that differ are named.
    other = write_run(tmp_path / "other", 50, "run.name=other", "sample.seed=7")
    (other / "grids/step_00000025.png").unlink()
    page = page_of([runs[0], other], tmp_path / "compare.html")
    assert page.tags.count("img") == 2
    assert "sample.seed differ" in page.text


def test_the_csv_has_a_row_for_each_run(runs: list[Path], tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", compare(runs))
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert [row["run"] for row in rows] == ["run0", "run1", "run2"]
    assert [float(row["fid/adm (result.json)"]) for row in rows] == [2, 3, 4]
    assert [float(row["fid/adm (result.json) low"]) for row in rows] == pytest.approx([1.95, 2.95, 3.95])
    assert [row["run.seed"] for row in rows] == ["0", "1", "0"]
    assert float(rows[0]["flops"]) > 0
    assert [float(row["val_loss"]) for row in rows] == pytest.approx([3.06, 4.06, 5.06])
    assert float(rows[0]["loss_deviation"]) > 0
    assert [row["images"] for row in rows] == ["960"] * 3


def test_names_of_runs_are_text_in_pages_and_cells(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / f"{number}", 10, f"run.name='{name}'", state=EVIL, x=number)
        for number, name in enumerate((EVIL, EVIL, "=1+1"))
    ]
    for folder in folders:
        write_lines(folder / "starts.jsonl", [start_line(commit=f"{EVIL}\ud800{folder.name}")])
    page = page_of(folders, tmp_path / "compare.html")
    assert page.tags.count("script") == 1
    assert f"{EVIL} (0)" in page.text
    write_csv(tmp_path / "a.csv", compare(folders))
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert [row["run"] for row in rows] == [f"{EVIL} (0)", f"{EVIL} (1)", "'=1+1"]


def test_runs_that_cannot_be_read_are_compared_as_far_as_they_go(tmp_path: Path) -> None:
    whole, empty = write_run(tmp_path / "a", 10), tmp_path / "b"
    write_checkpoint(empty, 4)
    (empty / "status.json").write_text("{")
    (empty / "config.yaml").write_text("run: {name: b, colour: 1}")
    page = page_of([whole, empty], tmp_path / "compare.html")
    assert "Not over FLOPs, because the config cannot be read: b" in page.text
    assert "b: config.yaml is not a config of this version" in page.text


def test_the_command_writes_what_is_asked_for(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*words: object) -> list[str]:
        monkeypatch.setattr("sys.argv", ["launchers/report.py", *map(str, words)])
        command.report()
        return capsys.readouterr().out.splitlines()

    assert call(*runs[:2], "--dry-run") == [f"{folder}/report.html" for folder in runs[:2]]
    assert not (runs[0] / "report.html").exists()
    assert call(*runs[:2]) == [f"{folder}/report.html" for folder in runs[:2]]
    out, table = tmp_path / "c.html", tmp_path / "c.csv"
    assert call(*runs, "--out", out, "--csv", table) == [str(out), str(table)]
    assert out.stat().st_size < 1_500_000
    assert call(runs[0], "--out", out) == [str(out)]
    assert "Checkpoints" in out.read_text()
    with pytest.raises(InputError, match=r"^--out .*/none/c.html: the folder .*/none does not exist"):
        call(runs[0], "--out", tmp_path / "none/c.html")
    for option, path, ending in (("--out", "c.txt", ".html"), ("--csv", tmp_path, ".csv")):
        with pytest.raises(InputError, match=f"^{option} .* is no name of a file that ends in {ending}"):
            call(runs[0], option, path)
