"""Packs a folder of class folders into WebDataset image shards: IMAGES/CLASS/FILE -> OUT/shard-000000.tar ... and index.json.

    python data/prepare_imagefolder.py --images IMAGENET/train --out data/imagenet256/images/train
    python data/prepare_imagefolder.py --images IMAGENET/val --out data/imagenet256/images/val --size 256

    python data/prepare_imagefolder.py --images PHOTOS --out shards/train --size 32 --split train
    python data/prepare_imagefolder.py --images PHOTOS --out shards/val --size 32 --split val

Without --size the files are stored unchanged, to be cropped when they are tokenized; with it, as PNG after ADM's centre crop,
as an evaluation needs its references. --split takes a tenth of every class for val, or the others for train, or as many of
these as there are in val (held_in); --val-fraction sets another fraction. The class id is the index among the sorted folder
names, or that of --class-map. Unreadable files are left out, counted and listed in OUT/skipped.txt. The same command
continues after a kill, and leaves a finished folder unchanged; a finished folder of other images or settings is refused.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from rear_scale import cli
from rear_scale.config import InputError
from rear_scale.progress import progress
from rear_scale.shards import writer
from rear_scale.shards.classes import read_class_map
from rear_scale.shards.crops import EXIF, BadImage, center_crop
from rear_scale.shards.images import IMAGES_PER_SHARD, png, read_image_index, write_image_manifest, write_image_shard
from rear_scale.shards.inputs import Inputs, check_same_inputs, fingerprint
from rear_scale.shards.sources import FolderSource, SourceImage, Split
from rear_scale.shards.walk import shown


def main() -> None:
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--images", type=Path, required=True, help="folder of class folders")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--size", type=int, metavar="PIXELS", help="centre crop to squares of this side")
    parser.add_argument("--class-map", type=Path, metavar="FILE", help="class ids by folder name, text or JSON")
    parser.add_argument(
        "--exif", choices=EXIF, default="ignore", help="with --size: whether to rotate images by their EXIF tag first"
    )
    parser.add_argument(
        "--split", choices=("train", "val", "held_in"), help="only this part of every class (default: all images)"
    )
    parser.add_argument("--val-fraction", type=float, help="with --split: fraction of a class in val (default: 0.1)")
    parser.add_argument("--max-bad-fraction", type=float, default=0.1, help="largest fraction of unreadable files")
    args = parser.parse_args()
    prepare(**vars(args))
    images = sum(shard.samples for shard in read_image_index(args.out)["shards"])
    following = cli.typed(
        "pretokenize", "--config", "CONFIG.yaml", f"pretokenize.images={args.out}", "pretokenize.out=TOKENS"
    )
    if args.split == "train":
        following = "the same command with --split val and another --out"
    cli.end(args.out, f"{images:,} images", following)


def prepare(
    images: Path,
    out: Path,
    size: int | None,
    class_map: Path | None,
    max_bad_fraction: float,
    exif: str = "ignore",
    split: str | None = None,
    val_fraction: float | None = None,
) -> None:
    """Writes the image shards. Raises InputError without class folders in `images`, and for too many unreadable files."""
    if size is not None and size < 1:
        raise InputError(f"--size={size} must be above 0. Use the tokenizer's image size, such as 256")
    if not images.is_dir():
        raise InputError(f"not found: --images {images}. Name a folder of class folders")
    if exif != "ignore" and size is None:
        raise InputError(
            f"--exif {exif} needs --size, because files are stored unchanged without it. Set pretokenize.exif later instead"
        )
    part = _split(split, val_fraction)
    source = FolderSource(images, read_class_map(class_map) if class_map else None, part)
    source.say_notes()
    inputs: Inputs = {**source.inputs, "--size": size, "--exif": exif}
    if part is not None:
        inputs = {**inputs, "--split": part.name, "--val-fraction": part.val_fraction}
    if (out / "index.json").exists():
        before = read_image_index(out)
        check_same_inputs(before.get("inputs"), inputs, out, "--out")
        writer.remove_records(out)  # left by a kill after the manifest was written
        print(f"{shown(out)} is complete: {sum(shard.samples for shard in before['shards'])} images")
        return
    out.mkdir(parents=True, exist_ok=True)
    made_from = fingerprint(inputs)
    finished = []
    with (
        progress(f"prepare {out}", len(source), "image") as bar,
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
    ):
        for index, start, end in writer.shard_ranges(len(source), IMAGES_PER_SHARD):
            shard = writer.finished_shard(out, index, source=made_from)
            if shard is None:
                entries = list(pool.map(partial(entry, size=size, exif=exif), source.read(start, end)))
                files = [item for item in entries if len(item) == 3]
                skipped = [item for item in entries if len(item) == 2]
                counts = np.bincount(np.array([label for *_, label in files], dtype=np.int64))
                shard = writer.FinishedShard(write_image_shard(out, index, files), counts, skipped)
                writer.write_record(out, shard.shard, made_from, counts, skipped)
            finished.append(shard)
            bar.update(end - start)
    skipped = [item for shard in finished for item in shard.skipped]
    writer.write_skipped(out, skipped)
    writer.check_skipped(skipped, len(source), max_bad_fraction, images, out / "skipped.txt", "--max-bad-fraction")
    label_counts = np.zeros(len(source.class_names), dtype=np.int64)
    for shard in finished:
        label_counts[: len(shard.label_counts)] += shard.label_counts
    shards = [shard.shard for shard in finished]
    write_image_manifest(out, size, source.class_names, label_counts.tolist(), shards, inputs)
    writer.remove_records(out)
    left_out = f", {len(skipped)} left out (see {shown(out / 'skipped.txt')})" if skipped else ""
    print(
        f"{shown(out)}: {label_counts.sum()} images of {len(source.class_names)} classes in {len(shards)} shards{left_out}"
    )


def _split(name: str | None, val_fraction: float | None) -> Split | None:
    if name is None:
        if val_fraction is not None:
            raise InputError(
                f"--val-fraction={val_fraction:g} needs --split train or --split val. Add it, or leave the fraction out"
            )
        return None
    share = 0.1 if val_fraction is None else val_fraction
    if not 0 < share < 1:
        raise InputError(f"--val-fraction={share:g} is not between 0 and 1. Use 0.1")
    return Split(name, share)


def entry(image: SourceImage, size: int | None, exif: str) -> tuple[str, bytes, int] | tuple[str, str]:
    """The (extension, bytes, class id) of an image to store, or (name, reason) of an unreadable one."""
    try:
        decoded = image.decode(exif)
        if size is None:
            return image.name.rpartition(".")[2].lower(), image.data, image.label
        return "png", png(Image.fromarray(center_crop(decoded, size)), size), image.label
    except BadImage as error:
        return image.name, str(error)


if __name__ == "__main__":
    cli.run(main)
