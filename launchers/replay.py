"""Makes a step of a run again: the same samples, noise, dropout and weights, from the nearest checkpoint before it.

    python launchers/replay.py runs/demo/rear_seed0 --step 1500
    torchrun --nproc-per-node 8 launchers/replay.py runs/rear_xl --step 120040 --until-nonfinite

Prints a table of the outputs of every module and their gradients, and of weights, their gradients and updates: rms, largest
magnitude, fraction that is not finite. The CSV file has them for each rank and micro-step. On as many ranks as the run had, the
loss is the logged one, bit for bit. --until-nonfinite finds the first value that is not finite from the checkpoint on, with its
module, its position and its sample. The run folder is only read.
"""

from pathlib import Path

from rear_scale import cli, world
from rear_scale.replay.command import replay, show, step_to_show


def main() -> None:
    parser = cli.make_parser(__doc__, config=None, first=("run", "a run folder"))
    parser.add_argument(
        "--step", type=int, metavar="N", help="the step (from 1); with --until-nonfinite the last one to try"
    )
    parser.add_argument(
        "--until-nonfinite",
        action="store_true",
        help="find the first value that is not finite; without --step: up to the last step at which the run found one",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE.csv", help="default: replays/NAME/step_N.csv in the current folder"
    )
    args = cli.parse_source(parser)
    run, ranks = Path(args.run), world.discover()
    step = step_to_show(run, args.step, args.until_nonfinite)
    if args.dry_run:
        show(run, step, args.overrides, args.out, ranks, full=args.full)
        return
    replay(run, step, args.overrides, args.out, ranks, until_nonfinite=args.until_nonfinite)


if __name__ == "__main__":
    cli.run(main)
