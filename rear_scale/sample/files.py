"""The files of a sampling job: intermediate files of each batch, the final files in image order, and copies as PNG."""

# B images of a batch, S side in pixels, N tokens of an image

from __future__ import annotations

import glob
import io
import re
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from rear_scale.config import InputError, TokenizerConfig
from rear_scale.files import atomic_file, atomic_open, remove_leftovers, write_array_atomically
from rear_scale.progress import progress
from rear_scale.sample.grid import write_sheet
from rear_scale.sample.npz_writer import open_samples, write_samples
from rear_scale.world import World

_GRID_COLUMNS = 10
_GRID_ROWS = 10
_WRITE_BLOCK = 500  # images
_TAR_IMAGES = 5000  # images per shard
_NUMBERS_BYTES = 16  # bytes per image besides pixels and tokens: its two counts of near ties, or its class
_SPACE_MARGIN = 1.02  # allows for file headers


class BatchFiles:
    """The intermediate files of one job: near ties, tokens and images of each batch."""

    def __init__(self, folder: Path, *, with_images: bool) -> None:
        self.folder, self.with_images = folder, with_images

    def finished(self, number: int) -> bool:
        """Whether a batch is complete, which is so when the file that is written last exists."""
        return self._file(number, "images" if self.with_images else "tokens").exists()

    def save(self, number: int, near_ties: np.ndarray, tokens: np.ndarray, images: np.ndarray | None) -> None:
        """Writes near_ties int64 [B, 2], tokens int64 [B, N] and images uint8 [B, S, S, 3] of a batch, in this order."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_array_atomically(self._file(number, "near_ties"), near_ties)
        write_array_atomically(self._file(number, "tokens"), tokens.astype(np.uint16))
        if images is not None:
            write_array_atomically(self._file(number, "images"), images)

    def near_ties(self, batches: list[np.ndarray]) -> np.ndarray:
        """The counts of near ties and of tokens within rounding of each image, int64 [n, 2], in image order."""
        return self._collected(batches, "near_ties")

    def tokens(self, batches: list[np.ndarray]) -> np.ndarray:
        """The token ids of all images, uint16 [n, N], in image order."""
        return self._collected(batches, "tokens")

    def images(self, number: int) -> np.ndarray:
        """The images of a batch, uint8 [B, S, S, 3], memory-mapped."""
        return np.load(self._file(number, "images"), mmap_mode="r")

    def remove(self) -> None:
        """Removes this job's intermediate files, and those of earlier unfinished jobs for the same output."""
        together = self.folder.parent
        if self.folder.exists():
            for other in together.iterdir():
                if other != self.folder:
                    shutil.rmtree(other)
            # Removed last: while it exists, the next start notices a killed removal and completes it.
            shutil.rmtree(self.folder)
        with suppress(OSError):  # it does not exist, or a job that began since has its files there
            together.rmdir()

    def _collected(self, batches: list[np.ndarray], quantity: str) -> np.ndarray:
        values = np.concatenate([np.load(self._file(number, quantity)) for number in range(len(batches))])
        collected = np.empty_like(values)
        collected[np.concatenate(batches)] = values
        return collected

    def _file(self, number: int, quantity: str) -> Path:
        return self.folder / f"unit_{number:06d}.{quantity}.npy"


def check_space(output: Path, batch_files: BatchFiles, to_make: int, count: int, tokenizer: TokenizerConfig) -> None:
    """Raises InputError unless the disk has space for the intermediate files of to_make images and the final files of `count`.

    Copies as PNG are not counted, because their size is not known in advance.
    """
    image = 3 * tokenizer.image_size**2 if batch_files.with_images else 0
    needed = (to_make + count) * (image + 2 * tokenizer.num_tokens + _NUMBERS_BYTES)
    free = shutil.disk_usage(output.parent).free
    if free < needed * _SPACE_MARGIN:
        raise InputError(
            f"{output.parent} has {free / 2**20:,.1f} MiB free, but {needed / 2**20:,.1f} MiB are needed: "
            f"intermediate files of {to_make:,} images that are still to be made, and {output.name} with all {count:,}. "
            "Free some space there, or write elsewhere with --out"
        )


