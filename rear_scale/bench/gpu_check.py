"""The check of a GPU machine: probes, GPU tests, rates of training, sampling and evaluation, losses and memory of every engine,
and scaling over the GPUs of one machine.

    bash launchers/gpu_check.sh --minutes 30
    bash launchers/gpu_check.sh --small --minutes 5      tiny sizes, on any machine: tests the check itself

The parts with the most information per second come first. Each part has a time limit; a part that fails or runs out of time
does not stop the next one. The same command continues: parts that are done for this commit are not run again. Writes
OUT/report.html, OUT/readme_rows.md, and the output of each part to OUT/parts/.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rear_scale import cli
from rear_scale.bench import gpu_runs
from rear_scale.bench.gpu_probes import PROBES
from rear_scale.config import InputError
from rear_scale.device import uses_cuda
from rear_scale.files import write_text_atomically
from rear_scale.parallel import facts
from rear_scale.places import ROOT
from rear_scale.progress import say
from rear_scale.report.page import Section, Table, write_page
from rear_scale.run.versions import commit
from rear_scale.world import end_with_parent

_LEAST_S = 5.0  # no part is started with less time left
_BENCH = "launchers/bench.py"
_TINY = ["model.depth=1", "model.width=32", "train.micro_batch_size=2", "sample.batch_size=2"]
# Micro-batch size and distinct classes for each model size, for a GPU of 141 GB. On smaller GPUs some parts fail (out of memory).
_SIZES = {"s": (256, 109), "l": (128, 109), "b": (192, 109), "xl": (64, 64), "xxl": (48, 48)}


@dataclass(frozen=True)
class Part:
    """A question, and the process or function that answers it."""

    name: str
    decides: str
    limit_s: float
    command: list[str] | None  # None = `judge` alone answers it, without a process
    needs: str | None = None  # a package without which the part is left out
    gpus: int = 0  # the number of GPUs that it needs
    after: tuple[str, ...] = ()  # the parts whose answers it needs
    prepare: Callable[[], None] | None = None  # called before the process
    judge: Callable[[], str] | None = None  # returns the answer after the process; None = taken from its output


@dataclass(frozen=True)
class Answer:
    """The result of a part."""

    state: str  # done | failed | out of time | left out
    line: str
    seconds: float = 0.0
    commit: str | None = None


def parts(out: Path, small: bool) -> list[Part]:
    """All parts, those with the most information first."""
    python = [sys.executable]
    tiny = ["--small"] if small else []
    probes = [
        Part(f"probe_{name}", decides, 90, [*python, "-m", "rear_scale.bench.gpu_probes", name, *tiny])
        for name, decides in zip(
            PROBES,
            (
                "the peak rates of the device",
                "whether attention dropout has the configured probability",
                "which attention kernel training should use",
                "whether a kernel builds a plan for each length of the cache",
                "what norms of queries and keys cost, and what compiling gives",
                "when modulation by class is faster than for every image",
                "layout and precision of decoding",
                "whether the sampler can use CUDA graphs",
            ),
            strict=True,
        )
    ]
    tests = Part(
        "tests", "whether kernels agree", 240, [*python, "-m", "pytest", "-q", "-m", "gpu", "tests"], "pytest", 1
    )
    compiler = [*python, "-m", "rear_scale.bench.compile_start", *tiny]
    start = Part("compiler_start", "seconds that torch.compile takes, with a cold and a warm cache", 240, compiler)
    train = [_train(out, name, small) for name in ("s", "l")]
    sample = [_sample(out, name, small) for name in ("s", "l")]
    more = [] if small else [make(out, name, small) for name in ("b", "xl", "xxl") for make in (_train, _sample)]
    variants = [] if small else _variants(out)
    scaling = [_scaling(out, strategy) for strategy in ("ddp", "fsdp2", "zero2")]
    return [
        *probes,
        tests,
        *train,
        *sample,
        *_engines(out, small),
        _evaluation(out, small),
        start,
        *scaling,
        *more,
        *variants,
    ]


def _train(out: Path, size: str, small: bool) -> Part:
    batch, classes = _SIZES[size]
    overrides = _TINY if small else [f"train.micro_batch_size={batch}"]
    words = ["--config", "bench_cpu.yaml" if small else f"rear_{size}.yaml", *overrides]
    words += ["--global-batch", str(2 if small else batch), "--classes", str(2 if small else classes)]
    return _bench(out, f"train_{size}", "images/s of a training step", "train", words, 1 if small else 5)


def _sample(out: Path, size: str, small: bool) -> Part:
    words = ["--config", *(["bench_cpu.yaml", *_TINY] if small else [f"rear_{size}.yaml", "sample.batch_size=256"])]
    words += ["--classes", "2" if small else "6"]
    return _bench(out, f"sample_{size}", "images/s of the sampler", "sample", words, 1 if small else 3)


def _variants(out: Path) -> list[Part]:
    """Training and sampling of reAR-S without one of the settings that make them faster, and the plain training step."""
    batch, classes = _SIZES["s"]
    alone = ["--config", "rear_s.yaml", f"train.micro_batch_size={batch}", "--global-batch", str(batch)]
    beside = ["--config", "rear_s.yaml", "train.micro_batch_size=128", "--classes", "54"]
    sample = ["--config", "rear_s.yaml", "sample.batch_size=256", "--classes", "6", "--alone"]
    return [
        _bench(out, "sample_s_uncompiled", "what compiled steps give", "sample", [*sample, "sample.compile=false"], 3),
        _bench(out, "train_s_uncompiled", "what compiled blocks give", "train",
            [*alone, "--classes", str(classes), "train.compile=false"], 5),
        _bench(out, "train_s_per_sample", "what modulation by class gives", "train",
            [*alone, "--classes", str(batch), "model.modulation=per_sample"], 5),
        _bench(out, "train_s_plain", "the plain training step", "train", beside, 3),
        _bench(out, "sample_s_no_graphs", "what CUDA graphs give", "sample", [*sample, "sample.cuda_graphs=false"], 1),
    ]  # fmt: skip


def _engines(out: Path, small: bool) -> list[Part]:
    """The parts that run every engine and compare its memory with the formula."""
    sizes, device_type = (gpu_runs.SMALL if small else gpu_runs.LARGE), "cuda" if uses_cuda() else "cpu"
    engine_parts = [
        Part("tokens", "data of the runs below", 60, None, judge=partial(gpu_runs.write_tokens, out, sizes)),
    ]
    for run in gpu_runs.RUNS:
        name = f"trajectory_{run.name}"
        others = {other for other in (gpu_runs.REFERENCE, run.goes_on) if other is not None and other != run.name}
        engine_parts.append(
            Part(
                name,
                "whether losses are those of single in bf16",
                170 if run.name == "compiled" else 120,
                gpu_runs.command(run, out, sizes),
                run.needs,
                after=("tokens", *(f"trajectory_{other}" for other in sorted(others))),
                prepare=partial(gpu_runs.prepare, run, out),
                judge=partial(_trajectory, run, out, sizes),
            )
        )
        if run.formula:
            judge = partial(gpu_runs.memory, run, out, sizes, device_type)
            decides = "whether its memory agrees with the formula"
            engine_parts.append(Part(f"memory_{run.name}", decides, 10, None, run.needs, after=(name,), judge=judge))
    return engine_parts


def _trajectory(run: gpu_runs.Run, out: Path, sizes: gpu_runs.Sizes) -> str:
    gpu_runs.keep_metrics(run, out)
    return gpu_runs.trajectory(run, out, sizes)


def _evaluation(out: Path, small: bool) -> Part:
    file = str(out / "parts" / "evaluation.object.json")
    command = [sys.executable, "-m", "rear_scale.bench.gpu_evaluation", *(["--small"] if small else []), "--out", file]
    return Part("evaluation", "images/s of generating, decoding and features", 120, command)


def _bench(out: Path, name: str, decides: str, mode: str, words: list[str], rounds: int) -> Part:
    file = str(out / "parts" / f"{name}.object.json")
    return Part(name, decides, 170, [sys.executable, _BENCH, mode, *words, "--rounds", str(rounds), "--out", file])


def _scaling(out: Path, strategy: str) -> Part:
    name = f"scaling_{strategy}"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "gpu",
        _BENCH,
        "train",
    ]
    command += ["--config", "rear_l.yaml", f"strategy={strategy}", "train.micro_batch_size=32"]
    needs = facts.named(strategy).needs
    file = str(out / "parts" / f"{name}.object.json")
    return Part(name, "images/s of all GPUs of this machine", 150, [*command, "--out", file], needs, 2)


def run(chosen: Sequence[Part], out: Path, minutes: float, gpus: int, clock: Callable[[], float]) -> dict[str, Answer]:
    """The answers by name of the part: earlier answers for this commit, and as many new ones as the time allows."""
    deadline = clock() + 60 * minutes
    answers: dict[str, Answer] = {}
    (out / "parts").mkdir(parents=True, exist_ok=True)
    for part in chosen:
        answers[part.name] = _earlier(part, out) or _answer(part, out, deadline - clock(), gpus, answers)
        say(f"{part.name}: {answers[part.name].state}; {answers[part.name].line}")
        write_text_atomically(out / "parts" / f"{part.name}.json", json.dumps(asdict(answers[part.name])) + "\n")
        report(chosen, answers, out)
    return answers


def _earlier(part: Part, out: Path) -> Answer | None:
    try:
        answer = Answer(**json.loads((out / "parts" / f"{part.name}.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return answer if answer.state == "done" and answer.commit == commit() else None


def _answer(part: Part, out: Path, left_s: float, gpus: int, answers: dict[str, Answer]) -> Answer:
    if part.gpus > gpus:
        return Answer("left out", f"needs {part.gpus} GPUs, and there are {gpus}")
    if part.needs is not None and importlib.util.find_spec(part.needs) is None:
        return Answer("left out", f"{part.needs} is not installed")
    if left_s < _LEAST_S:
        return Answer("out of time", "not started")
    lacking = [name for name in part.after if name not in answers or answers[name].state != "done"]
    if lacking:
        return Answer("left out", f"needs {lacking[0]}, which has no answer")
    started = time.monotonic()
    try:
        if part.prepare is not None:
            part.prepare()
        answer, output = _process(part, out, left_s)
        if answer is None:
            answer = Answer("done", _line(part, out, output) if part.judge is None else part.judge(), commit=commit())
    except Exception as error:  # a failed part must not stop the others
        answer = Answer("failed", f"{type(error).__name__}: {error}".splitlines()[0][:300])
    return replace(answer, seconds=time.monotonic() - started)


def _process(part: Part, out: Path, left_s: float) -> tuple[Answer | None, str]:
    """An Answer if the part's process failed or ran out of time (None if it succeeded, or if there is none), and its output."""
    if part.command is None:
        return None, ""
    path, started = out / "parts" / f"{part.name}.log", time.monotonic()
    with (
        open(path, "w") as log,
        subprocess.Popen(
            part.command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
            # End the part with this process: otherwise it would go on using the GPU and its run folder.
            preexec_fn=partial(end_with_parent, signal.SIGKILL),
        ) as process,
    ):
        try:
            output, _ = process.communicate(timeout=min(part.limit_s, left_s))
        except BaseException as stop:
            os.killpg(process.pid, signal.SIGKILL)  # also ends the ranks that it has started
            if isinstance(stop, subprocess.TimeoutExpired):
                return Answer("out of time", f"ended after {time.monotonic() - started:.0f} s"), ""
            raise
    if process.returncode != 0:
        lines = path.read_text().splitlines() or output.splitlines() or [""]
        return Answer("failed", f"exit code {process.returncode}: {lines[-1][:300]}"), output
    return None, output


