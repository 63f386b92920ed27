"""The whole path on handwritten digits, from images to trained models, samples and a report.

scikit-learn's digits -> tokenizer -> tar shards -> training of vanilla AR and reAR with deepspeed -> sampling -> evaluation
-> runs/demo/report.html and runs/demo/summary.json.

    bash launchers/demo.sh              one training seed
    bash launchers/demo.sh --seeds 3    three, with mean and spread
    bash launchers/demo.sh --dry-run    only the commands of all stages

Run again after a kill, it continues; finished stages are not run again. Overrides go to both trainings.
"""

import argparse

from rear_scale import cli
from rear_scale.config import InputError
from rear_scale.demo.commands import FOLDER, check_packages, open_folder, stages
from rear_scale.demo.report import write_report
from rear_scale.demo.summary import accuracy, print_table, write_summary
from rear_scale.places import as_typed
from rear_scale.world import locked


def main() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="training seeds 0 .. N-1 of each model (default 1)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands of all stages, and stop")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="for both trainings")
    args = parser.parse_intermixed_args()
    if args.seeds < 1:
        raise InputError(f"--seeds={args.seeds} must be at least 1. Use --seeds 1")
    seeds = list(range(args.seeds))
    planned = stages(seeds, args.overrides)
    if args.dry_run:
        print("\n".join(as_typed(stage.line) for stage in planned))
        return
    check_packages()
    in_use = f"{FOLDER} is in use by another demo. Wait for it, or start in another folder"
    # Beside the folder, which is moved when it was made by other settings.
    with locked(FOLDER.with_name(f".{FOLDER.name}.lock"), in_use):
        folder = open_folder(args.overrides)
        folder.run_all(planned)
        summary = write_summary(seeds)
        report = write_report(summary, planned, folder)
        print_table(summary, report)
    best = f"class accuracy of reAR's samples {accuracy(summary)}"
    cli.end(report, best, cli.typed("sample", "--checkpoint", summary["rear"]["run_dir"]))


if __name__ == "__main__":
    cli.run(main)
