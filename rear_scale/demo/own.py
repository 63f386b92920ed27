"""The demo on a user's folder of class folders of images. Model sizes are chosen by the images and the machine."""

from __future__ import annotations

import re
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rear_scale.config import ExperimentConfig, InputError, Plan
from rear_scale.demo.recipe import FASHION, NETWORK, Recipe, places
from rear_scale.shards.crops import BadImage, center_crop
from rear_scale.shards.inputs import Inputs
from rear_scale.shards.sources import FolderSource, Split
from rear_scale.shards.tar_index import tar_shards
from rear_scale.shards.walk import shown

_FEWEST = 50  # images of a folder
_FEWEST_OF_CLASS = 10
_LOOKED_AT = 16  # images that are read before the demo starts
# Names of the parts of a data set, which are no classes.
_PARTS = frozenset(("train", "training", "val", "valid", "validation", "test", "testing"))
_BATCH = 64
_EXIF = "apply"  # photographs of a telephone are stored on their side
_FEWEST_UPDATES, _MOST_UPDATES = 400, 2000


@dataclass(frozen=True)
class Size:
    """A resolution and the model for it."""

    pixels: int
    depth: int
    width: int

    @property
    def tokens_per_side(self) -> int:
        return self.pixels // 4


SIZES = {"s": Size(32, 4, 128), "m": Size(48, 6, 192), "l": Size(64, 6, 256)}


@dataclass(frozen=True)
class Folder:
    """The contents of a folder of class folders."""

    path: Path
    counts: dict[str, int]  # images by class
    side: int  # median of the shorter sides in pixels
    is_grey: bool  # whether all images that were looked at are
    read_s: float = 0.001  # seconds that reading and cropping an image takes
    inputs: Inputs = field(default_factory=dict)  # the content in words, which the results depend on

    @property
    def images(self) -> int:
        return sum(self.counts.values())


def look_at(path: Path) -> Folder:
    """The content of a folder. Raises InputError for one without class folders, with a single class or with too few images."""
    if not path.is_dir():
        raise InputError(
            f"--data {path} is neither digits nor fashion nor a folder. Name a folder of class folders of images"
        )
    if tar_shards(path):
        raise InputError(f"--data {path} holds tar shards. Name the folder of class folders that they were made from")
    source = FolderSource(path, None)
    counts = Counter(file.name.partition("/")[0] for file in source.files)
    _check_classes(path, counts)
    source.left_out.say(path)
    return _looked_at(path, source, dict(sorted(counts.items())))


def _check_classes(path: Path, counts: Counter[str]) -> None:
    """Raises InputError for classes of which nothing can be learned. counts: images by class."""
    if {name.lower() for name in counts} <= _PARTS:
        name = max(counts, key=lambda one: counts[one])
        raise InputError(
            f"--data {path} holds {', '.join(map(shown, sorted(counts)))}, which are parts of a data set and no classes. Use "
            f"--data {path / name}, of which the demo sets some images apart for validation"
        )
    if len(counts) < 2:
        raise InputError(
            f"--data {path} holds one class, {shown(next(iter(counts)))}. The models learn classes: give the images at least two "
            "class folders"
        )
    few = [f"{shown(name)} ({count})" for name, count in sorted(counts.items()) if count < _FEWEST_OF_CLASS]
    if few:
        more = f" and {len(few) - 5} more" if len(few) > 5 else ""
        raise InputError(
            f"--data {path} holds classes of fewer than {_FEWEST_OF_CLASS} images: {', '.join(few[:5])}{more}. Add images, or "
            "remove these folders"
        )
    if counts.total() < _FEWEST:
        raise InputError(
            f"--data {path} holds {counts.total()} images, but {_FEWEST} are the fewest that train. Add images"
        )


