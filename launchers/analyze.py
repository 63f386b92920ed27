"""Runs one of the papers' analyses on checkpoints of one model, or of two models to be compared.

    python launchers/analyze.py exposure --checkpoint runs/rear_b --versus runs/ar_b
    torchrun --nproc-per-node 8 launchers/analyze.py cka --checkpoint S0 S1 S2 --versus T0 T1 T2     three seeds each
    python launchers/analyze.py claims runs/demo                                                     what results say

Writes EXPERIMENT.csv, EXPERIMENT_summary.csv (means over seeds) and EXPERIMENT.png to RUN/analysis/EXPERIMENT, or to run.dir.
The same command continues after a kill. Results are the same for any number of ranks. throughput and claims read the results
that are in folders of runs. docs/analysis.md describes each experiment.
"""

from pathlib import Path

from rear_scale import cli
from rear_scale.analysis.command import OF_RESULTS, add_options, analyze, analyze_results, parse
from rear_scale.analysis.table import EXPERIMENTS
from rear_scale.report.page import Section, Table, write_page


def main() -> None:
    config = "for a weight file: the config to use instead of the one that fits it"
    parser = cli.make_parser(__doc__, config=config, first=("experiment", ", ".join([*EXPERIMENTS, *OF_RESULTS])))
    add_options(parser)
    command = parse(parser)
    if command.experiment in OF_RESULTS:
        analyze_results(command, page_of_table)
    else:
        analyze(command)


def page_of_table(path: Path, title: str, text: list[str], header: list[str], rows: list[list[str]]) -> None:
    """Writes an HTML page with paragraphs and one table of words."""
    write_page(path, title, [Section(title, text, Table(header, rows, frozenset(range(len(header)))))])


if __name__ == "__main__":
    cli.run(main)
