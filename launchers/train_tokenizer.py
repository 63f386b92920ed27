"""Trains the compact tokenizer of a config on images (tokenizer.training.images) and writes tokenizer.weights.

    python launchers/train_tokenizer.py --config demo.yaml

The images are a folder of class folders or of WebDataset tars; ADM's centre crop at tokenizer.image_size is taken of each image.
Training runs in one process. The same command continues after a kill, and does not change finished weights. It is refused for
weights that exist and were trained with other settings.
"""

from pathlib import Path

from rear_scale import cli
from rear_scale.config import InputError
from rear_scale.progress import say
from rear_scale.shards.sources import check_size, load_crops, open_source
from rear_scale.tokenizer import open_tokenizer
from rear_scale.tokenizer.compact_training import check_same_training, quality, remove_progress, train_compact
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
    source.left_out.say(source.folder)
    with joined(command.ranks) as world:
        if world.size > 1:
            raise InputError(
                f"the compact tokenizer trains in one process, but {world.size} were started. Use plain python"
            )
        path = Path(tokenizer.weights)
        pixels, skipped = load_crops(source, tokenizer.image_size)
        for name, reason in skipped:
            say(f"skipped {name}: {reason}")
        with world.alone(
            path.with_name(f".{path.name}.lock"),
            f"tokenizer.weights={path} is being trained by another process. Wait for it, or set another file",
        ):
            if path.exists():
                trained = open_tokenizer(tokenizer, world.device)
                check_same_training(tokenizer, pixels)
                remove_progress(path)  # left behind if training was killed before it removed its progress file
                say(f"{path} is complete")
            else:
                trained = train_compact(tokenizer, pixels, world.device)
        images, out = tokenizer.training.images, command.cfg.data.train
        given = [text for text in command.args.overrides if not text.startswith("pretokenize.")]
        cli.end(
            path,
            quality(trained, pixels),
            cli.typed(
                "pretokenize",
                "--config",
                command.args.config,
                *given,
                f"pretokenize.images={images}",
                f"pretokenize.out={out}",
            ),
        )


if __name__ == "__main__":
    cli.run(main)
