"""Tar shards -> batches. The order of training samples is a pure function of (seed, epoch, position).

The set is unpacked once per node into one memory map (12.8 million sequences of 256 tokens are 6.6 GB); after that a
batch is a gather of rows, and any step of any epoch is reached in constant time, whatever the ranks.
"""

# B images of a global batch, b of one rank, N tokens of an image

from __future__ import annotations

import fcntl
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rear_scale import rng
from rear_scale.config import InputError
from rear_scale.shards.record import Manifest, TarShard, file_sha256, read_manifest, tar_samples


@dataclass(frozen=True)
class TokenSet:
    """All samples of a shard folder, memory-mapped."""

    manifest: Manifest
    tokens: np.ndarray  # uint16 [samples, N]
    labels: np.ndarray  # uint16 [samples]

    def __len__(self) -> int:
        return self.manifest.num_samples

    def rows(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """int64 tokens [b, N] and labels [b] of the sample ids (int64 [b]), on the CPU."""
        index = ids.numpy()
        return torch.from_numpy(self.tokens[index].astype(np.int64)), torch.from_numpy(
            self.labels[index].astype(np.int64)
        )


def open_tokens(
    folder: str | Path, cache_dir: str | None = None, progress: Callable[[str], None] = lambda line: None
) -> TokenSet:
    """Unpacks the shards of `folder` on this node unless that is done already, and maps them.

    Any number of processes of a node may call it at once: one unpacks, the others wait for it.
    Raises InputError for a missing, truncated or altered shard (naming the file), and for too little disk space.
    """
    manifest = read_manifest(folder)
    # A folder of one's own: /tmp is shared, and a file that somebody else may write is not to be trusted.
    root = Path(cache_dir) if cache_dir else Path(tempfile.gettempdir()) / f"rear_scale-{os.getuid()}"
    unpacked = root / manifest.fingerprint[:32]
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not cache_dir and root.lstat().st_uid != os.getuid():
        raise InputError(
            f"{root} belongs to another user, who could change what is read. Set data.cache_dir to a folder of your own"
        )
    if not _is_complete(unpacked, manifest):
        with open(root / f"{unpacked.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_complete(unpacked, manifest):
                _unpack(Path(folder), manifest, unpacked, progress)
    return TokenSet(
        manifest,
        np.memmap(unpacked / "tokens.u16", np.uint16, "r", shape=(manifest.num_samples, manifest.num_tokens)),
        np.memmap(unpacked / "labels.u16", np.uint16, "r", shape=(manifest.num_samples,)),
    )


def _is_complete(unpacked: Path, manifest: Manifest) -> bool:
    sizes = {"tokens.u16": 2 * manifest.num_samples * manifest.num_tokens, "labels.u16": 2 * manifest.num_samples}
    return all((unpacked / name).is_file() and (unpacked / name).stat().st_size == size for name, size in sizes.items())


def _unpack(folder: Path, manifest: Manifest, unpacked: Path, progress: Callable[[str], None]) -> None:
    part = unpacked.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    needed = 2 * manifest.num_samples * (manifest.num_tokens + 1)
    free = shutil.disk_usage(unpacked.parent).free
    if free < needed * 1.05:
        raise InputError(
            f"data.cache_dir={unpacked.parent} has {free / 2**30:.1f} GiB free, but the unpacked shards of {folder} take "
            f"{needed / 2**30:.1f} GiB. Set data.cache_dir to a node-local folder with more space"
        )
    part.mkdir()
    with open(part / "tokens.u16", "wb") as tokens_file, open(part / "labels.u16", "wb") as labels_file:
        for number, shard in enumerate(manifest.shards):
            progress(f"unpacking shard {number + 1} of {len(manifest.shards)} of {folder}")
            for tokens, labels in read_blocks(folder, shard, manifest):
                tokens.tofile(tokens_file)
                labels.tofile(labels_file)
        for file in (tokens_file, labels_file):
            file.flush()
            os.fsync(file.fileno())
    shutil.rmtree(unpacked, ignore_errors=True)
    part.replace(unpacked)


def read_blocks(folder: Path, shard: TarShard, manifest: Manifest) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (tokens uint16 [n, N], labels uint16 [n]) of each block of one tar shard, checked against the manifest."""
    path = folder / shard.file
    if not path.is_file():
        raise InputError(f"not found: {path}, which {folder / 'index.json'} lists. Copy the shard folder again")
    if path.stat().st_size != shard.size:
        raise InputError(
            f"{path} has {path.stat().st_size} bytes, but index.json says {shard.size}: it is truncated or altered. Copy it again"
        )
    samples = 0
    try:
        if file_sha256(path) != shard.sha256:
            raise ValueError("its checksum is not the one in index.json")
        for block in tar_samples(path):
            tokens, labels = (np.load(io.BytesIO(block[name])) for name in ("tokens.npy", "label.npy"))
            if tokens.dtype != np.uint16 or tokens.shape != (len(labels), manifest.num_tokens):
                raise ValueError(
                    f"block {block['__key__']} holds {tokens.dtype} {tokens.shape} and {len(labels)} labels"
                )
            if tokens.max(initial=0) >= manifest.codebook_size or labels.max(initial=0) >= len(manifest.label_counts):
                raise ValueError(f"block {block['__key__']} has a token or label beyond the manifest's counts")
            samples += len(labels)
            yield tokens, labels
    except (KeyError, ValueError, EOFError, OSError) as error:
        raise InputError(f"{path} cannot be read: {error}. Copy it again, or make the shards again") from error
    if samples != shard.samples:
        raise InputError(
            f"{path} holds {samples} samples, but index.json says {shard.samples}. Copy it again, or make the shards again"
        )


@dataclass(frozen=True)
class BatchOrder:
    """Which samples step s trains on: positions (s - 1) B .. s B - 1 of an endless run of shuffled epochs."""

    num_samples: int
    global_batch_size: int  # B
    seed: int

    def global_batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Sample ids and epochs (both int64 [B], epochs from 0) of a step (from 1): every sample once per epoch."""
        first = (step - 1) * self.global_batch_size
        positions = torch.arange(first, first + self.global_batch_size)
        epochs = positions // self.num_samples
        ids = torch.empty_like(positions)
        for epoch in epochs.unique().tolist():
            inside = epochs == epoch
            ids[inside] = rng.permuted(
                self.seed, rng.Purpose.DATA_ORDER, epoch, positions[inside] % self.num_samples, self.num_samples
            )
        return ids, epochs

    def rank_batches(self, step: int, rank: int, world_size: int, micro_steps: int) -> list[tuple[Tensor, Tensor]]:
        """The (ids, epochs) of each micro-step of one rank: together, the ranks' shares are the global batch."""
        ids, epochs = self.global_batch(step)
        share = slice(rank * len(ids) // world_size, (rank + 1) * len(ids) // world_size)
        return list(zip(ids[share].chunk(micro_steps), epochs[share].chunk(micro_steps), strict=True))


def check_fits(
    manifest: Manifest, folder: str, *, codebook_size: int, num_tokens: int, codebook_dim: int, num_classes: int
) -> None:
    """Raises InputError, naming both values, when shards were made for another tokenizer or other classes, or are empty."""
    if manifest.num_samples == 0:
        raise InputError(f"{folder} holds no samples. Make the shards again, or name another folder")
    for field, found, wanted in (
        ("tokenizer.codebook_size", manifest.codebook_size, codebook_size),
        ("tokenizer.num_tokens", manifest.num_tokens, num_tokens),
        ("tokenizer.codebook_dim", manifest.codebook_dim, codebook_dim),
    ):
        if found != wanted:
            raise InputError(
                f"{field}={wanted}, but the shards in {folder} have {found} (tokenizer {manifest.tokenizer}). "
                f"Set {field}={found}, or use other shards"
            )
    if len(manifest.label_counts) > num_classes:
        raise InputError(
            f"model.num_classes={num_classes}, but the shards in {folder} have {len(manifest.label_counts)} classes. "
            f"Set model.num_classes={len(manifest.label_counts)}, or use other shards"
        )
