"""Access to the samples of token shards by id, in the two modes of data.mode.

mmap: the set is unpacked once per node into one memory map (12.8 million sequences of 256 tokens are 6.6 GB); a batch is a
gather of rows, and an epoch an exact global permutation. stream: blocks are read when they are needed and cached while
streams pass through them. In both modes any step of any epoch is reached in constant time, for any number of ranks.
"""

# b images of one rank, N tokens of an image

from __future__ import annotations

import json
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rear_scale.config import DataConfig, InputError, TokenizerConfig, required_path
from rear_scale.files import publish_folder, remove_leftovers, temporary_folder
from rear_scale.locks import locked, remove_unheld
from rear_scale.shards.blocks import Block, BlockFiles, open_blocks
from rear_scale.shards.classes import check_same_classes
from rear_scale.shards.order import BatchOrder, GroupedOrder, StreamOrder
from rear_scale.shards.plain import index_folder, index_plain, plain_tars
from rear_scale.shards.record import Manifest, read_manifest
from rear_scale.shards.storage import is_remote
from rear_scale.shards.subset import samples_of_share

__all__ = [
    "BatchOrder",
    "GroupedOrder",
    "StreamOrder",
    "MappedSet",
    "StreamSet",
    "TokenSet",
    "check_agree",
    "check_fits",
    "open_manifest",
    "open_set",
    "open_stream",
    "open_tokens",
]

Say = Callable[[str], None]


def _quiet(line: str) -> None:
    return


