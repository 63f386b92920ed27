"""The commands of a study's cells as resumable stages: run one after another, several cells side by side, or one cell in each
task of a SLURM job array.

Cells are independent: where one fails, the others are run all the same. Several processes may run the same study; each cell is
run by one of them.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rear_scale.config import InputError
from rear_scale.files import write_text_atomically
from rear_scale.locks import locked
from rear_scale.places import IN_CHECKOUT, as_typed
from rear_scale.progress import say
from rear_scale.run.requeue import read_status
from rear_scale.run.side_by_side import side_by_side
from rear_scale.run.stages import Stage, StageFolder
from rear_scale.scaling.study_file import StudyFile
from rear_scale.scaling.study_grid import Cell, sampling_overrides, training_identity
from rear_scale.shards.inputs import Inputs

RESULT, UNGUIDED, THROUGHPUT = "result.json", "unguided.json", "throughput.json"
WITHOUT_GUIDANCE = ("sample.guidance.schedule=constant", "sample.guidance.scale=1.0")
_PROCESSES = ("--nproc-per-node", "--nproc_per_node", "--num_gpus")
_TITLES = {
    "train": "train",
    "sample": "sample",
    "evaluate": "evaluate",
    "unguided": "evaluate without guidance",
    "throughput": "time the sampler of",
}


@dataclass(frozen=True)
class Runner:
    """A study with its cells, and the words that start its commands."""

    study: StudyFile
    cells: Sequence[Cell]
    start: tuple[str, ...]
    only: str | None = None  # the name of the one cell to run; None = all
    jobs: int = 1  # cells that are run at a time

    @property
    def stages(self) -> StageFolder:
        return StageFolder(self.study.folder)

    def run_folder(self, cell: Cell) -> Path:
        return self.study.folder / cell.name

    def trained_by(self, cell: Cell) -> Cell:
        """The cell whose training makes this one's weights: itself, or an earlier one that differs in sampling or scores."""
        same = training_identity(cell.cfg)
        return next(one for one in self.cells if self._trainings[one.name] == same)

    @cached_property
    def _trainings(self) -> dict[str, str]:
        return {cell.name: training_identity(cell.cfg) for cell in self.cells}

    def preparation(self) -> list[Stage]:
        """The stages that make the data of a scale, each dependent on the one before."""
        found: list[Stage] = []
        for one in self.study.prepare:
            inputs: Inputs = {found[-1].name: found[-1].key} if found else {}
            words = shlex.split(one.command)
            # The number of processes, which is that of the machine's GPUs, changes nothing that is made.
            first = next((at for at, word in enumerate(words) if word.startswith(("launchers/", "data/"))), 0)
            start, command = words[:first], words[first:]
            found.append(Stage(one.name, one.name, command, (one.makes,), inputs, processes_of(words), start))
        return found

    def stages_of(self, cell: Cell) -> list[Stage]:
        """The stages of a cell: its lines of launchers/train.py, sample.py and evaluate.py."""
        trained = self.trained_by(cell) if "train" in self.study.commands else cell
        study, shared = self.study, trained is not cell
        prepared = self.preparation()
        inputs: Inputs = {prepared[-1].name: prepared[-1].key} if prepared else {}
        found: list[Stage] = []
        if shared:
            inputs = {"train": self.stages_of(trained)[0].key}
        for command in study.commands[shared:]:
            words, product = self._words(command, cell, trained)
            found.append(
                Stage(
                    name=f"{cell.name}.{command}",
                    title=f"{_TITLES[command]} {cell.name}",
                    command=words,
                    products=(product,),
                    inputs=inputs,
                    processes=processes_of(self.start) * self.jobs,
                    start=self.start,
                )
            )
            inputs = {command: found[-1].key}
        return found

    def is_done(self, cell: Cell) -> bool:
        return all(self.stages.is_finished(stage) for stage in self.stages_of(cell))

    def failure(self, cell: Cell) -> str | None:
        """Why the last start of a cell failed; None where it did not."""
        try:
            return self._failure_file(cell).read_text().strip()
        except OSError:
            return None

    def prepare(self) -> None:
        """Makes the data of the scale, unless it is there. Other processes that need it wait."""
        if self.study.data is None or not self.study.prepare:
            return
        with locked(self.study.data.with_name(f".{self.study.data.name}.lock")):
            StageFolder(self.study.data).run_all(self.preparation())

    def run(self) -> dict[str, str]:
        """Runs the unfinished stages of all cells. Returns the reason of each cell that failed, by its name.

        Raises InputError where the data cannot be made, and KeyboardInterrupt with a message that says what is left.
        """
        self.prepare()
        chosen = [number for number, cell in enumerate(self.cells) if self.only in (None, cell.name)]
        ended: str | None = None
        try:
            if self.jobs == 1:
                for number in chosen:
                    self._run_cell(number)
            else:
                ended = side_by_side(self.jobs, chosen, self._run_cell)
        except KeyboardInterrupt:
            left = sum(not self.is_done(one) for one in self.cells)
            raise KeyboardInterrupt(f"{left} of {len(self.cells)} cells are left; the same command continues") from None
        failed: dict[str, str] = {}
        for cell in (self.cells[number] for number in chosen):
            reason = self.failure(cell)
            if reason is None and ended is not None and not self.is_done(cell):
                reason = f"a job that runs cells {ended}"
            if reason is not None:
                failed[cell.name] = reason
        return failed

    def _run_cell(self, number: int) -> None:
        """Runs the unfinished stages of a cell, unless another process does. Where one fails, its reason is kept in a file."""
        cell, place = self.cells[number], f"[{number + 1}/{len(self.cells)}] "
        in_use = f"{cell.name} is run by another process"
        try:
            with locked(self.study.folder / f".{cell.name}.lock", in_use):
                self._failure_file(cell).unlink(missing_ok=True)
                try:
                    self._run_stages(cell, place)
                except InputError as error:
                    reason = self._reason(cell, error)
                    self._failure_file(cell).parent.mkdir(exist_ok=True)
                    write_text_atomically(self._failure_file(cell), f"{reason}\n")
                    say(f"{cell.name} failed: {reason}")
        except InputError as error:
            # On file systems without locks, the message goes on with the process that holds it.
            if not str(error).startswith(in_use):
                raise
            say(f"{place}{in_use}: left to it")

    def _run_stages(self, cell: Cell, place: str) -> None:
        """Runs the stages of a cell. Raises InputError for the first one that fails.

        The training that makes a cell's weights may be that of another cell, and is done by whoever needs it first; others
        wait for it, without keeping that cell from its own evaluation.
        """
        trained = self.trained_by(cell)
        if "train" in self.study.commands:
            training = self.stages_of(trained)[0]
            with locked(self.study.folder / f".{trained.name}.train.lock"):
                if trained is cell or not self.stages.is_finished(training):
                    self.stages.run(training, place)
        for stage in self.stages_of(cell):
            if stage.name != f"{cell.name}.train":
                self.stages.run(stage, place)

    def _reason(self, cell: Cell, error: InputError) -> str:
        """The reason of a failure: that which the run has recorded, behind the stage and its log."""
        state, _, recorded = read_status(self.run_folder(cell))
        return f"{error}" + (f" ({recorded})" if state == "failed" and recorded else "")

    def _failure_file(self, cell: Cell) -> Path:
        return self.study.folder / "failed" / f"{cell.name}.txt"

    def _words(self, command: str, cell: Cell, trained: Cell) -> tuple[list[str], Path]:
        """The words of a command of a cell, from the launcher on, and what it makes."""
        run, weights = self.run_folder(cell), self.run_folder(trained)
        evaluate = [*self.study.evaluate, *(sampling_overrides(cell, trained) if trained is not cell else ())]
        if command == "train":
            words = [
                "launchers/train.py",
                "--config",
                cell.config,
                *cell.overrides,
                f"run.name={cell.name}",
                f"run.dir={run}",
            ]
            return words, run / "checkpoints/latest"
        if command == "throughput":
            words = [
                "launchers/bench.py",
                "sample",
                "--protocol",
                "rar_table5",
                "--config",
                cell.config,
                *cell.overrides,
            ]
            return [*words, "--out", str(run / THROUGHPUT)], run / THROUGHPUT
        samples = run / "samples.npz"
        if command == "sample":
            return ["launchers/sample.py", "--checkpoint", str(weights), "--out", str(samples), *evaluate], samples
        words = ["launchers/evaluate.py", "--checkpoint", str(weights)]
        if command == "unguided":
            return [*words, "--out", str(run / UNGUIDED), *evaluate, *WITHOUT_GUIDANCE], run / UNGUIDED
        given = ["--samples", str(samples)] if "sample" in self.study.commands else []
        out = ["--out", str(run / RESULT)] if trained is not cell else []
        return [*words, *given, *out, *evaluate], run / RESULT