def _looked_at(path: Path, source: FolderSource, counts: dict[str, int]) -> Folder:
    """The folder, of which a few images are read. Raises InputError if none of these can be read."""
    sides, seconds, grey = [], [], []
    chosen = [number * len(source) // _LOOKED_AT for number in range(min(_LOOKED_AT, len(source)))]
    for number in chosen:
        (image,) = source.read(number, number + 1)
        started = time.perf_counter()
        try:
            decoded = image.decode(_EXIF)
            pixels = center_crop(decoded, SIZES["l"].pixels)
        except BadImage:
            continue  # the preparation counts and lists images that cannot be read
        seconds.append(time.perf_counter() - started)
        sides.append(min(decoded.size))
        grey.append(bool(np.ptp(pixels, axis=2).max() == 0))
    if not sides:
        raise InputError(
            f"none of {len(chosen)} images of --data {path} that were tried can be read. Are they image files?"
        )
    inputs = {"folder": str(path.resolve()), **source.inputs}
    return Folder(path, counts, round(statistics.median(sides)), all(grey), statistics.mean(seconds), inputs)


def recipe_of(folder: Folder, size: str | None, device: torch.device) -> Recipe:
    """The recipe of a folder. size: s, m or l; None = l on a GPU and s on a CPU, unless the images are smaller than that."""
    if size is None:
        size = "l" if device.type == "cuda" else "s"
        while size != "s" and folder.side < SIZES[size].pixels:
            size = "m" if size == "l" else "s"
    chosen = SIZES[size]
    place = Path("runs") / f"demo_{re.sub(r'[^A-Za-z0-9._-]+', '_', folder.path.resolve().name) or 'images'}"
    val_fraction = 0.1 if folder.images >= 1000 else 0.2
    val = sum(map(Split("val", val_fraction).val_count, folder.counts.values()))
    settings = _settings(folder, chosen, place, val)
    return Recipe(
        folder=place,
        what=f"the images of {folder.path.resolve().name}",
        base=FASHION,
        prepare={
            split: (f"images as shards ({split})", _prepare(folder.path, place, chosen.pixels, split, val_fraction))
            for split in ("train", "held_in", "val")
        },
        packages=NETWORK,
        settings=settings,
        grid_every_images=max(_BATCH * 50, settings["train.total_steps"] * _BATCH // 4),
        yardsticks=True,
        val_images=val,
        passes=3,
        read_s=folder.read_s,
        inputs=folder.inputs,
    )


def _prepare(images: Path, place: Path, pixels: int, split: str, val_fraction: float) -> list[str]:
    command = ["python", "data/prepare_imagefolder.py", "--images", str(images), "--out", str(place / "images" / split),
               "--size", str(pixels), "--split", split, "--val-fraction", f"{val_fraction:g}", "--exif", _EXIF]  # fmt: skip
    # The largest part decides whether too many images cannot be read: a few of them may all be in a small part.
    return command if split == "train" else [*command, "--max-bad-fraction", "0.5"]


def _settings(folder: Folder, size: Size, place: Path, val_images: int) -> dict[str, Any]:
    train_images = folder.images - val_images
    # Two passes over many images; a few hundred updates over few, which are then seen many times.
    steps = min(max(_FEWEST_UPDATES, 2 * train_images // _BATCH), _MOST_UPDATES)
    classes = len(folder.counts)
    samples = classes * max(1, min(1000, max(200, 10 * classes)) // classes)
    return {
        **places(place),
        "data.assumed_images": train_images,
        "model.depth": size.depth,
        "model.width": size.width,
        "model.mlp_width": 2 * size.width,
        "model.num_classes": classes,
        "tokenizer.image_size": size.pixels,
        "tokenizer.num_tokens": size.tokens_per_side**2,
        "tokenizer.grid": [size.tokens_per_side] * 2,
        "tokenizer.codebook_size": 512 if train_images >= 2000 else 256,
        "tokenizer.training.steps": 800,
        "optim.warmup_steps": min(100, steps // 8),
        "train.total_steps": steps,
        "checkpoint.every_steps": max(25, steps // 8),
        "sample.num_images": samples,
        "sample.batch_size": min(250, samples),
        # Few validation images are predicted in as many ways as give a steady mean.
        "evaluate.replace_draws": min(16, max(2, 5000 // val_images)),
        "evaluate.classifier.steps": 800,
    }


def describe(folder: Folder, cfg: ExperimentConfig, plan: Plan) -> list[str]:
    """Lines for the user: the images, and what will be trained on them. cfg, plan: of reAR, with the user's overrides."""
    train, model, tokens = cfg.data.assumed_images or 0, cfg.model, cfg.tokenizer
    seen = plan.last_step * cfg.train.global_batch_size
    fewest, most = min(folder.counts.values()), max(folder.counts.values())
    each = f"{fewest:,} to {most:,} each" if fewest < most else f"{most:,} each"
    return [
        f"{folder.images:,} {'grey' if folder.is_grey else 'colour'} images of {len(folder.counts)} classes, {each}, "
        f"{folder.side} pixels along the shorter side; {folder.images - train:,} of them for validation",
        f"{tokens.image_size} x {tokens.image_size} pixels (centre crops), {tokens.num_tokens} tokens, models of {model.depth} "
        f"blocks of width {model.width}; each model sees {seen:,} images, every training image {seen / max(1, train):.3g} times",
    ]
