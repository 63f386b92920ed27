"""Lists runs: state, step, images per second, loss, last score, age of the last change, disk use.

    python launchers/runs.py              those in runs/
    python launchers/runs.py FOLDER       those in FOLDER and in the folders below it

Runs that changed last come first. Nothing is written, and no lock is taken. A run of very many files is measured for a second,
and its disk use is then shown as > SIZE. docs/reports.md says what `killed` means.
"""

from rear_scale import cli
from rear_scale.report.listing import list_runs


def main() -> None:
    list_runs(__doc__)


if __name__ == "__main__":
    cli.run(main)
