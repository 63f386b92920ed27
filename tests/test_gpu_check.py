"""launchers/gpu_check.sh: its small form on this machine, and how parts fail, run out of time and continue."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, environment

from rear_scale.bench import gpu_check
from rear_scale.bench.gpu_check import Answer, Part


def part(name: str, code: str, limit_s: float = 60, needs: str | None = None, gpus: int = 0) -> Part:
    return Part(name, "something", limit_s, [sys.executable, "-S", "-c", code], needs, gpus)


def test_a_part_that_fails_does_not_stop_the_next(tmp_path: Path) -> None:
    chosen = [
        part("good", "print('first'); print('last line')"),
        part("bad", "import sys; print('why', file=sys.stderr); sys.exit(3)"),
        part("slow", "import time; time.sleep(60)", limit_s=0.3),
        part("other", "", needs="a_package_that_nobody_has"),
        part("many", "", gpus=2),
        part("after", "print('still asked')"),
    ]
    found = gpu_check.run(chosen, tmp_path, 5, 1, clock=iter(range(100)).__next__)
    assert {name: (answer.state, answer.line) for name, answer in found.items() if name != "slow"} == {
        "good": ("done", "last line"),
        "bad": ("failed", "exit code 3: why"),
        "other": ("left out", "a_package_that_nobody_has is not installed"),
        "many": ("left out", "needs 2 GPUs, and there are 1"),
        "after": ("done", "still asked"),
    }
    assert found["slow"].state == "out of time"
    page = (tmp_path / "report.html").read_text()
    assert all(text in page for text in ("still asked", "exit code 3: why", "is not installed"))


def test_it_stops_in_time_and_continues(tmp_path: Path) -> None:
    note = f"open({str(tmp_path / 'asked')!r}, 'a').write('x')"
    chosen = [part("one", note), part("two", note), part("three", note)]
    times = iter([0, 0, 58, 58])
    first = gpu_check.run(chosen, tmp_path / "out", 1, 0, clock=times.__next__)
    assert [answer.state for answer in first.values()] == ["done", "out of time", "out of time"]
    again = gpu_check.run(chosen, tmp_path / "out", 1, 0, clock=lambda: 0.0)
    assert [answer.state for answer in again.values()] == ["done"] * 3
    assert (tmp_path / "asked").read_text() == "xxx"


@pytest.mark.timeout(300)
def test_the_small_form_runs_on_this_machine(tmp_path: Path) -> None:
    names = ["probe_graphs", "tests", "train_s", "sample_s", "scaling_zero2"]
    command = ["bash", "launchers/gpu_check.sh", "--small", "--minutes", "4", "--out", tmp_path, "--parts", *names]
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    states = {
        line.split(":")[0]: line.split(": ")[1].split(";")[0] for line in done.stderr.splitlines() if ": " in line
    }
    assert states["probe_graphs"] == states["train_s"] == states["sample_s"] == "done", done.stderr
    assert states["tests"] == states["scaling_zero2"] == "left out"
    assert "tokens as step by step: yes" in done.stderr
    rows = (tmp_path / "readme_rows.md").read_text().splitlines()
    assert len(rows) == 2
    assert "launchers/bench.py train --config bench_cpu.yaml" in rows[0]


def test_without_a_gpu_and_an_unknown_part_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, words in ((["--small", "--parts", "nothing"], "--parts nothing"), ([], "there is no GPU to check")):
        monkeypatch.setattr(sys, "argv", ["gpu_check", *arguments])
        with pytest.raises(gpu_check.InputError, match=words):
            gpu_check.main()


def test_an_answer_of_another_commit_is_asked_again(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    asked = part("one", "print('new')")
    gpu_check.write_text_atomically(
        tmp_path / "parts/one.json", '{"state": "done", "line": "old", "seconds": 1, "commit": "another"}'
    )
    assert gpu_check.run([asked], tmp_path, 1, 0, clock=lambda: 0.0)["one"].line == "new"
    assert isinstance(gpu_check._earlier(asked, tmp_path), Answer)
