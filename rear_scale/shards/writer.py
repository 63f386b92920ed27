"""Writing of token shards, each under a temporary name and renamed when it is complete."""

# n samples of a block, N tokens of an image

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rear_scale.config import InputError
from rear_scale.files import file_sha256, remove_leftovers, write_text_atomically
from rear_scale.shards.record import (
    BLOCK_SAMPLES,
    SHARD_SAMPLES,
    TarShard,
    block_checksum,
    block_key,
    shard_name,
    shards_from,
    write_tar,
)
from rear_scale.shards.walk import shown


class FinishedShard(NamedTuple):
    """A complete shard, before the manifest is written."""

    shard: TarShard
    label_counts: np.ndarray  # int64 [classes]
    skipped: list[tuple[str, str]]  # (name of an image, reason why it cannot be read)


def write_shard(
    folder: Path,
    index: int,
    tokens: np.ndarray,
    labels: np.ndarray,
    source: str,
    *,
    samples_per_shard: int = SHARD_SAMPLES,
    skipped: Sequence[tuple[str, str]] = (),
) -> TarShard:
    """Writes one tar shard and its record beside it. The bytes of the shard depend on the arguments alone.

    tokens: integers [samples, N]; labels: integers [samples]; both below 65,536; at most samples_per_shard samples.
    source: a hash of what the tokens were made from; `finished_shard` returns the shard for the same source alone.
    """
    assert len(tokens) == len(labels) <= samples_per_shard, (tokens.shape, labels.shape, samples_per_shard)
    first = index * -(-samples_per_shard // BLOCK_SAMPLES)
    checksums: list[int] = []

    def blocks() -> Iterator[dict[str, str | bytes]]:
        for number, start in enumerate(range(0, len(tokens), BLOCK_SAMPLES)):
            packed, classes = (_npy(values[start : start + BLOCK_SAMPLES]) for values in (tokens, labels))
            checksums.append(block_checksum(packed, classes))
            yield {"__key__": block_key(first + number), "tokens.npy": packed, "label.npy": classes}

    shard = replace(write_tar(folder, index, blocks(), count=len(tokens)), block_crc32=checksums)
    write_record(folder, shard, source, np.bincount(labels), skipped)
    return shard


def write_record(
    folder: Path, shard: TarShard, source: str, label_counts: np.ndarray, skipped: Sequence[tuple[str, str]]
) -> None:
    """Writes the record of a finished shard and its source, which is kept until the manifest is written."""
    record = {**shard.as_dict(), "source": source, "labels": label_counts.tolist(), "skipped": list(skipped)}
    write_text_atomically(_record_path(folder, shard.file), json.dumps(record))


def finished_shard(folder: Path, index: int, source: str) -> FinishedShard | None:
    """The shard, if an earlier run with the same source completed it, else None."""
    try:
        record = json.loads(_record_path(folder, shard_name(index)).read_text())
        label_counts = np.asarray(record.pop("labels"), dtype=np.int64)
        skipped = [(name, reason) for name, reason in record.pop("skipped")]
        if record.pop("source") != source:
            return None
        (shard,) = shards_from([record], folder)
        if shard.file != shard_name(index):
            return None
        intact = (folder / shard.file).stat().st_size == shard.size and file_sha256(folder / shard.file) == shard.sha256
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    return FinishedShard(shard, label_counts, skipped) if intact else None


def write_skipped(folder: Path, skipped: Sequence[tuple[str, str]]) -> None:
    """Writes skipped.txt, a line with name and reason per unreadable image; no file where all were readable."""
    # Remove the file of an earlier run.
    (folder / "skipped.txt").unlink(missing_ok=True)
    if skipped:
        lines = (f"{shown(name)}\t{shown(reason)}\n" for name, reason in skipped)
        write_text_atomically(folder / "skipped.txt", "".join(lines))


def check_skipped(
    skipped: Sequence[tuple[str, str]], total: int, limit: float, source: Path, listing: Path, option: str
) -> None:
    """Raises InputError when more than the fraction `limit` of `total` images, or all of them, could not be read. option: the
    name of the limit."""
    if len(skipped) > limit * total or len(skipped) == total:
        name, reason = skipped[0]
        raise InputError(
            f"{len(skipped)} of {total} images in {source} cannot be read, more than the allowed {limit:.1%}; the "
            f"first is {name} ({reason}), {listing} lists all. Repair or remove them, or raise {option}"
        )


def remove_records(folder: Path) -> None:
    """Removes the records of single shards, which the manifest replaces, and temporary files of killed writers."""
    for path in folder.glob(".shard-*.json"):
        path.unlink(missing_ok=True)
    remove_leftovers(folder, "*")


def shard_ranges(num_samples: int, per_shard: int = SHARD_SAMPLES) -> Iterator[tuple[int, int, int]]:
    """Yields (index, first sample, end) of every shard of a set."""
    for index, start in enumerate(range(0, num_samples, per_shard)):
        yield index, start, min(start + per_shard, num_samples)


def _npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(values, dtype=np.uint16))
    return buffer.getvalue()


def _record_path(folder: Path, file: str) -> Path:
    return folder / f".{file}.json"
