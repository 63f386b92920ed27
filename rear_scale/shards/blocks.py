"""Readers of blocks of token sequences in tar shards, checked, with file and byte in every error."""

# n samples of a block, N tokens of an image

from __future__ import annotations

import contextlib
import json
import math
import tarfile
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from webdataset.tariterators import group_by_keys, tar_file_expander

from rear_scale.config import InputError
from rear_scale.files import file_sha256
from rear_scale.shards.record import Manifest, TarShard, block_checksum
from rear_scale.shards.storage import address, is_remote, open_remote
from rear_scale.shards.tar_index import scan
from rear_scale.shards.walk import reason
from rear_scale.untrusted import npy_array, npy_header

Block = tuple[np.ndarray, np.ndarray]  # tokens uint16 [n, N], labels uint16 [n]


class BlockFiles(ABC):
    """The blocks of a set of shards, by index of the shard and index of the block in it."""

    folder: str | Path  # of the shards

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest

    @abstractmethod
    def read(self, shard: int, block: int) -> Block:
        """Tokens and labels of one block. Raises InputError, with file and byte, for a missing or damaged block."""

    def check_rest(self, shard: int) -> None:
        """Checks a shard beyond its blocks, once all of them were read intact. Raises InputError."""
        return

    def count(self, shard: int) -> int:
        """The number of blocks of a shard."""
        return math.ceil(self.manifest.shards[shard].samples / self.manifest.block_samples)

    def length(self, shard: int, block: int) -> int:
        """The number of samples of a block."""
        size = self.manifest.block_samples
        return min(size, self.manifest.shards[shard].samples - block * size)


def open_blocks(folder: str | Path, manifest: Manifest, index: Path | None = None) -> BlockFiles:
    """The reader for the layout of a folder. index: the folder with the offsets of plain shards."""
    if manifest.layout == "plain":
        assert index is not None
        return PlainFiles(folder, manifest, index)
    return RemoteFiles(str(folder), manifest) if is_remote(folder) else PackedFiles(folder, manifest)


class PackedFiles(BlockFiles):
    """Shards of this project in a local folder, read by offset."""

    folder: Path

    def __init__(self, folder: str | Path, manifest: Manifest) -> None:
        super().__init__(manifest)
        self.folder = Path(folder)
        # By shard that was opened, then by block: offset and size in bytes of each member.
        self.offsets: dict[int, list[dict[str, tuple[int, int]]]] = {}

    def read(self, shard: int, block: int) -> Block:
        entry = self.manifest.shards[shard]
        path = self.folder / entry.file
        members = self._offsets(shard, entry, path)[block]
        try:
            with open(path, "rb") as file:
                content = {}
                for name in ("tokens.npy", "label.npy"):
                    offset, size = members[name]
                    file.seek(offset)
                    content[name] = file.read(size)
            return unpack(content["tokens.npy"], content["label.npy"], self.manifest, shard, block)
        except (KeyError, ValueError, EOFError, OSError) as error:
            byte = min(offset for offset, _ in members.values())
            raise _damage(path, f"block {block} at byte {byte}", error) from error

    def check_rest(self, shard: int) -> None:
        entry = self.manifest.shards[shard]
        path = self.folder / entry.file
        if file_sha256(path) != entry.sha256:
            raise InputError(
                f"{path}: its blocks are intact, but its checksum is not the one in index.json. Copy it again, or make the "
                "shards again"
            )

    def _offsets(self, shard: int, entry: TarShard, path: Path) -> list[dict[str, tuple[int, int]]]:
        if shard not in self.offsets:
            if not path.is_file():
                raise InputError(
                    f"not found: {path}, which {self.folder / 'index.json'} lists. Copy the shard folder again"
                )
            size = path.stat().st_size
            if size != entry.size:
                raise InputError(
                    f"{path} is truncated or altered at byte {min(size, entry.size)}: it has {size} bytes, but index.json "
                    f"says {entry.size}. Copy it again"
                )
            offsets = [sample.members for sample in scan(path)]
            if len(offsets) != self.count(shard):
                raise InputError(
                    f"{path} holds {len(offsets)} blocks, but index.json says {entry.samples} samples in blocks of "
                    f"{self.manifest.block_samples}. Copy it again, or make the shards again"
                )
            self.offsets[shard] = offsets
        return self.offsets[shard]


