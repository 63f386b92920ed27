"""Scores images: FID, sFID, Inception Score, precision, recall, density, coverage; and a checkpoint's token predictions.

    torchrun --nproc-per-node 8 launchers/evaluate.py --checkpoint runs/rear_xl evaluate.reference.adm=REFERENCE.npz
    python launchers/evaluate.py --samples SAMPLES.npz evaluate.reference.adm=REFERENCE.npz evaluate.inception_weights=FILE
    ... --checkpoint runs/rear_xl --sweep sample.guidance.scale=4.0,6.9 --also runs/rear_l     several in one job

A checkpoint's images are generated while they are scored and written nowhere; samples that launchers/sample.py has written
are used. --samples takes an .npz, a folder of images, or tar shards. Writes RUN/result.json (result_SETTING.json under
--sweep; SAMPLES.result.json without a checkpoint). The same command continues after a kill, on any number of ranks, to the
same numbers. --part I/N computes one of N shares of the features, for jobs that run side by side on one file system; the
one that finds all shares there goes on to the scores. --reconstruct takes images through the tokenizer of --config and back.
--write-statistics makes a reference file of the images; image files are cropped to tokenizer.image_size. It needs no
evaluate.reference; with one, the images are scored too.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

from rear_scale import cli, config
from rear_scale.analysis import token_prediction
from rear_scale.checkpoint.open import open_source
from rear_scale.config import InputError
from rear_scale.evaluate.images.image_set import check_image_set
from rear_scale.evaluate.job import Evaluation, check_evaluation
from rear_scale.evaluate.networks.feature_cache import Part
from rear_scale.evaluate.published import our_rows, table
from rear_scale.evaluate.reconstruction import score_reconstruction
from rear_scale.evaluate.result import check_result, summary, write_result
from rear_scale.evaluate.subjects import Opener, Subject, beside, subjects_of
from rear_scale.progress import say
from rear_scale.run.folder import RunFolder
from rear_scale.run.wandb import log_summary
from rear_scale.world import World, joined

_Scores = dict[str, dict[str, float]]
_INPUTS = (
    "tokenizer.weights",
    "data.train",
    "data.val",
    "evaluate.inception_weights",
    "evaluate.dinov2_weights",
    "evaluate.vgg_weights",
    "evaluate.lpips_weights",
    "evaluate.classifier.images",
)


def main() -> None:
    parser = cli.make_parser(__doc__, from_checkpoint=True)
    parser.add_argument("--samples", type=Path, metavar="PATH", help="score these images instead of generating")
    parser.add_argument("--reconstruct", type=Path, metavar="PATH", help="score the tokenizer on these images instead")
    parser.add_argument("--also", type=Path, action="append", default=[], metavar="PATH", help="another checkpoint")
    parser.add_argument(
        "--sweep", action="append", default=[], metavar="sample.FIELD=V,V", help="each of these settings"
    )
    parser.add_argument("--part", type=_part, metavar="I/N", help="only a share of the features")
    parser.add_argument("--write-statistics", type=Path, metavar="FILE.npz", help="makes a reference of the images")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="where the result goes")
    command = cli.parse_either(parser, "evaluate.yaml")
    args = command.args
    if args.out is not None:
        check_result(args.out)
    if args.dry_run:
        cli.show_paths(command, inputs=_INPUTS, outputs=("evaluate.classifier.weights",), given=_given(command))
        return
    if args.reconstruct is not None:
        _check_alone(args)
        check_image_set(args.reconstruct)
        _reconstruct(command, args.reconstruct)
        return
    checkpoints = [(command.cfg, command.checkpoint)] if isinstance(command, cli.CheckpointCommand) else []
    if args.also and not checkpoints:
        raise InputError(
            f"--also {args.also[0]} adds to --checkpoint, which is missing. Use --checkpoint {args.also[0]}"
        )
    for path in args.also:
        other = open_source(path)
        cfg = config.from_file(other.meta["config"], str(other.path), args.overrides)
        # One evaluation scores all: what another run's config says of its own is not what is done.
        checkpoints.append((replace(cfg, evaluate=command.cfg.evaluate), other))
    subjects = subjects_of(command.cfg, checkpoints, args.samples, args.sweep, args.out)
    if args.write_statistics is not None and len(subjects) > 1:
        raise InputError(
            f"--write-statistics {args.write_statistics} is one file, but there are {len(subjects)} sets of images. "
            "Leave --sweep and --also away"
        )
    check_evaluation(command.cfg, args.write_statistics)
    if args.samples is not None:
        check_image_set(args.samples)
    with joined(command.ranks, same_for_any_world=True) as world:
        opener, rows = Opener(world), []
        tokens: dict[Path, _Scores | None] = {}
        evaluation = Evaluation(command.cfg, subjects[0].output.parent / "features", world)
        for subject in subjects:
            if command.cfg.evaluate.reference:
                rows += _score(subject, opener, evaluation, tokens, args, world)
            if args.write_statistics is not None:
                _write_statistics(subject, opener, evaluation, args, world)
        if world.is_main and rows:
            print(table(rows))


def _given(command: cli.Command) -> list[tuple[str, str | Path]]:
    """The inputs that the command line or evaluate.reference names."""
    args = command.args
    given = [
        ("--samples", args.samples),
        ("--reconstruct", args.reconstruct),
        *(("--also", path) for path in args.also),
    ]
    references = command.cfg.evaluate.reference.items()
    return [
        *((option, path) for option, path in given if path is not None),
        *((f"evaluate.reference.{name}", path) for name, path in references),
    ]


def _check_alone(args: argparse.Namespace) -> None:
    """Raises InputError for an option that --reconstruct has no use for."""
    for option in ("samples", "also", "sweep", "part", "write_statistics"):
        if getattr(args, option):
            raise InputError(
                f"--{option.replace('_', '-')} does not go with --reconstruct, which scores the tokenizer on its own images. "
                "Leave one of them out"
            )


def _reconstruct(command: cli.Command, images: Path) -> None:
    started = time.monotonic()
    out = command.args.out or beside(images, "reconstruction.json")
    with joined(command.ranks, same_for_any_world=True) as world:
        originals, scores = score_reconstruction(command.cfg, images, out.parent / "features", world)
        if world.is_main:
            seconds = time.monotonic() - started
            write_result(out, command.cfg, None, originals, str(images), scores, None, seconds, world)
            say(f"{out}: written")
            print(table(our_rows(f"{command.cfg.tokenizer.name} (reconstruction)", scores["inception"]), {}))
            print(json.dumps(scores["reconstruction"], indent=1))


def _score(
    subject: Subject,
    opener: Opener,
    evaluation: Evaluation,
    tokens: dict[Path, _Scores | None],
    args: argparse.Namespace,
    world: World,
) -> list[list[str]]:
    """Rows for the table. tokens: predictions by checkpoint, which this adds to."""
    started = time.monotonic()
    samples = opener.images(subject)
    if args.part is not None and not evaluation.extract_part(samples, args.part):
        _say_others_are_missing(subject, args, world)
        return []
    images = evaluation.score(samples)

    def write(predictions: _Scores | None) -> None:
        if world.is_main:
            source, seconds = str(subject.samples or "generated"), time.monotonic() - started
            out, cfg = subject.output, subject.cfg
            write_result(out, cfg, subject.checkpoint, samples, source, images, predictions, seconds, world)

    # Once before: a damaged token shard must not cost the scores of the images.
    write(None)
    if subject.checkpoint is not None:
        # Sampling settings do not touch them: once a checkpoint.
        if subject.checkpoint.path not in tokens:
            tokens[subject.checkpoint.path] = _token_scores(subject, opener, world)
        write(tokens[subject.checkpoint.path])
    if not world.is_main:
        return []
    say(f"{subject.output}: written")
    if subject.run is not None:
        log_summary(subject.cfg, RunFolder(subject.run), summary(images, subject.setting))
    return our_rows(subject.name, images["inception"]) if "inception" in images else []


def _token_scores(subject: Subject, opener: Opener, world: World) -> _Scores | None:
    data = subject.cfg.data
    folders = [folder for folder in (data.train, data.val) if folder is not None]
    if data.train is None and world.is_main:
        say(
            "data.train is not set: the config that came with the weights names a command or a remote place, which is taken from "
            "the command line alone"
        )
    if not folders or not all((Path(folder) / "index.json").exists() for folder in folders):
        if world.is_main:
            say(f"no token shards at {', '.join(folders) or 'data.train'}: token predictions are left out")
        return None
    return token_prediction.score_tokens(subject.cfg, opener.model(subject), world)


def _write_statistics(
    subject: Subject, opener: Opener, evaluation: Evaluation, args: argparse.Namespace, world: World
) -> None:
    # As images of a reference are: files of any size are cropped.
    images = opener.images(subject, subject.cfg.tokenizer.image_size)
    if not evaluation.write_statistics(images, args.write_statistics, args.part):
        _say_others_are_missing(subject, args, world)


def _say_others_are_missing(subject: Subject, args: argparse.Namespace, world: World) -> None:
    if world.is_main:
        say(f"{subject.name}: share {args.part.index} of {args.part.of} is done; others are still missing")


def _part(text: str) -> Part:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text} is not I/N with I below N, as in 0/8")
    return Part(int(index), int(count))


if __name__ == "__main__":
    cli.run(main)
