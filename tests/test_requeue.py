from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, write_checkpoint

from rear_scale.run.requeue import close, read_status, verdict


def run_folder(folder: Path, state: str | None, step: int, reason: str = "") -> Path:
    saved = write_checkpoint(folder, step)
    # What counts for nothing: unfinished, set aside, cut short, without its list of files, and with a list that is none.
    (saved.parent / f"step_{step + 1:08d}.tmp").mkdir()
    write_checkpoint(folder, step + 2).rename(saved.parent / f"step_{step + 2:08d}.damaged")
    (write_checkpoint(folder, step + 3) / "part-00000.safetensors").write_bytes(b"1")
    (write_checkpoint(folder, step + 4) / "meta.json").unlink()
    for number, text in enumerate(("", "[]", '{"files": 3}', '{"files": [{}]}'), start=step + 5):
        (write_checkpoint(folder, number) / "meta.json").write_text(text)
    if state is not None:
        (folder / "status.json").write_text(json.dumps({"state": state, "step": step, "reason": reason}))
    return folder


@pytest.mark.parametrize(
    ("state", "reason", "before", "code", "again"),
    [
        ("preempted", "rank 0 was asked to stop", 10, 75, True),
        ("preempted", "rank 0 was asked to stop", 10, 1, True),  # the deepspeed launcher has codes of its own
        ("preempted", "", 20, 1, False),  # what the start before left: this one has not come as far
        ("failed", "RuntimeError: connection closed by peer", 10, 1, True),
        ("failed", "RuntimeError: connection closed by peer", 20, 1, False),
        ("failed", "FloatingPointError: step 21: the loss is not finite on rank 1", 10, 1, False),
        ("running", "", 10, 137, True),
        ("preempted", "", 10, 2, False),
        ("done", "", 10, 0, False),
        (None, "", 20, 1, False),
    ],
)
def test_a_run_goes_on_when_that_can_help(
    tmp_path: Path, state: str | None, reason: str, before: int, code: int, again: bool
) -> None:
    folder = run_folder(tmp_path, state, 20, reason)
    assert verdict(folder, before, code)[0] is again


def test_ranks_that_died_silently_leave_a_failed_run(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, "running", 20)
    close(folder, 137)
    assert read_status(folder) == ("failed", 20, "its ranks ended with exit code 137 without recording a reason")
    (folder / "status.json").write_text(json.dumps({"state": "preempted", "step": 20, "reason": "asked"}))
    close(folder, 1)
    assert read_status(folder)[0] == "preempted"


@pytest.mark.parametrize(
    "text", ["", "null", "[]", '{"state": "failed"}', '{"state": "failed", "step": "x", "reason": ""}']
)
def test_a_status_that_says_nothing_does_not_stop_the_answer(tmp_path: Path, text: str) -> None:
    folder = run_folder(tmp_path, None, 20)
    (folder / "checkpoints/step_20.saved").mkdir()  # somebody's own: eight characters, and no number
    (folder / "status.json").write_text(text)
    close(folder, 1)
    assert verdict(folder, 10, 1)[0]
    (folder / "status.json").write_text('{"state": "failed", "step": 20, "reason": null}')
    assert verdict(folder, 10, 1)[0]
    assert not verdict(folder, 20, 1)[0]


def ask(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rear_scale.run.requeue", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_a_batch_script_can_ask(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "a run", "preempted", 20, "asked")
    found = ask("begin", "--check", "--config", "rear_xl.yaml", f"run.dir={folder}", "optim.lr=1e-4")
    assert found.stdout == f"20 {folder}\n"
    assert ask("end", "10", folder, "75").stdout == "again\n"
    assert ask("end", "20", folder, "75").stdout == "leave\n"
    # 30 was the newest at the start and was found damaged: what was saved since counts from 10 on, or from 20.
    assert ask("end", "30,10", folder, "75").stdout == "again\n"
    assert ask("end", "30,20,10", folder, "75").stdout == "leave\n"
    write_checkpoint(folder, 10)
    assert ask("begin", "--config", "rear_xl.yaml", f"run.dir={folder}").stdout == f"20,10 {folder}\n"
    wrong = ask("begin", "--config", "rear_xl.yaml", "optim.lrr=1")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("error: optim.lrr is not a config key")


def test_asking_imports_no_torch() -> None:
    code = "import sys, rear_scale.run.requeue; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "False\n"
