"""The command of launchers/report.py."""

from __future__ import annotations

from pathlib import Path

from rear_scale import cli
from rear_scale.config import InputError
from rear_scale.report.comparison import compare, write_comparison, write_csv
from rear_scale.report.reading import REPORT, is_run
from rear_scale.report.run_page import write_report


def report(description: str | None = None) -> None:
    """Parses the command line and writes what it asks for. Raises InputError for a folder that is no run."""
    parser = cli.Parser(description=description)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.html", help="compare the runs in one page; of one run, its report"
    )
    parser.add_argument(
        "--csv", type=Path, metavar="FILE.csv", help="one row for each run: totals, scores, settings that differ"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the files that would be written, and stop")
    args = parser.parse_args()
    for folder in args.runs:
        check_run(folder)
    for option, path, ending in (("--out", args.out, ".html"), ("--csv", args.csv, ".csv")):
        if path is not None:
            _check_output(option, path, ending)
    if args.dry_run:
        pages = (
            [folder / REPORT for folder in args.runs] if args.out is None and args.csv is None else [args.out, args.csv]
        )
        print(*(path for path in pages if path is not None), sep="\n")
        return
    if args.out is None and args.csv is None:
        for folder in args.runs:
            print(write_report(folder))
        return
    alone = args.out is not None and len(args.runs) == 1
    if alone:
        print(write_report(args.runs[0], out=args.out))
    runs = [] if alone and args.csv is None else compare(args.runs)
    if args.out is not None and not alone:
        write_comparison(args.out, runs)
        print(args.out)
    if args.csv is not None:
        write_csv(args.csv, runs)
        print(args.csv)


def _check_output(option: str, path: Path, ending: str) -> None:
    if path.suffix != ending or path.is_dir():
        raise InputError(
            f"{option} {path} is no name of a file that ends in {ending}. Use {option} {path.with_suffix(ending)}"
        )
    if not path.parent.is_dir():
        raise InputError(f"{option} {path}: the folder {path.parent} does not exist. Make it, or choose another file")


def check_run(folder: Path) -> None:
    """Raises InputError for a folder that does not exist or is no run."""
    if not folder.is_dir():
        raise InputError(f"not found: {folder}, which should be a run folder such as runs/rear_xl")
    if not is_run(folder):
        inside = [path.name for path in sorted(folder.iterdir()) if path.is_dir() and is_run(path)]
        runs = (
            f" The runs in it are {', '.join(inside[:5])}{' and others' if len(inside) > 5 else ''}." if inside else ""
        )
        raise InputError(
            f"{folder} is no run folder: it has neither starts.jsonl nor status.json nor metrics.jsonl.{runs}"
        )
