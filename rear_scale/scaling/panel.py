"""Whether a difference of two configs is larger than what another seed does: training seeds x sampling seeds of both.

    python launchers/study.py panel demo_ar.yaml demo.yaml --seeds 3 --samplings 2
    python launchers/study.py panel 'runs/demo/ar_seed*' 'runs/demo/rear_seed*' --samplings 2

Each of the two is a config, which is trained with run.seed=0, 1, ..., or a pattern of run folders that are there. Every training
run is scored with sample.seed=0, 1, ... by launchers/evaluate.py; results that a run folder holds already are taken. The same
command continues after a kill. Writes panel.json and panel.csv into --out.
"""

from __future__ import annotations

import argparse
import glob
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rear_scale import cli
from rear_scale.checkpoint.folder import last_step
from rear_scale.checkpoint.open import load_config
from rear_scale.config import ExperimentConfig, InputError, load, to_dict
from rear_scale.evaluate.result import Result, read_result
from rear_scale.files import write_text_atomically
from rear_scale.parallel import facts
from rear_scale.places import as_typed
from rear_scale.progress import say
from rear_scale.run.stages import Stage, StageFolder
from rear_scale.scaling.seed_noise import Difference, SeedNoise, difference, seed_noise
from rear_scale.shards.inputs import Inputs, fingerprint
from rear_scale.text_table import aligned, as_csv

# Scores of token prediction: name -> (set and context, key) in result.json. They depend on the training seed alone.
_OF_TOKENS = {
    "ctr": ("val_clean", "ctr"),
    "ctr_noisy": ("val_noisy", "ctr"),
    "perplexity": ("val_clean", "perplexity"),
    "perplexity_noisy": ("val_noisy", "perplexity"),
}


def main(arguments: list[str]) -> None:
    """Runs the command with its arguments. Raises InputError for bad input, and for a stage that fails."""
    args = _parser().parse_intermixed_args(arguments)
    for option, value in (("seeds", args.seeds), ("samplings", args.samplings), ("processes", args.processes)):
        if value is not None and value < 1:
            raise InputError(f"--{option}={value} must be at least 1. Use --{option} 3 or another number")
    out = args.out or Path("runs") / f"panel_{_label(args.first)}_{_label(args.second)}"
    panel = Panel(out, args.samplings, args.processes, tuple(args.overrides))
    methods = panel.methods((args.first, args.second), args.seeds)
    lanes = [lane for method in methods for lane in panel.lanes(method)]
    if args.dry_run:
        print(*(as_typed(stage.line) for lane in lanes for stage in lane), sep="\n")
        return
    StageFolder(out).run_all([], lanes, panel.jobs)
    compared = panel.compared(methods)
    out.mkdir(parents=True, exist_ok=True)
    write_text_atomically(out / "panel.json", json.dumps([one.to_json() for one in compared], indent=1) + "\n")
    write_text_atomically(out / "panel.csv", _as_csv(methods, compared))
    print(as_text(compared))
    cli.end(out / "panel.json", f"{len(compared)} measures")


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="study.py panel",
        description=__doc__,
    )
    parser.add_argument("first", metavar="A", help="a config, or a pattern of run folders")
    parser.add_argument("second", metavar="B", help="what is compared with it")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="replaces a value of both configs")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="training seeds of each config (default 3)")
    parser.add_argument("--samplings", type=int, default=2, metavar="N", help="sampling seeds of each run (default 2)")
    parser.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="processes of each command (default: one per GPU; on CPUs one, for two runs side by side)",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of runs and results (default runs/panel_A_B)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, and stop")
    return parser


@dataclass(frozen=True)
class Method:
    """One of the two that are compared: its training runs, by the name of the run."""

    label: str
    runs: Mapping[str, Path]
    config: str | None  # None = the runs are there already


@dataclass(frozen=True)
class Compared:
    """One measure of both methods."""

    measure: str
    labels: tuple[str, str]
    scores: tuple[list[list[float]], list[list[float]]]  # by method, training seed and sampling seed
    noise: tuple[SeedNoise, SeedNoise]
    difference: Difference

    def to_json(self) -> dict[str, Any]:
        methods = {
            label: {**asdict(noise), "scores": scores}
            for label, noise, scores in zip(self.labels, self.noise, self.scores, strict=True)
        }
        found = {**asdict(self.difference), "verdict": self.difference.verdict, "words": self.difference.words}
        return {"measure": self.measure, "methods": methods, "difference": found}


def compare_scores(
    measure: str, labels: tuple[str, str], first: list[list[float]], second: list[list[float]]
) -> Compared:
    """The comparison of two methods by their scores, by training seed and sampling seed."""
    noise = seed_noise(first), seed_noise(second)
    return Compared(measure, labels, (first, second), noise, difference(*noise))


