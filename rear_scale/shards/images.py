"""Image shards: plain WebDataset tars of `%08d.png` (or jpg, webp) and `%08d.cls` files, with a manifest.

shard-000000.tar     members 00000000.png (or jpg, jpeg, webp) and 00000000.cls (the class id as text) per image
index.json           shards with their counts, image size, class names
"""

# n images, C channels, S side in pixels

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from rear_scale.config import InputError
from rear_scale.shards.classes import class_id
from rear_scale.shards.crops import EXTENSIONS, BadImage, decode_image
from rear_scale.shards.inputs import Inputs
from rear_scale.shards.record import (
    TarShard,
    index_path,
    read_index,
    shards_from,
    write_index,
    write_tar,
    wrong_classes,
)
from rear_scale.shards.tar_index import TarSample, read_at, scan
from rear_scale.untrusted import is_count, read_json, shown

FORMAT = "rear_scale image shards 1"
IMAGES_PER_SHARD = 1000
_LARGEST_IMAGE = 65_536  # pixels of a side


@dataclass(frozen=True)
class ImageShards:
    """The images of a folder of image shards."""

    folder: Path
    image_size: int  # pixels, square
    class_names: list[str]
    label_counts: list[int]
    shards: list[TarShard]

    def __len__(self) -> int:
        return sum(shard.samples for shard in self.shards)

    def read(self, start: int = 0, end: int | None = None) -> Iterator[tuple[np.ndarray, int]]:
        """Yields (uint8 [S, S, 3], class id) of the images start .. end - 1, opening only the shards that hold them.

        Raises InputError, naming the file, for a missing or truncated shard and for an image that cannot be read.
        """
        end = len(self) if end is None else end
        first = 0
        for shard in self.shards:
            if first < end and first + shard.samples > start:
                yield from self._read_shard(shard, max(start - first, 0), min(end - first, shard.samples))
            first += shard.samples

    def batches(
        self, batch_size: int, start: int = 0, end: int | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (uint8 [n, S, S, 3], int64 [n]) of consecutive images; the last batch may be shorter."""
        images: list[np.ndarray] = []
        labels: list[int] = []
        for image, label in self.read(start, end):
            images.append(image)
            labels.append(label)
            if len(images) == batch_size:
                yield np.stack(images), np.array(labels)
                images, labels = [], []
        if images:
            yield np.stack(images), np.array(labels)

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """All images (uint8 [n, S, S, 3]) and class ids (int64 [n]), for sets that fit in memory."""
        if len(self) == 0:
            raise InputError(
                f"{self.folder / 'index.json'} lists no images. Make the shards again, or name another folder"
            )
        return next(self.batches(len(self)))

    def _read_shard(self, shard: TarShard, start: int, end: int) -> Iterator[tuple[np.ndarray, int]]:
        path = self.folder / shard.file
        if not path.is_file():
            raise InputError(
                f"not found: {path}, which {self.folder / 'index.json'} lists. Copy the shard folder again"
            )
        samples = scan(path)
        if len(samples) != shard.samples:
            raise InputError(
                f"{path} holds {len(samples)} images, but index.json says {shard.samples}. Copy the shard again"
            )
        with open(path, "rb") as file:
            for number, sample in enumerate(samples[start:end], start=start + 1):
                try:
                    yield self._decode(file, sample)
                except (OSError, KeyError, ValueError, BadImage) as error:
                    raise InputError(f"{path}, image {number}: {error}. Copy the shard again") from error

    def _decode(self, file: BinaryIO, sample: TarSample) -> tuple[np.ndarray, int]:
        extension = next((name for name in EXTENSIONS if name in sample.members), None)
        if extension is None or "cls" not in sample.members:
            raise ValueError(f"sample {sample.key} has no {', '.join(EXTENSIONS)}, or no cls")
        text = read_at(file, sample.members["cls"]).decode(errors="replace")
        label = class_id(text)
        if label is None:
            raise ValueError(f"sample {sample.key} has cls {text[:40]!r}, which is not a class id")
        pixels = np.asarray(decode_image(read_at(file, sample.members[extension]), deep=False))
        if pixels.shape != (self.image_size, self.image_size, 3):
            raise ValueError(
                f"sample {sample.key} is {pixels.shape[1]}x{pixels.shape[0]}, not {self.image_size} squared"
            )
        return pixels, label


def open_images(folder: str | Path) -> ImageShards:
    """The image shards of a folder. Raises InputError without their manifest, and for images of different sizes."""
    values = read_image_index(folder)
    if values["image_size"] is None:
        raise InputError(
            f"{folder} holds images of different sizes, but all must have one size. "
            "Prepare them with a size: python data/prepare_imagefolder.py --size 256"
        )
    names = ("image_size", "class_names", "label_counts", "shards")
    return ImageShards(Path(folder), **{name: values[name] for name in names})


def is_image_folder(folder: Path) -> bool:
    """Whether the manifest of a folder is one of image shards."""
    try:
        values = read_json(folder / "index.json")
    except (OSError, ValueError):
        return False  # read_index reports the reason
    return isinstance(values, dict) and values.get("format") == FORMAT


def read_image_index(folder: str | Path) -> dict[str, Any]:
    """The values of the manifest of image shards: image_size, class_names, label_counts, and shards as TarShard.

    Raises InputError for a missing manifest or field, and for impossible values.
    """
    values, source = read_index(folder, FORMAT), index_path(folder)
    lacking = [name for name in ("image_size", "class_names", "label_counts", "shards") if name not in values]
    if lacking:
        raise InputError(f"{source} lacks {', '.join(lacking)}. Make the shards again")
    size = values["image_size"]
    wrong = wrong_classes(values["label_counts"], values["class_names"])
    if size is not None and not (is_count(size) and 0 < size <= _LARGEST_IMAGE):
        wrong = f"image_size={shown(size)} is not a number of pixels"
    shards = shards_from(values["shards"], source)
    counted, total = sum(values["label_counts"]) if not wrong else 0, sum(shard.samples for shard in shards)
    if not wrong and counted != total:
        wrong = f"label_counts sum to {counted}, but its {len(shards)} shards hold {total} images"
    if wrong:
        raise InputError(f"{source}: {wrong}. Copy the folder again, or make the shards again")
    return {**values, "shards": shards}


def write_images(
    folder: Path,
    images: Iterable[tuple[Image.Image, int]],
    image_size: int,
    class_names: list[str],
    inputs: Inputs | None = None,
) -> ImageShards:
    """Writes square images of one size and their class ids as PNG shards. The bytes depend on the images alone.

    inputs: what the images were made from, for the manifest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[TarShard] = []
    label_counts = [0] * len(class_names)
    for group in _groups(images, IMAGES_PER_SHARD):
        files = [("png", png(image, image_size), label) for image, label in group]
        shards.append(write_image_shard(folder, len(shards), files))
        for _, label in group:
            label_counts[label] += 1
    write_image_manifest(folder, image_size, class_names, label_counts, shards, inputs)
    return open_images(folder)


def write_image_shard(folder: Path, index: int, files: list[tuple[str, bytes, int]]) -> TarShard:
    """Writes one tar shard of image files: (extension, bytes, class id) each."""
    first = index * IMAGES_PER_SHARD
    samples: Iterator[dict[str, str | bytes]] = (
        {"__key__": f"{first + offset:08d}", extension: data, "cls": str(label).encode()}
        for offset, (extension, data, label) in enumerate(files)
    )
    return write_tar(folder, index, samples, count=len(files))


def write_image_manifest(
    folder: Path,
    image_size: int | None,
    class_names: list[str],
    label_counts: list[int],
    shards: list[TarShard],
    inputs: Inputs | None = None,
) -> None:
    """Writes the manifest of image shards.

    image_size: side of every image in pixels, or None where they differ. inputs: what the images were made from.
    """
    write_index(
        folder,
        {
            "format": FORMAT,
            "image_size": image_size,
            "class_names": class_names,
            "label_counts": label_counts,
            "shards": [shard.as_dict() for shard in shards],
            **({} if inputs is None else {"inputs": inputs}),
        },
    )


def png(image: Image.Image, image_size: int) -> bytes:
    """The bytes of a PNG file of a square image."""
    assert image.size == (image_size, image_size), (image.size, image_size)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _groups(items: Iterable[tuple[Image.Image, int]], size: int) -> Iterator[list[tuple[Image.Image, int]]]:
    group = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
