"""The whole path on real images, from images to trained models, samples and a report.

images -> tokenizer -> tar shards -> training of vanilla AR and reAR with deepspeed -> sampling -> evaluation
-> report.html and summary.json in runs/demo, runs/demo_fashion or runs/demo_FOLDER.

    bash launchers/demo.sh              one training seed
    bash launchers/demo.sh --seeds 3    three, with mean and spread
    bash launchers/demo.sh --dry-run    only the commands of all stages
    bash launchers/demo.sh --data fashion           photographs of clothes (apt install dataset-fashion-mnist)
    bash launchers/demo.sh --data fashion --quick   the same on a fifth of them
    bash launchers/demo.sh --data FOLDER            your own images, FOLDER/CLASS/FILE

Run again after a kill, it continues; finished stages are not run again. Overrides go to every stage that reads a config.
"""

import argparse
from pathlib import Path

import torch

from rear_scale import cli
from rear_scale.bench.model import use_device
from rear_scale.config import InputError, derive
from rear_scale.demo import estimate
from rear_scale.demo.commands import check, num_processes, open_folder, planned, runs_at_a_time
from rear_scale.demo.own import SIZES, Folder, describe, look_at, recipe_of
from rear_scale.demo.recipe import DIGITS, Recipe, fashion
from rear_scale.demo.report import write_report
from rear_scale.demo.summary import accuracy, print_table, write_summary
from rear_scale.places import as_typed
from rear_scale.progress import say
from rear_scale.world import locked


def main() -> None:
    parser = cli.Parser(description=__doc__)
    parser.add_argument(
        "--data", default="digits", metavar="digits|fashion|FOLDER", help="what is trained on (default: digits)"
    )
    parser.add_argument("--size", choices=SIZES, help="of a folder: 32, 48 or 64 pixels, each with a model for it")
    parser.add_argument("--quick", action="store_true", help="of fashion: a fifth of the images, for a first look")
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="training seeds 0 .. N-1 of each model (default 1)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands of all stages, and stop")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="for every stage with a config")
    args = parser.parse_intermixed_args()
    if args.seeds < 1:
        raise InputError(f"--seeds={args.seeds} must be at least 1. Use --seeds 1")
    recipe = _recipe(args)
    seeds = list(range(args.seeds))
    plan = planned(recipe, seeds, args.overrides)
    if args.dry_run:
        print("\n".join(as_typed(stage.line) for stage in plan.stages))
        return
    recipe.check_packages()
    in_use = f"{recipe.folder} is in use by another demo. Wait for it, or start in another folder"
    # The lock file is beside the folder and not in it, because open_folder may rename the folder.
    with locked(recipe.folder.with_name(f".{recipe.folder.name}.lock"), in_use):
        folder = open_folder(recipe, args.overrides)
        folder.run_all(plan.data, plan.runs, runs_at_a_time())
        summary = write_summary(recipe, seeds)
        report = write_report(recipe, summary, plan.stages, folder)
        print_table(recipe, summary, report)
    best = f"class accuracy of reAR's samples {accuracy(summary)}"
    cli.end(report, best, cli.typed("sample", "--checkpoint", summary["rear"]["run_dir"]))


def _recipe(args: argparse.Namespace) -> Recipe:
    """The recipe of --data.

    Raises InputError for data that no demo has, for an option that the data do not have, and for overrides that are refused.
    """
    known = args.data in ("digits", "fashion")
    if args.quick and args.data != "fashion":
        raise InputError(f"--quick is of --data fashion, not of {args.data}. Leave it out, or set train.total_steps")
    if args.size and known:
        raise InputError(f"--size is of --data FOLDER, not of {args.data}. Leave it out")
    if args.data == "digits":
        return DIGITS
    images: Folder | None = None
    if args.data == "fashion":
        recipe = fashion(quick=args.quick)
        check(recipe, args.overrides)
        device = use_device()
    else:
        images = look_at(Path(args.data))
        device = use_device()
        recipe = recipe_of(images, args.size, device)
        check(recipe, args.overrides)
    _say_plan(recipe, images, args, device)
    return recipe


def _say_plan(recipe: Recipe, images: Folder | None, args: argparse.Namespace, device: torch.device) -> None:
    """Prints what will be trained and how long that takes. images: the user's folder, if there is one."""
    cfg = recipe.load("rear", args.overrides)
    processes, jobs = num_processes(), runs_at_a_time()
    lines = [] if images is None else describe(images, cfg, derive(cfg, processes // jobs, None))
    rates = estimate.measure(cfg, processes, device, recipe.read_s)
    counts = estimate.Counts(cfg.data.assumed_images or 0, recipe.val_images, recipe.passes)
    lines += estimate.lines(estimate.seconds(cfg, processes, rates, counts, args.seeds, jobs))
    change = "overrides change" if images is None else "--size and overrides change"
    for line in (*lines, f"all files go to {recipe.folder}; {change} the size and the time"):
        say(line)


if __name__ == "__main__":
    cli.run(main)