@dataclass(frozen=True)
class Panel:
    """The runs and results of one command."""

    folder: Path
    samplings: int
    given_processes: int | None
    overrides: tuple[str, ...]

    def methods(self, given: tuple[str, str], seeds: int) -> tuple[Method, Method]:
        """Both methods. Raises InputError for a config that is missing or wrong, a pattern without runs, and twice the same."""
        labels = [_label(text) for text in given]
        if labels[0] == labels[1]:
            labels = [f"{label}_{number}" for number, label in enumerate(labels, start=1)]
        first, second = (self._method(text, label, seeds) for text, label in zip(given, labels, strict=True))
        if given[0] == given[1] or {*first.runs.values()} & {*second.runs.values()}:
            raise InputError(
                f"{given[0]} and {given[1]} are the same runs, whose difference is 0. Name two that differ"
            )
        return first, second

    def _method(self, given: str, label: str, seeds: int) -> Method:
        if given.endswith(".yaml"):
            load(given, [*self.overrides])
            names = [f"{label}_seed{seed}" for seed in range(seeds)]
            return Method(label, {name: self.folder / name for name in names}, given)
        runs = [Path(path) for path in sorted(glob.glob(given)) if (Path(path) / "config.yaml").is_file()]
        if not runs:
            raise InputError(f"no run folder is named {given}. Name a config such as demo.yaml, or a pattern in quotes")
        for run in runs:
            if not last_step(run):
                raise InputError(f"{run} holds no checkpoint to be scored. Continue its training, or leave it out")
        return Method(label, {f"{label}_{number}": run for number, run in enumerate(runs)}, None)

    @property
    def jobs(self) -> int:
        """Runs at a time."""
        return 1 if self.given_processes or torch.cuda.device_count() else min(2, len(os.sched_getaffinity(0)))

    def lanes(self, method: Method) -> list[list[Stage]]:
        """The training and scoring of each run of a method, without results that its folder holds."""
        lanes: list[list[Stage]] = []
        for seed, (name, run) in enumerate(method.runs.items()):
            stages: list[Stage] = []
            inputs: Inputs = {"step": last_step(run)} if method.config is None else {}
            if method.config is not None:
                stages.append(self._training(method, name, run, seed))
                inputs = {"training": stages[-1].key}
            for sampling in range(self.samplings):
                if self._held(method, run, sampling) is None:
                    stages.append(self._scoring(name, run, sampling, inputs, method.config is None))
            lanes.append(stages)
        return lanes

    def _training(self, method: Method, name: str, run: Path, seed: int) -> Stage:
        assert method.config is not None
        cfg = load(method.config, [*self.overrides])
        start, processes = self._start(cfg)
        words = [*start, "launchers/train.py", "--config", method.config, *self.overrides, f"run.name={name}"]
        return Stage(
            f"train_{name}",
            f"train {name}",
            [*words, f"run.dir={run}", f"run.seed={seed}"],
            (run / "checkpoints/latest",),
            {"config": fingerprint({"config": json.dumps(to_dict(cfg), sort_keys=True)})},
            processes,
        )

    def _scoring(self, name: str, run: Path, sampling: int, inputs: Inputs, with_overrides: bool) -> Stage:
        start, processes = self._start(None)
        words = [*start, "launchers/evaluate.py", "--checkpoint", str(run), "--out", str(self._result(name, sampling))]
        return Stage(
            f"score_{name}_{sampling}",
            f"score {name}, sampling seed {sampling}",
            [*words, *(self.overrides if with_overrides else ()), f"sample.seed={sampling}"],
            (self._result(name, sampling),),
            inputs,
            processes,
        )

    def _start(self, cfg: ExperimentConfig | None) -> tuple[list[str], int]:
        """The words in front of a command, and the processes that share the machine. cfg: of a training; None = of an
        evaluation."""
        count = self.given_processes or torch.cuda.device_count() or 1
        if cfg is not None and facts.of(cfg.strategy).alone:
            count = 1
        return (["python"] if count == 1 else ["torchrun", "--nproc-per-node", str(count)]), count * self.jobs

    def _result(self, name: str, sampling: int) -> Path:
        return self.folder / "results" / f"{name}_sampling{sampling}.json"

    def _held(self, method: Method, run: Path, sampling: int) -> Path | None:
        """A result with this sampling seed in the folder of a run that was there before; None = none."""
        if method.config is not None or self.overrides:
            return None
        own: dict[str, Any] | None = None
        for path in sorted(run.glob("result*.json")):
            result = read_result(path)
            made = result.checkpoint
            # A folder may hold results of averages of the weights and of other settings of sampling (--ema, --sweep).
            if made is None or made.step != last_step(run) or made.average is not None or result.sample is None:
                continue
            own = asdict(load_config(str(run / "config.yaml")).sample) if own is None else own
            theirs = {key: value for key, value in result.sample.items() if key in own}
            if theirs == {**{key: own[key] for key in theirs}, "seed": sampling}:
                return path
        return None

    def compared(self, methods: tuple[Method, Method]) -> list[Compared]:
        """The comparison of each measure that all results have. Raises InputError where results are not comparable."""
        results = [self._results(method) for method in methods]
        _check_comparable([result for rows in results for row in rows for result in row])
        scores = [[[measures(result) for result in row] for row in rows] for rows in results]
        names = [name for name in scores[0][0][0] if all(name in one for rows in scores for row in rows for one in row)]
        labels = methods[0].label, methods[1].label
        found = []
        for name in names:
            wrong = [
                (run, one[name])
                for method, rows in zip(methods, scores, strict=True)
                for run, row in zip(method.runs.values(), rows, strict=True)
                for one in row
                if not math.isfinite(one[name])
            ]
            if wrong:
                run, value = wrong[0]
                say(f"left out: {name}, which is {value} of {run}. Leave that run out to compare the others")
                continue
            of_methods = [
                [[one[name] for one in (row[:1] if name in _OF_TOKENS else row)] for row in rows] for rows in scores
            ]
            found.append(compare_scores(name, labels, *of_methods))
        return found

    def _results(self, method: Method) -> list[list[Result]]:
        return [
            [
                read_result(self._held(method, run, sampling) or self._result(name, sampling))
                for sampling in range(self.samplings)
            ]
            for name, run in method.runs.items()
        ]


