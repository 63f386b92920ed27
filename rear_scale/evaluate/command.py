"""The command of launchers/evaluate.py: scores images or checkpoints, writes result.json and prints a table."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rear_scale import cli
from rear_scale.checkpoint.average import averaged
from rear_scale.checkpoint.folder import Checkpoint
from rear_scale.checkpoint.open import open_with_config
from rear_scale.config import ExperimentConfig, InputError, all_checks
from rear_scale.evaluate.images.image_set import check_image_set
from rear_scale.evaluate.job import Evaluation, check_evaluation
from rear_scale.evaluate.networks import rows_in_use, weight_fields
from rear_scale.evaluate.networks.feature_cache import Part
from rear_scale.evaluate.published import TableRow, our_rows, table, table_with_published, token_table
from rear_scale.evaluate.reconstruction import score_reconstruction
from rear_scale.evaluate.result import ImageScores, check_result, json_line, summary, write_result
from rear_scale.evaluate.targets import EvalTarget, TargetOpener, eval_targets, result_path_next_to
from rear_scale.model import Generator
from rear_scale.progress import say
from rear_scale.run import sinks
from rear_scale.run.folder import RunFolder
from rear_scale.tokenizer import check_weights
from rear_scale.world import World, joined

TokenScores = Mapping[str, Mapping[str, float]]
ScoreTokens = Callable[[ExperimentConfig, Generator, World], TokenScores]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=Path, metavar="PATH", help="score these images instead of generating")
    parser.add_argument("--reconstruct", type=Path, metavar="PATH", help="score the tokenizer on these images instead")
    parser.add_argument("--also", type=Path, action="append", default=[], metavar="PATH", help="another checkpoint")
    parser.add_argument(
        "--sweep", action="append", default=[], metavar="sample.FIELD=V,V", help="each of these settings"
    )
    parser.add_argument("--part", type=_part, metavar="I/N", help="compute only part I of N of the features, from 0")
    parser.add_argument(
        "--write-statistics",
        type=Path,
        metavar="FILE.npz",
        help="write statistics of the images, to be used as a reference",
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="where the result goes")
    parser.add_argument(
        "--json", action="store_true", help="print a line of JSON for each set of images instead of the table"
    )
    cli.add_ema_option(parser)


def _part(text: str) -> Part:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text} is not I/N with I below N, as in 0/8")
    return Part(int(index), int(count))


def evaluate(
    command: cli.Command, score_tokens: ScoreTokens, on_result: Callable[[Path], None] = lambda run: None
) -> None:
    """Runs the command: scores images or checkpoints, writes the results and prints the table.

    score_tokens: computes the token predictions of a checkpoint (analysis.token_prediction). on_result: called on rank 0 with
    the folder of a run after a result of one of its checkpoints was written. Raises InputError for
    contradictory options, before any process group exists.
    """
    args = command.args
    if args.out is not None:
        check_result(args.out)
    if args.dry_run:
        _show_paths(command)
    elif args.reconstruct is not None:
        _check_alone(args)
        networks = [*rows_in_use(command.cfg.evaluate), *rows_in_use(command.cfg.evaluate, of_pairs=True)]
        all_checks(
            lambda: check_image_set(args.reconstruct),
            lambda: check_weights(command.cfg.tokenizer),
            *(partial(row.check, command.cfg.evaluate) for row in networks),
        )
        _reconstruct(command, args.reconstruct)
    else:
        targets = _targets(command)
        all_checks(
            lambda: check_evaluation(command.cfg, args.write_statistics),
            *(partial(check_image_set, target.samples) for target in targets if target.samples is not None),
            *(partial(check_weights, target.cfg.tokenizer) for target in targets if target.samples is None),
        )
        with joined(command.ranks, same_for_any_world=True) as world:
            _Job(command, targets, score_tokens, world, on_result).run()


def _show_paths(command: cli.Command) -> None:
    inputs = ("tokenizer.weights", "data.train", "data.val", *weight_fields(), "evaluate.classifier.images")
    cli.show_paths(command, inputs=inputs, outputs=("evaluate.classifier.weights",), given=_given(command))


def _given(command: cli.Command) -> list[tuple[str, str | Path]]:
    """(name, path) of the input files that options, evaluate.reference and evaluate.network_weights name."""
    args, cfg = command.args, command.cfg.evaluate
    given = [
        ("--samples", args.samples),
        ("--reconstruct", args.reconstruct),
        *(("--also", path) for path in args.also),
    ]
    return [
        *((option, path) for option, path in given if path is not None),
        *((f"evaluate.reference.{name}", path) for name, path in cfg.reference.items()),
        *((f"evaluate.network_weights.{name}", path) for name, path in cfg.network_weights.items()),
    ]


def _check_alone(args: argparse.Namespace) -> None:
    """Raises InputError for an option that cannot be combined with --reconstruct."""
    for option in ("samples", "also", "sweep", "part", "write_statistics"):
        if getattr(args, option):
            raise InputError(
                f"--{option.replace('_', '-')} cannot be combined with --reconstruct, which scores the tokenizer on its own "
                "images. Use one of them"
            )


def _reconstruct(command: cli.Command, images: Path) -> None:
    started = time.monotonic()
    out = command.args.out or result_path_next_to(images, "reconstruction.json")
    cache_dir = command.cfg.evaluate.cache_dir
    cache = Path(cache_dir) if cache_dir else out.parent / "features"
    with joined(command.ranks, same_for_any_world=True) as world:
        originals, scores = score_reconstruction(command.cfg, images, cache, world)
        if world.is_main:
            seconds = time.monotonic() - started
            write_result(out, command.cfg, None, originals, str(images), scores, None, seconds, world)
            say(f"{out}: written")
            name, size = f"{command.cfg.tokenizer.name} (reconstruction)", (originals.height, originals.width)
            rows = our_rows(name, scores, size)
            print(json_line(name, out, scores) if command.args.json else table(rows, {}))
            cli.end(out, f"PSNR {rows[0].cells['PSNR']} dB")


def _targets(command: cli.Command) -> list[EvalTarget]:
    """The targets of the command line. Raises InputError for --also without --checkpoint, and for --write-statistics with several
    sets of images."""
    args = command.args
    checkpoints = [(command.cfg, command.checkpoint)] if isinstance(command, cli.CheckpointCommand) else []
    if args.also and not checkpoints:
        raise InputError(
            f"--also {args.also[0]} adds to --checkpoint, which is missing. Use --checkpoint {args.also[0]}"
        )
    checkpoints += [_open_other(command, path) for path in args.also]
    targets = eval_targets(command.cfg, checkpoints, args.samples, args.sweep, args.out)
    if args.write_statistics is not None and len(targets) > 1:
        raise InputError(
            f"--write-statistics {args.write_statistics} is one file, but there are {len(targets)} sets of images. "
            "Use it without --sweep and --also"
        )
    return targets


def _open_other(command: cli.Command, path: Path) -> tuple[ExperimentConfig, Checkpoint]:
    other, cfg = open_with_config(path, None, command.args.overrides)
    if command.args.ema is not None:
        other = averaged(other, command.args.ema)
    # All checkpoints are scored by one evaluation, so the evaluation settings of the other run's config are replaced.
    return replace(cfg, evaluate=command.cfg.evaluate), other


@dataclass
class _Job:
    """One evaluation of several targets. All ranks must construct it and run it."""

    command: cli.Command
    targets: list[EvalTarget]
    score_tokens: ScoreTokens
    world: World
    on_result: Callable[[Path], None]
    tokens: dict[Path, TokenScores | None] = field(default_factory=dict)  # by checkpoint
    predicted: dict[str, TokenScores | None] = field(default_factory=dict)  # the same by name, for the table
    rows: list[TableRow] = field(default_factory=list)  # of the table, on rank 0 alone

    def __post_init__(self) -> None:
        self.args: Any = self.command.args
        self.opener = TargetOpener(self.world)
        self.evaluation = Evaluation(self.command.cfg, self.targets[0].output.parent / "features", self.world)

    def run(self) -> None:
        try:
            for target in self.targets:
                if self.command.cfg.evaluate.reference:
                    self._score(target)
                if self.args.write_statistics is not None:
                    self._write_statistics(target)
        finally:
            # What is scored is shown, whatever a later target or damaged token shards bring.
            if self.rows and not self.args.json:
                print(table_with_published(self.rows))
                if predicted := token_table(self.predicted):
                    print(f"\n{predicted}")
        if self.rows:
            self._end(self.rows[0])

    def _end(self, row: TableRow) -> None:
        """The last lines: the result, its first number, and other settings of sampling to try."""
        target = self.targets[0]
        title, value = next(iter(row.cells.items()))
        following, scale = "", target.cfg.sample.guidance.scale
        if target.checkpoint is not None and target.samples is None and not self.args.sweep and scale > 0:
            values = ",".join(f"{scale * factor:.3g}" for factor in (0.8, 1, 1.25))
            words = ["--checkpoint", self.args.checkpoint, *cli.ema_words(self.args.ema), *self.args.overrides]
            following = cli.typed("evaluate", *words, "--sweep", f"sample.guidance.scale={values}")
        cli.end(target.output, f"{title} {value}", following)

    def _score(self, target: EvalTarget) -> None:
        """Scores a target, writes its result and adds its rows to the table."""
        started = time.monotonic()
        samples = self.opener.images(target)
        if self.args.part is not None and not self.evaluation.extract_part(samples, self.args.part):
            self._say_others_are_missing(target)
            return
        images = self.evaluation.score(samples)

        def write(predictions: TokenScores | None) -> None:
            if self.world.is_main:
                source, seconds = str(target.samples or "generated"), time.monotonic() - started
                out, cfg = target.output, target.cfg
                write_result(out, cfg, target.checkpoint, samples, source, images, predictions, seconds, self.world)

        # Write the scores of the images first, so that a damaged token shard cannot lose them.
        write(None)
        if self.world.is_main:
            self.rows += our_rows(target.name, images, (samples.height, samples.width))
            if self.args.json:
                print(json_line(target.name, target.output, images), flush=True)
        if target.checkpoint is not None:
            # Token predictions do not depend on sampling settings: compute them once per checkpoint.
            if target.checkpoint.path not in self.tokens:
                self.tokens[target.checkpoint.path] = self._token_scores(target)
            write(self.tokens[target.checkpoint.path])
            self.predicted[f"{target.cfg.run.name}, step {target.checkpoint.step}"] = self.tokens[
                target.checkpoint.path
            ]
        if self.world.is_main:
            self._report(target, images)

    def _report(self, target: EvalTarget, images: ImageScores) -> None:
        say(f"{target.output}: written")
        if target.run is not None:
            step = target.checkpoint.step if target.checkpoint is not None else 0
            sinks.log_summary(target.cfg, RunFolder(target.run), summary(images, target.setting), step)
            self.on_result(target.run)

    def _token_scores(self, target: EvalTarget) -> TokenScores | None:
        data = target.cfg.data
        folders = [folder for folder in (data.train, data.val) if folder is not None]
        if data.train is None and self.world.is_main:
            say(
                "data.train is not set: a command or a URL in the config of downloaded weights is not used, for safety. Set it "
                "on the command line"
            )
        if not folders or not all((Path(folder) / "index.json").exists() for folder in folders):
            if self.world.is_main:
                say(f"no token shards at {', '.join(folders) or 'data.train'}: token predictions are skipped")
            return None
        return self.score_tokens(target.cfg, self.opener.model(target), self.world)

    def _write_statistics(self, target: EvalTarget) -> None:
        # Image files are cropped to the tokenizer's size, as those of a reference are.
        images = self.opener.images(target, target.cfg.tokenizer.image_size)
        statistics = self.args.write_statistics
        if not self.evaluation.write_statistics(images, statistics, self.args.part):
            self._say_others_are_missing(target)
        elif not self.command.cfg.evaluate.reference:
            words = ["--samples", "SAMPLES", f"evaluate.reference.{statistics.stem}={statistics}", *self.args.overrides]
            cli.end(statistics, f"of {images.count:,} images", cli.typed("evaluate", *words))

    def _say_others_are_missing(self, target: EvalTarget) -> None:
        if self.world.is_main:
            part = self.args.part
            say(f"{target.name}: part {part.index} of {part.of} is done; other parts are still missing")