class TokenSet(ABC):
    """The samples of a shard folder by id."""

    manifest: Manifest

    def __len__(self) -> int:
        return self.manifest.num_samples

    @abstractmethod
    def order(self, global_batch_size: int, seed: int) -> BatchOrder:
        """The order in which a run of this batch size and seed trains on the samples."""

    @abstractmethod
    def rows(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The int64 tokens [b, N] and labels [b] of sample ids (int64 [b]), on the CPU."""

    @abstractmethod
    def labels_of(self, ids: Tensor) -> Tensor:
        """The int64 labels [B] of the sample ids (int64 [B]) of a global batch, on the CPU."""


@dataclass(frozen=True)
class MappedSet(TokenSet):
    """A set that is memory-mapped as a whole."""

    manifest: Manifest
    tokens: np.ndarray  # uint16 [samples, N]
    labels: np.ndarray  # uint16 [samples]
    share: float = 1.0  # the fraction of the images of each class that an order has

    def order(self, global_batch_size: int, seed: int) -> BatchOrder:
        if self.share == 1:
            return BatchOrder(len(self), global_batch_size, seed)
        chosen = samples_of_share(self.manifest, self.labels, self.share)
        return BatchOrder(len(chosen), global_batch_size, seed, chosen)

    def rows(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        index = ids.numpy()
        return _as_int64(self.tokens[index], self.labels[index])

    def labels_of(self, ids: Tensor) -> Tensor:
        return torch.from_numpy(self.labels[ids.numpy()].astype(np.int64))


class StreamSet(TokenSet):
    """A set whose blocks are read when their samples are asked for, with a cache of blocks."""

    def __init__(self, files: BlockFiles, data: DataConfig, world_size: int, say: Say) -> None:
        self.files, self.manifest, self.data, self.say = files, files.manifest, data, say
        sizes = [shard.samples for shard in self.manifest.shards]
        self.firsts = np.concatenate([[0], np.cumsum(sizes)])
        self.cached: OrderedDict[tuple[int, int], Block] = OrderedDict()  # least recently used first
        self.lost: set[tuple[int, int]] = set()
        self.capacity = self._samples_of_streams(-(-data.shuffle_streams // world_size))

    def _samples_of_streams(self, streams: int) -> int:
        """The number of samples in all blocks that the shuffle buffers of this many streams may overlap."""
        size = self.manifest.block_samples
        return (streams + 1) * size * (-(-self.data.buffer_samples // size) + 1)

    def order(self, global_batch_size: int, seed: int) -> StreamOrder:
        return StreamOrder(
            len(self),
            global_batch_size,
            seed,
            shard_samples=tuple(shard.samples for shard in self.manifest.shards),
            streams=self.data.shuffle_streams,
            buffer_samples=self.data.buffer_samples,
        )

    def rows(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """As TokenSet.rows.

        Raises InputError, with file and byte, for a damaged block, or when data.on_error=skip has left out too many samples.
        """
        index = ids.numpy()
        shards = np.searchsorted(self.firsts, index, side="right") - 1
        blocks, offsets = np.divmod(index - self.firsts[shards], self.manifest.block_samples)
        tokens = np.empty((len(index), self.manifest.num_tokens), np.uint16)
        labels = np.empty(len(index), np.uint16)
        by_block = np.lexsort((blocks, shards))
        ends = np.flatnonzero(np.diff(shards[by_block]) | np.diff(blocks[by_block])) + 1
        for group in np.split(by_block, ends):
            block_tokens, block_labels = self._block(int(shards[group[0]]), int(blocks[group[0]]))
            rows = offsets[group] % len(block_labels)  # the block that replaces a damaged one may be shorter
            tokens[group], labels[group] = block_tokens[rows], block_labels[rows]
        return _as_int64(tokens, labels)

    def labels_of(self, ids: Tensor) -> Tensor:
        # Labels are stored in the blocks, so a rank that needs those of a whole batch reads every stream.
        self.capacity = self._samples_of_streams(self.data.shuffle_streams)
        return self.rows(ids)[1]

    def _block(self, shard: int, block: int) -> Block:
        key = shard, block
        if key not in self.cached:
            self.cached[key] = self._read(shard, block)
            total = sum(len(labels) for _, labels in self.cached.values())
            while total > self.capacity and len(self.cached) > 1:
                total -= len(self.cached.popitem(last=False)[1][1])
        self.cached.move_to_end(key)
        return self.cached[key]

    def _read(self, shard: int, block: int) -> Block:
        """The block; where it is damaged and data.on_error=skip, the next intact block."""
        try:
            return self.files.read(shard, block)
        except InputError as error:
            if self.data.on_error == "raise":
                raise
            if (shard, block) not in self.lost:
                self.lost.add((shard, block))
                self.say(f"skipped {self.files.length(shard, block)} samples: {error}")
                lost = sum(self.files.length(*key) for key in self.lost)
                _check_lost(lost, len(self), self.data.max_skipped_fraction, str(error))
        if block + 1 < self.files.count(shard):
            return self._read(shard, block + 1)
        following = (shard + 1) % len(self.manifest.shards)
        while not self.files.count(following):
            following = (following + 1) % len(self.manifest.shards)
        return self._read(following, 0)


def _as_int64(tokens: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(labels.astype(np.int64))


def open_set(data: DataConfig, manifest: Manifest, world_size: int, say: Say = _quiet) -> TokenSet:
    """The training set in the mode of data.mode. Raises InputError as open_stream and open_tokens do."""
    if data.mode == "stream":
        return open_stream(data, manifest, world_size, say)
    folder = required_path(data.train, "data.train")
    whole = open_tokens(folder, data.cache_dir, say, manifest, data.on_error, data.max_skipped_fraction)
    return replace(whole, share=data.use_share)


def open_stream(data: DataConfig, manifest: Manifest, world_size: int, say: Say = _quiet) -> StreamSet:
    """The training set, read from its shards while training. Raises InputError for shards that cannot be opened."""
    folder = required_path(data.train, "data.train")
    index = index_folder(folder, _cache_root(data.cache_dir)) if manifest.layout == "plain" else None
    return StreamSet(open_blocks(folder, manifest, index), data, world_size, say)


def open_manifest(folder: str, tokenizer: TokenizerConfig, data: DataConfig) -> Manifest:
    """The manifest of a folder of packed shards, or of ordinary WebDataset shards, which are indexed at their first use.

    Raises InputError for a folder without shards.
    """
    if is_remote(folder) or (Path(folder) / "index.json").exists() or not plain_tars(folder):
        return read_manifest(folder)
    index = index_folder(folder, _cache_root(data.cache_dir))
    return index_plain(folder, tokenizer, index, on_error=data.on_error, max_skipped_fraction=data.max_skipped_fraction)


def open_tokens(
    folder: str | Path,
    cache_dir: str | None = None,
    progress: Say = _quiet,
    manifest: Manifest | None = None,
    on_error: str = "raise",
    max_skipped_fraction: float = 0.0,
) -> MappedSet:
    """The memory-mapped set of the shards in `folder`, which are unpacked on this node first if they are not yet.

    Any number of processes of a node may call it at once: one unpacks, the others wait for it. manifest: the result of
    `open_manifest`; None = the index.json of packed shards. on_error="skip": the samples of a damaged block are replaced by
    others, up to a fraction of max_skipped_fraction.
    Raises InputError for a missing, truncated or altered shard (naming file and byte), and for too little disk space.
    """
    manifest = read_manifest(folder) if manifest is None else manifest
    root = _cache_root(cache_dir)
    whole = root / manifest.fingerprint[:32]
    folders = [whole] if on_error == "raise" else [whole, root / f"{whole.name}-skipped"]
    lock = root / f"{whole.name}.lock"
    unpacked = _complete(folders, manifest)
    if unpacked is not None:
        remove_unheld(lock)
    else:
        with locked(lock):
            unpacked = _complete(folders, manifest)
            if unpacked is None:
                index = index_folder(folder, root) if manifest.layout == "plain" else None
                files = open_blocks(folder, manifest, index)
                unpacked = _unpack(files, whole, progress, None if on_error == "raise" else max_skipped_fraction)
    for line in _lost_lines(unpacked):
        progress(line)
    return MappedSet(
        manifest,
        _mapped(unpacked / "tokens.u16", (manifest.num_samples, manifest.num_tokens)),
        _mapped(unpacked / "labels.u16", (manifest.num_samples,)),
    )


def _mapped(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A memory-mapped file of uint16. An empty array for an empty file, which cannot be mapped."""
    return np.memmap(path, np.uint16, "r", shape=shape) if shape[0] else np.empty(shape, np.uint16)


def _cache_root(cache_dir: str | None) -> Path:
    if cache_dir:
        return Path(cache_dir)
    # The temporary folder is shared, and a folder of another user could hold manipulated data.
    root = Path(tempfile.gettempdir()) / f"rear_scale-{os.getuid()}"
    if root.exists() and root.lstat().st_uid != os.getuid():
        raise InputError(
            f"{root} belongs to another user, who could change the data. Set data.cache_dir to a folder of your own"
        )
    return root


def _complete(folders: list[Path], manifest: Manifest) -> Path | None:
    sizes = {"tokens.u16": 2 * manifest.num_samples * manifest.num_tokens, "labels.u16": 2 * manifest.num_samples}

    def is_complete(folder: Path) -> bool:
        return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items())

    return next((folder for folder in folders if is_complete(folder)), None)


