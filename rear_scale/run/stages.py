"""Resumable sequences of command lines (stages). Finished stages are not run again, so that a start after a kill continues.

    train = Stage("train", "train at 1e-4", ["deepspeed", "launchers/train.py", ...], (run / "checkpoints/latest",))
    sample = Stage("sample", "sample at 1e-4", [...], (run / "samples.npz",), {"training": train.key})
    StageFolder("runs/study").run_all([train, sample])
    StageFolder("runs/demo").run_all([data], [[train_a, sample_a], [train_b, sample_b]], jobs=2)

FOLDER/stages/NAME.json     command, inputs and seconds of a finished stage
FOLDER/logs/NAME.log        standard output of every start of a stage
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from rear_scale.config import InputError
from rear_scale.files import write_text_atomically
from rear_scale.places import ROOT, as_typed
from rear_scale.progress import say
from rear_scale.run.side_by_side import side_by_side
from rear_scale.shards.inputs import Inputs, fingerprint
from rear_scale.world import end_with_parent, free_port

# Of the environment: says to a command that it is a stage of a longer job, and of which process.
STAGE_VARIABLE = "REAR_STAGE"
_PASSED_ON_AFTER_S = 1.0


@dataclass(frozen=True)
class Stage:
    """A command line, its output files, and the inputs that these depend on."""

    name: str  # the name of its record and its log
    title: str  # shown to the user
    command: Sequence[str]  # as typed in the project's root
    products: tuple[Path, ...]  # files or folders that must exist afterwards
    inputs: Inputs = field(default_factory=dict)  # inputs of the products besides the command
    processes: int = 1  # the number of processes that the command starts on this machine, among which cores are divided
    start: Sequence[str] = ()  # words in front of the command; a stage that was started in another way is finished too

    @property
    def key(self) -> str:
        """A hash of command and inputs. As an input of a later stage, it makes that stage run again when this one changes."""
        return fingerprint({"command": shlex.join(self.command), "inputs": fingerprint(self.inputs)})

    @property
    def line(self) -> str:
        return shlex.join([*self.start, *self.command])


class StageFolder:
    """The records and logs of stages. Several processes may use a folder at the same time, but not for the same stages."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def run_all(self, stages: Sequence[Stage], lanes: Sequence[Sequence[Stage]] = (), jobs: int = 1) -> None:
        """Runs the unfinished stages in order, and then those of the lanes: each lane in order, so many lanes at a time.

        Raises InputError for the first stage that fails, as `run` does, after the other lanes have ended; and KeyboardInterrupt
        with a message that says what is left.
        """
        every = [*stages, *(stage for lane in lanes for stage in lane)]
        place = {stage.name: f"[{number}/{len(every)}] " for number, stage in enumerate(every, start=1)}
        assert len(place) == len(every), [stage.name for stage in every]
        in_turn = every if jobs == 1 else stages
        for number, stage in enumerate(in_turn, start=1):
            try:
                self.run(stage, place[stage.name])
            except KeyboardInterrupt:
                again = f"the same command continues with stage {number} of {len(every)}, {stage.title}"
                raise KeyboardInterrupt(again) from None
        if jobs > 1:
            try:
                self._run_side_by_side(lanes, jobs, place)
            except KeyboardInterrupt:
                left = sum(not self.is_finished(stage) for stage in every)
                raise KeyboardInterrupt(f"{left} of {len(every)} stages are left; the same command continues") from None

    def _run_side_by_side(self, lanes: Sequence[Sequence[Stage]], jobs: int, place: Mapping[str, str]) -> None:
        reasons: multiprocessing.SimpleQueue[str] = multiprocessing.SimpleQueue()

        def run(number: int) -> None:
            try:
                for stage in lanes[number]:
                    self.run(stage, place[stage.name])
            except InputError as error:
                say(f"error: {error}")
                reasons.put(str(error))

        ended = side_by_side(min(jobs, len(lanes)), range(len(lanes)), run)
        if not reasons.empty():
            raise InputError(reasons.get())
        if ended is not None:
            raise InputError(f"a process that runs stages {ended}. The same command continues with those that are left")

    def run(self, stage: Stage, place: str = "") -> None:
        """Runs a stage unless it is finished. place: text before its title, such as "[1/3] ".

        Raises InputError when the command cannot be started, when it fails, and when it does not make its products.
        """
        changed = self._changed(stage)
        if changed is None:
            say(f"{place}{stage.title}: finished before")
            return
        say(f"{place}{stage.title}{f' again: {changed}' if changed else ''}\n    {as_typed(stage.line)}")
        # Remove the record first: from now on the products may change, even if the command is killed.
        self._record(stage).unlink(missing_ok=True)
        started = time.monotonic()
        self._start(stage)
        missing = _missing(stage)
        if missing:
            raise InputError(
                f"the stage '{stage.title}' ended without an error, but did not make {missing[0]}; see {self._log(stage)}"
            )
        seconds = round(time.monotonic() - started, 1)
        record = {"command": shlex.join(stage.command), "inputs": stage.inputs, "seconds": seconds}
        write_text_atomically(self._record(stage), json.dumps(record, indent=1) + "\n")

    def is_finished(self, stage: Stage) -> bool:
        """Whether a stage would not be run again."""
        return self._changed(stage) is None

    def seconds(self, stage: Stage) -> float:
        """The duration in seconds of the start that finished a stage."""
        record = self._read(stage)
        assert record is not None, stage.name
        return record["seconds"]

    def _changed(self, stage: Stage) -> str | None:
        """The reason why a stage has to run: "" when it has no record; None when it is finished, which means that its products
        exist and were made by this command from these inputs."""
        before = self._read(stage)
        if before is None:
            return ""
        if before["command"] != shlex.join(stage.command):
            return f"its command was {before['command']}"
        names = sorted(before["inputs"].keys() | stage.inputs.keys())
        others = [name for name in names if before["inputs"].get(name) != stage.inputs.get(name)]
        if others:
            return f"its inputs changed ({', '.join(others)})"
        missing = _missing(stage)
        return f"{missing[0]} does not exist" if missing else None

    def _read(self, stage: Stage) -> dict[str, Any] | None:
        try:
            return json.loads(self._record(stage).read_text())
        except (OSError, ValueError):
            return None

    def _start(self, stage: Stage) -> None:
        log = self._log(stage)
        for folder in (log.parent, self._record(stage).parent):
            folder.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as output:
            # Only standard output goes to the log: progress bars and errors on standard error stay visible in the terminal.
            try:
                process = subprocess.Popen(
                    _arguments([*stage.start, *stage.command]),
                    stdout=output,
                    env=_environment(stage.processes),
                    preexec_fn=partial(end_with_parent, signal.SIGTERM),
                )
            except FileNotFoundError as error:
                raise InputError(
                    f"the stage '{stage.title}' needs the program {shlex.split(stage.line)[0]}, which was not found. Install it, "
                    "or add its folder to PATH"
                ) from error
            try:
                code = process.wait()
            except KeyboardInterrupt:
                _wait_for_the_end_of_all()
                raise
        if code:
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
            raise InputError(f"the stage '{stage.title}' {how}; see above and {log}. The same command continues it")

    def _record(self, stage: Stage) -> Path:
        return self.path / "stages" / f"{stage.name}.json"

    def _log(self, stage: Stage) -> Path:
        return self.path / "logs" / f"{stage.name}.log"


