"""Where images to score come from: an .npz, a folder of images, tar shards. Each is cut into fixed blocks."""

# n images, H and W their size in pixels

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from rear_scale.config import InputError
from rear_scale.evaluate.npz import StoredArray, read_samples, read_sha256
from rear_scale.shards.crops import BadImage, center_crop, decode_image
from rear_scale.shards.images import ImageShards, open_images
from rear_scale.world import World

BLOCK_IMAGES = 500
_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

AS_STORED = "as stored"  # preprocessing of images that are taken as they are

Read = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]]


@dataclass(frozen=True)
class Generation:
    """The two halves of reading a block of generated images: one block is decoded while the tokens of the next are drawn."""

    draw: Callable[[np.ndarray], Tensor]  # the numbers of a block -> token ids of as many images or more, on the device
    decode: Callable[[Tensor, np.ndarray], tuple[np.ndarray, np.ndarray]]  # these and the numbers -> as Read


@dataclass(frozen=True)
class ImageSet:
    """Images to score, wherever they lie or come from."""

    name: str
    identity: str  # a hash of what the images depend on
    height: int  # pixels
    width: int
    blocks: Sequence[np.ndarray]  # the numbers (int64) of each block's images; a block is read at once
    read: Read  # the numbers of a block -> uint8 [n, H, W, 3] and classes (int64 [n], or null)
    preprocessing: str = AS_STORED
    quantiser: str | None = None  # the rule that made them uint8; null = they came so
    generation: Generation | None = None  # of images that are stored nowhere

    @property
    def count(self) -> int:
        return sum(len(block) for block in self.blocks)


def consecutive_blocks(count: int) -> list[np.ndarray]:
    return [np.arange(start, min(start + BLOCK_IMAGES, count)) for start in range(0, count, BLOCK_IMAGES)]


def check_image_set(path: Path) -> None:
    """Raises InputError, before anything is spent, when there is nothing at the path, or a file that holds no images."""
    if is_tar(path):
        _members(path)
    elif path.is_file():
        read_samples(path)
    elif not path.is_dir():
        raise InputError(f"not found: {path}. Name an .npz, a folder of images, a tar shard or a folder of them")


def is_tar(path: Path) -> bool:
    """Whether a path is a single tar shard, by its name."""
    return path.suffix == ".tar" and path.is_file()


def open_image_set(path: str | Path, world: World, size: int | None = None) -> ImageSet:
    """The images at a path: an .npz, a tar shard, or a folder of image shards, plain tar shards, or image files.

    size: image files and plain tar shards are brought to it as ADM does (halved, scaled and cropped about the centre); null
    = they are taken as they are and must share one size. All ranks must call this.
    Raises InputError when there are no images, or none that can be read.
    """
    check_image_set(Path(path))
    path = Path(os.path.abspath(path))  # "." has no name
    if is_tar(path):
        return _from_files(path, _members(path), size)
    if path.is_file():
        return from_npz(path, world)
    if (path / "index.json").is_file():
        return from_shards(path.name, open_images(path))
    if tars := sorted(path.glob("*.tar")):
        return _from_files(path, [found for tar in tars for found in _members(tar)], size)
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in _EXTENSIONS)
    return _from_files(path, [_File(file, 0, None, _class_of(file, path)) for file in found], size)


def from_npz(path: Path, world: World) -> ImageSet:
    """The sample file of the ADM evaluation, read in parts. All ranks must call this."""
    images, labels = read_samples(path)
    # One rank reads the whole file for its checksum.
    sha256 = world.on_main(lambda: read_sha256(path))
    return from_arrays(path.name, sha256, images, labels, _quantiser_beside(path))


def _quantiser_beside(path: Path) -> str | None:
    """The uint8 rule as launchers/sample.py notes it beside its files; their copies included; null for files of others."""
    try:
        return json.loads(path.with_suffix(".json").read_text()).get("quantiser")
    except (OSError, ValueError, AttributeError):
        return None