def _unpack(files: BlockFiles, whole: Path, say: Say, max_skipped_fraction: float | None) -> Path:
    """Writes the memory maps and returns their folder. max_skipped_fraction: None = any damage is an error."""
    manifest = files.manifest
    remove_leftovers(whole.parent, whole.name)
    needed = 2 * manifest.num_samples * (manifest.num_tokens + 1)
    free = shutil.disk_usage(whole.parent).free
    if free < needed * 1.05:
        raise InputError(
            f"data.cache_dir={whole.parent} has {free / 2**30:.1f} GiB free, but the unpacked shards of {files.folder} take "
            f"{needed / 2**30:.1f} GiB. Set data.cache_dir to a node-local folder with more space, or data.mode=stream"
        )
    with temporary_folder(whole) as temporary:
        lost, errors = _write_maps(files, temporary, say, max_skipped_fraction)
        unpacked = whole
        if lost:
            _replace_lost(temporary, manifest, lost)
            (temporary / "skipped.json").write_text(json.dumps(errors))
            unpacked = whole.with_name(f"{whole.name}-skipped")
        publish_folder(temporary, unpacked)
    return unpacked


def _write_maps(
    files: BlockFiles, folder: Path, say: Say, max_skipped_fraction: float | None
) -> tuple[list[tuple[int, int]], list[str]]:
    """Writes all tokens and labels. Returns (first sample, end) of every unreadable block, and their errors."""
    manifest = files.manifest
    lost: list[tuple[int, int]] = []
    errors: list[str] = []
    written = 0
    with open(folder / "tokens.u16", "wb") as tokens_file, open(folder / "labels.u16", "wb") as labels_file:
        for shard in range(len(manifest.shards)):
            say(f"unpacking shard {shard + 1} of {len(manifest.shards)} of {files.folder}")
            for block in range(files.count(shard)):
                length = files.length(shard, block)
                try:
                    tokens, labels = files.read(shard, block)
                except InputError as error:
                    if max_skipped_fraction is None:
                        raise
                    tokens, labels = np.zeros((length, manifest.num_tokens), np.uint16), np.zeros(length, np.uint16)
                    lost.append((written, written + length))
                    errors.append(str(error))
                # write, not tofile, whose error on a full disk does not mention the disk.
                tokens_file.write(np.ascontiguousarray(tokens).data)
                labels_file.write(np.ascontiguousarray(labels).data)
                written += length
            if max_skipped_fraction is None:
                files.check_rest(shard)
    if lost:
        _check_lost(sum(end - first for first, end in lost), written, max_skipped_fraction, errors[0])
    return lost, errors


