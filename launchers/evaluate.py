"""Scores a checkpoint: its samples against reference images, its token predictions on held-out shards.

    torchrun --nproc-per-node 8 launchers/evaluate.py --checkpoint runs/demo_rear

Samples first, unless the samples are there or --samples names a file. Writes RUN/result.json.
"""

from pathlib import Path

from rear_scale import cli
from rear_scale.analysis.token_prediction import score_tokens
from rear_scale.evaluate.job import check_evaluation, from_npz, score_images
from rear_scale.evaluate.result import write_result
from rear_scale.sample.job import default_output, load_generator, sample_images
from rear_scale.world import joined


def main() -> None:
    parser = cli.make_parser(__doc__, from_checkpoint=True)
    parser.add_argument("--samples", type=Path, metavar="FILE.npz", help="score these images instead of generating")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="default: RUN/result.json")
    command = cli.parse_checkpoint(parser)
    cfg, checkpoint = command.cfg, command.checkpoint
    if command.args.dry_run:
        cli.show_paths(
            command, inputs=("tokenizer.weights", "data.train", "data.val"), outputs=("evaluate.classifier.weights",)
        )
        return
    check_evaluation(cfg)
    run = checkpoint.run
    samples = command.args.samples or default_output(cfg, checkpoint)
    with joined(command.ranks, same_for_any_world=True) as world:
        if command.args.samples is None:
            sample_images(cfg, checkpoint, world, samples)
        images = score_images(cfg, from_npz(samples), run / "features", world)
        tokens = score_tokens(cfg, load_generator(cfg, checkpoint, world.device), world)
        if world.is_main:
            write_result(command.args.out or run / "result.json", cfg, checkpoint, samples, images, tokens, world)


if __name__ == "__main__":
    cli.run(main)