class RemoteFiles(BlockFiles):
    """Shards of this project that webdataset opens at a URL or through a command.

    They can only be read from the front, so the stream of a shard is kept open for its next block.
    """

    folder: str

    def __init__(self, folder: str, manifest: Manifest, streams: int = 64) -> None:
        super().__init__(manifest)
        self.folder, self.most = folder, streams
        # (shard, next block) -> the open stream of that shard, least recently used first, which is closed first
        self.open: OrderedDict[tuple[int, int], tuple[Any, Iterator[dict[str, Any]]]] = OrderedDict()

    def read(self, shard: int, block: int) -> Block:
        waiting = [key for key in self.open if key[0] == shard and key[1] <= block]
        if waiting:
            key = max(waiting)
            # A server may have closed a stream that was idle for long; the shard is then read from its front again.
            with contextlib.suppress(InputError):
                return self._advance(shard, key[1], block, *self.open.pop(key))
        stream = _Counted(open_remote(self.folder, self.manifest.shards[shard].file))
        return self._advance(shard, 0, block, stream, group_by_keys(tar_file_expander([{"url": "", "stream": stream}])))

    def _advance(
        self, shard: int, position: int, block: int, stream: _Counted, samples: Iterator[dict[str, Any]]
    ) -> Block:
        """Tokens and labels of a block, from a stream whose next block is `position`. Keeps the stream open for later blocks."""
        url = address(self.folder, self.manifest.shards[shard].file)
        try:
            for _ in range(position, block):
                next(samples)
            sample = next(samples)
            arrays = unpack(sample["tokens.npy"], sample["label.npy"], self.manifest, shard, block)
        except StopIteration:
            stream.close()
            raise InputError(
                f"{url} ends at byte {stream.byte}, before block {block} of {self.count(shard)}. Copy it again"
            ) from None
        except (KeyError, ValueError, EOFError, OSError, tarfile.TarError) as error:
            stream.close()
            raise _damage(url, f"block {block} before byte {stream.byte}", error) from error
        if block + 1 == self.count(shard):
            stream.close()
            return arrays
        self.open[shard, block + 1] = stream, samples
        while len(self.open) > self.most:
            self.open.popitem(last=False)[1][0].close()
        return arrays


class PlainFiles(BlockFiles):
    """Ordinary WebDataset shards, one sample per key, read by the offsets that plain.py wrote."""

    folder: Path

    def __init__(self, folder: str | Path, manifest: Manifest, index: Path) -> None:
        super().__init__(manifest)
        self.folder, self.index = Path(folder), index
        self.checked: set[int] = set()  # the shards whose offsets were checked

    def read(self, shard: int, block: int) -> Block:
        path = self.folder / self.manifest.shards[shard].file
        size = self.manifest.block_samples
        try:
            rows = np.array(self._rows(shard, path.name)[block * size : (block + 1) * size])
            if path.stat().st_size != self.manifest.shards[shard].size:
                raise ValueError("its size changed since it was indexed")
            first, last = int(rows[0, 0]), int(rows[-1, 0] + rows[-1, 1])
            with open(path, "rb") as file:
                file.seek(first)
                data = file.read(last - first)
        except (ValueError, OSError) as error:
            raise _damage(path, f"block {block}", error) from error
        tokens = np.empty((len(rows), self.manifest.num_tokens), np.uint16)
        for row, (offset, length, extension, _) in enumerate(rows.tolist()):
            try:
                content = data[offset - first : offset - first + length]
                tokens[row] = decode_plain(content, extension, self.manifest.num_tokens, self.manifest.codebook_size)
            except (ValueError, EOFError) as error:
                raise _damage(path, f"the sample at byte {offset}", error) from error
        return tokens, rows[:, 3].astype(np.uint16)

    def _rows(self, shard: int, name: str) -> np.ndarray:
        """The offsets of the samples of a shard, int64 [n, 4], memory-mapped. Raises ValueError for impossible ones."""
        entry = self.manifest.shards[shard]
        path = self.index / f"{name}.offsets.npy"
        with open(path, "rb") as file:
            shape, by_columns, dtype = npy_header(file)
        if shape != (entry.samples, 4) or by_columns or dtype != np.int64:
            raise ValueError(f"{path} holds {dtype} {list(shape)}, not int64 [{entry.samples}, 4]")
        # Mapped only while a block is read: mapped pages count towards the memory of the process.
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
        if shard not in self.checked:
            ends, classes = rows[:, 0] + rows[:, 1], len(self.manifest.label_counts)
            inside = (rows >= 0).all(1) & (ends > 0) & (ends <= entry.size) & (rows[:, 2] < len(TOKEN_EXTENSIONS))
            if not (inside & (rows[:, 3] < classes)).all() or (np.diff(rows[:, 0]) < 0).any():
                raise ValueError(f"{path} has samples outside of the shard, or class ids beyond its {classes} classes")
            self.checked.add(shard)
        return rows


