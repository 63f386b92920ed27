"""Reports of run folders: what they show, that everything in them is text, and that long runs stay small."""

from __future__ import annotations

import io
import json
import os
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import ROOT, run_alone, tiny_config
from made_run import metric_line, start_line, write_lines, write_run, write_sheet
from PIL import Image
from test_train import run

from rear_scale.config import InputError
from rear_scale.report import command, comparison, reading, run_page, writing
from rear_scale.report.charts import Chart, Line, Mark, short, ticks
from rear_scale.report.curves import COLUMNS, Curves
from rear_scale.report.figures import class_rows, grid
from rear_scale.report.page import Head, Picture, Section, Table, page_text, write_page
from rear_scale.report.reading import RunFiles, command_of
from rear_scale.report.run_page import duration, evenly, size, write_report
from rear_scale.report.writing import RunReport, update_report

EVIL = "<script>alert(1)</script>"


class Seen(HTMLParser):
    """The text of a page as a browser shows it, its tags and their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.inside = tag
        self.attributes += [(name, value or "") for name, value in attributes]

    def handle_data(self, data: str) -> None:
        (self.scripts if self.inside == "script" else self.words if self.inside != "style" else []).append(data)

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def seen(folder: Path) -> Seen:
    return Seen(write_report(folder).read_text())


def test_a_page_holds_everything_itself(tmp_path: Path) -> None:
    picture = Picture(grid(np.zeros((4, 8, 8, 3), np.uint8), 2), "four <black> squares")
    sections = [
        Section("Scores & more", ["text"], Table(["name", "value"], [["a<b", "1"]]), pictures=[picture], code="x --y")
    ]
    write_page(tmp_path / "page.html", "A title", sections)
    text = (tmp_path / "page.html").read_text()
    for expected in (
        "A title",
        "Scores &amp; more",
        "a&lt;b",
        "four &lt;black&gt; squares",
        "x --y",
        "data:image/png;base64,",
    ):
        assert expected in text
    for outside in ("http://", "https://", 'src="/', "href=", "url(", "@import"):
        assert outside not in text


def test_class_rows_take_the_first_of_each_class() -> None:
    labels = np.array([1, 0, 1, 0, 1, 0])
    images = np.arange(6, dtype=np.uint8)[:, None, None, None] + np.zeros((6, 2, 2, 3), np.uint8)
    assert class_rows(images, labels, 2, 2)[:, 0, 0, 0].tolist() == [1, 3, 0, 2]
    # A class of fewer images, or of none, has white in their place, so that each row is a class.
    assert class_rows(images[:4], labels[:4], 3, 3)[:, 0, 0, 0].tolist() == [1, 3, 255, 0, 2, 255, 255, 255, 255]


def test_a_report_shows_the_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 100)
    lines = [metric_line(step) for step in range(1, 101)]
    for line in lines[19::20]:
        line |= {"val_loss": 3.0, "val_loss_ar": 2.5, "val_ctr": 0.4, "val_ctr_noisy": 0.3, "own_term": 7.0}
    write_lines(folder / "metrics.jsonl", lines)
    after = {"state": "preempted", "step": 50, "reason": "rank 2 was asked to stop during step 50"}
    write_lines(folder / "starts.jsonl", [start_line(), start_line(50, hosts={"node7": 4}, after=after)])
    positions = {"3": "a.tar 5"}
    nonfinite = {"event": "nonfinite", "step": 70, "what": "the loss is not finite on rank 3", "positions": positions}
    left = {"event": "left_expected_curve", "step": 80, "what": "loss 3 at 1,280 images"}
    events = [{"event": "loss_spike", "step": 60, "loss": 9.5, "rewind": True}, nonfinite, left]
    write_lines(folder / "events.jsonl", events)
    write_lines(folder / "evaluations.jsonl", [{"step": 50, "images_seen": 800, "fid_n100/adm": 70.5}])
    page = seen(folder)
    for expected in (
        "made", "done", "100", "1,600", "loss_ar (part of the loss)", "accuracy of the next token", "gradient norm",
        "learning rate", "largest noise rate", "correct token ratio, validation", "throughput", "time of a step",
        "spread over ranks: data and forward", "peak memory per rank", "own_term", "fid_n100/adm", "step_00000100",
        "node7", "preempted (rank 2 was asked to stop during step 50)", "update not finite: the loss is not finite on rank 3",
        "loss spike of 9.5, rewound to the newest checkpoint", "rank 3: a.tar 5", "torch 2.13.0", "--config demo.yaml",
        "slowest rank", "MFU: the peak of this device is not known", "global_batch_size", "step 50",
        "Training would continue from step 100", "loss outside of its expected curve: loss 3 at 1,280 images",
    ):  # fmt: skip
        assert expected in page.text, expected
    assert page.tags.count("svg") > 12
    assert sum(name == "src" and value.startswith("data:image/png") for name, value in page.attributes) == 2
    (marks,) = [json.loads(value) for name, value in page.attributes if name == "data-marks"]
    assert [mark[0] for mark in marks] == [50, 60, 70, 80]
    assert "restart after step 50 on node7; before: preempted" in marks[0][1]
    kinds = {value for name, value in page.attributes if name == "class" and value.startswith("mark ")}
    assert kinds == {"mark start", "mark rewind", "mark skipped", "mark spike"}
    charts = [json.loads(value) for name, value in page.attributes if name == "data-chart"]
    assert [line["label"] for line in charts[0]["lines"]] == ["training", "validation"]
    assert charts[0]["lines"][1] == {"label": "validation", "x": [20, 40, 60, 80, 100], "y": [3] * 5}


def test_what_comes_from_files_is_text(tmp_path: Path) -> None:
    folder = write_run(tmp_path / f"run {EVIL.replace('/', '')}", 20, f"run.name='{EVIL}'", reason=EVIL)
    lines = [metric_line(step) | {f"a{EVIL}": 1.0, "slowest_host": EVIL, '"><img src=x>': 2.0} for step in range(1, 21)]
    write_lines(folder / "metrics.jsonl", lines)
    start = start_line(
        5, hosts={EVIL: 2, "'>": 2}, host=EVIL, device=f"{EVIL}\ud800", commit=EVIL, command=f"x '{EVIL}'"
    )
    start |= {"versions": {EVIL: EVIL}, "after": {"state": EVIL, "reason": EVIL}, "time": EVIL, "folder": EVIL}
    write_lines(folder / "starts.jsonl", [start, start])
    write_lines(folder / "events.jsonl", [{"event": EVIL, "step": 3, "what": EVIL, "positions": {EVIL: EVIL}}])
    write_lines(folder / "evaluations.jsonl", [{"step": 5, EVIL: 1.0}])
    (folder / "result.json").write_text(EVIL)
    (folder / "grids/step_00000007.png").write_text(EVIL)
    page = seen(folder)
    assert page.tags.count("script") == len(page.scripts) == 1
    assert not [tag for tag in page.tags if tag in ("b", "iframe", "link", "object")]
    assert page.tags.count("img") == 2
    assert page.text.startswith(f"{EVIL} ") or f" {EVIL} " in page.text
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert not [value for name, value in page.attributes if name == "src" and not value.startswith("data:image/")]
    # The script is that of the package, and the page's policy allows no other.
    assert page.scripts == [(ROOT / "rear_scale/report/page.js").read_text()]
    (policy,) = [value for name, value in page.attributes if name == "content" and "default-src 'none'" in value]
    assert re.search(r"script-src 'sha256-[\w+/=]{44}'$", policy)


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("running", ("It was killed: no process runs it", "Last seen at step 30 of 230", "from step 15; 15 later steps")),
        ("preempted", ("It was asked to stop and has saved: why.", "It waits to be started again")),
        ("failed", ("It ended with an error: why. It waits for you.",)),
        ("done", ("It has ended as planned at step 30 (why). It waits for nothing.",)),
        (None, ("no status.json that can be read",)),
    ],
)  # fmt: skip
def test_a_report_says_where_a_run_stands_and_how_to_go_on(tmp_path: Path, state: str | None, expected: tuple) -> None:
    folder = write_run(tmp_path / "run", 30, state=state or "", reason="why")
    (folder / "checkpoints/step_00000030/meta.json").unlink()
    for name in ("metrics.jsonl", "status.json", "starts.jsonl"):
        os.utime(folder / name, (time.time() - 7200,) * 2)
    text = seen(folder).text
    for words in expected:
        assert words in text, words
    again = "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint HOST:PORT launchers/train.py --config demo.yaml"
    assert (again in text.partition("images seen")[0]) is (state != "done")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"world_size": 1, "launcher": "single", "hosts": {"a": 1}}, "python launchers/train.py --config demo.yaml"),
        ({"world_size": 4, "hosts": {"a": 4}}, "torchrun --nproc-per-node 4 launchers/train.py --config demo.yaml"),
        ({"world_size": 4, "hosts": None}, "torchrun --nproc-per-node 4 launchers/train.py --config demo.yaml"),
        ({"launcher": "slurm"}, "sbatch --nodes 2 launchers/slurm/train.sbatch --config demo.yaml"),
        ({"command": "launchers/train.py 'a b'", "world_size": 1}, "python launchers/train.py 'a b'"),
        ({"command": "x 'unfinished"}, ""),
        ({"command": None, "world_size": 1}, "python None"),
    ],
)
def test_the_command_that_continues_is_that_of_the_last_start(changes: dict, expected: str) -> None:
    assert command_of(start_line(**changes)) == expected


def test_a_running_process_is_seen_by_its_lock(tmp_path: Path) -> None:
    import fcntl

    folder = write_run(tmp_path / "run", 4, state="running")
    for name in ("metrics.jsonl", "status.json", "starts.jsonl"):
        os.utime(folder / name, (time.time() - 7200,) * 2)
    with open(folder / ".lock", "w") as file:
        assert RunFiles(folder).state == "killed"
        fcntl.flock(file, fcntl.LOCK_EX)
        assert RunFiles(folder).state == "running"
    assert RunFiles(folder).state == "killed"


def test_a_spike_of_one_step_stays_visible_in_few_columns(tmp_path: Path) -> None:
    steps = 5000
    write_lines(
        tmp_path / "metrics.jsonl",
        [{"step": step, "images_seen": step * 2, "loss": 50.0 if step == 3333 else 2.0, "step_time_s": 3.6}
         for step in range(1, steps + 1)],
    )  # fmt: skip
    read = Curves(tmp_path / "metrics.jsonl")
    read.update()
    curve = read.curve("loss")
    assert curve is not None
    assert COLUMNS <= len(curve.steps) <= 2 * COLUMNS
    spiky = np.flatnonzero(curve.high > 2)
    assert curve.high[spiky].tolist() == [50.0]
    assert curve.steps[spiky[0] - 1] < 3333 <= curve.steps[spiky[0]]
    width = read.width
    assert curve.mean[spiky[0]] == pytest.approx(2 + 48 / width)
    assert (curve.low == 2).all()
    assert (curve.steps[-1], curve.images[-1], curve.hours[-1]) == (steps, 2 * steps, pytest.approx(steps / 1000))
    assert read.hours == pytest.approx(steps / 1000)
    assert Chart("loss", [Line("loss", curve.steps, curve.mean, curve.low, curve.high)]).cut_off == ""


def test_lines_that_are_added_cut_or_rewritten_are_read_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    read = Curves(path)
    read.update()
    assert (read.lines, read.names) == (0, [])
    whole = [metric_line(step) for step in range(1, 1001)]
    write_lines(path, whole[:400])
    with open(path, "a") as file:
        file.write('{"step": 401, "lo')
    read.update()
    assert (read.lines, read.last["step"]) == (400, 400)
    write_lines(path, whole[:700])
    read.update()
    assert (read.lines, read.left_out) == (700, 0)
    # Cut by a resume and trained further, to a file that is longer than before.
    write_lines(path, [*whole[:300], *({**line, "loss": 1.0} for line in whole[300:])])
    read.update()
    fresh = Curves(path)
    fresh.update()
    assert read.lines == fresh.lines == 1000
    ours, theirs = read.curve("loss"), fresh.curve("loss")
    assert ours is not None
    assert theirs is not None
    assert np.array_equal(ours.mean, theirs.mean)
    assert ours.high[-1] == 1.0


def test_lines_of_any_kind_are_read_or_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    odd = [
        "",
        "null",
        "[1]",
        '{"loss": 1}',
        '{"step": "1"}',
        '{"step": true}',
        '{"step": -1}',
        "[" * 5000,
        '{"step": 1e3}',
        "\x00",
        "x" * 70_000,
    ]
    huge = '{"step": 2, "loss": 1' + "0" * 400 + "}"
    good = [
        '{"step": 1, "loss": NaN, "text": "3", "list": [1]}',
        huge,
        '{"step": 3, "loss": 5}',
        '{"step": 900000000000, "loss": 6}',
    ]
    path.write_text("\n".join([*odd, *good]) + "\n")
    read = Curves(path)
    read.update()
    assert (read.lines, read.left_out) == (4, len(odd) - 1)
    curve = read.curve("loss")
    assert curve is not None
    assert (read.names, curve.low.min(), curve.high.max()) == (["loss"], 5, 6)


def test_a_damaged_folder_still_has_a_report_that_names_what_is_damaged(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 20)
    for name, content in {
        "config.yaml": "a: [1\n  b: }", "status.json": "[]", "starts.jsonl": '[1]\n{"world_size": {}}\n',
        "events.jsonl": "x\n{}\n",
        "result.json": "{}", "result_x.json": '{"images": 1}', "evaluations.jsonl": '{"step": "x"}\n',
        "grids/step_00000020.png": "no image",
    }.items():  # fmt: skip
        (folder / name).write_text(content)
    (folder / "checkpoints/step_00000020/meta.json").write_text("{")
    (folder / "checkpoints/step_00000010.damaged").mkdir()
    text = seen(folder).text
    for expected in (
        "Not read",
        "config.yaml: while parsing",
        "step_00000020.png: not an image",
        "result_x.json is not shown",
        "unknown",
    ):
        assert expected in text, expected
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "starts.jsonl").touch()
    assert "No step has been logged yet" in seen(empty).text


def test_a_config_of_another_version_is_shown_as_it_is(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 20)
    (folder / "config.yaml").write_text("run: {name: old, colour: blue}\n")
    text = seen(folder).text
    assert "config.yaml is not a config of this version: " in text
    assert "colour: blue" in text


def test_large_pictures_are_scaled_down(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1000, 2000, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    problems: list[str] = []
    picture = run_page.picture_of(tmp_path / "a.png", "a", problems)
    assert picture is not None
    with Image.open(io.BytesIO(picture.data)) as image:
        assert (image.size, image.format) == ((720, 360), "JPEG")
    assert picture.uri.startswith("data:image/jpeg;base64,")
    assert run_page.picture_of(tmp_path / "none.png", "b", problems) is None
    assert len(problems) == 1


def test_charts_have_round_ticks_and_say_what_is_cut_off() -> None:
    assert ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1.0]
    assert ticks(37, 250_000) == [100_000, 200_000]
    assert ticks(3, 3) == [3]
    assert [short(value) for value in (0, 12_345, 1e-4, -2.5e6, 0.12345, 999.99)] == [
        "0",
        "12.35k",
        "0.0001",
        "-2.5M",
        "0.1235",
        "1k",
    ]
    x = np.arange(1.0, 201.0)
    values = np.sin(x)
    values[50] = 500
    chart = Chart("a", [Line("a", x, values)], marks=[Mark(51, "spike", "t"), Mark(900, "spike", "outside")])
    assert chart.cut_off == "values up to 500 are cut off"
    assert chart.y_range[1] < 10
    assert len(chart.mark_paths) == 1
    assert chart.mark_paths[0][1].count("M") == 1
    # One point, and equal values, are drawn too.
    page_text("t", [Section("s", charts=[Chart("b", [Line("b", np.ones(1), np.zeros(1))])])], Head("done"))


def test_numbers_are_put_into_words() -> None:
    assert [duration(seconds) for seconds in (3, 400, 7200, 1e6)] == ["3 s", "7 min", "2.0 h", "11.6 days"]
    assert [size(count) for count in (0, 999, 12_345, 3_400_000_000, 5e15)] == [
        "0 B",
        "999 B",
        "12.3 KB",
        "3.4 GB",
        "5e+03 TB",
    ]
    assert evenly(list(range(100)), 4) == [0, 33, 66, 99]
    assert evenly([1, 2], 4) == [1, 2]


def test_training_writes_the_report_and_a_failure_costs_a_line(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = tiny_config(tmp_path, tokens, "strategy=single", "train.stop_at_step=4")
    run_alone(run, cfg)
    world, folder = SimpleNamespace(is_main=True), tmp_path / "run"
    (start,) = [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]
    assert (start["step"], sum(start["hosts"].values()), start["after"]) == (0, 1, None)
    with RunReport(folder, world) as report:
        report(4, folder)  # too soon after the start
        assert report.thread is None
        monkeypatch.setattr(writing, "_FIRST_S", 0.0)
        report(4, folder)
        assert report.thread is not None
        report.thread.join()
        first = (folder / "report.html").stat().st_mtime_ns
        report(8, folder)  # too soon after the last one
        assert not report.thread.is_alive()
        assert (folder / "report.html").stat().st_mtime_ns == first
    assert (folder / "report.html").stat().st_mtime_ns > first
    assert "It has ended as planned at step 4" in (folder / "report.html").read_text()
    # The lines are read once, by whichever report.
    assert report.curves is not None
    assert report.curves.lines == 4

    def failing(*arguments: object) -> None:
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr(writing, "write_report", failing)
    capsys.readouterr()
    with RunReport(folder, world) as report:
        report(4, folder)
    said = capsys.readouterr().err.splitlines()
    assert said == [f"{folder}/report.html: No space left on device. The report was not written"] * 2
    with pytest.raises(KeyError), RunReport(folder, world):
        raise KeyError  # the error of the run, whatever the report
    (folder / "report.html").unlink()
    with pytest.raises(InputError), RunReport(folder, world):
        raise InputError("refused")
    with RunReport(folder, SimpleNamespace(is_main=False)) as other:
        other(4, folder)
    update_report(tmp_path)
    monkeypatch.undo()
    update_report(folder, False)
    assert not (folder / "report.html").exists()
    update_report(folder)
    assert (folder / "report.html").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "runs/a", 4)
    with pytest.raises(InputError, match="not found: .*/none"):
        command.check_run(tmp_path / "none")
    with pytest.raises(InputError, match=r"is no run folder: .* The runs in it are a\."):
        command.check_run(tmp_path / "runs")


@pytest.mark.long
def test_a_quarter_of_a_million_steps_are_a_small_page_in_a_short_time(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 4)
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, 250_001):
            file.write(json.dumps(metric_line(step, loss=90.0 if step == 123_456 else 2.0)) + "\n")
    for step in range(10_000, 250_001, 10_000):
        write_sheet(folder / f"grids/step_{step:08d}.png", seed=step, size=(2560, 1280))
    events = [{"event": "loss_spike", "step": step, "loss": 9.0, "rewind": False} for step in range(100, 250_000, 100)]
    write_lines(folder / "events.jsonl", events)
    # The time of this process: the machine may be busy with other tests.
    started = time.process_time()
    path = write_report(folder)
    taken = time.process_time() - started
    print(f"{taken:.1f} s, {path.stat().st_size:,} bytes")
    assert taken < 20
    assert path.stat().st_size < 3_000_000
    charts = [json.loads(value) for name, value in Seen(path.read_text()).attributes if name == "data-chart"]
    assert max(charts[0]["lines"][0]["high"]) == 90


def test_values_that_no_run_of_ours_writes_leave_a_report(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 3, time_left_s=float("nan"), step_time_s=1e-300)
    huge = 10**400
    lines = [metric_line(step, loss=huge, images_seen=huge) for step in (4, 10**12)]
    with open(run / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    write_lines(run / "evaluations.jsonl", [{"step": 3, "fid": huge}, {"step": 3, "is": 1.5}])
    for name in ("result_gone.json", "samples_gone.png"):
        (run / name).symlink_to("/nowhere")
    shown = seen(run)
    assert "1,000,000,000,000" in shown.text
    assert "result_gone.json is not shown" in shown.text
    # A curve at one huge place has a width all the same.
    chart = Chart("a", [Line("a", np.array([1e18]), np.array([1.0]))])
    assert chart.path(chart.lines[0]).startswith("M")
    comparison.write_comparison(tmp_path / "two.html", comparison.compare([run, run]))
    result = SimpleNamespace(samples=SimpleNamespace(images=3, size=[8]), checkpoint=None, sample=None, tokens=None)
    with pytest.raises(TypeError, match="values of other types"):
        reading._check_shape(result)
