"""Readers of images with class ids: class folders, or WebDataset tar shards of jpg, png or webp with cls."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import psutil
from PIL import Image

from rear_scale.config import InputError
from rear_scale.progress import say_once
from rear_scale.shards.classes import class_id, folder_ids, id_notes, names_by_id, read_class_map
from rear_scale.shards.crops import EXTENSIONS, BadImage, center_crop, check_bytes, decode_image
from rear_scale.shards.images import read_image_index
from rear_scale.shards.inputs import Inputs, listing_hash
from rear_scale.shards.tar_index import TarSample, read_at, scan, tar_shards
from rear_scale.shards.walk import BESIDE_TARS, NOT_UTF8, OUTSIDE, LeftOut, is_utf8, reason, shown, walk

_LONGEST_CLASS = 4096  # bytes of a cls member; the rest is not read


@dataclass(frozen=True)
class SourceImage:
    """One image file with its class id, not decoded."""

    name: str  # the file, or shard and key, as text
    data: bytes  # of the image file; empty where it cannot be read
    label: int
    problem: str | None = None  # why it cannot be read

    def decode(self, exif: str = "ignore") -> Image.Image:
        """The RGB image, as `decode_image` returns it. Raises BadImage with the problem of an unreadable file."""
        if self.problem is not None:
            raise BadImage(self.problem)
        return decode_image(self.data, exif=exif)


class ImageSource(ABC):
    """Images in a fixed order, each with its class id."""

    folder: Path
    image_size: int | None = None  # pixels where all are square and of one size, else None
    class_names: list[str] | None = None  # by class id; None where the source does not name its classes
    fingerprint: str  # a hash of the content and its order, whatever the folder
    inputs: Inputs  # the content in words, with modification times, for the comparison with a finished output
    left_out: LeftOut
    notes: list[str]  # notes for the user on the class ids

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, start: int, end: int) -> Iterator[SourceImage]:
        """Yields the images start .. end - 1 without decoding them; an unreadable one with its problem.

        Raises InputError for a damaged tar file, and for a class that is not in the class map.
        """

    def say_notes(self) -> None:
        """Prints, once per process, which files are ignored and how classes are numbered."""
        self.left_out.say(self.folder)
        for note in self.notes:
            say_once(f"note: {shown(self.folder)}: {note}")


def open_source(folder: str | Path, class_map: str | None = None) -> ImageSource:
    """The images of a folder of class folders or of tar shards. Raises InputError for any other folder.

    class_map: a file of class ids by name; without it the id of a class folder is its index among the sorted names.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"not found: {folder}. Name a folder of class folders, or of tar shards")
    ids = read_class_map(class_map) if class_map else None
    tars = tar_shards(folder)
    return TarSource(folder, tars, ids) if tars else FolderSource(folder, ids)


def check_size(source: ImageSource, image_size: int) -> None:
    """Raises InputError for images that were prepared at another size than the tokenizer's (pixels)."""
    if source.image_size not in (None, image_size):
        raise InputError(
            f"tokenizer.image_size={image_size}, but the images in {source.folder} have {source.image_size} pixels. "
            "Prepare them at the tokenizer's size, or without a size"
        )


def load_crops(source: ImageSource, image_size: int) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """The centre crops, uint8 [n, S, S, 3], of all images, and (name, reason) of those that cannot be decoded.

    Raises InputError when they do not fit in memory, or none can be decoded.
    """
    crops, _, skipped = load_labelled(source, image_size)
    return crops, skipped


def load_labelled(source: ImageSource, image_size: int) -> tuple[np.ndarray, np.ndarray, list[tuple[str, str]]]:
    """As `load_crops`, with the class ids int64 [n] of the crops."""
    check_size(source, image_size)
    needed, free = len(source) * image_size**2 * 3, psutil.virtual_memory().available
    if needed > 0.5 * free:
        raise InputError(
            f"{len(source):,} images of {image_size} pixels take {needed / 2**30:.1f} GiB of memory, but at "
            f"most half of the free {free / 2**30:.1f} GiB are used for {source.folder}. Use fewer images or smaller ones"
        )
    crops: list[np.ndarray] = []
    labels: list[int] = []
    skipped: list[tuple[str, str]] = []
    for image in source.read(0, len(source)):
        try:
            crops.append(center_crop(image.decode(), image_size))
            labels.append(image.label)
        except BadImage as error:
            skipped.append((image.name, str(error)))
    if not crops:
        raise InputError(f"none of the {len(source)} images in {source.folder} can be read. Is it the right folder?")
    return np.stack(crops), np.array(labels, np.int64), skipped