def processes_of(words: Sequence[str]) -> int:
    """The number of processes that words such as `torchrun --nproc-per-node 2` start on this machine."""
    for option, value in zip(words, words[1:], strict=False):
        if option in _PROCESSES and value.isdecimal():
            return int(value)
    return 1


def submit(runner: Runner, words: Sequence[str], nodes: int) -> str:
    """Submits the unfinished cells as one SLURM job array, and returns the line that did it.

    words: the arguments of launchers/study.py that choose the study. Raises InputError where there is no sbatch, and where
    sbatch refuses the job.
    """
    if not IN_CHECKOUT:
        raise InputError("--slurm needs launchers/slurm/, which an installed copy does not have. Use a checkout")
    numbers = [str(number) for number, cell in enumerate(runner.cells) if not runner.is_done(cell)]
    if not numbers:
        raise InputError(f"all {len(runner.cells)} cells are done. Gather them with --collect")
    array = f"0-{len(runner.cells) - 1}" if len(numbers) == len(runner.cells) else ",".join(numbers)
    command = ["sbatch", f"--array={array}", "--nodes", str(nodes), "launchers/slurm/study.sbatch", *words]
    line = shlex.join(command)
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise InputError(
            f"--slurm needs the program sbatch, which was not found. On a login node, type: {line}"
        ) from error
    if done.returncode:
        raise InputError(f"{line} was refused: {' '.join(done.stderr.split())}. Correct it, and type the line by hand")
    say(done.stdout.strip())
    return line


def lines(runner: Runner) -> list[str]:
    """All command lines of a study, as typed."""
    stages = [*runner.preparation(), *(stage for cell in runner.cells for stage in runner.stages_of(cell))]
    return [as_typed(stage.line) for stage in stages]
