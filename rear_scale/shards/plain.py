"""Ordinary WebDataset shards of tokens (one sample per key: tokens and cls): an index of offsets makes them a set.

Beside the tars lie, once indexed, `NAME.tar.offsets.npy` (int64 [n, 4]: first byte, size, kind of member, class id) and
`offsets.json` (the manifest, with what the index was made from).
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
from rear_scale.shards.blocks import PLAIN_KINDS, decode_plain
from rear_scale.shards.classes import class_id
from rear_scale.shards.record import Manifest, TarShard, manifest_from
from rear_scale.shards.tar_index import TarSample, read_member, scan, tar_shards
from rear_scale.untrusted import read_json

FORMAT = "rear_scale plain shards 1"


def plain_tars(folder: str | Path) -> list[Path]:
    """The tar files of a local folder by sorted name, which is the order of their samples.

    Raises InputError for a compressed one.
    """
    return tar_shards(folder) if Path(folder).is_dir() else []


def index_folder(folder: str | Path, cache_root: Path) -> Path:
    """Where the index of a folder lies: beside the shards, or in the cache where they cannot be written to."""
    folder = Path(folder)
    if (folder / "offsets.json").exists() or os.access(folder, os.W_OK):
        return folder
    return cache_root / f"offsets-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]}"


def index_plain(
    folder: str | Path, tokenizer: TokenizerConfig, place: Path, *, on_error: str, max_skipped_fraction: float
) -> Manifest:
    """The manifest of a folder of plain shards; indexes them first unless that is done and they are as they were.

    Any number of processes may call it at once. Raises InputError, with file and byte, for a sample that is damaged or
    does not fit the tokenizer; with on_error="skip" it is left out, up to a share of max_skipped_fraction.
    """
    tars = plain_tars(folder)
    state = [[tar.name, tar.stat().st_size, tar.stat().st_mtime_ns] for tar in tars]
    codebook = Path(folder) / "codebook.npy"
    if codebook.is_file():
        state.append([codebook.name, codebook.stat().st_size, codebook.stat().st_mtime_ns])
    made_from = json.loads(json.dumps([state, tokenizer.num_tokens, tokenizer.codebook_size, on_error]))
    found = _read_index(place, made_from)
    if found is not None:
        return found  # also where nothing can be written
    with locked(place / ".offsets.lock"):
        found = _read_index(place, made_from)
        if found is None:
            found = _build(Path(folder), tars, tokenizer, place, on_error, max_skipped_fraction)
            text = json.dumps({"format": FORMAT, "made_from": made_from, "manifest": found.as_dict()}, indent=1)
            write_text_atomically(place / "offsets.json", text)
    return found


def _read_index(place: Path, made_from: Any) -> Manifest | None:
    try:
        values = read_json(place / "offsets.json")
        if values["format"] != FORMAT or values["made_from"] != made_from:
            return None
        return manifest_from(values["manifest"], place / "offsets.json")
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _build(
    folder: Path, tars: list[Path], tokenizer: TokenizerConfig, place: Path, on_error: str, max_skipped_fraction: float
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
            found = np.bincount(rows[:, 3], minlength=len(counts))
            found[: len(counts)] += counts
            counts = found
            write_array_atomically(place / f"{tar.name}.offsets.npy", rows)
            shards.append(TarShard(tar.name, len(rows), tar.stat().st_size, file_sha256(tar)))
            bar.update()
    samples = int(counts.sum())
    if len(skipped) > max_skipped_fraction * (samples + len(skipped)) or not samples:
        first = skipped[0] if skipped else "no tar has any"
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
    """Rows int64 [n, 4] of the samples that can be used, and what is wrong with the others."""
    rows, errors = [], []
    for sample in scan(tar):
        try:
            rows.append(_row(tar, sample, tokenizer))
        except (ValueError, EOFError) as error:
            errors.append(f"{tar}, byte {sample.first_byte}: sample {sample.key}: {error}")
    return np.array(rows, dtype=np.int64).reshape(-1, 4), errors


def _row(tar: Path, sample: TarSample, tokenizer: TokenizerConfig) -> tuple[int, int, int, int]:
    kind = next((number for number, name in enumerate(PLAIN_KINDS) if name in sample.members), None)
    if kind is None or "cls" not in sample.members:
        raise ValueError(
            f"it has {', '.join(sample.members)}, but tokens ({', '.join(PLAIN_KINDS)}) and cls are wanted"
        )
    place = sample.members[PLAIN_KINDS[kind]]
    decode_plain(read_member(tar, place), kind, tokenizer.num_tokens, tokenizer.codebook_size)
    text = read_member(tar, sample.members["cls"]).decode(errors="replace").strip()
    label = class_id(text)
    if label is None:
        raise ValueError(f"cls is {text[:40]!r}, which is no class id")
    return *place, kind, label
