"""The demo as a user starts it, with a short training, in a folder of its own."""

from __future__ import annotations

import hashlib
import json
import os
import random
import runpy
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import ROOT, launch, start
from notebook import execute

from rear_scale.config import CONFIG_DIR, InputError
from rear_scale.demo import report
from rear_scale.demo.commands import open_folder, planned
from rear_scale.demo.recipe import DIGITS, MODELS
from rear_scale.demo.summary import scores_of
from rear_scale.world import locked

IMAGES = 200
SHORT = [
    "train.total_steps=6",
    "checkpoint.every_steps=2",
    f"sample.num_images={IMAGES}",
    "evaluate.classifier.steps=60",
    "evaluate.replace_draws=2",
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_start_does_not_touch_what_is_as_it_was(here: Path) -> None:
    open_folder(DIGITS, ["a"])
    mark = DIGITS.folder / "stages/fingerprint"
    before = mark.stat()
    open_folder(DIGITS, ["a"])
    assert (mark.stat().st_ino, mark.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    open_folder(DIGITS, ["b"])
    assert (DIGITS.folder.with_name("demo.old1") / "stages/fingerprint").exists()


def summary_of(rate: float) -> dict:
    scores = dict.fromkeys(scores_of(DIGITS), 0.25)
    ratios = {"ctr_train": {"mean": 0.75, "std": 0.0, "values": [0.75]}, "ctr_clean": 0.5}
    return {
        "seeds": [0],
        "num_samples": 20,
        "replace_rate": rate,
        "ar": {**scores, **ratios},
        "rear": scores,
        "real": {},
    }


def test_the_report_says_what_was_done(here: Path) -> None:
    """Rates, draws and marks may be overridden, and what the figures show may be anything."""
    result = SimpleNamespace(
        sample={"guidance": {"schedule": "linear", "scale": 3}}, tokens={"val_noisy": {"draws": 5}}
    )
    section = report._scores(DIGITS, summary_of(0.35), result)
    text = " ".join(section.text)
    assert "with probability 0.35 by a random one, over 5 fixed draws" in text
    assert "vanilla AR 0.750 against 0.500; reAR 0.250 against 0.250" in text
    assert "correct token ratio, validation, 35% of the context replaced" in [row[0] for row in section.table.rows]
    steps = [
        {"step": n, "images_seen": n, "noise_max": max(0, 4 - n), "loss_ar": 1.0, "accuracy": 0.5} for n in range(1, 6)
    ]
    for model in MODELS:
        folder = DIGITS.run_folder(model, 0)
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    training = report._training(DIGITS, 0)
    assert "up to step 3 of 5" in " ".join(training.text)
    assert [line.label for chart in training.charts for line in chart.lines] == ["vanilla AR", "reAR"] * 2


def demo(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["demo.py", *arguments])
    runpy.run_path(str(ROOT / "launchers/demo.py"))["main"]()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.depht=3", "did you mean model.depth"),
        ("train.global_batch_size=63", "is not a multiple of"),
        ("strategy=hsdp", "strategy=hsdp "),
    ],
)
def test_wrong_arguments_leave_good_results_where_they_are(
    here: Path, monkeypatch: pytest.MonkeyPatch, override: str, expected: str
) -> None:
    open_folder(DIGITS, SHORT)
    with pytest.raises(InputError, match=expected):
        demo(monkeypatch, override)
    assert [path.name for path in (here / "runs").iterdir()] == ["demo"]


def test_a_second_demo_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        locked(Path("runs/.demo.lock"), "never said"),
        pytest.raises(InputError, match="runs/demo is in use by another demo"),
    ):
        demo(monkeypatch)
    assert not list((here / "runs").iterdir())


