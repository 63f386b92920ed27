"""Lines and states on full and failing disks."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import metrics, run_alone, tiny_config, write_checkpoint
from test_train import run

from rear_scale.locks import locked
from rear_scale.run import folder as run_folder
from rear_scale.run import line_log
from rear_scale.run.folder import RunFolder
from rear_scale.run.line_log import LineLog

WRITE = os.write


class Disk:
    """Takes so many bytes more, then answers with an error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room: int | None = None
        self.error = errno.ENOSPC
        monkeypatch.setattr(line_log.os, "write", self.write)

    def write(self, handle: int, data: bytes) -> int:
        if self.room is None:
            return WRITE(handle, data)
        if self.room == 0:
            raise OSError(self.error, os.strerror(self.error))
        written = WRITE(handle, data[: self.room])
        self.room -= written
        return written


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG])
@pytest.mark.parametrize("room", [0, 1, 6, 7, 12])
def test_lines_wait_for_room_and_none_is_torn(
    tmp_path: Path, disk: Disk, capsys: pytest.CaptureFixture[str], error: int, room: int
) -> None:
    log, path = LineLog(tmp_path / "lines"), tmp_path / "lines"
    log.append("first")
    disk.room, disk.error = room, error
    log.append("second")
    log.append("third")
    assert path.read_text() in ("first\n", "first\nsecond\n")
    disk.room = None
    log.append("fourth")
    log.close()
    assert path.read_text() == "first\nsecond\nthird\nfourth\n"
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[2].partition(".")[0].partition(",")[0] for line in said] == [
        os.strerror(error), "written again",
    ]  # fmt: skip


@pytest.mark.parametrize("left", ["a\nb\nhalf", "a\nb\n" + "x" * 10_000, "a\nb\n", "a\nb\n\0\0\0"])
def test_a_line_that_a_kill_has_torn_is_cut(tmp_path: Path, left: str) -> None:
    (tmp_path / "lines").write_text(left)
    LineLog(tmp_path / "lines").append("c")
    assert (tmp_path / "lines").read_text() == "a\nb\nc\n"
    (tmp_path / "only").write_text("half")
    LineLog(tmp_path / "only").append("c")
    assert (tmp_path / "only").read_text() == "c\n"


def test_lines_that_never_find_room_are_counted(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(line_log, "_MOST_KEPT", 3)
    log = LineLog(tmp_path / "lines")
    disk.room = 0
    for number in range(5):
        log.append(str(number))
    log.close()
    assert capsys.readouterr().err.splitlines()[1:] == [
        f"{tmp_path}/lines: 3 lines could not be written; 2 older ones were dropped"
    ]
    disk.room = None
    log.close()
    assert (tmp_path / "lines").read_text() == "2\n3\n4\n"


def failing(error: int) -> Callable[..., None]:
    def write(path: Path, text: str) -> None:
        raise OSError(error, os.strerror(error), str(path))

    return write


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_ends_no_run(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, disk: Disk, error: int
) -> None:
    """Nothing but checkpoints can be written between the first step and the last but one."""
    log = RunFolder.log

    def filling(self: RunFolder, values: dict) -> None:
        full = 2 <= values["step"] < 6
        disk.room, disk.error = 0 if full else None, error
        monkeypatch.setattr(run_folder, "write_text_atomically", failing(error) if full else write)
        log(self, values)

    write = run_folder.write_text_atomically
    monkeypatch.setattr(RunFolder, "log", filling)
    run_alone(run, tiny_config(tmp_path, tokens, "strategy=single", "train.total_steps=6", "checkpoint.every_steps=2"))
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert json.loads((tmp_path / "run/status.json").read_text()) == {"state": "done", "step": 6, "reason": ""}


def test_a_state_is_written_in_place_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path)
    folder.set_status("running", 1_000_000, "a longer reason than the next one")
    monkeypatch.setattr(run_folder, "write_text_atomically", failing(errno.ENOSPC))
    folder.set_status("failed", 4, "short")
    assert json.loads((tmp_path / "status.json").read_text()) == {"state": "failed", "step": 4, "reason": "short"}
    (tmp_path / "status.json").unlink()
    folder.set_status("failed", 4, "short")
    assert capsys.readouterr().err == (
        f"{tmp_path}/status.json: No space left on device. Not recorded: failed, step 4, short\n"
    )


def test_what_was_logged_after_a_step_is_cut_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    lines = [json.dumps({"step": step, "host": "ü"}, ensure_ascii=False) for step in range(1, 5)]
    folder.metrics.write_text("\n".join(lines) + '\n{"step": 5, "ho')
    monkeypatch.setattr(run_folder, "atomic_open", failing(errno.ENOSPC))
    folder.cut_metrics(3)
    assert folder.metrics.read_text().splitlines() == lines[:3]


def test_a_refused_start_says_why_in_its_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "new/run")
    folder.refuse("InputError: not found: x")
    state = {"state": "failed", "step": 0, "reason": "InputError: not found: x"}
    assert json.loads((folder.path / "status.json").read_text()) == state
    assert json.loads((folder.path / "events.jsonl").read_text()) == {
        "event": "refused", "step": 0, "reason": state["reason"],
    }  # fmt: skip
    # Neither a run that is done, nor one that another process has in hand, nor a place that cannot be written to.
    for held in ("done", "running"):
        folder.set_status(held, 8, "")
        if held == "running":
            with locked(*folder.lock):
                RunFolder(folder.path).refuse("other")
        else:
            folder.refuse("other")
        assert (folder.state(), len((folder.path / "events.jsonl").read_text().splitlines())) == (held, 1)
    (tmp_path / "file").write_text("")
    RunFolder(tmp_path / "file/run").refuse("other")
    # A run whose process was killed, and that has saved.
    write_checkpoint(folder.path, 4)
    folder.refuse("other")
    assert json.loads((folder.path / "status.json").read_text()) == {"state": "failed", "step": 4, "reason": "other"}
