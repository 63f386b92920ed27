"""Samples and scores a published model with its published weights, and compares the result with the published scores.

    torchrun --nproc-per-node 8 launchers/reproduce.py rar_b --weights FOLDER
    python launchers/reproduce.py rear_l --weights FOLDER --dry-run        lists the required files, and where to get them

FOLDER holds the files under their published names. Both reference sets are used, if they are there: ADM's npz and the ImageNet
validation images. Writes OUT/result.json (default runs/reproduce/MODEL) and prints for each reference whether the FID is within
0.05 of the published FID. The same command continues after a kill.
"""

import argparse
from pathlib import Path

from rear_scale import cli, config, world
from rear_scale.config import InputError
from rear_scale.evaluate.job import Evaluation
from rear_scale.evaluate.reproduce import ENTRIES, entry_of, reproduce
from rear_scale.progress import say


def main() -> None:
    parser = cli.Parser(description=__doc__)
    parser.add_argument("model", help=f"one of {', '.join(ENTRIES)}")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="replaces a value of the config")
    parser.add_argument("--weights", type=Path, default=Path("weights"), metavar="FOLDER", help="default: weights")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: runs/reproduce/MODEL")
    parser.add_argument("--dry-run", action="store_true", help="print what is missing, and stop")
    parser.add_argument("--full", action="store_true", help="with --dry-run: print the resolved config too")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    entry, ranks = entry_of(args.model), world.discover()
    cfg = entry.load_config(args.weights, args.overrides)
    missing = entry.missing(cfg, args.weights)
    if args.dry_run:
        if ranks.rank == 0:
            print(*missing, *entry.left_out(cfg, args.weights), *([config.to_yaml(cfg)] if args.full else []), sep="\n")
        return
    if missing:
        raise InputError("; ".join(missing) + ". Put them there, or set their folder with --weights")
    if ranks.rank == 0:
        for line in entry.left_out(cfg, args.weights):
            say(line)
    out = args.out or Path("runs/reproduce") / entry.name
    with world.joined(ranks, same_for_any_world=True) as joined:
        lines = reproduce(entry, cfg, args.weights, out, Evaluation(cfg, out / "features", joined), joined)
        if joined.is_main:
            print("\n".join(lines))
    cli.end(out / "result.json", lines[-1])


if __name__ == "__main__":
    cli.run(main)