def start_demo(folder: Path, *arguments: str, fresh: bool = False) -> subprocess.Popen[str]:
    return start(
        "python",
        "launchers/demo.py",
        *arguments,
        fresh=fresh,
        cwd=folder,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill_when(process: subprocess.Popen[str], path: Path, delay: float) -> None:
    """kill -9 of the whole group, some time after a file has appeared."""
    deadline = time.monotonic() + 600
    while not path.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def check_results(folder: Path, seeds: int) -> dict:
    demo = folder / "runs/demo"
    summary = json.loads((demo / "summary.json").read_text())
    assert summary["seeds"] == list(range(seeds))
    for model in ("ar", "rear"):
        for name in scores_of(DIGITS):
            value = summary[model][name]
            if seeds > 1:
                assert value["mean"] == pytest.approx(np.mean(value["values"]))
                assert value["std"] == pytest.approx(np.std(value["values"], ddof=1))
                assert len(value["values"]) == seeds
            else:
                assert isinstance(value, float)
        assert (folder / summary[model]["run_dir"] / "metrics.jsonl").exists()
        samples = np.load(folder / summary[model]["samples"])
        assert (samples["arr_0"].dtype, samples["arr_0"].shape) == (np.uint8, (IMAGES, 24, 24, 3))
        assert np.bincount(samples["label"]).tolist() == [IMAGES // 10] * 10
        assert (folder / summary[model]["samples"]).with_suffix(".png").exists()
    report = (demo / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 3
    assert report.count("<svg ") == 2
    for stage in planned(DIGITS, list(range(seeds)), SHORT).stages:
        assert " ".join(stage.command[-3:]) in report.replace("&#39;", "")
    return summary


def test_the_demo_survives_a_kill_and_does_nothing_twice(tmp_path: Path) -> None:
    demo = tmp_path / "runs/demo"
    # 400 steps of the tokenizer are two thirds of the time.
    config = (CONFIG_DIR / "demo.yaml").read_text()
    (tmp_path / "demo.yaml").write_text(f"{config}\ntokenizer: {{training: {{steps: 60, continuous_steps: 15}}}}\n")
    kill_when(start_demo(tmp_path, *SHORT), demo / "ar_seed0/checkpoints/latest", delay=0)
    assert not (demo / "stages/train_ar_0.json").exists()
    process = start_demo(tmp_path, *SHORT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert err.count("finished before") == 4
    assert out.splitlines()[-1] == "report: runs/demo/report.html"
    assert "reAR (1 seed)" in out
    summary = check_results(tmp_path, 1)

    result = launch("python", "launchers/demo.py", *SHORT, cwd=tmp_path)
    assert result.returncode == 0
    assert result.stderr.count("finished before") == 10
    assert check_results(tmp_path, 1) == summary

    # Other settings are another demo: the first is kept, nothing of it is mixed in.
    aside = tmp_path / "runs/demo.old1"
    kill_when(start_demo(tmp_path, "train.total_steps=7"), aside / "summary.json", delay=0.5)
    assert json.loads((aside / "summary.json").read_text()) == summary
    assert not (demo / "summary.json").exists()


def test_a_stage_that_fails_is_named_and_can_be_repeated(tmp_path: Path) -> None:
    (tmp_path / "runs/demo/images").mkdir(parents=True)
    (tmp_path / "runs/demo/images/train").write_text("in the way")
    result = launch("python", "launchers/demo.py", cwd=tmp_path)
    assert result.returncode == 2
    assert "error: the stage 'digits as image shards' failed with exit code 2" in result.stderr


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_the_notebook_runs_after_the_demo(tmp_path: Path) -> None:
    assert launch("python", "launchers/demo.py", *SHORT, cwd=tmp_path, timeout=900).returncode == 0
    started = time.monotonic()
    printed = execute(Path("runs/demo/rear_seed0"), tmp_path)
    seconds = time.monotonic() - started
    print(f"the notebook took {seconds:.0f} s")
    assert seconds < 180
    settings = ["sample.labels=[0,1,2,3,4,5,6,7]", "sample.num_images=8", "sample.seed=0", "sample.batch_size=8"]
    command = ["python", "launchers/sample.py", "--checkpoint", "runs/demo/rear_seed0", "--out", "eight.npz", *settings]
    assert launch(*command, cwd=tmp_path).returncode == 0
    images = np.load(tmp_path / "eight.npz")["arr_0"]
    assert hashlib.sha256(images.tobytes()).hexdigest() in printed["Sample"]


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_kill_in_every_stage_changes_nothing(tmp_path: Path) -> None:
    """Each stage of a two-seed demo is killed once at a random moment; the scores equal those of an unbroken one."""
    for name in ("unbroken", "killed"):
        (tmp_path / name).mkdir()
    arguments = ["--seeds", "2", *SHORT]
    process = start_demo(tmp_path / "unbroken", *arguments, fresh=True)
    process.communicate(timeout=900)
    assert process.returncode == 0
    kills = 0
    chance = random.Random(0)
    for stage in planned(DIGITS, [0, 1], SHORT).stages:
        log = tmp_path / "killed/runs/demo/logs" / f"{stage.name}.log"
        kill_when(start_demo(tmp_path / "killed", *arguments, fresh=True), log, delay=chance.uniform(0, 6))
        kills += 1
    process = start_demo(tmp_path / "killed", *arguments, fresh=True)
    _, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    print(f"{kills} kills survived")
    assert check_results(tmp_path / "killed", 2) == check_results(tmp_path / "unbroken", 2)
