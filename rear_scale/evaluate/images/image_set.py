"""Image sets to score, from an .npz, a folder of images or tar shards, divided into fixed blocks."""

# n images, H and W their size in pixels

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from torch import Tensor

from rear_scale.config import InputError
from rear_scale.config.renamed import with_todays_rounding
from rear_scale.evaluate.images.npz import StoredArray, read_samples, read_sha256
from rear_scale.shards.classes import class_id
from rear_scale.shards.crops import EXTENSIONS, BadImage, center_crop, check_bytes, decode_image
from rear_scale.shards.images import ImageShards, open_images
from rear_scale.shards.tar_index import check_not_compressed, members, read_at, scan, tar_shards
from rear_scale.shards.walk import BESIDE_TARS, NOT_UTF8, File, LeftOut, extension_of, is_utf8, shown, walk
from rear_scale.untrusted import read_json
from rear_scale.world import World

BLOCK_IMAGES = 500

AS_STORED = "as stored"  # the preprocessing of images that are used unchanged

Read = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]]


@dataclass(frozen=True)
class Generation:
    """The two steps of reading a block of generated images, so that one block is decoded while the next is sampled."""

    draw: Callable[
        [np.ndarray], Tensor
    ]  # image numbers of a block -> token ids of at least as many images, on the device
    decode: Callable[[Tensor, np.ndarray], tuple[np.ndarray, np.ndarray]]  # token ids, image numbers -> result of Read


@dataclass(frozen=True)
class ImageSet:
    """A set of images to score, from any source."""

    name: str
    identity: str  # a hash of everything that the images depend on
    height: int  # pixels
    width: int
    blocks: Sequence[np.ndarray]  # image numbers (int64) of each block; a block is read as a whole
    read: Read  # image numbers of a block -> images uint8 [n, H, W, 3] and classes (int64 [n], or None)
    preprocessing: str = AS_STORED
    uint8_rounding: str | None = None  # the rule that rounded floats to uint8; None = not known, the source is uint8
    class_names: Sequence[str] | None = None  # by class id; None where the set has no classes, or no names for them
    generation: Generation | None = None  # for images that are generated and not stored

    @property
    def count(self) -> int:
        return sum(len(block) for block in self.blocks)


def consecutive_blocks(count: int) -> list[np.ndarray]:
    """Image numbers of blocks of BLOCK_IMAGES, the last one shorter."""
    return [np.arange(start, min(start + BLOCK_IMAGES, count)) for start in range(0, count, BLOCK_IMAGES)]


def check_image_set(path: Path) -> None:
    """Raises InputError when the path does not exist or is a file without images. Called before any expensive work."""
    check_not_compressed(path)
    if is_tar(path):
        members(path)
    elif path.is_file():
        read_samples(path)
    elif not path.is_dir():
        raise InputError(f"not found: {path}. Use an .npz, a folder of images, a tar shard or a folder of tar shards")


def is_tar(path: Path) -> bool:
    """Whether a path is a single tar shard, by its name."""
    return path.suffix == ".tar" and path.is_file()


def open_image_set(path: str | Path, world: World, size: int | None = None, exif: str = "ignore") -> ImageSet:
    """The image set at a path: an .npz, a tar shard, or a folder of image shards, plain tar shards, or image files.

    size: image files and plain tar shards are resized and cropped to it as by ADM (halved, scaled and cropped at the centre);
    None = they are used unchanged and must all have one size. exif: "apply" first rotates them by their EXIF orientation. All
    ranks must call this; rank 0 reports skipped files. Raises InputError when there are no images, and for an image that
    cannot be read: it is not skipped, because scores depend on the number of images.
    """
    check_image_set(Path(path))
    path = Path(os.path.abspath(path))  # "." has no name
    if path.is_file() and not is_tar(path):
        return from_npz(path, world)
    if (path / "index.json").is_file():
        return from_shards(path.name, open_images(path))
    left_out = LeftOut()
    if is_tar(path):
        files = _in_tar(path, left_out)
    elif tars := tar_shards(path):
        files = [image for tar in tars for image in _in_tar(tar, left_out)]
        for file in walk(path, EXTENSIONS).files:
            left_out.add(BESIDE_TARS, file.name)
    else:
        listing = walk(path, EXTENSIONS)
        left_out = listing.left_out
        files = [_File.of(path, file) for file in listing.files]
    if world.is_main:
        left_out.say(path)
    return _from_files(path, files, size, exif)


