"""launchers/gpu_check.sh: its small form on this machine, and how parts fail, run out of time and continue."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from helpers import ROOT, environment, launch

from rear_scale import config
from rear_scale.bench import compile_start, gpu_check, gpu_evaluation, gpu_runs
from rear_scale.bench.gpu_check import Answer, Part
from rear_scale.bench.gpu_probes import PROBES
from rear_scale.parallel.memory import memory_per_rank

RUNS = {run.name: run for run in gpu_runs.RUNS}


def part(name: str, code: str, limit_s: float = 60, needs: str | None = None, gpus: int = 0) -> Part:
    return Part(name, "something", limit_s, [sys.executable, "-S", "-c", code], needs, gpus)


def test_a_part_that_fails_does_not_stop_the_next(tmp_path: Path) -> None:
    chosen = [
        part("good", "print('first'); print('last line')"),
        part("bad", "import sys; print('why', file=sys.stderr); sys.exit(3)"),
        part("slow", "import time; time.sleep(60)", limit_s=0.3),
        part("other", "", needs="a_package_that_nobody_has"),
        part("many", "", gpus=2),
        Part("judged", "something", 60, None, judge=lambda: "in words"),
        Part("unjudged", "something", 60, [sys.executable, "-S", "-c", ""], judge=lambda: json.loads("{")),
        Part("unprepared", "something", 60, None, prepare=lambda: (tmp_path / "missing").unlink(), judge=str),
        Part("needs_bad", "something", 60, None, judge=str, after=("good", "bad")),
        part("after", "print('still asked')"),
    ]
    found = gpu_check.run(chosen, tmp_path, 5, 1, clock=iter(range(100)).__next__)
    assert {
        name: (answer.state, answer.line) for name, answer in found.items() if name not in ("slow", "unprepared")
    } == {
        "good": ("done", "last line"),
        "bad": ("failed", "exit code 3: why"),
        "other": ("left out", "a_package_that_nobody_has is not installed"),
        "many": ("left out", "needs 2 GPUs, and there are 1"),
        "judged": ("done", "in words"),
        "unjudged": (
            "failed",
            "JSONDecodeError: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        ),
        "needs_bad": ("left out", "needs bad, which has no answer"),
        "after": ("done", "still asked"),
    }
    assert found["slow"].state == "out of time"
    assert found["unprepared"].line.startswith("FileNotFoundError")
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


def test_a_killed_check_takes_its_process_with_it(tmp_path: Path) -> None:
    number = tmp_path / "number"
    sleeps = part("sleeps", f"import os, time; open({str(number)!r}, 'w').write(str(os.getpid())); time.sleep(3600)")
    check = multiprocessing.get_context("fork").Process(
        target=gpu_check.run, args=([sleeps], tmp_path, 5, 0, time.monotonic)
    )
    check.start()
    while not (number.exists() and number.read_text()):
        time.sleep(0.02)
    asked = psutil.Process(int(number.read_text()))
    check.kill()
    check.join()
    asked.wait(300)
    assert gpu_check._earlier(sleeps, tmp_path) is None


@pytest.mark.timeout(1000)
def test_the_small_form_runs_on_this_machine(tmp_path: Path) -> None:
    names = ["probe_graphs", "tests", "train_s", "sample_s", "trajectory_fsdp2", "memory_single", "scaling_zero2"]
    words = ["--small", "--minutes", "15", "--out", tmp_path, "--parts", *names]
    done = launch("python", "-m", "rear_scale.bench.gpu_check", *words, timeout=900)
    assert done.returncode == 0, done.stderr
    states = {
        line.split(":")[0]: line.split(": ")[1].split(";")[0] for line in done.stderr.splitlines() if ": " in line
    }
    assert states["probe_graphs"] == states["train_s"] == states["sample_s"] == "done", done.stderr
    assert states["tests"] == states["scaling_zero2"] == "left out"
    assert "trajectory_fsdp2: done; ok: losses within" in done.stderr
    assert "memory_single: done; not compared on a CPU" in done.stderr
    assert not list((tmp_path / "runs").iterdir())  # logs are kept elsewhere, checkpoints nowhere
    assert "tokens as step by step: yes" in done.stderr
    rows = (tmp_path / "readme_rows.md").read_text().splitlines()
    assert len(rows) == 2
    assert "launchers/bench.py train --config bench_cpu.yaml" in rows[0]


def test_the_script_starts_it() -> None:
    command = ["bash", "launchers/gpu_check.sh", "--small", "--parts", "nothing"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr.startswith("error: --parts nothing")) == (2, True), done.stderr


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


def test_a_part_is_asked_with_those_that_it_needs(tmp_path: Path) -> None:
    known = gpu_check.parts(tmp_path, small=False)
    assert [one.name for one in gpu_check._with_needed(known, {"memory_zero1", "probe_graphs"})] == [
        "probe_graphs",
        "tokens",
        "trajectory_single",
        "trajectory_zero1",
        "memory_zero1",
    ]
    resumed = [one.name for one in gpu_check._with_needed(known, {"trajectory_resumed"})]
    assert resumed == ["tokens", "trajectory_single", "trajectory_half", "trajectory_resumed"]


@pytest.mark.parametrize("name", ["again", "fp32", "zero3", "compiled", "half", "resumed"])
def test_a_run_has_a_config_and_differs_by_what_it_tries(name: str, tmp_path: Path) -> None:
    sizes = gpu_runs.LARGE
    cfg = config.load(sizes.config, gpu_runs.overrides_of(RUNS[name], tmp_path, sizes))
    plan = config.derive(cfg, 1, sizes.samples)
    assert (plan.last_step, plan.accumulation) == (10 if name == "half" else 20, 2)
    assert (cfg.model.dropout, cfg.model.attn_dropout, cfg.data.val) == (0, 0, None)
    assert cfg.strategy.name == {"zero3": "zero3", "resumed": "fsdp2"}.get(name, "single")
    assert cfg.train.precision == ("fp32" if name == "fp32" else "bf16")
    assert cfg.train.compile == (name == "compiled")


def write_metrics(out: Path, name: str, losses: list[float | None], peak: float = 1.0) -> None:
    (out / "parts").mkdir(exist_ok=True)
    lines = [
        {"step": step, "loss": loss, "grad_norm": 1.0, "images_per_s": 8.0, "peak_mem_gib": peak}
        for step, loss in enumerate(losses, 1)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (out / "parts" / f"trajectory_{name}.metrics.jsonl").write_text(text)


@pytest.mark.parametrize(
    ("name", "losses", "verdict"),
    [
        ("single", [8.0, 7.0, 6.0, 5.0], "ok: the others"),
        ("again", [8.0, 7.0, 6.0, 5.0], "ok: the same bits"),
        ("again", [8.0, 7.0, 6.0000001, 5.0], "not ok: loss of step 3 is 6.0000001 and was 6.0"),
        ("fsdp2", [8.0, 7.0, 6.05, 5.0], "ok: losses within 8.3e-03 of single's (step 3; 0.01 allowed)"),
        ("zero1", [8.0, 7.0, 5.93, 5.0], "not ok: losses within 1.2e-02 of single's (step 3; 0.01 allowed)"),
        ("fp32", [8.0, 7.0, 5.93, 5.0], "ok: losses within 1.2e-02"),
        ("resumed", [8.0, 7.0, 6.0, 5.01], "not ok: losses within 2.0e-03 of single's (step 4; 0.001 allowed)"),
        ("half", [8.0, 7.0], "ok: losses within 0.0e+00"),
        ("compiled", [8.0, None, 6.0, 5.0], "not ok: losses within inf of single's (step 2"),
    ],
)
def test_losses_beside_those_of_single(name: str, losses: list[float | None], verdict: str, tmp_path: Path) -> None:
    write_metrics(tmp_path, "single", [8.0, 7.0, 6.0, 5.0])
    write_metrics(tmp_path, name, losses)
    assert gpu_runs.trajectory(RUNS[name], tmp_path, gpu_runs.SMALL).startswith(verdict)


def test_a_run_that_ended_early_has_no_verdict(tmp_path: Path) -> None:
    write_metrics(tmp_path, "single", [8.0, 7.0, 6.0, 5.0])
    write_metrics(tmp_path, "ddp", [8.0, 7.0, 6.0])
    with pytest.raises(ValueError, match="ddp logged 3 of the steps 1 to 4"):
        gpu_runs.trajectory(RUNS["ddp"], tmp_path, gpu_runs.SMALL)


@pytest.mark.parametrize(("name", "factor", "verdict"), [("fsdp2", 1.04, "ok: "), ("selective", 0.94, "not ok: ")])
def test_memory_beside_the_formula(name: str, factor: float, verdict: str, tmp_path: Path) -> None:
    cfg = config.load("rear_s.yaml", gpu_runs.overrides_of(RUNS[name], tmp_path, gpu_runs.LARGE))
    formula = memory_per_rank(cfg, 1, 2, device="cuda").peak / 2**30
    write_metrics(tmp_path, name, [8.0] * 20, factor * formula)
    line = gpu_runs.memory(RUNS[name], tmp_path, gpu_runs.LARGE, "cuda")
    assert line.startswith(f"{verdict}peak {factor * formula:.2f} GiB, formula {formula:.2f} GiB ({factor - 1:+.1%}")


def test_rates_of_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = gpu_check._evaluation(tmp_path, small=True)
    assert asked.command is not None
    (tmp_path / "parts").mkdir()
    monkeypatch.setattr(sys, "argv", asked.command[2:])
    gpu_evaluation.main()
    rates = json.loads((tmp_path / "parts/evaluation.object.json").read_text())
    assert list(rates["alone"]) == ["generating", "decoding", "features"]
    assert rates["images_per_s"] > 0
    assert all(rate > 0 for rate in rates["alone"].values())
    gpu_check.report([asked], {"evaluation": Answer("done", gpu_check._line(asked, tmp_path, ""))}, tmp_path)
    assert "features alone" in (tmp_path / "report.html").read_text()
    assert "rear_scale.bench.gpu_evaluation --small" in (tmp_path / "readme_rows.md").read_text()


def test_the_compilers_time_with_a_cold_and_a_warm_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[tuple[str, str]] = []

    def bench(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        mode, cache = command[2], Path(options["env"]["TORCHINDUCTOR_CACHE_DIR"])
        state = "warm" if (cache / mode).exists() else "cold"
        (cache / mode).touch()
        started.append((mode, state))
        assert f"{mode}.compile=true" in command
        first = {"cold": 9.0, "warm": 2.0}[state]
        values = {"images_per_s": 8.0, "first_step_s": first, "first_batch_s": first + 1}
        return subprocess.CompletedProcess(
            command, 0, json.dumps({**values, "global_batch_size": 4, "batch_size": 2}), ""
        )

    monkeypatch.setattr(compile_start.subprocess, "run", bench)
    monkeypatch.setattr(sys, "argv", ["compile_start", "--small"])
    compile_start.main()
    assert started == [("train", "cold"), ("sample", "cold"), ("train", "warm"), ("sample", "warm")]
    assert capsys.readouterr().out == (
        "first training step 9.0 s (cold cache), 2.0 s (warm), later 0.500 s; "
        "first sampled batch 10.0 s (cold cache), 3.0 s (warm), later 0.250 s\n"
    )
    fails = subprocess.CompletedProcess([], 1, "", "Traceback\nInvalidCxxCompiler: no C++ compiler")
    monkeypatch.setattr(compile_start.subprocess, "run", lambda command, **_: fails)
    compile_start.main()
    assert (
        "could not be measured here: launchers/bench.py train ended with exit code 1: InvalidCxx"
        in capsys.readouterr().out
    )


@pytest.mark.long  # two minutes of the compiler on a CPU
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on CPUs")
def test_the_compiler_is_faster_with_a_warm_cache_on_this_machine(tmp_path: Path) -> None:
    found = compile_start.measure("bench_cpu.yaml", list(compile_start.TINY), 2, tmp_path)
    for mode, times in found.items():
        assert times["cold"] > times["warm"] > times["later"], (mode, times)


@pytest.mark.parametrize("name", ["attention_kernels", "modulation_rows", "head_norms"])
def test_probes_answer_in_their_small_form(name: str) -> None:
    line = PROBES[name](torch.device("cpu"), True)
    words = {
        "attention_kernels": "training ",
        "modulation_rows": "2 classes: gather",
        "head_norms": "not measured on a CPU",
    }
    assert words[name] in line
