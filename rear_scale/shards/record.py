"""The layout of a shard folder: tar shards of packed blocks, one manifest, one codebook. data/README.md describes it.

shard-000000.tar     members 00000000.tokens.npy (uint16 [n, N]) and 00000000.label.npy (uint16 [n]) per block
index.json           the manifest: what the tokens are, how many, and a checksum for every shard
codebook.npy         float32 [K, D], so that training never needs the tokenizer's weights
"""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

from rear_scale.config import InputError
from rear_scale.files import atomic_file, file_sha256, write_text_atomically
from rear_scale.shards.storage import is_remote, read_remote

BLOCK_SAMPLES = 4096
BLOCKS_PER_SHARD = 8
SHARD_SAMPLES = BLOCK_SAMPLES * BLOCKS_PER_SHARD
FORMAT = "rear_scale token shards 1"


@dataclass(frozen=True)
class TarShard:
    file: str  # name inside the folder
    samples: int
    size: int  # bytes
    sha256: str
    block_crc32: list[int] = field(default_factory=list)  # of each block's tokens and labels; image shards have none

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "block_crc32" or value}


@dataclass(frozen=True)
class Manifest:
    """index.json of a folder of token shards."""

    tokenizer: str  # name
    tokenizer_sha256: str  # of the weight file that made the tokens
    codebook_size: int  # K
    codebook_dim: int  # D
    num_tokens: int  # N, of one image
    num_samples: int  # token sequences
    crops_per_image: int  # sequences of one image; an epoch is counted in images
    label_counts: list[int]  # samples of each class, by class id
    class_names: list[str]
    codebook_sha256: str | None  # null = the folder has no codebook.npy
    shards: list[TarShard]
    crops: str = "center"  # center | flip | ten; the crops of one image follow one another
    samples_per_shard: int = SHARD_SAMPLES  # at most; the last shard and one with skipped images hold fewer
    block_samples: int = BLOCK_SAMPLES  # at most, of one block
    num_skipped: int = 0  # images that could not be read; skipped.txt names them
    made_from: str = ""  # a hash of images, weights and settings: what the tokens depend on
    inputs: dict[str, Any] | None = (
        None  # images, weights and settings in words, with times; None before they were recorded
    )
    layout: str = "packed"  # packed: blocks; plain: one sample per key, as webdataset writes them
    format: str = FORMAT

    @property
    def num_images(self) -> int:
        """Images of one epoch."""
        return self.num_samples // self.crops_per_image

    @property
    def fingerprint(self) -> str:
        """A hash of the content: shards, order and codebook, wherever the folder lies."""
        content = {name: value for name, value in self.as_dict().items() if name != "inputs"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def as_dict(self) -> dict[str, Any]:
        values = {**vars(self), "shards": [shard.as_dict() for shard in self.shards]}
        return values if self.inputs is not None else {name: values[name] for name in values if name != "inputs"}


def shard_name(index: int) -> str:
    return f"shard-{index:06d}.tar"


def block_key(index: int) -> str:
    """The WebDataset key of a block, counted over the whole folder."""
    return f"{index:08d}"


def read_manifest(folder: str | Path) -> Manifest:
    """Raises InputError when the folder (local or remote) has no manifest, or one that is not ours."""
    values = read_index(folder, FORMAT)
    try:
        manifest = manifest_from(values)
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{Path(folder) / 'index.json'} lacks or adds a field ({error}). Make the shards again"
        ) from error
    if wrong := _wrong_count(manifest):
        raise InputError(f"{Path(folder) / 'index.json'}: {wrong}. Copy the folder again, or make the shards again")
    return manifest


