"""An index of ordinary WebDataset shards of tokens (one sample per key, with tokens and cls), for reading by offset.

The index lies beside the tars: `NAME.tar.offsets.npy` (int64 [n, 4]: first byte, size, index of the extension, class id) and
`offsets.json` (the manifest, and a record of the indexed files).
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from rear_scale.config import InputError, TokenizerConfig
from rear_scale.files import file_sha256, write_array_atomically, write_text_atomically
from rear_scale.locks import locked
from rear_scale.progress import progress
from rear_scale.shards.blocks import TOKEN_EXTENSIONS, decode_plain
from rear_scale.shards.classes import class_id
from rear_scale.shards.record import Manifest, TarShard, manifest_from
from rear_scale.shards.tar_index import TarSample, read_member, scan, tar_shards
from rear_scale.untrusted import read_json

FORMAT = "rear_scale plain shards 1"


def plain_tars(folder: str | Path) -> list[Path]:
    """The tar files of a local folder, sorted by name, which is the order of their samples.

    Raises InputError for a compressed one.
    """
    return tar_shards(folder) if Path(folder).is_dir() else []


def index_folder(folder: str | Path, cache_root: Path) -> Path:
    """The folder for the index of a folder of tars: that folder itself or, where it is read-only, one in the cache."""
    folder = Path(folder)
    if (folder / "offsets.json").exists() or os.access(folder, os.W_OK):
        return folder
    return cache_root / f"offsets-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]}"


def index_plain(
    folder: str | Path, tokenizer: TokenizerConfig, index: Path, *, on_error: str, max_skipped_fraction: float
) -> Manifest:
    """The manifest of a folder of plain shards. Indexes them first, unless an index of the unchanged files exists.

    index: the folder of `index_folder`. Any number of processes may call this at once. Raises InputError, with file and byte,
    for a sample that is damaged or does not fit the tokenizer; with on_error="skip" such samples are left out, up to a
    fraction of max_skipped_fraction.
    """
    tars = plain_tars(folder)
    state = [[tar.name, tar.stat().st_size, tar.stat().st_mtime_ns] for tar in tars]
    codebook = Path(folder) / "codebook.npy"
    if codebook.is_file():
        state.append([codebook.name, codebook.stat().st_size, codebook.stat().st_mtime_ns])
    made_from = json.loads(json.dumps([state, tokenizer.num_tokens, tokenizer.codebook_size, on_error]))
    manifest = _read_index(index, made_from)
    if manifest is not None:
        return manifest  # before the lock, which a read-only folder cannot hold
    with locked(index / ".offsets.lock"):
        manifest = _read_index(index, made_from)
        if manifest is None:
            manifest = _build(Path(folder), tars, tokenizer, index, on_error, max_skipped_fraction)
            text = json.dumps({"format": FORMAT, "made_from": made_from, "manifest": manifest.as_dict()}, indent=1)
            write_text_atomically(index / "offsets.json", text)
    return manifest


def _read_index(index: Path, made_from: Any) -> Manifest | None:
    try:
        values = read_json(index / "offsets.json")
        if values["format"] != FORMAT or values["made_from"] != made_from:
            return None
        return manifest_from(values["manifest"], index / "offsets.json")
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _build(
    folder: Path, tars: list[Path], tokenizer: TokenizerConfig, index: Path, on_error: str, max_skipped_fraction: float
) -> Manifest:
    shards: list[TarShard] = []
    counts = np.zeros(0, dtype=np.int64)
    skipped: list[str] = []
    with progress(f"index {folder}", len(tars), "shard") as bar:
        for tar in tars:
            rows, errors = _index_tar(tar, tokenizer)
            if errors and on_error == "raise":
                raise InputError(f"{errors[0]}. Repair or remove it, or set data.on_error=skip")
            skipped += errors
            more = np.bincount(rows[:, 3], minlength=len(counts))
            more[: len(counts)] += counts
            counts = more
            write_array_atomically(index / f"{tar.name}.offsets.npy", rows)
            shards.append(TarShard(tar.name, len(rows), tar.stat().st_size, file_sha256(tar)))
            bar.update()
    samples = int(counts.sum())
    if len(skipped) > max_skipped_fraction * (samples + len(skipped)) or not samples:
        first = skipped[0] if skipped else "no tar holds a sample"
        raise InputError(
            f"{folder}: {len(skipped)} of {samples + len(skipped)} samples cannot be used, more than "
            f"data.max_skipped_fraction={max_skipped_fraction}; first: {first}. Repair the shards, or allow more"
        )
    codebook = folder / "codebook.npy"
    return Manifest(
        tokenizer=tokenizer.name,
        tokenizer_sha256="",
        codebook_size=tokenizer.codebook_size,
        codebook_dim=tokenizer.codebook_dim,
        num_tokens=tokenizer.num_tokens,
        num_samples=samples,
        crops_per_image=1,
        label_counts=counts.tolist(),
        class_names=[str(label) for label in range(len(counts))],
        codebook_sha256=file_sha256(codebook) if codebook.is_file() else None,
        shards=shards,
        samples_per_shard=max(shard.samples for shard in shards),
        num_skipped=len(skipped),
        layout="plain",
    )


def _index_tar(tar: Path, tokenizer: TokenizerConfig) -> tuple[np.ndarray, list[str]]:
    """The index of a tar: rows int64 [n, 4] of the usable samples, and an error for each of the others."""
    rows, errors = [], []
    for sample in scan(tar):
        try:
            rows.append(_row(tar, sample, tokenizer))
        except (ValueError, EOFError) as error:
            errors.append(f"{tar}, byte {sample.first_byte}: sample {sample.key}: {error}")
    return np.array(rows, dtype=np.int64).reshape(-1, 4), errors


def _row(tar: Path, sample: TarSample, tokenizer: TokenizerConfig) -> tuple[int, int, int, int]:
    extension = next((number for number, name in enumerate(TOKEN_EXTENSIONS) if name in sample.members), None)
    if extension is None or "cls" not in sample.members:
        raise ValueError(
            f"it has {', '.join(sample.members)}, but needs tokens ({', '.join(TOKEN_EXTENSIONS)}) and cls"
        )
    location = sample.members[TOKEN_EXTENSIONS[extension]]
    decode_plain(read_member(tar, location), extension, tokenizer.num_tokens, tokenizer.codebook_size)
    text = read_member(tar, sample.members["cls"]).decode(errors="replace").strip()
    label = class_id(text)
    if label is None:
        raise ValueError(f"cls is {text[:40]!r}, which is not a class id")
    return *location, extension, label
