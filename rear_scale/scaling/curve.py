"""Stores the expected loss curve of a config, from finished runs of it with different seeds.

    python launchers/study.py curve runs/demo/ar_seed0 runs/demo/ar_seed1 runs/demo/ar_seed2 --name demo_ar

Writes configs/curves/NAME.yaml: mean and band of the loss by images seen, with the settings that determine it. From then on,
launchers/train.py says when a run with these settings leaves the band.
"""

from __future__ import annotations

from pathlib import Path

from rear_scale import cli
from rear_scale.scaling.expected_curve import FOLDER, make_curve, write_curve


def main(arguments: list[str]) -> None:
    """Runs the command with its arguments. Raises InputError for runs that do not make a curve."""
    parser = cli.Parser(
        prog="study.py curve",
        description=__doc__,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of finished runs of one config")
    parser.add_argument("--name", required=True, help="of the curve: the name of the config")
    parser.add_argument("--out", type=Path, metavar="FILE.yaml", help="another place than configs/curves/NAME.yaml")
    args = parser.parse_args(arguments)
    path = args.out or FOLDER / f"{args.name}.yaml"
    curve = make_curve(args.name, args.runs)
    write_curve(curve, path)
    cli.end(path, f"{curve.runs} runs, {len(curve.images)} logged steps, final loss {curve.mean[-1]:.4f}")