def _line(part: Part, out: Path, output: str) -> str:
    values = _object(part, out)
    if values is None:
        return (output.strip().splitlines() or [""])[-1]
    line = f"{values['images_per_s']:.1f} images/s"
    if values.get("ratio"):
        line += f", {values['ratio']:.2f}x the plain reference"
    if "alone" in values:
        line += f" ({', '.join(f'{name} alone {rate:.1f}' for name, rate in values['alone'].items())})"
    if "share_of_limit" in values:
        line += f", {values['share_of_limit']:.2f} of the measured limit"
    return line


def _object(part: Part, out: Path) -> dict[str, Any] | None:
    path = out / "parts" / f"{part.name}.object.json"
    return json.loads(path.read_text()) if path.exists() else None


def report(chosen: Sequence[Part], answers: dict[str, Answer], out: Path) -> None:
    """Writes report.html and readme_rows.md with the answers so far."""
    device = torch.cuda.get_device_name() if uses_cuda() else "CPU"
    rows = [
        [part.name, part.decides, answer.state, answer.line, f"{answer.seconds:.0f}"]
        for part in chosen
        if (answer := answers.get(part.name)) is not None
    ]
    commands = "\n".join(shlex.join(part.command) for part in chosen if part.command)
    about = f"{device}, torch {torch.__version__}, commit {commit()}"
    table = Table(["part", "what it decides", "state", "answer", "seconds"], rows)
    write_page(out / "report.html", "GPU check", [Section(about, table=table), Section("Commands", code=commands)])
    lines = []
    for part in chosen:
        values = _object(part, out)
        if part.command and values is not None and part.name in answers and answers[part.name].state == "done":
            ratio = f"{values['ratio']:.1f}x" if values.get("ratio") else "-"
            command = shlex.join(["python", *part.command[1:]]).split(" --out ")[0]
            lines.append(f"| {device}, {part.name} | {values['images_per_s']:.1f} | {ratio} | `{command}` ({about}) |")
    write_text_atomically(out / "readme_rows.md", "".join(f"{line}\n" for line in lines))


def _with_needed(known: Sequence[Part], names: set[str]) -> list[Part]:
    """The parts with these names and the parts whose answers they need."""
    for part in reversed(known):  # a part comes after those that it needs
        if part.name in names:
            names.update(part.after)
    return [part for part in known if part.name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="time limit of the whole check (default: 30)")
    parser.add_argument("--small", action="store_true", help="tiny sizes, for any device")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"), metavar="FOLDER")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="run only these parts, and those that they need")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    known = parts(out, arguments.small)
    names = [part.name for part in known]
    for name in arguments.parts or []:
        if name not in names:
            raise InputError(f"--parts {name} is not the name of a part. Use some of {', '.join(names)}")
    chosen = known if arguments.parts is None else _with_needed(known, set(arguments.parts))
    gpus = torch.cuda.device_count() if uses_cuda() else 0
    if gpus == 0 and not arguments.small:
        raise InputError("there is no GPU to check. Use --small to test the check itself on this machine")
    run(chosen, out, arguments.minutes, gpus, time.monotonic)
    say(f"{out / 'report.html'}: written")


if __name__ == "__main__":
    cli.run(main)
