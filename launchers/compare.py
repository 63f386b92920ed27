"""Says what differs between two runs, the most important first: code, versions, config, data, weights, losses.

    python launchers/compare.py runs/a runs/b
    torchrun --nproc-per-node 2 launchers/compare.py runs/a runs/b --tensors

Reads the run folders alone. --tensors makes the first step whose loss or gradient differs again in both runs, and names the first
module whose output, gradient or update differs, with the size of the difference. Exit code 0: nothing differs; 1: something does,
or no step is logged by both; 2: bad input.
"""

import argparse
from pathlib import Path

from rear_scale import cli, world
from rear_scale.config import InputError
from rear_scale.replay import aspects, tensors


def main() -> None:
    parser = cli.Parser(description=__doc__)
    parser.add_argument("a", type=Path, metavar="A", help="a run folder")
    parser.add_argument("b", type=Path, metavar="B", help="another one")
    parser.add_argument("--tensors", action="store_true", help="replay both at the first step that differs")
    parser.add_argument("--step", type=int, metavar="N", help="with --tensors: replay up to this step instead")
    parser.add_argument("--dry-run", action="store_true", help="with --tensors: say which step it would be, and stop")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if (args.step is not None or args.dry_run) and not args.tensors:
        raise InputError("--step and --dry-run belong to --tensors. Add it, or leave them out")
    a, b, ranks = aspects.record(args.a), aspects.record(args.b), world.discover()
    found = aspects.aspects(a, b)
    lines = aspects.in_words(a, b, found)
    different = not aspects.equal(found)
    if args.tensors:
        step = args.step or tensors.step_to_compare(a, b)
        if step is None:
            raise InputError(f"{a.run} and {b.run} have logged no step in common. Name one with --step")
        if args.dry_run:
            lines.append(f"--tensors would replay both up to step {step}")
        else:
            result = tensors.compare(a, b, step, ranks)
            lines += tensors.in_words(result, a.run, b.run)
            different |= result.step is not None
    if ranks.rank == 0:
        print("\n".join(lines))
    if different:
        raise SystemExit(1)


if __name__ == "__main__":
    cli.run(main)