TOKEN_EXTENSIONS = ("tokens.npy", "npy", "tokens.bin", "bin", "tokens.json", "json")


def decode_plain(content: bytes, extension: int, num_tokens: int, codebook_size: int) -> np.ndarray:
    """The token ids, integers [N], of one member. npy: any integers; json: a list; bin: little-endian, 2, 4 or 8 bytes each.

    extension: the index of the member's extension in TOKEN_EXTENSIONS. Raises ValueError for another length or an id out of
    range.
    """
    form = TOKEN_EXTENSIONS[extension].rpartition(".")[2]
    if form in ("npy", "json"):
        try:
            tokens = npy_array(content, "iu") if form == "npy" else np.asarray(json.loads(content))
        except Exception as error:  # damaged bytes make the readers raise all kinds of exceptions
            raise ValueError(reason(error)) from error
    else:
        itemsize, rest = divmod(len(content), num_tokens)
        if rest or itemsize not in (2, 4, 8):
            raise ValueError(f"{len(content)} bytes are not {num_tokens} integers")
        tokens = np.frombuffer(content, f"<u{itemsize}")
    if tokens.size != num_tokens or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"{tokens.dtype} of shape {tokens.shape} is not {num_tokens} integers")
    if tokens.min() < 0 or tokens.max() >= codebook_size:
        raise ValueError(f"a token is outside 0..{codebook_size - 1}")
    return tokens.reshape(-1)


def unpack(packed: bytes, classes: bytes, manifest: Manifest, shard: int, block: int) -> Block:
    """Tokens and labels of a block from the bytes of its two members. Raises ValueError where the manifest says otherwise."""
    checksums = manifest.shards[shard].block_crc32
    if checksums and block_checksum(packed, classes) != checksums[block]:
        raise ValueError("its checksum is not the one in index.json")
    tokens, labels = npy_array(packed), npy_array(classes)
    length = min(manifest.block_samples, manifest.shards[shard].samples - block * manifest.block_samples)
    form = (tokens.dtype, tokens.shape, labels.dtype, labels.shape)
    if form != (np.dtype(np.uint16), (length, manifest.num_tokens), np.dtype(np.uint16), (length,)):
        raise ValueError(
            f"it holds tokens {tokens.dtype} {tokens.shape} and labels {labels.dtype} {labels.shape}, not uint16 [{length}]"
        )
    if tokens.max(initial=0) >= manifest.codebook_size or labels.max(initial=0) >= len(manifest.label_counts):
        raise ValueError("it has a token or label beyond the manifest's counts")
    return tokens, labels


class _Counted:
    """A stream that knows how far it was read."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.byte = stream, 0

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(size)
        self.byte += len(data)
        return data

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a command whose output is cut short exits with an error
            self.stream.close()


def _damage(path: str | Path, where: str, error: Exception) -> InputError:
    return InputError(f"{path}, {where} cannot be read: {error}. Copy it again, or make the shards again")