def _replace_lost(folder: Path, manifest: Manifest, lost: list[tuple[int, int]]) -> None:
    """Replaces lost samples by intact ones, spread over the set, so that ids and order stay the same."""
    size = manifest.num_samples
    tokens = np.memmap(folder / "tokens.u16", np.uint16, "r+", shape=(size, manifest.num_tokens))
    labels = np.memmap(folder / "labels.u16", np.uint16, "r+", shape=(size,))
    is_lost = np.zeros(size, bool)
    for first, end in lost:
        is_lost[first:end] = True
    intact = np.flatnonzero(~is_lost)
    for first, end in lost:
        chosen = intact[np.linspace(0, len(intact) - 1, end - first).astype(np.int64)]
        tokens[first:end], labels[first:end] = tokens[chosen], labels[chosen]
    tokens.flush()
    labels.flush()


def _lost_lines(unpacked: Path) -> list[str]:
    """A line for each block that was skipped when the set was unpacked, reported at every start."""
    record = unpacked / "skipped.json"
    return [f"skipped a block: {error}" for error in json.loads(record.read_text())] if record.exists() else []


def _check_lost(lost: int, total: int, max_skipped_fraction: float | None, first: str) -> None:
    if lost > (max_skipped_fraction or 0.0) * total or lost == total:
        raise InputError(
            f"{lost} of {total} samples cannot be read, more than data.max_skipped_fraction={max_skipped_fraction}; the first "
            f"error is: {first}. Repair the shards, or allow more"
        )


def check_agree(train: Manifest, val: Manifest, data: DataConfig) -> str | None:
    """Raises InputError, naming both values, when data.val was made by another tokenizer than data.train, or gives a class id
    to another class. Returns a note for the user where the class names cannot be compared, else None.
    """
    one, other = f"data.train={data.train}", f"data.val={data.val}"
    way_out = "Make both with the same tokenizer and weights"
    if train.tokenizer != val.tokenizer:
        raise InputError(f"{one} was made by tokenizer {train.tokenizer}, but {other} by {val.tokenizer}. {way_out}")
    for what, first, second in (
        ("tokenizer weights", train.tokenizer_sha256, val.tokenizer_sha256),
        ("a codebook", train.codebook_sha256, val.codebook_sha256),
    ):
        # Empty or all zeros where it is not known.
        if first and second and first.strip("0") and second.strip("0") and first != second:
            raise InputError(
                f"{one} has {what} with sha256 {first[:12]}, but {other} with {second[:12]}: the same tokens mean other images. "
                f"{way_out}"
            )
    return check_same_classes(one, train.class_names, other, val.class_names)


def check_fits(
    manifest: Manifest, folder: str, *, codebook_size: int, num_tokens: int, codebook_dim: int, num_classes: int
) -> None:
    """Raises InputError, naming both values, when shards were made for another tokenizer or other classes, or are empty."""
    if manifest.num_samples == 0:
        raise InputError(f"{folder} holds no samples. Make the shards again, or name another folder")
    for field, present, wanted in (
        ("tokenizer.codebook_size", manifest.codebook_size, codebook_size),
        ("tokenizer.num_tokens", manifest.num_tokens, num_tokens),
        ("tokenizer.codebook_dim", manifest.codebook_dim, codebook_dim),
    ):
        if present != wanted:
            raise InputError(
                f"{field}={wanted}, but the shards in {folder} have {present} (tokenizer {manifest.tokenizer}). "
                f"Set {field}={present}, or use other shards"
            )
    if len(manifest.label_counts) > num_classes:
        raise InputError(
            f"model.num_classes={num_classes}, but the shards in {folder} have {len(manifest.label_counts)} classes. "
            f"Set model.num_classes={len(manifest.label_counts)}, or use other shards"
        )
