"""The command of a study: launchers/study.py --config study/NAME.yaml. It runs a grid of training runs, or shows, submits or
gathers it.

    python launchers/study.py --config study/rear_scaling.yaml --dry-run            cells, parameters, FLOPs, GPU-hours
    python launchers/study.py --config study/rear_scaling.yaml --scale digits       the same study on two CPU cores
    python launchers/study.py --config study/own.yaml --jobs 8 --start python       eight cells at a time, each on one GPU
    python launchers/study.py --config study/table4.yaml --slurm --nodes 2          one SLURM job array
    python launchers/study.py --config study/table4.yaml --collect                  study.csv, figures and study.md

Every cell is made by the lines of launchers/train.py, sample.py and evaluate.py that are printed, one after another. The same
command continues after a kill: finished commands are not run again. Where a cell fails, the others are run, and the exit code
is 1. Overrides in Hydra's sweep syntax replace or add words of every grid: run.seed=range(5).
"""

from __future__ import annotations

import argparse
import shlex
import signal
from dataclasses import replace
from pathlib import Path

from rear_scale import cli
from rear_scale.config import InputError
from rear_scale.progress import say
from rear_scale.scaling.guidance import Search, Space, run_of
from rear_scale.scaling.study_collect import collect, write_csv
from rear_scale.scaling.study_file import StudyFile, checked_jobs, read_study
from rear_scale.scaling.study_grid import expand
from rear_scale.scaling.study_plan import dry_run
from rear_scale.scaling.study_run import Runner, lines, processes_of, submit
from rear_scale.scaling.study_summary import write_summary


def main(arguments: list[str]) -> None:
    """Runs the command with its arguments. Raises InputError for bad input, and SystemExit(1) where a cell failed."""
    args = _parser().parse_intermixed_args(arguments)
    if args.config is None:
        raise InputError(
            "--config is missing. Use --config study/NAME.yaml, for instance --config study/rear_scaling.yaml"
        )
    study = read_study(args.config, args.scale)
    if study.guidance is not None:
        _search(study, args)
        return
    if args.checkpoint is not None:
        raise InputError(
            f"--checkpoint is for a study with a section guidance, which {study.source} does not have. Leave it out"
        )
    start = tuple(shlex.split(args.start or study.start))
    jobs = checked_jobs(args.jobs, "--jobs", study.commands) if args.jobs is not None else study.jobs
    if args.jobs is not None and (args.slurm or args.cell is not None):
        raise InputError("--jobs is for cells side by side on one machine. Leave it out with --slurm and --cell")
    runner = Runner(study, expand(study, args.overrides), start, jobs=jobs)
    if args.dry_run:
        _show(runner, full=args.full)
    elif args.slurm:
        _submit(runner, args)
    elif args.collect or args.runs:
        _collect(runner, args.runs, arguments)
    elif args.cell is not None:
        _run_one(runner, args.cell)
    else:
        _run_all(runner, arguments)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--config", metavar="study/NAME.yaml", help="a file in configs/study/, or a path")
    parser.add_argument("overrides", nargs="*", metavar="KEY=V,V", help="replaces or adds a word of every grid")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="RUN", help="of study/guidance.yaml: the model to search for"
    )
    parser.add_argument("--scale", metavar="NAME", help="a smaller form of the study: digits or fashion, for a CPU")
    parser.add_argument(
        "--start", metavar="WORDS", help='in front of every line, such as "torchrun --nproc-per-node 8"'
    )
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="run so many cells at a time, each on its share of cores and GPUs (default 1)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the cells and their costs, and stop")
    parser.add_argument("--full", action="store_true", help="with --dry-run: print all command lines too")
    parser.add_argument(
        "--collect", action="store_true", help="write study.csv, study.md and figures of what is there, and stop"
    )
    parser.add_argument("--runs", type=Path, action="append", default=[], metavar="FOLDER",
                        help="gather runs of this study from here too, whoever started them")  # fmt: skip
    parser.add_argument("--slurm", action="store_true", help="submit the unfinished cells as one job array")
    parser.add_argument(
        "--nodes", type=int, default=1, metavar="N", help="with --slurm: nodes of each cell (default 1)"
    )
    parser.add_argument(
        "--cell", type=int, metavar="I", help="run cell I alone, from 0; a task of a job array does that"
    )
    return parser


def _search(study: StudyFile, args: argparse.Namespace) -> None:
    """Searches for the guidance of --checkpoint."""
    if args.checkpoint is None:
        raise InputError(f"{study.source} searches for the guidance of a model. Name it: --checkpoint RUN")
    assert study.guidance is not None
    start = shlex.split(args.start or study.start)
    folder = run_of(args.checkpoint) / "guidance"
    space = Space.read(study.guidance, study.source)
    search = Search(space, args.checkpoint, folder, start, args.overrides, processes_of(start))
    if args.dry_run:
        settings = len(space.scale) * len(space.power)
        print(f"{settings} settings on {space.images:,} samples, {space.rounds} rounds of up to 9 around the best, and the best "
              f"one on {space.confirm:,}")  # fmt: skip
        print(*(stage.line for stage in search.stages()), sep="\n")
        return
    best = search.run()
    chosen = f"sample.guidance.schedule=power_cosine sample.guidance.scale={best.scale:g} sample.guidance.power={best.power:g}"
    print(f"{chosen}\n{space.score} on {best.images:,} samples: {best.score:.4f}")
    cli.end(folder / "guidance.csv", f"{space.score} {best.score:.4f}")


def _show(runner: Runner, *, full: bool) -> None:
    done = [runner.is_done(cell) for cell in runner.cells]
    print(dry_run(runner.study, runner.cells, done, runner.jobs))
    if full:
        print("", *lines(runner), sep="\n")


def _run_all(runner: Runner, words: list[str]) -> None:
    failed = runner.run()
    _collect(runner, [], words)
    if failed:
        for name, reason in failed.items():
            say(f"failed: {name}: {reason}")
        say(f"{len(failed)} of {len(runner.cells)} cells failed. The same command runs them again, and no others")
        raise SystemExit(1)


def _collect(runner: Runner, others: list[Path], words: list[str]) -> None:
    """Writes study.csv, study.md and figures of what the cells have so far. words: the arguments of this command."""
    collected = collect(runner, others)
    path = write_csv(runner, collected)
    write_summary(runner, collected, shlex.join(["python", "launchers/study.py", *words]))
    done = sum(row["state"] == "done" for row in collected.rows)
    cli.end(path, f"{done} of {len(collected.rows)} cells are done")


def _run_one(runner: Runner, number: int) -> None:
    """Runs one cell. SIGUSR1, by which a batch script asks for a checkpoint, goes to the ranks; this process waits for them."""
    if not 0 <= number < len(runner.cells):
        raise InputError(f"--cell {number} is not a cell of {runner.study.source}. Use 0 to {len(runner.cells) - 1}")
    alone = replace(runner, only=runner.cells[number].name, jobs=1)
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        failed = alone.run()
    finally:
        signal.signal(signal.SIGUSR1, before)
    if failed:
        raise SystemExit(1)


def _submit(runner: Runner, args: argparse.Namespace) -> None:
    if args.nodes < 1:
        raise InputError(f"--nodes={args.nodes} must be at least 1. Use --nodes 1")
    words = ["--config", args.config, *(["--scale", args.scale] if args.scale else []), *args.overrides]
    line = submit(runner, words, args.nodes)
    cli.end(line, "", shlex.join(["python", "launchers/study.py", *words, "--collect"]))
