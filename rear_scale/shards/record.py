"""The file layout of a folder of token shards: tars of packed blocks, a manifest and a codebook. See data/README.md.

shard-000000.tar     members 00000000.tokens.npy (uint16 [n, N]) and 00000000.label.npy (uint16 [n]) per block
index.json           the manifest: what the tokens are, how many, and a checksum for every shard
codebook.npy         float32 [K, D], so that training never needs the tokenizer's weights
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

from rear_scale.config import InputError
from rear_scale.files import atomic_open, checked_name, file_sha256, write_text_atomically
from rear_scale.shards.storage import is_remote, read_remote
from rear_scale.untrusted import (
    is_count,
    is_sha256,
    mistaken_for,
    npy_array,
    parse_json,
    read_bytes,
    read_json,
    shown,
)

BLOCK_SAMPLES = 4096
BLOCKS_PER_SHARD = 8
SHARD_SAMPLES = BLOCK_SAMPLES * BLOCKS_PER_SHARD
FORMAT = "rear_scale token shards 1"

_MOST_CLASSES = 65_536  # labels and tokens have 16 bits
_MOST_SAMPLES = 2**40
_NPY_HEAD = 4096  # bytes, more than the head of such an array has
# Field of a manifest -> its smallest and largest value.
_COUNTS = {
    "codebook_size": (1, 65_536),
    "codebook_dim": (1, 65_536),
    "num_tokens": (1, 65_536),
    "crops_per_image": (1, 65_536),
    "num_samples": (0, _MOST_SAMPLES),
    "samples_per_shard": (1, _MOST_SAMPLES),
    "block_samples": (1, 2**24),
    "num_skipped": (0, _MOST_SAMPLES),
}


@dataclass(frozen=True)
class TarShard:
    """One shard of a folder, as index.json lists it."""

    file: str  # name inside the folder
    samples: int
    size: int  # bytes
    sha256: str
    block_crc32: list[int] = field(default_factory=list)  # of each block's tokens and labels; empty for image shards

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "block_crc32" or value}


@dataclass(frozen=True)
class Manifest:
    """The content of index.json in a folder of token shards."""

    tokenizer: str  # name
    tokenizer_sha256: str  # of the weight file that made the tokens
    codebook_size: int  # K
    codebook_dim: int  # D
    num_tokens: int  # N, of one image
    num_samples: int  # token sequences
    crops_per_image: int  # sequences of one image; an epoch is counted in images
    label_counts: list[int]  # samples of each class, by class id
    class_names: list[str]
    codebook_sha256: str | None  # None = the folder has no codebook.npy
    shards: list[TarShard]
    crops: str = "center"  # center | flip | ten; the crops of one image are consecutive
    samples_per_shard: int = SHARD_SAMPLES  # at most: the last shard and shards with skipped images hold fewer
    block_samples: int = BLOCK_SAMPLES  # at most, of one block
    num_skipped: int = 0  # images that could not be read; skipped.txt names them
    made_from: str = ""  # a hash of the images, weights and settings that the tokens depend on
    inputs: dict[str, Any] | None = (
        None  # images, weights and settings in words, with times; None in manifests of earlier versions
    )
    layout: str = "packed"  # packed: blocks; plain: one sample per key, as webdataset writes them
    format: str = FORMAT

    @property
    def num_images(self) -> int:
        """The number of images of one epoch."""
        return self.num_samples // self.crops_per_image

    @property
    def fingerprint(self) -> str:
        """A hash of the content: shards, their order and the codebook, whatever the folder."""
        content = {name: value for name, value in self.as_dict().items() if name != "inputs"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def in_a_line(self) -> str:
        """What the shards hold, for a person."""
        skipped = f", {self.num_skipped:,} skipped" if self.num_skipped else ""
        return (
            f"{self.num_samples:,} sequences of {self.num_images:,} images of {len(self.label_counts)} classes{skipped}"
        )

    def as_dict(self) -> dict[str, Any]:
        values = {**vars(self), "shards": [shard.as_dict() for shard in self.shards]}
        return values if self.inputs is not None else {name: values[name] for name in values if name != "inputs"}


def shard_name(index: int) -> str:
    """The file name of a shard."""
    return f"shard-{index:06d}.tar"


def block_key(index: int) -> str:
    """The WebDataset key of a block, counted over the whole folder."""
    return f"{index:08d}"


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a folder, local or remote. Raises InputError without one, and for one of another format."""
    source = index_path(folder)
    manifest = manifest_from(read_index(folder, FORMAT), source)
    if manifest.layout != "packed":
        raise InputError(f"{source}: layout={shown(manifest.layout)} is not packed. Make the shards again")
    return manifest


