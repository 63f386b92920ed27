"""Where images come from: a folder of class folders, or WebDataset tar shards of jpg, png or webp with cls."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from rear_scale.config import InputError
from rear_scale.shards.crops import BadImage, center_crop, decode_image
from rear_scale.shards.images import EXTENSIONS, FORMAT
from rear_scale.shards.record import read_index
from rear_scale.shards.tar_index import TarSample, read_member, scan


@dataclass(frozen=True)
class SourceImage:
    name: str  # the file, or shard and key
    data: bytes  # of the image file
    label: int


class ImageSource(ABC):
    """Images in a fixed order, each with its class id."""

    folder: Path
    image_size: int | None = None  # pixels where all are square and of one size, else null
    class_names: list[str] | None = None  # by class id; null where the source does not name its classes
    fingerprint: str  # of what is in it and in which order, wherever it lies

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, start: int, end: int) -> Iterator[SourceImage]:
        """Yields the images start .. end - 1. Raises InputError for a damaged tar file or a missing class, not for an
        image that cannot be decoded: nothing is decoded here."""


def open_source(folder: str | Path, class_map: str | None = None) -> ImageSource:
    """Class folders or tar shards, whichever `folder` holds. Raises InputError for neither.

    class_map: a file that gives class ids by name, in place of the position among the sorted names.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"not found: {folder}. It is a folder of class folders, or of tar shards")
    ids = read_class_map(class_map) if class_map else None
    tars = sorted(folder.glob("*.tar"))
    return TarSource(folder, tars, ids) if tars else FolderSource(folder, ids)


def check_size(source: ImageSource, image_size: int) -> None:
    """Raises InputError when a source was prepared at another size than the tokenizer's (pixels)."""
    if source.image_size not in (None, image_size):
        raise InputError(
            f"tokenizer.image_size={image_size}, but the images in {source.folder} have {source.image_size} pixels. "
            "Prepare them at the tokenizer's size, or without a size"
        )