def from_arrays(
    name: str,
    identity: str,
    images: StoredArray | np.ndarray,
    labels: np.ndarray | None,
    quantiser: str | None = None,
) -> ImageSet:
    """Images (uint8 [n, H, W, 3]) that can be sliced, under a hash of their content."""

    def read(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        part = slice(int(numbers[0]), int(numbers[-1]) + 1)
        return images[part], None if labels is None else labels[part]

    height, width = images.shape[1:3]
    return ImageSet(name, identity, height, width, consecutive_blocks(len(images)), read, quantiser=quantiser)


def from_shards(name: str, shards: ImageShards) -> ImageSet:
    """Image shards with their manifest."""

    def read(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return next(shards.batches(len(numbers), int(numbers[0]), int(numbers[-1]) + 1))

    identity = hashlib.sha256("".join(shard.sha256 for shard in shards.shards).encode()).hexdigest()
    return ImageSet(name, identity, shards.image_size, shards.image_size, consecutive_blocks(len(shards)), read)


@dataclass(frozen=True)
class _File:
    """An image file, or one inside a tar."""

    path: Path
    offset: int
    size: int | None  # bytes; null = the whole file
    label: int | str | None

    def data(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read() if self.size is None else file.read(self.size)


def _members(tar: Path) -> list[_File]:
    """The images of a tar in its order, with the class id of a `.cls` beside them."""
    try:
        # Not unpacked on the way: members are read from the file itself.
        with tarfile.open(tar, "r:") as archive:
            members = [member for member in archive if member.isfile()]
    except (tarfile.TarError, OSError) as error:
        with suppress(OSError):
            if tarfile.is_tarfile(tar):
                raise InputError(
                    f"{tar} is compressed, but images are read from within it. Unpack it to a plain .tar"
                ) from error
        raise InputError(f"{tar} cannot be read ({error}). Copy the shard again") from error
    classes: dict[str, int] = {}
    for member in members:
        if member.name.endswith(".cls"):
            text = _File(tar, member.offset_data, member.size, None).data()
            if not text.strip().isdigit():
                raise InputError(
                    f"{tar}: {member.name} holds {text[:20]!r}, which is no class id. Write whole numbers there"
                )
            classes[member.name.removesuffix(".cls")] = int(text)
    return [
        _File(tar, member.offset_data, member.size, classes.get(member.name.rsplit(".", 1)[0]))
        for member in members
        if Path(member.name).suffix.lower() in _EXTENSIONS
    ]


def _class_of(file: Path, folder: Path) -> str | None:
    """The sub-folder an image lies in, which names its class."""
    return None if file.parent == folder else file.parent.relative_to(folder).as_posix()


def _from_files(path: Path, files: list[_File], size: int | None) -> ImageSet:
    """path: their folder, or the tar shard that they are all in."""
    if not files:
        raise InputError(
            f"{path} holds no images ({', '.join(_EXTENSIONS)}, or tar shards of them). Name another folder"
        )
    labels = _class_ids([file.label for file in files])
    if size is None:
        height, width = _decode(files[0], None).shape[:2]
    else:
        height = width = size

    def read(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        pixels = np.empty((len(numbers), height, width, 3), np.uint8)
        for row, number in enumerate(numbers):
            image = _decode(files[number], size)
            if image.shape != pixels.shape[1:]:
                raise InputError(
                    f"{files[number].path}: image {number} is {image.shape[1]}x{image.shape[0]}, but the first one is "
                    f"{width}x{height}. Images to score must share one size"
                )
            pixels[row] = image
        return pixels, None if labels is None else labels[numbers]

    # Names, sizes and times instead of the content: a training set is too large to hash for every evaluation.
    folder = path if path.is_dir() else path.parent
    listing = [f"{file.path.relative_to(folder)} {file.offset} {_stamp(file.path)}" for file in files]
    preprocessing = AS_STORED if size is None else crop_rule(size)
    identity = hashlib.sha256("\n".join([preprocessing, *listing]).encode()).hexdigest()
    return ImageSet(
        path.name,
        identity,
        height,
        width,
        consecutive_blocks(len(files)),
        read,
        preprocessing,
        _quantiser_beside(path),
    )


def _stamp(path: Path) -> str:
    found = path.stat()
    return f"{found.st_size} {found.st_mtime_ns}"


def _class_ids(labels: list[int | str | None]) -> np.ndarray | None:
    """Class ids of the labels; names are numbered in order. Null unless every image has one."""
    if any(label is None for label in labels):
        return None
    if all(isinstance(label, int) for label in labels):
        return np.array(labels)
    return np.unique(np.array(labels, dtype=str), return_inverse=True)[1]


def _decode(file: _File, size: int | None) -> np.ndarray:
    try:
        image = decode_image(file.data(), deep=False)
    except (BadImage, OSError) as error:
        raise InputError(f"{file.path} (byte {file.offset}): {error}. Remove the image or make it again") from error
    return np.asarray(image) if size is None else center_crop(image, size)


def crop_rule(size: int) -> str:
    """What is done to image files that are brought to a size, in words: part of what features depend on."""
    return f"centre crop to {size} pixels (halved by boxes, then bicubic)"