def index_path(folder: str | Path) -> str:
    """The name of the manifest of a folder, local or remote, for errors."""
    return f"{folder} (index.json)" if is_remote(folder) else str(Path(folder) / "index.json")


def _wrong_count(manifest: Manifest) -> str | None:
    """An error for the first impossible value of a manifest, or None."""
    for name, (least, most) in _COUNTS.items():
        value = getattr(manifest, name)
        if not is_count(value) or not least <= value <= most:
            return f"{name}={shown(value)} is not a whole number of at least {least} and at most {most:,}"
    for name in ("tokenizer", "tokenizer_sha256", "crops", "made_from", "layout"):
        if not isinstance(getattr(manifest, name), str):
            return f"{name}={shown(getattr(manifest, name))} is not a text"
    if manifest.codebook_sha256 is not None and not is_sha256(manifest.codebook_sha256):
        return f"codebook_sha256={shown(manifest.codebook_sha256)} is not a checksum"
    if wrong := wrong_classes(manifest.label_counts, manifest.class_names):
        return wrong
    for shard in manifest.shards:
        blocks = -(-shard.samples // manifest.block_samples)
        if len(shard.block_crc32) not in (0, blocks):
            return f"{shard.file} has {len(shard.block_crc32)} block checksums, but {blocks} blocks"
    total = sum(shard.samples for shard in manifest.shards)
    if total != manifest.num_samples:
        return f"num_samples={manifest.num_samples}, but its {len(manifest.shards)} shards hold {total}"
    # All zero means that they were not counted.
    if sum(manifest.label_counts) not in (0, manifest.num_samples):
        return f"num_samples={manifest.num_samples}, but label_counts sum to {sum(manifest.label_counts)}"
    return None


def wrong_classes(label_counts: Any, class_names: Any) -> str | None:
    """An error for impossible classes of a manifest, or None."""
    if not isinstance(label_counts, list) or not all(map(is_count, label_counts)):
        return f"label_counts={shown(label_counts)} is not a list, or its values are not whole numbers"
    if not isinstance(class_names, list) or not all(isinstance(name, str) for name in class_names):
        return f"class_names={shown(class_names)} is not a list of texts"
    if max(len(label_counts), len(class_names)) > _MOST_CLASSES:
        return f"it has {max(len(label_counts), len(class_names)):,} classes, more than labels of 16 bits can number"
    return None


def manifest_from(values: dict[str, Any], source: str | Path) -> Manifest:
    """The manifest of the values that `as_dict` returns; `source` is the file that holds them, for errors.

    Raises InputError for missing or unknown fields, and for impossible values.
    """
    wrong = _other_fields(values, Manifest) if isinstance(values, dict) else shown(values)
    if wrong:
        raise InputError(f"{source} has a missing or unknown field ({wrong}). Make the shards again")
    manifest = Manifest(**{**values, "shards": shards_from(values["shards"], source)})
    if miscounted := _wrong_count(manifest):
        raise InputError(f"{source}: {miscounted}. Copy the folder again, or make the shards again")
    return manifest


def _other_fields(values: dict[str, Any], dataclass_type: type) -> str:
    """The name of a field that is missing in values, or unknown to a dataclass; empty when there is none."""
    known = {one.name: one for one in fields(dataclass_type)}
    lacking = [
        name
        for name, one in known.items()
        if name not in values and one.default is MISSING and one.default_factory is MISSING
    ]
    return ", ".join(map(shown, [*lacking, *(name for name in values if name not in known)][:1]))


def shards_from(entries: Any, source: str | Path) -> list[TarShard]:
    """The tar shards that a manifest lists. Raises InputError for names outside of the folder, for a shard that is listed
    twice, and for impossible sizes, counts and checksums."""
    if not isinstance(entries, list):
        raise InputError(f"{source}: shards={shown(entries)} is not a list. Make the shards again")
    by_name: dict[str, TarShard] = {}
    for entry in entries:
        wrong = _other_fields(entry, TarShard) if isinstance(entry, dict) else shown(entry)
        if wrong:
            raise InputError(f"{source}: a shard has a missing or unknown field ({wrong}). Make the shards again")
        shard = TarShard(**entry)
        checked_name(shard.file, source, "file")
        if shard.file in by_name:
            raise InputError(f"{source} lists {shard.file} twice. Copy the folder again, or make the shards again")
        counts = [shard.samples, shard.size, *(shard.block_crc32 if isinstance(shard.block_crc32, list) else [None])]
        if not all(map(is_count, counts)) or shard.samples > _MOST_SAMPLES or not is_sha256(shard.sha256):
            raise InputError(
                f"{source}: the samples, size or checksums of {shard.file} are not whole numbers and a sha256 "
                f"({shown([shard.samples, shard.size, shard.sha256])}). Copy the folder again, or make the shards again"
            )
        by_name[shard.file] = shard
    return list(by_name.values())


def write_manifest(folder: str | Path, manifest: Manifest) -> None:
    """Writes index.json of a folder of token shards."""
    write_index(folder, manifest.as_dict())


def read_index(folder: str | Path, expected_format: str) -> dict[str, Any]:
    """The values of a folder's index.json. Raises InputError when it is missing or has another format."""
    path = index_path(folder)
    try:
        values = parse_json(read_remote(str(folder), "index.json")) if is_remote(folder) else read_json(path)
    except FileNotFoundError:
        raise InputError(
            f"not found: {path}. It is written when the shards are complete: make or copy them first"
        ) from None
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}). Make the shards again") from error
    format_name = values.get("format") if isinstance(values, dict) else None
    if format_name != expected_format:
        raise InputError(
            f"{path} has format {shown(format_name)}, but {expected_format!r} is needed. Is this the right folder?"
        )
    return values