def _wrong_count(manifest: Manifest) -> str | None:
    """What in the counts of a manifest cannot be, or None."""
    for name in ("codebook_size", "codebook_dim", "num_tokens", "crops_per_image", "num_samples"):
        value, least = getattr(manifest, name), 0 if name == "num_samples" else 1
        if not _is_count(value) or value < least:
            return f"{name}={value!r} is not a whole number of at least {least}"
    for name in ("label_counts", "class_names"):
        if not isinstance(getattr(manifest, name), list):
            return f"{name}={getattr(manifest, name)!r} is not a list"
    for counts, what in (
        (manifest.label_counts, "label_counts"),
        ([shard.samples for shard in manifest.shards], "the samples of shards"),
        ([shard.size for shard in manifest.shards], "the sizes of shards"),
    ):
        if not all(_is_count(value) for value in counts):
            return f"{what} {counts[:8]} are not whole numbers"
    total = sum(shard.samples for shard in manifest.shards)
    if total != manifest.num_samples:
        return f"num_samples={manifest.num_samples}, but its {len(manifest.shards)} shards hold {total}"
    # All zero: not counted.
    if sum(manifest.label_counts) not in (0, manifest.num_samples):
        return f"num_samples={manifest.num_samples}, but label_counts sum to {sum(manifest.label_counts)}"
    return None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def manifest_from(values: dict[str, Any]) -> Manifest:
    """Of the values that `as_dict` gives. Raises KeyError or TypeError for others."""
    return Manifest(**{**values, "shards": [TarShard(**shard) for shard in values["shards"]]})


def write_manifest(folder: str | Path, manifest: Manifest) -> None:
    write_index(folder, manifest.as_dict())


def read_index(folder: str | Path, expected_format: str) -> dict[str, Any]:
    """The values of a folder's index.json. Raises InputError when there is none, or of another format."""
    path = f"{folder} (index.json)" if is_remote(folder) else Path(folder) / "index.json"
    try:
        values = json.loads(read_remote(str(folder), "index.json") if is_remote(folder) else Path(path).read_text())
    except FileNotFoundError:
        raise InputError(
            f"not found: {path}. Shards are complete when their manifest is written; make or copy them first"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON ({error}). Make the shards again") from error
    found = values.get("format") if isinstance(values, dict) else None
    if found != expected_format:
        raise InputError(f"{path} has format {found!r}, but {expected_format!r} is wanted. Is this the right folder?")
    return values


def write_index(folder: str | Path, values: dict[str, Any]) -> None:
    """Written last and in one piece: a folder with a manifest is complete."""
    write_text_atomically(Path(folder) / "index.json", json.dumps(values, indent=1) + "\n")


def read_codebook(folder: str | Path, manifest: Manifest) -> np.ndarray:
    """float32 [K, D]. Raises InputError when the file is missing or not the one of the manifest."""
    assert manifest.codebook_sha256 is not None, "the manifest has no codebook"
    if is_remote(folder):
        path, data = f"{folder} (codebook.npy)", read_remote(str(folder), "codebook.npy")
    else:
        path = Path(folder) / "codebook.npy"
        if not path.is_file():
            raise InputError(f"not found: {path}. It is part of the shard folder: copy it, or make the shards again")
        data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != manifest.codebook_sha256:
        raise InputError(f"{path} does not match the checksum in index.json. Copy the shard folder again")
    return np.load(io.BytesIO(data))


def block_checksum(tokens: bytes, labels: bytes) -> int:
    """CRC-32 of the two members of a block."""
    return zlib.crc32(labels, zlib.crc32(tokens))


def write_tar(folder: Path, index: int, samples: Iterable[dict[str, str | bytes]], count: int) -> TarShard:
    """Writes WebDataset samples (`__key__` and bytes per extension) as one tar shard that stands for `count` items.

    The shard appears when it is complete; its bytes depend on the samples alone.
    """
    path = folder / shard_name(index)
    with (
        atomic_file(path) as temporary,
        # A stream, because TarWriter expands URLs in a name.
        open(temporary, "wb") as stream,
        webdataset.TarWriter(stream, mtime=0, user="root", group="root", mode=0o444) as tar,
    ):
        for sample in samples:
            tar.write(sample)
    return TarShard(path.name, count, path.stat().st_size, file_sha256(path))
