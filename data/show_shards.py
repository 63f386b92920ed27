"""Prints a summary of a folder of shards, and writes a picture of samples from it.

    python data/show_shards.py runs/demo/tokens/val --weights runs/demo/tokenizer/compact.safetensors
    python data/show_shards.py runs/demo/images/val

Token shards are decoded with the weights of the tokenizer that made them; without --weights only the summary is printed.
Image shards need no weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from rear_scale import cli
from rear_scale.config import InputError
from rear_scale.files import file_sha256
from rear_scale.sample.grid import write_sheet
from rear_scale.sample.uint8_rounding import to_uint8
from rear_scale.shards import images
from rear_scale.shards.blocks import open_blocks
from rear_scale.shards.crops import BadImage, center_crop
from rear_scale.shards.record import FORMAT, Manifest, read_manifest
from rear_scale.shards.sources import open_source
from rear_scale.tokenizer import find_tokenizer
from rear_scale.weight_file import find_weights

_COLUMNS = 8
_BATCH = 8  # images decoded at once
_THUMBNAIL = 128  # pixels, for images of different sizes


def main() -> None:
    parser = cli.Parser(description=__doc__)
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="folder of token shards or image shards")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="weights of the tokenizer that made the tokens")
    parser.add_argument("--samples", type=int, default=48, help="samples in the picture, evenly spaced over the set")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="the picture (default: SHARDS.png)")
    show(**vars(parser.parse_args()))


def show(shards: Path, weights: Path | None, samples: int, out: Path | None) -> None:
    """Prints the summary and writes the picture. Raises InputError without shards, and for the wrong weights."""
    if samples < 1:
        raise InputError(f"--samples={samples} must be above 0. Use 48")
    out = out or shards.with_name(f"{shards.resolve().name}.png")
    if images.is_image_folder(shards):
        print(image_summary(images.read_image_index(shards)))
        pixels = stored_images(shards, samples)
    else:
        manifest = read_manifest(shards)
        print(token_summary(manifest))
        if weights is None:
            published = find_tokenizer(manifest.tokenizer).published or "the file that tokenizer.weights named"
            print(f"no picture: it takes the weights of {manifest.tokenizer} (--weights; {published})")
            return
        pixels = decoded_images(shards, manifest, weights, samples)
    write_sheet(out, pixels, _COLUMNS)
    print(f"{len(pixels)} samples, spread over the set in its order: {out}")


def token_summary(manifest: Manifest) -> str:
    """The content of token shards in five lines."""
    size = sum(shard.size for shard in manifest.shards)
    counts = np.array(manifest.label_counts or [0])
    lines = [
        f"{FORMAT}, made by {manifest.tokenizer} (weights {manifest.tokenizer_sha256[:12] or 'unknown'})",
        f"{manifest.num_samples:,} sequences of {manifest.num_tokens} tokens out of {manifest.codebook_size:,} codes of width "
        f"{manifest.codebook_dim}",
        f"{manifest.num_images:,} images x {manifest.crops_per_image} crops ({manifest.crops}), "
        f"{manifest.num_skipped:,} images skipped",
        f"{len(manifest.shards):,} tar shards, {size / 2**20:,.1f} MiB, {size / max(manifest.num_samples, 1):,.1f} bytes per "
        "sequence",
        f"{len(manifest.label_counts):,} classes with {counts.min():,} to {counts.max():,} sequences, "
        f"{(counts == 0).sum():,} without any",
    ]
    return "\n".join(lines)


def image_summary(index: dict[str, Any]) -> str:
    """The content of image shards in three lines."""
    counts = np.array(index["label_counts"] or [0])
    size = f"{index['image_size']} pixels squared" if index["image_size"] else "of various sizes"
    return "\n".join(
        [
            f"{images.FORMAT}: {counts.sum():,} images, {size}",
            f"{len(index['shards']):,} tar shards, {sum(shard.size for shard in index['shards']) / 2**20:,.1f} MiB",
            f"{len(counts):,} classes with {counts.min():,} to {counts.max():,} images",
        ]
    )


def stored_images(shards: Path, samples: int) -> np.ndarray:
    """The images to show, uint8 [n, S, S, 3]; thumbnails where sizes differ."""
    source = open_source(shards)
    size = source.image_size or _THUMBNAIL
    pixels = []
    for number in spread(len(source), samples):
        image = next(source.read(number, number + 1))
        try:
            pixels.append(center_crop(image.decode(), size))
        except BadImage as error:
            raise InputError(f"{shards}: {image.name} cannot be read ({error}). Make the shards again") from error
    return np.stack(pixels)


def decoded_images(shards: Path, manifest: Manifest, weights: Path, samples: int) -> np.ndarray:
    """The decoded images of evenly spaced token sequences, uint8 [n, S, S, 3]."""
    file = find_weights(weights)
    tokenizer = find_tokenizer(manifest.tokenizer).from_file(str(weights)).eval()
    # Imported shards may have no checksum of their weights.
    if manifest.tokenizer_sha256 and file_sha256(file) != manifest.tokenizer_sha256:
        raise InputError(
            f"--weights {file} has hash {file_sha256(file)[:12]}, but the tokens in {shards} were made by "
            f"{manifest.tokenizer_sha256[:12]}. Name those weights"
        )
    files = open_blocks(shards, manifest)
    blocks = [(shard, block) for shard in range(len(manifest.shards)) for block in range(files.count(shard))]
    firsts = np.cumsum([0, *(files.length(*block) for block in blocks)])
    rows = []
    for number in spread(manifest.num_samples, samples):
        index = int(np.searchsorted(firsts, number, side="right")) - 1
        tokens, _ = files.read(*blocks[index])
        rows.append(tokens[number - firsts[index]].astype(np.int64))
    with torch.inference_mode():
        decoded = [
            to_uint8(tokenizer.decode(ids), "truncate") for ids in torch.from_numpy(np.stack(rows)).split(_BATCH)
        ]
    return np.concatenate(decoded)


def spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` numbers below `count`, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).astype(int)).tolist()


if __name__ == "__main__":
    cli.run(main)