def measures(result: Result) -> dict[str, float]:
    """The scores of a result by name: of tokens first, then of images as NAME or NAME/REFERENCE."""
    tokens = result.tokens or {}
    found = {
        name: float("nan" if tokens[held][key] is None else tokens[held][key])
        for name, (held, key) in _OF_TOKENS.items()
        if held in tokens
    }
    for number in result.images.numbers():
        found[number.name if number.reference is None else f"{number.name}/{number.reference}"] = number.value
    return found


def _check_comparable(results: Sequence[Result]) -> None:
    settings = [
        {
            "images": result.samples.images,
            "evaluate.replace_rate": result.evaluate.get("replace_rate"),
            "evaluate.replace_draws": result.evaluate.get("replace_draws"),
            "classifier": result.images.classifier.features if result.images.classifier else None,
        }
        for result in results
    ]
    for name in settings[0]:
        values = {str(one[name]) for one in settings}
        if len(values) > 1:
            raise InputError(
                f"the results do not compare: {name} is {' in some and '.join(sorted(values))} in others. Score all runs with "
                "the same settings, in another --out"
            )


def as_text(compared: Sequence[Compared]) -> str:
    """The table of a panel: means, spreads, the difference with its 95% interval, and the verdict on the second method."""
    if not compared:
        return "the results share no measure"
    first, second = compared[0].labels
    rows = [["measure", first, second, "difference", "95% interval", "sd of training", "sd of sampling", second]]
    for one in compared:
        gap = one.difference
        interval = "-" if gap.low is None or gap.high is None else f"{gap.low:+.4g} to {gap.high:+.4g}"
        spreads = [_pair([noise.training_sd for noise in one.noise]), _pair([noise.sampling_sd for noise in one.noise])]
        if one.measure in _OF_TOKENS:
            spreads = [_pair([noise.seed_variance and noise.seed_variance**0.5 for noise in one.noise]), "none"]
        means = [f"{noise.mean:.5g}" for noise in one.noise]
        rows.append([one.measure, *means, f"{gap.value:+.4g}", interval, *spreads, gap.words])
    seeds = ", ".join(
        f"{noise.seeds} of {label}" for label, noise in zip(compared[0].labels, compared[0].noise, strict=True)
    )
    head = f"{second} against {first}; training seeds: {seeds}; each verdict at the 5% level for itself"
    return f"{head}\n{aligned(rows, left=(0, 7))}"


def _pair(values: Sequence[float | None]) -> str:
    return " / ".join("-" if value is None else f"{value:.2g}" for value in values)


def _as_csv(methods: tuple[Method, Method], compared: Sequence[Compared]) -> str:
    """One line per score: method, run, sampling seed, measure, value."""
    rows = [
        (method.label, run, number, one.measure, value)
        for one in compared
        for method, scores in zip(methods, one.scores, strict=True)
        for run, row in zip(method.runs.values(), scores, strict=True)
        for number, value in enumerate(row)
    ]
    return as_csv(["method", "run", "sampling", "measure", "value"], rows)


def _label(given: str) -> str:
    """A short name of a config or a pattern, for files and columns."""
    stem = Path(given).stem if given.endswith(".yaml") else Path(given).name
    letters = "".join(letter for letter in stem if letter.isalnum() or letter in "_-").strip("_-")
    return letters.removesuffix("_seed") or "runs"
