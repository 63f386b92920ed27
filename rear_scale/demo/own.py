"""The demo on a user's folder of class folders of images. Model sizes are chosen by the images and the machine."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from rear_scale.bench.ceilings import product_flops_per_s
from rear_scale.config import InputError
from rear_scale.demo.recipe import FASHION, NETWORK, Recipe, places
from rear_scale.model.flops import train_flops_per_image
from rear_scale.shards.sources import FolderSource, Split
from rear_scale.shards.walk import shown

_FEWEST = 50  # images of a folder
_FEWEST_OF_CLASS = 10
_MEASURED = 64  # images whose size is looked at
_BATCH = 64
_FEWEST_UPDATES, _MOST_UPDATES = 400, 2000
# The training of the demo's models reaches about this fraction of the rate of a large product of matrices. The values for a
# GPU, here and below, are assumed: they have not been measured.
_EFFICIENCY = {"cpu": 0.25, "cuda": 0.02}
_FEATURES_PER_S = {"cpu": 60.0, "cuda": 1500.0}  # images through EfficientNet-Lite0, by all processes


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

    @property
    def images(self) -> int:
        return sum(self.counts.values())


def look_at(path: Path) -> Folder:
    """The content of a folder. Raises InputError for one without class folders, with a single class or with too few images."""
    if not path.is_dir():
        raise InputError(
            f"--data {path} is neither digits nor fashion nor a folder. Name a folder of class folders of images"
        )
    source = FolderSource(path, None)
    counts = Counter(file.name.partition("/")[0] for file in source.files)
    if len(counts) < 2:
        raise InputError(
            f"--data {path} holds one class, {next(iter(counts))}. The models learn classes: give the images at least two "
            "class folders"
        )
    few = [f"{shown(name)} ({count})" for name, count in sorted(counts.items()) if count < _FEWEST_OF_CLASS]
    if few:
        raise InputError(
            f"--data {path} holds classes of fewer than {_FEWEST_OF_CLASS} images: {', '.join(few[:5])}. Add images, or remove "
            "these folders"
        )
    if len(source) < _FEWEST:
        raise InputError(
            f"--data {path} holds {len(source)} images, but {_FEWEST} are the fewest that train. Add images"
        )
    chosen = [source.files[number * len(source) // _MEASURED] for number in range(min(_MEASURED, len(source)))]
    sides, modes = [], set()
    for file in chosen:
        try:
            with Image.open(path / file.name) as image:
                sides.append(min(image.size))
                modes.add(image.mode)
        except (OSError, ValueError, Image.DecompressionBombError):
            continue  # the preparation counts images that cannot be read
    if not sides:
        raise InputError(f"none of {len(chosen)} images in --data {path} can be read. Are they image files?")
    return Folder(
        path, dict(sorted(counts.items())), round(statistics.median(sides)), modes <= {"L", "1", "LA", "I;16"}
    )


@dataclass(frozen=True)
class Plan:
    """The plan of a demo on a folder: the recipe, and estimates of its duration."""

    recipe: Recipe
    size: str
    seconds: dict[str, float]  # by what the user reads

    def lines(self, folder: Folder) -> list[str]:
        """The lines that are printed before anything starts."""
        size, settings = SIZES[self.size], self.recipe.settings
        seen = settings["train.total_steps"] * _BATCH
        total = sum(self.seconds.values())
        return [
            f"{folder.images:,} {'grey' if folder.is_grey else 'colour'} images of {len(folder.counts)} classes, "
            f"{min(folder.counts.values())} to {max(folder.counts.values())} each, {folder.side} pixels along the shorter side",
            f"size {self.size}: {size.pixels} x {size.pixels} pixels (centre crops), {size.tokens_per_side**2} tokens, models of "
            f"{size.depth} blocks of width {size.width}; each model sees {seen:,} images, every training image "
            f"{seen / settings['data.assumed_images']:.0f} times",
            *(f"    {_duration(seconds):>8}  {what}" for what, seconds in self.seconds.items()),
            f"    {_duration(total):>8}  in all, as estimated for this machine; --size and overrides change it",
        ]


def plan(folder: Folder, size: str | None, device: torch.device) -> Plan:
    """The demo of a folder. size: s, m or l; None = l on a GPU and s on a CPU, unless the images are smaller than that."""
    if size is None:
        size = "l" if device.type == "cuda" else "s"
        while size != "s" and folder.side < SIZES[size].pixels:
            size = "m" if size == "l" else "s"
    chosen = SIZES[size]
    place = Path("runs") / f"demo_{re.sub(r'[^A-Za-z0-9._-]+', '_', folder.path.resolve().name) or 'images'}"
    val_fraction = 0.1 if folder.images >= 1000 else 0.2
    val = sum(map(Split("val", val_fraction).val_count, folder.counts.values()))
    settings = _settings(folder, chosen, place, folder.images - val)
    recipe = Recipe(
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
    )
    return Plan(recipe, size, _seconds(recipe, chosen, folder, val, device))


def _prepare(images: Path, place: Path, pixels: int, split: str, val_fraction: float) -> list[str]:
    return ["python", "data/prepare_imagefolder.py", "--images", str(images), "--out", str(place / "images" / split),
            "--size", str(pixels), "--split", split, "--val-fraction", f"{val_fraction:g}"]  # fmt: skip


def _settings(folder: Folder, size: Size, place: Path, train_images: int) -> dict[str, Any]:
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
        "evaluate.classifier.steps": 800,
    }


def _seconds(recipe: Recipe, size: Size, folder: Folder, val: int, device: torch.device) -> dict[str, float]:
    """Estimates from the rate of a product of matrices on this machine. val: validation images."""
    cfg = recipe.load("rear")
    processes = 2
    rate = product_flops_per_s(device, torch.float32) * _EFFICIENCY[device.type]
    classes = len(folder.counts)
    flops = train_flops_per_image(cfg, min(1.0, classes * (1 - (1 - 1 / classes) ** _BATCH) / _BATCH))
    seen = cfg.train.total_steps or 0
    training = seen * _BATCH * flops / rate
    pixels = size.pixels**2
    features = _FEATURES_PER_S[device.type]
    forward = flops / 3 * cfg.sample.num_images * 3 / rate  # guidance doubles it, and single steps are slower
    start = 15.0  # imports and the meeting of two processes
    return {
        "images as shards": 3 + folder.images / 400,
        "tokenizer": start + 800 * _BATCH * pixels * 6.0e4 / rate,
        "token shards": 2 * start + folder.images * pixels * 2.0e4 / rate / processes,
        "yardsticks": 2 * start + 3 * val / features,
        "training of vanilla AR": start + 0.8 * training,
        "training of reAR": start + training,
        "samples of both": 2 * (start + forward),
        "scores of both": 2 * (start + cfg.sample.num_images / features) + 10,
    }


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
