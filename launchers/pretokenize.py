"""Encodes images into token shards.

    torchrun --nproc-per-node 8 launchers/pretokenize.py --config demo.yaml \\
        pretokenize.images=IMAGES/train pretokenize.out=TOKENS/train

IMAGES is a folder of class folders, or of WebDataset tars with images and cls members. The result is byte-identical for any
number of ranks; the same command continues after a kill.
"""

from pathlib import Path

from rear_scale import cli
from rear_scale.config import required_path
from rear_scale.shards.pretokenize import check_pretokenize, pretokenize
from rear_scale.shards.record import read_manifest
from rear_scale.shards.storage import is_remote
from rear_scale.world import joined

_OF_ONE_SET = ("pretokenize.images=", "pretokenize.out=", "pretokenize.crops=")
_LONGEST_WAIT_S = 7 * 86_400  # ranks that have finished wait in a collective for the last shards of slower ranks


def main() -> None:
    command = cli.parse(cli.make_parser(__doc__))
    if command.args.dry_run:
        cli.show_paths(command, inputs=("pretokenize.images", "tokenizer.weights"), outputs=("pretokenize.out",))
        return
    images = check_pretokenize(command.cfg)
    with joined(command.ranks, same_for_any_world=True, timeout_s=_LONGEST_WAIT_S) as world:
        pretokenize(command.cfg, images, world)
    out = required_path(command.cfg.pretokenize.out, "pretokenize.out")
    cli.end(out, read_manifest(out).in_a_line(), _following(command, Path(out)))


def _following(command: cli.Command, out: Path) -> str:
    """Tokenizing the validation images where their shards are missing, else training."""
    cfg, own = command.cfg, ["--config", command.args.config]
    given = [text for text in command.args.overrides if not text.startswith("pretokenize.")]
    kept = [text for text in command.args.overrides if text not in given and not text.startswith(_OF_ONE_SET)]
    val = cfg.data.val
    if val is not None and not is_remote(val) and not Path(val).exists() and Path(val) != out:
        images = Path(required_path(cfg.pretokenize.images, "pretokenize.images")).with_name("val")
        kept += [f"pretokenize.images={images if images.is_dir() else 'IMAGES'}", f"pretokenize.out={val}"]
        return cli.typed("pretokenize", *own, *given, *kept)
    if cfg.data.train is None or (not Path(cfg.data.train).exists() and val != str(out)):
        given = [*given, f"data.train={out}"]
    return cli.typed("train", *own, *given)


if __name__ == "__main__":
    cli.run(main)