def load_crops(source: ImageSource, image_size: int) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Centre crops uint8 [n, S, S, 3] of all images, and name and reason of those that cannot be decoded.

    Raises InputError when they do not fit in memory, or none can be decoded.
    """
    check_size(source, image_size)
    needed, free = len(source) * image_size**2 * 3, psutil.virtual_memory().available
    if needed > 0.5 * free:
        raise InputError(
            f"{len(source):,} images of {image_size} pixels take {needed / 2**30:.1f} GiB of memory, but {source.folder} may "
            f"take half of the {free / 2**30:.1f} GiB that are free. Use fewer images or smaller ones"
        )
    crops, skipped = [], []
    for image in source.read(0, len(source)):
        try:
            crops.append(center_crop(decode_image(image.data), image_size))
        except BadImage as error:
            skipped.append((image.name, str(error)))
    if not crops:
        raise InputError(f"none of the {len(source)} images in {source.folder} can be read. Is it the right folder?")
    return np.stack(crops), skipped


def read_class_map(path: str | Path) -> dict[str, int]:
    """Class ids by name: a JSON object {name: id}, or lines of a name and an id; a line without one has its position.

    Raises InputError for a file that is missing or holds anything else.
    """
    try:
        text = Path(path).read_text()
    except OSError:
        raise InputError(f"not found: the class map {path}. Set it to a JSON or text file") from None
    try:
        if text.lstrip().startswith("{"):
            ids = {str(name): int(number) for name, number in json.loads(text).items()}
        else:
            lines = [line.split() for line in text.splitlines() if line.strip()]
            # Anything but a number after the name is a description, as in ImageNet's lists.
            ids = {
                words[0]: int(words[1]) if len(words) == 2 and words[1].isdigit() else position
                for position, words in enumerate(lines)
            }
            if len(ids) != len(lines):
                raise ValueError("a name comes twice")
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"the class map {path} cannot be read ({error}). Use lines such as: n01440764 0") from error
    if not ids or not all(0 <= number < 65_536 for number in ids.values()):
        raise InputError(f"the class map {path} has no class, or ids outside 0..65535. Use lines such as: n01440764 0")
    return ids


def names_by_id(ids: dict[str, int]) -> list[str]:
    """The name of each class id, up to the largest; where several share an id, the first in the map."""
    names = {number: name for name, number in reversed(ids.items())}
    return [names.get(number, str(number)) for number in range(max(names) + 1)]


class FolderSource(ImageSource):
    """FOLDER/CLASS/**/FILE: classes and files by sorted name."""

    def __init__(self, folder: Path, ids: dict[str, int] | None) -> None:
        self.folder = folder
        classes = sorted(
            entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")
        )
        if not classes:
            raise InputError(f"{folder} holds neither class folders nor tar shards. Give each class a folder of images")
        if ids is None:
            ids = {name: position for position, name in enumerate(classes)}
        if unknown := [name for name in classes if name not in ids]:
            raise InputError(
                f"{len(unknown)} of {len(classes)} folders of {folder} are not in the class map, {unknown[0]} among them. "
                "Add them, or move them away"
            )
        self.class_names = names_by_id(ids)
        self.files = [(file, ids[name]) for name in classes for file in _image_files(folder, name)]
        if not self.files:
            raise InputError(
                f"{folder} holds class folders without a {', '.join(EXTENSIONS)} file. Is it the right one?"
            )
        listing = "\n".join(f"{name}\t{label}\t{(folder / name).stat().st_size}" for name, label in self.files)
        self.fingerprint = hashlib.sha256(listing.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.files)

    def read(self, start: int, end: int) -> Iterator[SourceImage]:
        for name, label in self.files[start:end]:
            try:
                data = (self.folder / name).read_bytes()
            except OSError:
                data = b""  # an unreadable file is a bad image like any other
            yield SourceImage(name, data, label)


def _image_files(folder: Path, class_name: str) -> list[str]:
    """Paths of the image files below a class folder, relative to `folder`, sorted."""
    found = []
    for parent, folders, files in os.walk(folder / class_name, followlinks=True):
        folders.sort()
        found += [
            os.path.relpath(os.path.join(parent, name), folder)
            for name in files
            if name.rpartition(".")[2].lower() in EXTENSIONS and not name.startswith(".")
        ]
    return sorted(found)


class TarSource(ImageSource):
    """Tar shards, ours or anybody's: one image and its cls (a number, or a name of the class map) per key."""

    def __init__(self, folder: Path, tars: list[Path], ids: dict[str, int] | None) -> None:
        self.folder, self.ids = folder, ids
        self.own_names: list[str] | None = None
        if (folder / "index.json").exists():
            index = read_index(folder, FORMAT)
            tars = [folder / shard["file"] for shard in index["shards"]]
            counts = [shard["samples"] for shard in index["shards"]]
            self.image_size = index["image_size"]
            self.class_names = self.own_names = index["class_names"]
            described = index
        else:
            counts = [len(scan(tar)) for tar in tars]
            described = [(tar.name, tar.stat().st_size, count) for tar, count in zip(tars, counts, strict=True)]
        if ids is not None:
            self.class_names = names_by_id(ids)
        self.tars = list(zip(tars, counts, strict=True))
        if not sum(counts):
            raise InputError(f"{folder} holds {len(tars)} tar shards without an image. Make or copy them again")
        text = json.dumps([described, ids], sort_keys=True)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()

    def __len__(self) -> int:
        return sum(count for _, count in self.tars)

    def read(self, start: int, end: int) -> Iterator[SourceImage]:
        first = 0
        for tar, count in self.tars:
            if first < end and first + count > start:
                samples = scan(tar)
                if len(samples) != count:
                    raise InputError(f"{tar} holds {len(samples)} images, not {count}. Copy the shard folder again")
                for sample in samples[max(start - first, 0) : end - first]:
                    yield self._image(tar, sample)
            first += count

    def _image(self, tar: Path, sample: TarSample) -> SourceImage:
        name = f"{tar.name}/{sample.key}"
        place = next((sample.members[kind] for kind in EXTENSIONS if kind in sample.members), None)
        if place is None or "cls" not in sample.members:
            raise InputError(
                f"{tar}, byte {sample.first_byte}: sample {sample.key} has {', '.join(sample.members)}, but an image "
                f"({', '.join(EXTENSIONS)}) and cls are wanted. Make the shards with both"
            )
        text = read_member(tar, sample.members["cls"]).decode(errors="replace").strip()
        label = self._label(text)
        if label is None or not 0 <= label < 65_536:
            raise InputError(
                f"{tar}, byte {sample.members['cls'][0]}: cls is {text!r}, which is no class id. "
                "Name a class map that lists it"
            )
        return SourceImage(name, read_member(tar, place), label)

    def _label(self, text: str) -> int | None:
        if self.ids is None:
            return int(text) if text.isdigit() else None
        # Where a manifest names the classes, the map speaks of those names.
        if self.own_names and text.isdigit() and int(text) < len(self.own_names):
            text = self.own_names[int(text)]
        return self.ids.get(text)
