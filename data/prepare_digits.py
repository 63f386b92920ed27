"""Writes scikit-learn's handwritten digits as image shards: 1,797 real images, ten classes, no download.

    python data/prepare_digits.py --out runs/demo/images

writes OUT/train (1,437 images) and OUT/val (360), always with the same split. The 8x8 scans are enlarged to 24x24 with
bicubic interpolation. A finished folder is left as it is.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from rear_scale import cli
from rear_scale.config import InputError
from rear_scale.places import how_to_install
from rear_scale.shards.images import write_images

IMAGE_SIZE = 24
NUM_VAL = 360


def main() -> None:
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder; train/ and val/ are written into it")
    out = parser.parse_args().out
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise InputError(f"the digits come with scikit-learn. Install it: {how_to_install('scikit-learn')}") from None
    digits = load_digits()
    indices = np.arange(len(digits.target))
    train, val = train_test_split(indices, test_size=NUM_VAL, stratify=digits.target, random_state=0)
    for split, chosen in (("train", np.sort(train)), ("val", np.sort(val))):
        if (out / split / "index.json").exists():
            print(f"{out / split} is complete")
            continue
        images = ((enlarge(digits.images[i]), int(digits.target[i])) for i in chosen)
        shards = write_images(out / split, images, IMAGE_SIZE, [str(name) for name in digits.target_names])
        print(
            f"{out / split}: {len(shards)} images of {len(shards.class_names)} classes in {len(shards.shards)} shards"
        )
    own = [] if out == Path("runs/demo/images") else [f"tokenizer.training.images={out / 'train'}"]
    cli.end(out, f"{len(digits.target):,} images", cli.typed("train_tokenizer", "--config", "demo.yaml", *own))


def enlarge(scan: np.ndarray) -> Image.Image:
    """The grey image of 24x24 pixels of a scan (float [8, 8], 0 to 16)."""
    grey = np.rint(scan * (255 / 16)).astype(np.uint8)
    return Image.fromarray(grey).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)


if __name__ == "__main__":
    cli.run(main)
