"""Token sequences -> tar shards: whole shards, each written under another name and renamed when it is complete."""

# n samples of a block, N tokens of an image

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rear_scale.shards.record import (
    BLOCK_SAMPLES,
    BLOCKS_PER_SHARD,
    SHARD_SAMPLES,
    TarShard,
    block_key,
    file_sha256,
    shard_name,
    write_tar,
    write_text_atomically,
)


def write_shard(folder: Path, index: int, tokens: np.ndarray, labels: np.ndarray, source: str) -> TarShard:
    """Writes one tar shard and, beside it, its record. The bytes of the shard depend on the arguments alone.

    tokens: integers [samples, N]; labels: integers [samples]; both below 65,536; at most SHARD_SAMPLES samples.
    source: what the tokens were made by; only a caller with the same source finds the shard finished.
    """
    assert len(tokens) == len(labels) <= SHARD_SAMPLES, (tokens.shape, labels.shape)
    first = index * BLOCKS_PER_SHARD
    blocks = (
        {
            "__key__": block_key(first + number),
            "tokens.npy": _npy(tokens[start : start + BLOCK_SAMPLES]),
            "label.npy": _npy(labels[start : start + BLOCK_SAMPLES]),
        }
        for number, start in enumerate(range(0, len(tokens), BLOCK_SAMPLES))
    )
    shard = write_tar(folder, index, blocks, count=len(tokens))
    write_text_atomically(
        _record_path(folder, index),
        json.dumps({**vars(shard), "source": source, "labels": np.bincount(labels).tolist()}),
    )
    return shard


def finished_shard(folder: Path, index: int, source: str) -> tuple[TarShard, np.ndarray] | None:
    """The shard and its label counts if an earlier run of the same source completed it, else None."""
    try:
        record = json.loads(_record_path(folder, index).read_text())
        label_counts = np.asarray(record.pop("labels"), dtype=np.int64)
        if record.pop("source") != source:
            return None
        shard = TarShard(**record)
        intact = (folder / shard.file).stat().st_size == shard.size and file_sha256(folder / shard.file) == shard.sha256
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (shard, label_counts) if intact else None


def remove_records(folder: Path) -> None:
    """Once the manifest holds them, the records of single shards and leftovers of killed writers go."""
    for pattern in (".shard-*.json", "*.part"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def shard_ranges(num_samples: int) -> Iterator[tuple[int, int, int]]:
    """(index, first sample, end) of every shard of a set."""
    for index, start in enumerate(range(0, num_samples, SHARD_SAMPLES)):
        yield index, start, min(start + SHARD_SAMPLES, num_samples)


def _npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(values, dtype=np.uint16))
    return buffer.getvalue()


def _record_path(folder: Path, index: int) -> Path:
    return folder / f".{shard_name(index)}.json"
