"""Runs one of the papers' analyses on checkpoints of one model, or of two models to be compared.

    python launchers/analyze.py generalization --checkpoint runs/rear_b --versus runs/ar_b
    torchrun --nproc-per-node 8 launchers/analyze.py generalization --checkpoint S0 S1 S2 --versus T0 T1 T2     three seeds each

Writes EXPERIMENT.csv, EXPERIMENT_summary.csv (means over seeds) and EXPERIMENT.png to RUN/analysis/EXPERIMENT, or to run.dir.
The same command continues after a kill. Results are the same for any number of ranks. docs/analysis.md describes each
experiment.
"""

from rear_scale import cli
from rear_scale.analysis.command import add_options, analyze, parse
from rear_scale.analysis.table import EXPERIMENTS


def main() -> None:
    config = "for a weight file: the config to use instead of the one that fits it"
    parser = cli.make_parser(__doc__, config=config, first=("experiment", ", ".join(EXPERIMENTS)))
    add_options(parser)
    analyze(parse(parser, ()))


if __name__ == "__main__":
    cli.run(main)
