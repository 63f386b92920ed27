"""Trains the compact tokenizer of a config on images (tokenizer.training.images) and writes tokenizer.weights.

    python launchers/train_tokenizer.py --config demo.yaml

The images are a folder of class folders or of WebDataset tars; of each, ADM's centre crop at tokenizer.image_size is taken.
One process; the same command continues after a kill and leaves finished weights as they are.
"""

from pathlib import Path

from rear_scale import cli
from rear_scale.config import InputError
from rear_scale.progress import say
from rear_scale.shards.sources import check_size, load_crops, open_source
from rear_scale.tokenizer import open_tokenizer
from rear_scale.tokenizer.training import train_compact
from rear_scale.world import joined


def main() -> None:
    command = cli.parse(cli.make_parser(__doc__))
    if command.args.dry_run:
        cli.show_paths(command, inputs=("tokenizer.training.images",), outputs=("tokenizer.weights",))
        return
    tokenizer = command.cfg.tokenizer
    if tokenizer.training is None or tokenizer.weights is None:
        raise InputError(
            "tokenizer.training and tokenizer.weights must both be set to train a tokenizer. configs/demo.yaml shows how"
        )
    source = open_source(tokenizer.training.images)
    check_size(source, tokenizer.image_size)
    with joined(command.ranks) as world:
        if world.size > 1:
            raise InputError(
                f"the compact tokenizer trains in one process, but {world.size} were started. Use plain python"
            )
        if Path(tokenizer.weights).exists():
            open_tokenizer(tokenizer, world.device)
            say(f"{tokenizer.weights} is complete")
        else:
            images, skipped = load_crops(source, tokenizer.image_size)
            for name, reason in skipped:
                say(f"skipped {name}: {reason}")
            train_compact(tokenizer, images, world.device)


if __name__ == "__main__":
    cli.run(main)
