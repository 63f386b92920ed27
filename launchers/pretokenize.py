"""Turns images into token shards.

    torchrun --nproc-per-node 8 launchers/pretokenize.py --config demo.yaml \\
        pretokenize.images=IMAGES/train pretokenize.out=TOKENS/train

The images are a folder of class folders, or of WebDataset tars of images and cls. The result is byte-identical for any
number of ranks; the same command continues after a kill.
"""

from rear_scale import cli
from rear_scale.shards.pretokenize import check_pretokenize, pretokenize
from rear_scale.world import joined

_LONGEST_WAIT_S = 7 * 86_400  # a rank that is done waits for the last shard of the others, however slow they are


def main() -> None:
    command = cli.parse(cli.make_parser(__doc__))
    if command.args.dry_run:
        cli.show_paths(command, inputs=("pretokenize.images", "tokenizer.weights"), outputs=("pretokenize.out",))
        return
    images = check_pretokenize(command.cfg)
    with joined(command.ranks, same_for_any_world=True, timeout_s=_LONGEST_WAIT_S) as world:
        pretokenize(command.cfg, images, world)


if __name__ == "__main__":
    cli.run(main)
