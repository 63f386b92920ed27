"""The list of runs in the terminal."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from made_run import start_line, write_lines, write_run
from test_comparison import result

from rear_scale.config import InputError
from rear_scale.report import listing
from rear_scale.report.listing import list_runs, rows_of


def test_runs_are_listed_with_what_they_are_and_the_newest_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = write_run(tmp_path / "old", 20, state="preempted")
    for name in ("metrics.jsonl", "status.json", "starts.jsonl"):
        os.utime(old / name, (time.time() - 7200,) * 2)
    scored = write_run(tmp_path / "study/deep/scored", 30)
    (scored / "result_x.json").write_text(json.dumps(result(1.95)))
    (scored / "checkpoints/step_00000030/big").write_bytes(b"0" * 2_000_000)
    trend = write_run(tmp_path / "trend", 10)
    write_lines(trend / "evaluations.jsonl", [{"step": 5, "images_seen": 80, "fid_n100/adm": 71.25}])
    monkeypatch.setattr("sys.argv", ["launchers/runs.py", str(tmp_path)])
    list_runs()
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["run", "state", "step", "images/s", "loss", "last", "score", "age", "disk"]
    by_name = {line.split()[0]: line for line in lines}
    assert set(by_name) == {"old", "study/deep/scored", "trend"}
    assert lines[-1] == by_name["old"]
    for name, expected in {
        "old": ("preempted", " 20 ", "100.", "2.0 h"),
        "study/deep/scored": ("done", " 30 ", "fid/adm 1.95 (n = 50,000)", "2.0"),
        "trend": ("done", "fid_n100/adm 71.25", " s "),
    }.items():
        for words in expected:
            assert words in by_name[name], words


def test_what_cannot_be_read_is_listed_as_such_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "good", 4)
    for name, content in {
        "odd": "[]",
        "torn": '{"state": "runn',
        "evil\x1b[31m": '{"state": "done", "step": "x"}',
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "status.json").write_text(content)
    (tmp_path / "odd/metrics.jsonl").write_text('{"step": {}}\n[1]\n')
    (tmp_path / "odd/result.json").write_text("{}")
    (tmp_path / "closed").mkdir()
    real = os.scandir

    def scandir(path: Path) -> object:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    cells = {row.cells[0]: row.cells for row in rows_of(tmp_path)}
    assert cells["closed"] == ["closed", "unreadable: Permission denied"]
    assert cells["odd"][1:6] == ["unknown", "-", "-", "-", "-"]
    assert cells["torn"][1] == "unknown"
    assert cells["evil\\x1b[31m"][1:3] == ["done", "-"]
    assert cells["good"][1] == "done"
    monkeypatch.setattr(listing, "_cells", lambda *arguments: 1 / 0)
    assert {row.cells[1] for row in rows_of(tmp_path)} == {
        "unreadable: Permission denied", "unreadable: ZeroDivisionError: division by zero",
    }  # fmt: skip


def test_folders_of_many_files_take_a_bounded_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    (run / "features").mkdir(parents=True)
    write_lines(run / "starts.jsonl", [start_line()])
    for number in range(1000):
        (run / f"features/{number}").touch()
    (row,) = rows_of(tmp_path)
    assert not row.cells[-1].startswith(">")
    monkeypatch.setattr(listing, "_DISK_S", 0.0)
    (row,) = rows_of(tmp_path)
    assert row.cells[-1].startswith("> ")
    monkeypatch.setattr(listing, "_MOST_FOLDERS", 1)
    assert rows_of(tmp_path) == []
    assert "holds too many folders; 1 were looked into" in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["launchers/runs.py", str(tmp_path / "none")])
    with pytest.raises(InputError, match="not found: .*/none, a folder of runs"):
        list_runs()
    monkeypatch.setattr("sys.argv", ["launchers/runs.py", str(tmp_path)])
    list_runs()
    assert capsys.readouterr().out == f"no runs in {tmp_path}\n"
