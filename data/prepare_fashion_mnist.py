"""Writes Fashion-MNIST as image shards: 70,000 real photographs of clothes in ten classes, from a local folder of its four files.

    apt install dataset-fashion-mnist
    python data/prepare_fashion_mnist.py --out runs/demo_fashion/images

writes OUT/train (60,000 images), OUT/val (10,000) and OUT/held_in (as many training images as there are in val, for the
distance of real images from real images). The grey 28 x 28 images get a black border to 32 x 32. A finished folder is left
unchanged. --fraction 0.2 takes a fifth of each part, evenly over the classes.

Source: Xiao, Rasul and Vollgraf 2017, arXiv:1708.07747; licence MIT. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from rear_scale import cli
from rear_scale.config import InputError
from rear_scale.progress import progress
from rear_scale.shards.images import read_image_index, write_images
from rear_scale.shards.inputs import Inputs, check_same_inputs

IMAGE_SIZE = 32  # pixels, of which the outer two are the border
SOURCE = Path("/usr/share/datasets/fashion-mnist")
CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
_SIDE, _BORDER = 28, 2
# sha256 of the uncompressed content: packagers compress the files again
_FILES = {
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
_PUBLISHED = (
    "Debian and Ubuntu ship them (apt install dataset-fashion-mnist), and "
    "github.com/zalandoresearch/fashion-mnist publishes them"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=SOURCE, help=f"folder of the four files (default: {SOURCE})")
    parser.add_argument("--out", type=Path, required=True, help="folder; train/, val/ and held_in/ are written into it")
    parser.add_argument("--fraction", type=float, default=1.0, metavar="F", help="fraction of each part (default: all)")
    args = parser.parse_args()
    if not 0 < args.fraction <= 1:
        raise InputError(f"--fraction={args.fraction:g} is not above 0 and at most 1. Use 0.2 for a fifth")
    files = read_files(args.source)
    train = split(files["train-images-idx3-ubyte.gz"], files["train-labels-idx1-ubyte.gz"])
    val = split(files["t10k-images-idx3-ubyte.gz"], files["t10k-labels-idx1-ubyte.gz"])
    train, val = (evenly(part, round(args.fraction * len(part[1]))) for part in (train, val))
    for name, part in (("train", train), ("held_in", evenly(train, len(val[1]))), ("val", val)):
        write_split(args.out / name, *part)
    own = f"tokenizer.training.images={args.out / 'train'}"
    count = f"{len(train[1]):,} images to train on, {len(val[1]):,} to validate on"
    cli.end(args.out, count, cli.typed("train_tokenizer", "--config", "demo_fashion.yaml", own))


def read_files(source: Path) -> dict[str, bytes]:
    """The content of the four files by name. Raises InputError for a missing or damaged one, and for other content."""
    missing = [name for name in _FILES if not (source / name).is_file()]
    if missing:
        raise InputError(
            f"--source {source} lacks {', '.join(missing)}. {_PUBLISHED}; then name the folder with --source"
        )
    contents = {}
    for name, expected in _FILES.items():
        try:
            contents[name] = gzip.decompress((source / name).read_bytes())
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{source / name} is damaged ({error}). Get it again: {_PUBLISHED}") from error
        sha256 = hashlib.sha256(contents[name]).hexdigest()
        if sha256 != expected:
            raise InputError(
                f"{source / name} holds other data than the published file (sha256 {sha256[:16]}..., not "
                f"{expected[:16]}...). Get it again: {_PUBLISHED}"
            )
    return contents


def split(images: bytes, labels: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The images, uint8 [n, 28, 28], and class ids, int64 [n], from the content of a pair of files."""
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, _SIDE, _SIDE)
    classes = np.frombuffer(labels, np.uint8, offset=8).astype(np.int64)
    assert len(pixels) == len(classes), (len(pixels), len(classes))
    return pixels, classes


def evenly(part: tuple[np.ndarray, np.ndarray], count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first images of each class, `count` in all, in the order of the files."""
    pixels, classes = part
    # The number of an image within its class orders the images class by class in turn.
    within = np.empty(len(classes), np.int64)
    for label in range(len(CLASSES)):
        of_class = classes == label
        within[of_class] = np.arange(of_class.sum())
    chosen = np.sort(np.lexsort((classes, within))[:count])
    return pixels[chosen], classes[chosen]


def write_split(out: Path, pixels: np.ndarray, classes: np.ndarray) -> None:
    """Writes the image shards of one split, unless they exist. Raises InputError for existing shards of other images."""
    inputs: Inputs = {"images": hashlib.sha256(pixels.tobytes()).hexdigest()[:16]}
    if (out / "index.json").exists():
        check_same_inputs(read_image_index(out).get("inputs"), inputs, out, "--out")
        print(f"{out} is complete")
        return
    with progress(f"prepare {out}", len(pixels), "image") as bar:
        shards = write_images(out, bordered(pixels, classes, bar), IMAGE_SIZE, list(CLASSES), inputs)
    print(f"{out}: {len(shards)} images of {len(CLASSES)} classes in {len(shards.shards)} shards")


def bordered(pixels: np.ndarray, classes: np.ndarray, bar: tqdm[Any]) -> Iterator[tuple[Image.Image, int]]:
    """Yields the images with their border, and their class ids."""
    for picture, label in zip(pixels, classes, strict=True):
        yield Image.fromarray(np.pad(picture, _BORDER)), int(label)
        bar.update()


if __name__ == "__main__":
    cli.run(main)