def _missing(stage: Stage) -> list[Path]:
    return [path for path in stage.products if not path.exists()]


def _arguments(command: Sequence[str]) -> list[str]:
    """The command with the project's own files by their full paths, and on a port that nobody else uses."""
    program, *arguments = command
    arguments = [str(ROOT / word) if word.startswith(("launchers/", "data/")) else word for word in arguments]
    if program == "deepspeed":
        arguments = ["--master_port", str(free_port()), *arguments]
    if program == "torchrun":
        arguments = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *arguments]
    return [program, *arguments]


def _wait_for_the_end_of_all() -> None:
    """Waits, after Ctrl-C, until a stage and all that it has started have ended, so that nothing goes on unseen.

    They are found by their environment: a launcher may have ended before its ranks. Ctrl-C in a terminal has reached them, but
    a signal of kill this process alone, so that those which live on are asked to end as well; SIGTERM, because a second Ctrl-C
    would keep a training from saving its step.
    """
    family = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(STAGE_VARIABLE) == str(os.getpid()):
                family.append(process)
    _, left = psutil.wait_procs(family, timeout=_PASSED_ON_AFTER_S)
    for process in left:
        with suppress(psutil.Error):
            process.terminate()
    psutil.wait_procs(left)


def _environment(processes: int) -> dict[str, str]:
    """The environment of a command. This Python's folder comes first in PATH, because deepspeed starts `python` by name."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    environment = {**os.environ, "PATH": path, STAGE_VARIABLE: str(os.getpid())}
    if processes > 1:
        # Set here: otherwise torchrun sets 1 and prints a warning.
        environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    return environment
