"""Features on disk, one file per network and fixed block of images.

All scores are computed from these files. A killed job continues with the missing blocks, and sums run in block order, so that
scores do not depend on the number of ranks.
"""

# n images, F features

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np

from rear_scale.config import InputError
from rear_scale.evaluate.images.image_set import ImageSet
from rear_scale.evaluate.images.npz import StoredArray, open_array
from rear_scale.evaluate.networks.base import Extractor
from rear_scale.files import atomic_open, write_text_atomically
from rear_scale.progress import progress
from rear_scale.sample.decode_worker import DecodeWorker
from rear_scale.untrusted import read_json
from rear_scale.world import World


@dataclass(frozen=True)
class Part:
    """One part of the blocks, for an evaluation that is split into several jobs: the blocks with number mod `of` = `index`."""

    index: int = 0
    of: int = 1


@dataclass(frozen=True)
class FeatureBlocks:
    """The features of one network for one image set."""

    folder: Path
    ids: Sequence[np.ndarray]  # the image numbers of each block

    def path(self, number: int) -> Path:
        return self.folder / f"block_{number:05d}.npz"

    def array(self, number: int, name: str) -> np.ndarray:
        return open_array(self.path(number), name)[:]

    def column(self, name: str) -> np.ndarray | None:
        """A whole array in image order; meant for arrays with few values per image. None when the blocks do not have it."""
        try:
            parts = [self.array(number, name) for number in range(len(self.ids))]
        except KeyError:
            return None
        order = np.argsort(np.concatenate(self.ids))
        return np.concatenate(parts)[order]

    def rows(self, name: str) -> BlockRows:
        return BlockRows([open_array(self.path(number), name) for number in range(len(self.ids))])

    @property
    def count(self) -> int:
        return sum(len(ids) for ids in self.ids)


@dataclass(frozen=True)
class BlockRows:
    """An array stored in blocks, read from disk in slices, in the order of the blocks."""

    blocks: list[StoredArray]

    @cached_property
    def starts(self) -> np.ndarray:
        return np.cumsum([0, *(len(block) for block in self.blocks)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, part: slice) -> np.ndarray:
        start, end, _ = part.indices(len(self))
        first, last = np.searchsorted(self.starts, [start, max(start, end - 1)], side="right") - 1
        parts = [
            self.blocks[number][max(0, start - self.starts[number]) : end - self.starts[number]]
            for number in range(first, min(last + 1, len(self.blocks)))
        ]
        return np.concatenate(parts)


def extract(
    images: ImageSet,
    extractors: Sequence[Extractor],
    cache: Path,
    batch_size: int,
    world: World,
    part: Part | None = None,
) -> list[FeatureBlocks]:
    """The features of each extractor, after computing missing blocks. A block of images is read once for all extractors, while
    the features of the previous block are computed.

    All ranks must call this; each computes some blocks. part: compute only this part of the blocks. Raises InputError for
    images that cannot be read, and for features that are not finite.
    """
    part = part or Part()
    feature_sets = [
        FeatureBlocks(feature_folder(images, extractor, cache, batch_size), images.blocks) for extractor in extractors
    ]
    if world.is_main:
        for blocks, extractor in zip(feature_sets, extractors, strict=True):
            _write_manifest(blocks.folder, images, extractor, batch_size)
    # Rank 0 lists the missing blocks, because all ranks must distribute the same list.
    missing = world.on_main(lambda: _missing(feature_sets, part))
    description = f"features of {images.name}"
    total = sum(len(images.blocks[number]) for number in missing)

    def write(number: int, pixels: np.ndarray, labels: np.ndarray | None) -> None:
        for blocks, extractor in zip(feature_sets, extractors, strict=True):
            if not is_whole(blocks.path(number)):
                _write_block(blocks.path(number), _features(extractor, pixels, labels, batch_size))

    with (
        progress(description, total, "image", show=world.is_main and bool(missing)) as bar,
        DecodeWorker(world.device) as worker,
    ):
        begun = 0  # images of the blocks from this rank's last one on, which the worker has not finished
        for position, number in enumerate(missing):
            if position % world.size == world.rank:
                _read_and(write, images, number, worker)  # returns when this rank's block before is written
                bar.update(begun)
                begun = 0
            begun += len(images.blocks[number])
        worker.wait()
        bar.update(begun)
    world.barrier()
    return feature_sets


def _read_and(
    write: Callable[[int, np.ndarray, np.ndarray | None], None], images: ImageSet, number: int, worker: DecodeWorker
) -> None:
    """Reads a block and starts `write` on it in the worker thread, together with the decoding of generated images."""
    generation, ids = images.generation, images.blocks[number]
    if generation is None:
        worker.run(write, number, *images.read(ids))
    else:
        worker.run(lambda tokens: write(number, *generation.decode(tokens, ids)), generation.draw(ids))


def is_complete(blocks: Sequence[FeatureBlocks]) -> bool:
    """Whether the files of all blocks are there and intact."""
    return not _missing(blocks, Part())


def _missing(feature_sets: Sequence[FeatureBlocks], part: Part) -> list[int]:
    numbers = range(part.index, len(feature_sets[0].ids), part.of)
    return [number for number in numbers if not all(is_whole(blocks.path(number)) for blocks in feature_sets)]


def is_whole(path: Path) -> bool:
    """Whether a file of the cache exists and matches its checksums; otherwise it is computed again."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return False
    return _matches_checksums(path, status.st_size, status.st_mtime_ns)


@cache
def _matches_checksums(path: Path, size: int, time_ns: int) -> bool:
    # Cached, because this is called several times per evaluation and reads the whole file.
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, EOFError):
        return False


def _features(
    extractor: Extractor, pixels: np.ndarray, labels: np.ndarray | None, batch_size: int
) -> dict[str, np.ndarray]:
    batches = [extractor(pixels[start : start + batch_size]) for start in range(0, len(pixels), batch_size)]
    arrays = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    return arrays if labels is None else {**arrays, "label": np.asarray(labels, np.int64)}


def _write_block(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with atomic_open(path) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # its stub asks whether a name is allow_pickle


def feature_folder(images: ImageSet, extractor: Extractor, cache: Path, batch_size: int) -> Path:
    """The folder of the features of a set by a network, named by a hash of all that they depend on."""
    # batch_size is part of the key: another shape may select another kernel, which rounds differently.
    identity = f"{images.identity} {extractor.identity} {batch_size} {len(images.blocks)} {len(images.blocks[0])}"
    return cache / hashlib.sha256(identity.encode()).hexdigest()[:16]


def _write_manifest(folder: Path, images: ImageSet, extractor: Extractor, batch_size: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "format": "rear_scale features 1",
        "images": {"name": images.name, "identity": images.identity, "count": images.count},
        "preprocessing": images.preprocessing,
        "network": extractor.identity,
        "batch_size": batch_size,
        "blocks": len(images.blocks),
    }
    path = folder / "manifest.json"
    if path.exists():
        try:
            before = read_json(path)
        except ValueError:
            before = None
        described = before.get("images") if isinstance(before, dict) else None
        if isinstance(described, dict) and {**before, "images": {**described, "name": images.name}} != values:
            raise InputError(
                f"{folder} was made with other images, weights or preprocessing. Remove it, or set evaluate.cache_dir"
            )
    write_text_atomically(path, json.dumps(values, indent=1) + "\n")