@dataclass(frozen=True)
class Split:
    """A part of a folder of images.

    `val` is a fraction of every class, `train` the others. `held_in` is a part of train with as many images as val, as far as
    there are: the distance of real images from real images is taken on it.
    """

    name: str
    val_fraction: float

    def val_count(self, images: int) -> int:
        """The number of a class's images in val."""
        return min(max(1, round(self.val_fraction * images)), images - 1)

    def members(self, files: Sequence[tuple[str, str]]) -> list[bool]:
        """Whether each file belongs to the part; files: (class, name).

        A hash of the name decides, so that the parts are the same on every machine and new images change little. Every class
        of at least two images has one in train and one in val.
        """
        by_class: dict[str, list[int]] = {}
        for number, (label, _) in enumerate(files):
            by_class.setdefault(label, []).append(number)
        chosen = [False] * len(files)
        for numbers in by_class.values():
            count = self.val_count(len(numbers))
            digests = {
                number: hashlib.sha256(files[number][1].encode("utf-8", "surrogateescape")).digest()
                for number in numbers
            }
            ordered = sorted(numbers, key=digests.__getitem__)
            parts = {"val": ordered[:count], "train": ordered[count:], "held_in": ordered[count : 2 * count]}
            for number in parts[self.name]:
                chosen[number] = True
        return chosen


class FolderSource(ImageSource):
    """The images FOLDER/CLASS/**/FILE, with classes and files sorted by name."""

    class_names: list[str]

    def __init__(self, folder: Path, ids: dict[str, int] | None, split: Split | None = None) -> None:
        """split: the part of the images that is read; None = all. Class ids are those of the whole folder."""
        self.folder = folder
        listing = walk(folder, EXTENSIONS)
        self.left_out = listing.left_out
        if listing.dangling:
            raise InputError(
                f"{shown(folder / listing.dangling[0])} is a broken link that may be a class. Remove it, or restore its "
                "folder"
            )
        if not listing.folders:
            raise InputError(f"{folder} holds neither class folders nor tar shards. Give each class a folder of images")
        self.files = [file for file in listing.files if "/" in file.name]
        for file in listing.files:
            if "/" not in file.name:
                self.left_out.add(OUTSIDE, file.name)
        classes = [file.name.partition("/")[0] for file in self.files]
        counts = Counter(classes)
        self.ids = folder_ids(listing, counts, ids)
        self.class_names = names_by_id(self.ids)
        if not self.files:
            raise InputError(
                f"{folder} holds class folders, but none with a {', '.join(EXTENSIONS)} file "
                f"({self.left_out.line() or 'they are empty'}). Is it the right one?"
            )
        if split is not None:
            members = split.members([(name, file.name) for name, file in zip(classes, self.files, strict=True)])
            self.files = list(compress(self.files, members))
            classes = list(compress(classes, members))
        self.labels = [self.ids[name] for name in classes]
        self.notes = id_notes(listing.folders, counts, self.ids, mapped=ids is not None)
        lines = "\n".join(
            f"{file.name}\t{label}\t{file.size}" for file, label in zip(self.files, self.labels, strict=True)
        )
        self.fingerprint = hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()
        stamps = ((file.name, file.size, file.mtime_ns) for file in self.files)
        self.inputs = {
            "images": f"{len(self.files)} files ({listing_hash(stamps)})",
            "classes": f"{len(self.class_names)} ({listing_hash(sorted(self.ids.items()))})",
        }

    def __len__(self) -> int:
        return len(self.files)

    def read(self, start: int, end: int) -> Iterator[SourceImage]:
        for file, label in zip(self.files[start:end], self.labels[start:end], strict=True):
            data, problem = b"", file.problem
            if problem is None:
                try:
                    check_bytes(file.size)
                    data = (self.folder / file.name).read_bytes()
                except (OSError, MemoryError, BadImage) as error:
                    problem = getattr(error, "strerror", None) or reason(error)
            yield SourceImage(shown(file.name), data, label, problem)