def from_npz(path: Path, world: World) -> ImageSet:
    """The image set of an .npz of the ADM evaluation, which is read in parts. All ranks must call this."""
    images, labels = read_samples(path)
    # Rank 0 alone reads the whole file, for its checksum.
    sha256 = world.on_main(lambda: read_sha256(path))
    return from_arrays(path.name, sha256, images, labels, _rounding_beside(path))


def _rounding_beside(path: Path) -> str | None:
    """The rounding rule that launchers/sample.py has recorded beside its files and their copies; None for other files."""
    try:
        rule = with_todays_rounding(read_json(path.with_suffix(".json"))).get("uint8_rounding")
    except (OSError, ValueError, AttributeError):
        return None
    return rule if isinstance(rule, str) and rule.isprintable() else None


def from_arrays(
    name: str,
    identity: str,
    images: StoredArray | np.ndarray,
    labels: np.ndarray | None,
    uint8_rounding: str | None = None,
) -> ImageSet:
    """The image set of an array (uint8 [n, H, W, 3]) that can be sliced. identity: a hash of its content."""

    def read(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        part = slice(int(numbers[0]), int(numbers[-1]) + 1)
        return images[part], None if labels is None else labels[part]

    height, width = images.shape[1:3]
    return ImageSet(name, identity, height, width, consecutive_blocks(len(images)), read, uint8_rounding=uint8_rounding)


def from_shards(name: str, shards: ImageShards) -> ImageSet:
    """The image set of image shards."""

    def read(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return next(shards.batches(len(numbers), int(numbers[0]), int(numbers[-1]) + 1))

    identity = hashlib.sha256("".join(shard.sha256 for shard in shards.shards).encode()).hexdigest()
    blocks = consecutive_blocks(len(shards))
    return ImageSet(name, identity, shards.image_size, shards.image_size, blocks, read, class_names=shards.class_names)


@dataclass(frozen=True)
class _File:
    """An image file in a folder or in a tar."""

    path: Path
    offset: int
    size: int | None  # bytes; None = the whole file
    label: int | str | None
    stamp: str  # size and modification time of the file or the tar
    problem: str | None = None  # the reason why it cannot be read; None = it can

    @classmethod
    def of(cls, folder: Path, file: File) -> Self:
        """The entry of a file in a folder; its class is the name of its sub-folder."""
        label = file.name.rpartition("/")[0] or None
        return cls(folder / file.name, 0, None, label, f"{file.size} {file.mtime_ns}", file.problem)

    def data(self) -> bytes:
        with open(self.path, "rb") as file:
            if self.size is None:
                return file.read()
            return read_at(file, (self.offset, self.size))


def _in_tar(tar: Path, left_out: LeftOut) -> list[_File]:
    """The images of a tar in the tar's order, with their class ids from `.cls` members."""
    files: list[_File] = []
    samples = scan(tar, left_out)
    stamp = _stamp(tar)
    with open(tar, "rb") as file:
        for sample in samples:
            of_sample = [name for name in sample.members if name in EXTENSIONS]
            if len(of_sample) > 1:
                raise InputError(
                    f"{shown(tar)}: the key {shown(sample.key)} has several images ({', '.join(of_sample)}), but only one is "
                    "allowed. Keep one of them"
                )
            # If no member is KEY.png or the like, names such as KEY.1.png are several images that share the part before
            # their first dot.
            chosen = of_sample or [name for name in sample.members if extension_of(f"_.{name}") in EXTENSIONS]
            classes = {
                name.removesuffix("cls"): _class_id(tar, sample.key, read_at(file, place))
                for name, place in sample.members.items()
                if name.rpartition(".")[2] == "cls"
            }
            for name, place in sample.members.items():
                if name in chosen:
                    label = classes.get(name.removesuffix(name.rpartition(".")[2]))
                    problem = None if is_utf8(sample.key + name) else NOT_UTF8
                    files.append(_File(tar, *place, label, stamp, problem))
                elif not chosen or name.rpartition(".")[2] != "cls":
                    left_out.add_format(f"{sample.key}.{name}")
    return files


def _class_id(tar: Path, key: str, content: bytes) -> int:
    label = class_id(content.decode(errors="replace"))
    if label is None:
        raise InputError(
            f"{shown(tar)}: {shown(key)}.cls holds {content[:20]!r}, which is not a class id. Write integers there"
        )
    return label


def _from_files(path: Path, files: list[_File], size: int | None, exif: str) -> ImageSet:
    """The image set of files. path: their folder, or the tar shard that holds all of them."""
    if not files:
        raise InputError(f"{path} holds no images ({', '.join(EXTENSIONS)}, or tar shards of them). Use another folder")
    bad = [file for file in files if file.problem is not None]
    if bad:
        raise InputError(
            f"{shown(bad[0].path)} (byte {bad[0].offset}): {bad[0].problem}, as for {len(bad)} of {len(files)} images. Remove "
            "the image or make it again"
        )
    labels, class_names = _class_ids([file.label for file in files])
    if size is None:
        height, width = _decode(files[0], None, exif).shape[:2]
    else:
        height = width = size

    def read(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        pixels = np.empty((len(numbers), height, width, 3), np.uint8)
        for row, number in enumerate(numbers):
            image = _decode(files[number], size, exif)
            if image.shape != pixels.shape[1:]:
                raise InputError(
                    f"{files[number].path}: image {number} is {image.shape[1]}x{image.shape[0]}, but the first one is "
                    f"{width}x{height}. Images to score must share one size"
                )
            pixels[row] = image
        return pixels, None if labels is None else labels[numbers]

    # Hash names, sizes and times instead of contents, because a training set is too large to be read for every evaluation.
    folder = path if path.is_dir() else path.parent
    listing = [f"{file.path.relative_to(folder)} {file.offset} {file.stamp}" for file in files]
    preprocessing = preprocessing_rule(size, exif)
    text = "\n".join([preprocessing, *listing])
    identity = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
    return ImageSet(
        path.name,
        identity,
        height,
        width,
        consecutive_blocks(len(files)),
        read,
        preprocessing,
        _rounding_beside(path),
        class_names,
    )


def _stamp(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def _class_ids(labels: list[int | str | None]) -> tuple[np.ndarray | None, list[str] | None]:
    """Class ids of the labels, and the class names, if the labels are names (numbered in alphabetical order).

    (None, None) unless every image has a class.
    """
    if any(label is None for label in labels):
        return None, None
    if all(isinstance(label, int) for label in labels):
        return np.array(labels), None
    names, ids = np.unique(np.array(labels, dtype=str), return_inverse=True)
    return ids, names.tolist()


def _decode(file: _File, size: int | None, exif: str) -> np.ndarray:
    try:
        check_bytes(os.path.getsize(file.path) if file.size is None else file.size)
        image = decode_image(file.data(), deep=False, exif=exif)
        return np.asarray(image) if size is None else center_crop(image, size)
    except (BadImage, OSError, MemoryError) as error:
        raise InputError(
            f"{shown(file.path)} (byte {file.offset}): {shown(str(error))}. Remove the image or make it again"
        ) from error


def preprocessing_rule(size: int | None, exif: str) -> str:
    """A description of the preprocessing of image files. Part of the identity of features, so it must not be reworded."""
    rule = AS_STORED if size is None else crop_rule(size)
    return rule if exif == "ignore" else f"{rule}, turned as EXIF says"


def crop_rule(size: int) -> str:
    """A description of resizing and cropping image files. Part of the identity of features, so it must not be reworded."""
    return f"centre crop to {size} pixels (halved by boxes, then bicubic)"
