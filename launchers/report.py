"""Writes the report of a run, or compares several runs: one HTML file each that needs no other.

    python launchers/report.py runs/rear_xl                            writes runs/rear_xl/report.html
    python launchers/report.py runs/a runs/b --out compare.html        curves, settings that differ, scores, sheets side by side
    python launchers/report.py runs/a runs/b --csv runs.csv            one row for each run

Training writes the report at checkpoints and at its end, and sampling and evaluation write it after their own. A run that is
training, was killed or is on another machine's disk is only read; --out says where the page goes if not into its folder.
"""

from rear_scale import cli
from rear_scale.report.command import report


def main() -> None:
    report(__doc__)


if __name__ == "__main__":
    cli.run(main)