class TarSource(ImageSource):
    """The images of WebDataset tar shards with one image and its cls (a number, or a name of the class map) per key."""

    def __init__(self, folder: Path, tars: list[Path], ids: dict[str, int] | None) -> None:
        self.folder, self.ids = folder, ids
        self.own_names: list[str] | None = None
        self.left_out, self.notes = LeftOut(), []
        if (folder / "index.json").exists():
            index = read_image_index(folder)
            tars = [folder / shard.file for shard in index["shards"]]
            counts = [shard.samples for shard in index["shards"]]
            self.image_size = index["image_size"]
            self.class_names = self.own_names = index["class_names"]
            about = {name: value for name, value in index.items() if name != "inputs"}
            described: object = {**about, "shards": [shard.as_dict() for shard in index["shards"]]}
        else:
            counts = [len(scan(tar, self.left_out)) for tar in tars]
            described = [(tar.name, tar.stat().st_size, count) for tar, count in zip(tars, counts, strict=True)]
        for file in walk(folder, EXTENSIONS).files:
            self.left_out.add(BESIDE_TARS, file.name)
        if ids is not None:
            self.class_names = names_by_id(ids)
        self.tars = list(zip(tars, counts, strict=True))
        if not sum(counts):
            raise InputError(f"{folder} holds {len(tars)} tar shards without an image. Make or copy them again")
        text = json.dumps([described, ids], sort_keys=True)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()
        classes = "numbers alone" if self.class_names is None else f"{len(self.class_names)} names"
        self.inputs = {
            "images": f"{sum(counts)} in {len(tars)} tars ({listing_hash(map(_stamp, tars))})",
            "classes": f"{classes} ({listing_hash([self.class_names, sorted((ids or {}).items())])})",
        }

    def __len__(self) -> int:
        return sum(count for _, count in self.tars)

    def read(self, start: int, end: int) -> Iterator[SourceImage]:
        first = 0
        for tar, count in self.tars:
            if first < end and first + count > start:
                samples = scan(tar)
                if len(samples) != count:
                    raise InputError(f"{tar} holds {len(samples)} images, not {count}. Copy the shard folder again")
                with open(tar, "rb") as file:
                    for sample in samples[max(start - first, 0) : end - first]:
                        yield self._image(tar, file, sample)
            first += count

    def _image(self, tar: Path, file: BinaryIO, sample: TarSample) -> SourceImage:
        name = shown(f"{tar.name}/{sample.key}")
        images = [extension for extension in EXTENSIONS if extension in sample.members]
        if len(images) != 1 or "cls" not in sample.members:
            has = ", ".join(map(shown, sample.members))
            return SourceImage(name, b"", 0, f"it has {has}, but needs one image ({', '.join(EXTENSIONS)}) and cls")
        offset, size = sample.members["cls"]
        text = read_at(file, (offset, min(size, _LONGEST_CLASS))).decode(errors="replace").strip()
        label = self._label(text)
        if label is None:
            where = f"{tar}, byte {sample.members['cls'][0]}: cls is {shown(text[:40])!r}, which is"
            if self.ids is not None:
                # An error, as for a class folder that is not in the map: skipping would silently lose its images.
                raise InputError(f"{where} not in the class map. Add it")
            return SourceImage(
                name, b"", 0, f"{where.partition(': ')[2]} not a class id. Use a class map that lists it"
            )
        if not is_utf8(sample.key):
            return SourceImage(name, b"", label, NOT_UTF8)
        location = sample.members[images[0]]
        try:
            check_bytes(location[1])
            return SourceImage(name, read_at(file, location), label)
        except (OSError, MemoryError, BadImage) as error:
            return SourceImage(name, b"", label, getattr(error, "strerror", None) or reason(error))

    def _label(self, text: str) -> int | None:
        number = class_id(text)
        if self.ids is None:
            return number
        # In shards whose manifest names the classes, the class map maps these names, and the number is only an index.
        if self.own_names and number is not None and number < len(self.own_names):
            text = self.own_names[number]
        return self.ids.get(text)


def _stamp(path: Path) -> tuple[str, int, int]:
    """The name, size in bytes and modification time in ns of a file."""
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"not found: {shown(path)} ({error.strerror}). Copy the shard folder again") from error
    return path.name, status.st_size, status.st_mtime_ns