def write_index(folder: str | Path, values: dict[str, Any]) -> None:
    """Writes index.json atomically. Call it last: a folder with a manifest counts as complete."""
    write_text_atomically(Path(folder) / "index.json", json.dumps(values, indent=1) + "\n")


def read_codebook(folder: str | Path, manifest: Manifest) -> np.ndarray:
    """The codebook, float32 [K, D]. Raises InputError when the file is missing or does not match the manifest."""
    assert manifest.codebook_sha256 is not None, "the manifest has no codebook"
    shape = (manifest.codebook_size, manifest.codebook_dim)
    most = shape[0] * shape[1] * 8 + _NPY_HEAD
    try:
        if is_remote(folder):
            path, data = f"{folder} (codebook.npy)", read_remote(str(folder), "codebook.npy", most)
        else:
            path = str(Path(folder) / "codebook.npy")
            data = read_bytes(path, most)
    except FileNotFoundError:
        raise InputError(
            f"not found: {path}. It is part of the shard folder: copy it, or make the shards again"
        ) from None
    except InputError:
        raise
    except ValueError as error:
        raise InputError(
            f"{path} cannot be a codebook of {list(shape)} ({error}). Copy the shard folder again"
        ) from error
    if wrong := mistaken_for(data):
        raise InputError(f"{path} {wrong}")
    if hashlib.sha256(data).hexdigest() != manifest.codebook_sha256:
        raise InputError(f"{path} does not match the checksum in index.json. Copy the shard folder again")
    return codebook_from(data, shape, path)


def codebook_from(data: bytes, shape: tuple[int, int], path: str) -> np.ndarray:
    """The codebook, float32 [K, D], from the bytes of an .npy file.

    Raises InputError for another shape, for other types than floats of 32 or 64 bits, and for values that are not finite.
    """
    try:
        codes = npy_array(data, "f", shape)
    except ValueError as error:
        raise InputError(
            f"{path} does not hold the codebook of its manifest: {error}. Copy the shard folder again"
        ) from error
    with np.errstate(over="ignore"):
        codes = codes.astype(np.float32)
    if not np.isfinite(codes).all():
        raise InputError(f"{path} holds values that are not finite. Make the shards again")
    return codes


def block_checksum(tokens: bytes, labels: bytes) -> int:
    """The CRC-32 of the two members of a block."""
    return zlib.crc32(labels, zlib.crc32(tokens))


def write_tar(folder: Path, index: int, samples: Iterable[dict[str, str | bytes]], count: int) -> TarShard:
    """Writes WebDataset samples (`__key__` and bytes per extension) as one tar shard of `count` items.

    Written atomically; the bytes depend on the samples alone.
    """
    path = folder / shard_name(index)
    with (
        # TarWriter gets a stream, because it would interpret a name as a URL.
        atomic_open(path) as stream,
        webdataset.TarWriter(stream, mtime=0, user="root", group="root", mode=0o444) as tar,
    ):
        for sample in samples:
            tar.write(sample)
    return TarShard(path.name, count, path.stat().st_size, file_sha256(path))
