"""The stages of the demo, each a command of its own, run in order and not twice."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from rear_scale.config import InputError, derive, load
from rear_scale.files import write_text_atomically
from rear_scale.progress import say
from rear_scale.world import end_with_parent, free_port

FOLDER = Path("runs/demo")  # relative to the current directory, as configs/demo.yaml has it
_ROOT = Path(__file__).resolve().parents[2]
MODELS = {"ar": "demo_ar.yaml", "rear": "demo.yaml"}

_GRID_EVERY_IMAGES = 19_200  # 300 steps


@dataclass(frozen=True)
class Stage:
    name: str
    title: str
    command: list[str]  # as a user would type it in the project's root
    product: Path  # what later stages need of it: without it, it is not finished


def run_folder(model: str, seed: int) -> Path:
    return FOLDER / f"{model}_seed{seed}"


def samples_file(model: str, seed: int) -> Path:
    return run_folder(model, seed) / "samples.npz"


def stages(seeds: list[int], overrides: list[str]) -> list[Stage]:
    """All stages up to the report. The overrides go to both trainings. Raises InputError for what these would refuse."""
    for config in MODELS.values():
        derive(load(config, overrides), _num_processes(), None)
    deepspeed = ["deepspeed", "--num_gpus", str(_num_processes())]
    torchrun = ["torchrun", "--nproc-per-node", str(_num_processes())]
    images, tokens = FOLDER / "images", FOLDER / "tokens"
    found = [
        Stage(
            "images",
            "digits as image shards",
            ["python", "data/prepare_digits.py", "--out", str(images)],
            images / "val/index.json",
        ),
        Stage(
            "tokenizer",
            "train the tokenizer",
            ["python", "launchers/train_tokenizer.py", "--config", "demo.yaml"],
            Path(load("demo.yaml").tokenizer.weights),
        ),
    ]
    for split in ("train", "val"):
        paths = [f"pretokenize.images={images / split}", f"pretokenize.out={tokens / split}"]
        command = [*torchrun, "launchers/pretokenize.py", "--config", "demo.yaml", *paths]
        found.append(
            Stage(f"tokens_{split}", f"images to token shards ({split})", command, tokens / split / "index.json")
        )
    for seed in seeds:
        for model, config in MODELS.items():
            label = f"{'vanilla AR' if model == 'ar' else 'reAR'}, seed {seed}"
            run = run_folder(model, seed)
            names = [f"run.name={model}_seed{seed}", f"run.dir={run}", f"run.seed={seed}"]
            if seed == seeds[0]:
                names += [f"sample.grid_every_images={_GRID_EVERY_IMAGES}"]  # the report shows this seed
            train = [*deepspeed, "launchers/train.py", "--config", config, *names, *overrides]
            sample = [
                *torchrun,
                "launchers/sample.py",
                "--checkpoint",
                str(run),
                "--out",
                str(samples_file(model, seed)),
            ]
            evaluate = [
                *torchrun,
                "launchers/evaluate.py",
                "--checkpoint",
                str(run),
                "--samples",
                str(samples_file(model, seed)),
            ]
            found += [
                Stage(f"train_{model}_{seed}", f"train {label}", train, run / "checkpoints/latest"),
                Stage(f"sample_{model}_{seed}", f"sample {label}", sample, samples_file(model, seed)),
                Stage(f"evaluate_{model}_{seed}", f"evaluate {label}", evaluate, run / "result.json"),
            ]
    return found


def _num_processes() -> int:
    """Two; where there are GPUs, at most one per GPU."""
    return min(2, torch.cuda.device_count()) or 2


class Progress:
    """Which stages are finished, in FOLDER/stages: one file per stage with its command and its seconds."""

    def __init__(self, overrides: list[str]) -> None:
        self.folder = FOLDER / "stages"
        fingerprint = _fingerprint(overrides)
        mark = self.folder / "fingerprint"
        if mark.exists() and mark.read_text() != fingerprint:
            _set_aside()
        self.folder.mkdir(parents=True, exist_ok=True)
        if not mark.exists():
            write_text_atomically(mark, fingerprint)

    def run(self, stage: Stage, number: int, total: int) -> None:
        """Runs a stage unless it is finished. Raises InputError when its command fails."""
        mark, line = self.folder / f"{stage.name}.done", shlex.join(stage.command)
        if mark.exists() and mark.read_text().splitlines()[0] == line and stage.product.exists():
            say(f"[{number}/{total}] {stage.title}: finished before")
            return
        say(f"[{number}/{total}] {stage.title}\n    {line}")
        log = FOLDER / "logs" / f"{stage.name}.log"
        log.parent.mkdir(exist_ok=True)
        started = time.monotonic()
        with open(log, "ab") as output:
            # Progress comes on stderr; what the launchers themselves have to say goes to the log.
            code = subprocess.run(
                _executable(stage.command),
                stdout=output,
                env=_environment(stage.command[0]),
                preexec_fn=partial(end_with_parent, signal.SIGTERM),
            ).returncode
        if code:
            raise InputError(
                f"the stage '{stage.title}' failed with exit code {code}; see above and {log}. The same command continues it"
            )
        write_text_atomically(mark, f"{line}\n{time.monotonic() - started:.1f}\n")

    def seconds(self, stage: Stage) -> float:
        return float((self.folder / f"{stage.name}.done").read_text().splitlines()[1])


def _executable(command: list[str]) -> list[str]:
    """The command with this environment's programs, whatever PATH says, and a port that nobody else uses."""
    program, *arguments = command
    programs = Path(sys.executable).parent
    arguments = [str(_ROOT / word) if word.startswith(("launchers/", "data/")) else word for word in arguments]
    if program == "deepspeed":
        arguments = ["--master_port", str(free_port()), *arguments]
    if program == "torchrun":
        arguments = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *arguments]
    return [str(programs / program), *arguments]


def _environment(program: str) -> dict[str, str]:
    # deepspeed starts `python` by name on the way.
    found = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    if program != "python":
        # torchrun would set 1 and say so at length.
        found.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // _num_processes())))
    return found


def _fingerprint(overrides: list[str]) -> str:
    """A hash of the code and settings that the results depend on: results of other code are not continued."""
    digest = hashlib.sha256(repr(overrides).encode())
    for pattern in ("rear_scale/**/*.py", "configs/**/*.yaml", "launchers/*.py", "data/*.py"):
        for path in sorted(_ROOT.glob(pattern)):
            digest.update(path.relative_to(_ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def _set_aside() -> None:
    number = 1
    while (aside := FOLDER.with_name(f"{FOLDER.name}.old{number}")).exists():
        number += 1
    say(f"{FOLDER} was made by other code or settings: it is kept as {aside}, and the demo starts afresh")
    shutil.move(FOLDER, aside)
