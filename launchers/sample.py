"""Generates images from a checkpoint, on all ranks together.

    torchrun --nproc-per-node 8 launchers/sample.py --checkpoint runs/rear_xl sample.num_images=50000

Writes an ADM .npz (arr_0: uint8 [n, S, S, 3], label: int64 [n]) and, beside it, a grid, the token ids and the settings; for a
tokenizer whose decoder is not implemented here, only token ids and settings.
The same command continues after a kill. Image i is the same for any number of ranks.
"""

from pathlib import Path

from rear_scale import cli
from rear_scale.evaluate.job import missing_inputs
from rear_scale.report.writing import update_report
from rear_scale.sample.job import check_output, default_output, sample_images
from rear_scale.tokenizer import TOKENS_ONLY
from rear_scale.world import joined


def main() -> None:
    parser = cli.make_parser(__doc__, from_checkpoint=True)
    parser.add_argument(
        "--out", type=Path, metavar="FILE.npz", help="default: RUN/samples/, named by step and settings"
    )
    parser.add_argument("--figure", metavar="NAME", help="sample settings of configs/figure/NAME.yaml")
    cli.add_ema_option(parser)
    command = cli.parse_checkpoint(parser)
    if command.args.out is not None:
        check_output(command.args.out)
    if command.args.dry_run:
        tied = () if command.cfg.model.tie_codebook is None else ("data.train",)
        cli.show_paths(command, inputs=("tokenizer.weights", *tied), outputs=())
        return
    output = command.args.out or default_output(command.cfg, command.checkpoint)
    with joined(command.ranks, same_for_any_world=True) as world:
        sample_images(command.cfg, command.checkpoint, world, output)
        update_report(command.checkpoint.run, world.is_main)
    if command.cfg.tokenizer.name in TOKENS_ONLY:
        cli.end(output.with_suffix(".tokens.npy"), f"{command.cfg.sample.num_images:,} sequences")
        return
    number = f"{command.cfg.sample.num_images:,} images, some of them in {output.with_suffix('.png').name}"
    given = ["--checkpoint", command.args.checkpoint, *cli.ema_words(command.args.ema)]
    words = [*given, "--samples", output, *missing_inputs(command.cfg)]
    cli.end(output, number, cli.typed("evaluate", *words))


if __name__ == "__main__":
    cli.run(main)