def assemble(
    output: Path, batch_files: BatchFiles, batches: list[np.ndarray], labels: np.ndarray, image_size: int
) -> None:
    """Writes the .npz, the token ids and a grid in image order; only token ids where the job has decoded no images."""
    write_array_atomically(output.with_suffix(".tokens.npy"), batch_files.tokens(batches))
    if not batch_files.with_images:
        return
    count = len(labels)
    position = np.empty((count, 2), dtype=np.int64)  # image id -> batch, row
    for number, ids in enumerate(batches):
        position[ids] = np.stack([np.full(len(ids), number), np.arange(len(ids))], axis=1)

    def some(ids: slice) -> np.ndarray:
        # Mapped only while a block is read, because mapped pages count towards the memory of the process.
        opened = {number: batch_files.images(number) for number in np.unique(position[ids, 0])}
        return np.stack([opened[number][row] for number, row in position[ids]])

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, count, _WRITE_BLOCK):
            yield some(slice(start, start + _WRITE_BLOCK))

    columns = min(len(np.unique(labels)), _GRID_COLUMNS)
    write_sheet(output.with_suffix(".png"), some(slice(columns * _GRID_ROWS)), columns)
    write_samples(output, blocks(), count, image_size, labels)


def write_copies(output: Path, format: str, labels: np.ndarray, world: World) -> None:
    """Writes the images of `output` as PNG beside it: 000000.png ... in a folder, or tar shards with their labels (.cls).

    All ranks must call this; each writes a part. Existing files are kept.
    """
    images = open_samples(output)
    folder = _copies_folder(output, format)
    folder.mkdir(exist_ok=True)
    shards = range(0, len(images), _TAR_IMAGES)
    with progress(f"write {format}", len(images), "image", show=world.is_main) as bar:
        for start in shards[world.rank :: world.size]:
            ids = range(start, min(start + _TAR_IMAGES, len(images)))
            if format == "tar":
                _write_shard(folder / f"shard-{start // _TAR_IMAGES:06d}.tar", images, labels, ids)
            else:
                _write_pngs(folder, images, ids)
            bar.update(min(world.size * len(ids), len(images) - bar.n))


def written_over(output: Path) -> list[Path]:
    """The existing, non-empty files that a job would replace or remove: `output`, the files beside it, and its copies."""
    return [*(path for path in _beside(output) if path.is_file() and path.stat().st_size > 0), *_copies(output)]


def _beside(output: Path) -> list[Path]:
    return [output.with_suffix(suffix) for suffix in (".npz", ".tokens.npy", ".png", ".json")]


def remove_unfinished(output: Path) -> None:
    """Removes temporary files that a killed job has left of `output`, of the files beside it and of its copies. The caller must
    hold the job's lock, so that no other process writes there."""
    remove_leftovers(output.parent, *(glob.escape(path.name) for path in _beside(output)))
    for format in ("png", "tar"):
        remove_leftovers(_copies_folder(output, format), "*")


def remove_copies(output: Path) -> None:
    """Removes the copies of an earlier `output`, and no other files in their folders."""
    for path in _copies(output):
        path.unlink()


def _copies(output: Path) -> list[Path]:
    files = [
        path
        for format, names in (("png", "[0-9]*.png"), ("tar", "shard-*.tar"))
        for path in _copies_folder(output, format).glob(names)
    ]
    return [path for path in files if re.fullmatch(r"\d{6,}\.png|shard-\d{6}\.tar", path.name)]


def _copies_folder(output: Path, format: str) -> Path:
    return output.with_suffix("" if format == "png" else f".{format}")


def _write_pngs(folder: Path, images: np.ndarray, ids: range) -> None:
    for number in ids:
        path = folder / f"{number:06d}.png"
        if not path.exists():
            with atomic_open(path) as file:
                file.write(_png(images[number]))


def _write_shard(path: Path, images: np.ndarray, labels: np.ndarray, ids: range) -> None:
    if path.exists():
        return
    with atomic_file(path) as temporary, tarfile.open(temporary, "w") as tar:
        for number in ids:
            for suffix, data in (("cls", str(labels[number]).encode()), ("png", _png(images[number]))):
                member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()
