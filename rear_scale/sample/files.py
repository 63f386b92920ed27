"""What a sampling job writes: a unit's parts, the files of all images in image order, and copies as PNG."""

# B images of a unit, S side in pixels, N tokens of an image

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
_TAR_IMAGES = 5000  # of a shard
_NUMBERS_BYTES = 16  # of an image, besides pixels and tokens: how often it was near a tie, or its class
_SPACE_MARGIN = 1.02  # for heads of files


class Parts:
    """The files of the units of one job."""

    def __init__(self, folder: Path, *, with_images: bool) -> None:
        self.folder, self.with_images = folder, with_images

    def finished(self, number: int) -> bool:
        """Whether a unit is complete: its last file is there."""
        return self._file(number, "images" if self.with_images else "tokens").exists()

    def save(self, number: int, near_ties: np.ndarray, tokens: np.ndarray, images: np.ndarray | None) -> None:
        """Writes near_ties int64 [B, 2], tokens int64 [B, N], images uint8 [B, S, S, 3] of a unit, the last one last."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_array_atomically(self._file(number, "near_ties"), near_ties)
        write_array_atomically(self._file(number, "tokens"), tokens.astype(np.uint16))
        if images is not None:
            write_array_atomically(self._file(number, "images"), images)

    def near_ties(self, units: list[np.ndarray]) -> np.ndarray:
        """int64 [n, 2], in image order: tokens near a tie, and tokens within rounding, of each image."""
        return self._collected(units, "near_ties")

    def tokens(self, units: list[np.ndarray]) -> np.ndarray:
        """uint16 [n, N], in image order."""
        return self._collected(units, "tokens")

    def images(self, number: int) -> np.ndarray:
        """uint8 [B, S, S, 3], read from the disk as it is indexed."""
        return np.load(self._file(number, "images"), mmap_mode="r")

    def remove(self) -> None:
        """Removes them, and with them those of other jobs of the same output, which were begun before and not ended."""
        together = self.folder.parent
        if self.folder.exists():
            for other in together.iterdir():
                if other != self.folder:
                    shutil.rmtree(other)
            shutil.rmtree(self.folder)  # last: what a kill leaves of it says that there is something to remove
        with suppress(OSError):  # not there; or another job was begun since, whose parts stay
            together.rmdir()

    def _collected(self, units: list[np.ndarray], kind: str) -> np.ndarray:
        found = np.concatenate([np.load(self._file(number, kind)) for number in range(len(units))])
        collected = np.empty_like(found)
        collected[np.concatenate(units)] = found
        return collected

    def _file(self, number: int, kind: str) -> Path:
        return self.folder / f"unit_{number:06d}.{kind}.npy"


def check_space(output: Path, parts: Parts, to_make: int, count: int, tokenizer: TokenizerConfig) -> None:
    """Raises InputError unless there is room for the parts of to_make images and for the files of all `count` of them.

    Copies (sample.also_write) are not counted: how small PNGs are shows when they are made.
    """
    image = 3 * tokenizer.image_size**2 if parts.with_images else 0
    needed = (to_make + count) * (image + 2 * tokenizer.num_tokens + _NUMBERS_BYTES)
    free = shutil.disk_usage(output.parent).free
    if free < needed * _SPACE_MARGIN:
        raise InputError(
            f"{output.parent} has {free / 2**20:,.1f} MiB free, but {needed / 2**20:,.1f} MiB are needed: "
            f"parts of {to_make:,} images that are still to be made, and {output.name} of all {count:,}. "
            "Make room there, or write elsewhere with --out"
        )


def assemble(output: Path, parts: Parts, units: list[np.ndarray], labels: np.ndarray, image_size: int) -> None:
    """Writes the .npz, the token ids and a grid in image order; token ids alone where the parts have no images."""
    write_array_atomically(output.with_suffix(".tokens.npy"), parts.tokens(units))
    if not parts.with_images:
        return
    count = len(labels)
    place = np.empty((count, 2), dtype=np.int64)  # image id -> unit, row
    for number, ids in enumerate(units):
        place[ids] = np.stack([np.full(len(ids), number), np.arange(len(ids))], axis=1)

    def some(ids: slice) -> np.ndarray:
        # Opened for as long as a block is read: what is mapped counts as memory of the process.
        opened = {number: parts.images(number) for number in np.unique(place[ids, 0])}
        return np.stack([opened[number][row] for number, row in place[ids]])

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, count, _WRITE_BLOCK):
            yield some(slice(start, start + _WRITE_BLOCK))

    columns = min(len(np.unique(labels)), _GRID_COLUMNS)
    write_sheet(output.with_suffix(".png"), some(slice(columns * _GRID_ROWS)), columns)
    write_samples(output, blocks(), count, image_size, labels)


def write_copies(output: Path, kind: str, labels: np.ndarray, world: World) -> None:
    """The images of `output` as PNG, beside it: 000000.png ... in a folder, or shards of them with their labels (.cls).

    All ranks must call this; each writes some. A file that is there is kept.
    """
    images = open_samples(output)
    folder = _copies_folder(output, kind)
    folder.mkdir(exist_ok=True)
    shards = range(0, len(images), _TAR_IMAGES)
    with progress(f"write {kind}", len(images), "image", show=world.is_main) as bar:
        for start in shards[world.rank :: world.size]:
            ids = range(start, min(start + _TAR_IMAGES, len(images)))
            if kind == "tar":
                _write_shard(folder / f"shard-{start // _TAR_IMAGES:06d}.tar", images, labels, ids)
            else:
                _write_pngs(folder, images, ids)
            bar.update(min(world.size * len(ids), len(images) - bar.n))


def written_over(output: Path) -> list[Path]:
    """The files with content that a job would replace or remove: `output`, what goes beside it, and its copies."""
    return [*(path for path in _beside(output) if path.is_file() and path.stat().st_size > 0), *_copies(output)]


def _beside(output: Path) -> list[Path]:
    return [output.with_suffix(suffix) for suffix in (".npz", ".tokens.npy", ".png", ".json")]


def remove_unfinished(output: Path) -> None:
    """Removes what a killed job has left of `output`, of what goes beside it and of its copies. Nobody else writes there."""
    remove_leftovers(output.parent, *(glob.escape(path.name) for path in _beside(output)))
    for kind in ("png", "tar"):
        remove_leftovers(_copies_folder(output, kind), "*")


def remove_copies(output: Path) -> None:
    """Removes the copies of an earlier `output`, and nothing else that may lie in their folders."""
    for path in _copies(output):
        path.unlink()


def _copies(output: Path) -> list[Path]:
    found = [
        path
        for kind, names in (("png", "[0-9]*.png"), ("tar", "shard-*.tar"))
        for path in _copies_folder(output, kind).glob(names)
    ]
    return [path for path in found if re.fullmatch(r"\d{6,}\.png|shard-\d{6}\.tar", path.name)]


def _copies_folder(output: Path, kind: str) -> Path:
    return output.with_suffix("" if kind == "png" else f".{kind}")


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
