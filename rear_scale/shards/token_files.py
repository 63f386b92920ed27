"""Import and export of token sets of other projects, one shard at a time: the released jsonl, and AliTok's cache of npz files.

jsonl        one line {"class_id": int, "tokens": [int, ...]} per sequence
AliTok       CACHE/CLASS/IMAGE.npz with `codes` (integers [n, N]): the n crops of one image
"""

# N tokens of an image, n crops of an image

from __future__ import annotations

import hashlib
import json
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from rear_scale.config import InputError, TokenizerConfig
from rear_scale.files import atomic_open, file_sha256, inside, write_array_atomically
from rear_scale.progress import progress, say
from rear_scale.shards import writer
from rear_scale.shards.blocks import open_blocks
from rear_scale.shards.classes import folder_ids, id_notes, names_by_id, read_class_map
from rear_scale.shards.inputs import Inputs, check_same_inputs, fingerprint, listing_hash
from rear_scale.shards.record import SHARD_SAMPLES, Manifest, index_path, read_manifest, write_manifest
from rear_scale.shards.walk import reason, shown, walk
from rear_scale.tokenizer import open_tokenizer
from rear_scale.untrusted import check_file, npy_array
from rear_scale.weight_file import find_weights

_LONGEST_LINE = 1 << 20  # bytes of a jsonl line
_MOST_CROPS = 1024  # of one image
_NPY_HEAD = 4096  # bytes, more than the head of such an array has

Sequence = tuple[str, int, np.ndarray]  # file and line for errors, class id, tokens: integers [N]


@dataclass(frozen=True)
class Crops:
    """The crops of one image, whose sequences are consecutive in a file."""

    name: str  # center | flip | ten, or another name for any other order
    count: int


def import_jsonl(path: Path, out: Path, tokenizer: TokenizerConfig, crops: Crops) -> None:
    """Writes token shards from a jsonl file, in its order, with one shard in memory at a time.

    Writes the codebook too if tokenizer.weights is set. A killed import continues with the same call. Raises InputError, with
    the line, for a line that is no such object, has another number of tokens, or ids beyond the codebook.
    """
    if not path.is_file():
        raise InputError(f"not found: {path}. Name a file that has one line with class_id and tokens per sequence")
    source = f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}"
    _import(_JsonlFile(path), out, tokenizer, crops, source, {"tokens": source}, [])


def import_alitok(cache: Path, out: Path, tokenizer: TokenizerConfig, class_map: Path | None = None) -> None:
    """Writes token shards from an AliTok cache, with class ids as for class folders. Otherwise as `import_jsonl`."""
    if not cache.is_dir():
        raise InputError(f"not found: {cache}. Name a folder of class folders with an .npz per image")
    listing = walk(cache, ("npz",))
    files = [file for file in listing.files if "/" in file.name]
    if not files:
        raise InputError(f"{cache} holds no class folders with .npz files. Is it the folder of AliTok's cache?")
    if bad := next((file for file in files if file.problem), None):
        raise InputError(f"{shown(cache / bad.name)} cannot be read: {bad.problem}. Make, rename or remove it")
    counts = Counter(file.name.partition("/")[0] for file in files)
    ids = folder_ids(listing, counts, read_class_map(class_map) if class_map else None)
    listing.left_out.say(cache)
    for note in id_notes(listing.folders, counts, ids, mapped=class_map is not None):
        say(f"note: {cache}: {note}")
    paths = [(cache / file.name, file.name.partition("/")[0]) for file in files]
    first = _alitok_codes(paths[0][0], tokenizer.num_tokens, None)
    count = len(first)
    if count > 1 and count % 2 == 0 and np.array_equal(first[::2], first[1::2]):
        say(
            f"note: in {paths[0][0]} every second row repeats the one before: with --flip_flag the released script stores the "
            "codes of the plain crops twice and those of the mirrored ones not at all"
        )
    lines = "\n".join(f"{file.name} {file.size}" for file in files)
    source = hashlib.sha256(f"{lines} {sorted(ids.items())}".encode()).hexdigest()
    crops = Crops({1: "center", 10: "ten"}.get(count, "alitok"), count)
    sequences = _AlitokCache([(path, ids[name]) for path, name in paths], tokenizer.num_tokens, count)
    stamps = ((file.name, file.size, file.mtime_ns) for file in files)
    inputs: Inputs = {
        "tokens": f"{len(files)} files ({listing_hash(stamps)})",
        "classes": f"{len(ids)} ({listing_hash(sorted(ids.items()))})",
    }
    _import(sequences, out, tokenizer, crops, source, inputs, names_by_id(ids))


def export_jsonl(folder: Path, path: Path) -> None:
    """Writes the sequences of packed shards as jsonl, one block in memory at a time. Raises InputError for damaged shards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_open(path, "w") as lines:
        for _, label, tokens in _sequences(folder):
            lines.write(json.dumps({"class_id": label, "tokens": tokens.tolist()}) + "\n")


def export_alitok(folder: Path, cache: Path) -> None:
    """Writes packed shards as an AliTok cache: CACHE/CLASS/NUMBER.npz with all crops of an image, int64 [n, N].

    Raises InputError for damaged shards, and for class names that cannot be folder names.
    """
    manifest, source = read_manifest(folder), index_path(folder)
    # All folders are checked before anything is written.
    class_folders = [
        inside(cache, name, source, f"class_names[{label}]") for label, name in enumerate(manifest.class_names)
    ]
    if len(set(class_folders)) < len(class_folders) or len(class_folders) < len(manifest.label_counts):
        raise InputError(
            f"{source}: its {len(manifest.label_counts)} classes have {len(set(class_folders))} different names in class_names, "
            "but every class needs a folder of its own. Give every class a name"
        )
    sequences = _sequences(folder)
    for number in range(manifest.num_images):
        crops = list(islice(sequences, manifest.crops_per_image))
        class_folder = class_folders[crops[0][1]]
        class_folder.mkdir(parents=True, exist_ok=True)
        with atomic_open(class_folder / f"{number:08d}.npz") as file:
            np.savez(file, codes=np.stack([tokens for *_, tokens in crops]).astype(np.int64))


def _sequences(folder: Path) -> Iterator[Sequence]:
    manifest = read_manifest(folder)
    files = open_blocks(folder, manifest)
    with progress(f"export {folder}", manifest.num_samples, "sequence") as bar:
        for shard in range(len(manifest.shards)):
            for block in range(files.count(shard)):
                tokens, labels = files.read(shard, block)
                yield from (("", label, row) for label, row in zip(labels.tolist(), tokens, strict=True))
                bar.update(len(labels))


class _JsonlFile:
    """The sequences of a jsonl file, from any line on. A resumed import skips lines without parsing them, which is fast."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, start: int) -> Iterator[Sequence]:
        with open(self.path, "rb") as lines:
            # Bounded, because a file without line ends would be read into memory as a whole.
            read = iter(lambda: lines.readline(_LONGEST_LINE + 1), b"")
            for number, line in enumerate(islice(read, start, None), start=start + 1):
                where = f"{self.path}, line {number}"
                try:
                    if len(line) > _LONGEST_LINE:
                        raise ValueError(f"more than {_LONGEST_LINE:,} bytes")
                    # json, not the strict reader of untrusted.py, which calls a function per token.
                    entry = json.loads(line)
                    label, tokens = entry["class_id"], np.asarray(entry["tokens"])
                    if type(label) is not int:
                        raise ValueError(f"class_id is {str(label)[:40]!r}, not a whole number")
                except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
                    raise InputError(
                        f"{where}: not an object with class_id and tokens ({reason(error)}). Repair the file"
                    ) from error
                yield where, label, tokens


class _AlitokCache:
    """The sequences of an AliTok cache, from any one on."""

    def __init__(self, files: list[tuple[Path, int]], num_tokens: int, crops: int) -> None:
        self.files, self.num_tokens, self.crops = files, num_tokens, crops

    def read(self, start: int) -> Iterator[Sequence]:
        for path, label in self.files[start // self.crops :]:
            codes = _alitok_codes(path, self.num_tokens, self.crops)
            yield from ((str(path), label, row) for row in codes[start % self.crops :])
            start = 0


def _alitok_codes(path: Path, num_tokens: int, crops: int | None) -> np.ndarray:
    """The codes, integers [n, N], of one image. Raises InputError for another format, shape or number of crops."""
    try:
        check_file(path)
        with zipfile.ZipFile(path) as archive, archive.open("codes.npy") as member:
            size = archive.getinfo("codes.npy").file_size
            # Of the head alone: a small file may unpack to any size.
            if size > _MOST_CROPS * num_tokens * 8 + _NPY_HEAD:
                raise ValueError(f"{size:,} bytes are more than the crops of one image")
            codes = npy_array(member.read(size), "iu")
    except Exception as error:  # damaged bytes make zipfile and numpy raise all kinds of exceptions
        raise InputError(f"{path} holds no array `codes` ({reason(error)}). Make it again") from error
    if codes.ndim == 2 and codes.shape[1] == 2 * num_tokens:
        raise InputError(
            f"{path}: rows of {codes.shape[1]} codes join sequences of two images, as the released script writes them without "
            "--ten_crop and --flip_flag. Tokenize the images again"
        )
    if codes.ndim != 2 or codes.shape[1] != num_tokens or len(codes) != (crops or len(codes)):
        wanted = f"[{crops or 'crops'}, {num_tokens}]"
        raise InputError(
            f"{path}: codes are {list(codes.shape)}, but {wanted} is needed. Is the tokenizer the right one?"
        )
    return codes


def _import(
    sequences: _JsonlFile | _AlitokCache,
    out: Path,
    tokenizer: TokenizerConfig,
    crops: Crops,
    source: str,
    inputs: Inputs,
    class_names: list[str],
) -> None:
    weights_sha256 = "" if tokenizer.weights is None else file_sha256(find_weights(tokenizer.weights))
    inputs |= {
        "--tokenizer": f"{tokenizer.name} of {tokenizer.num_tokens} tokens and {tokenizer.codebook_size} codes",
        "--weights": f"sha256 {weights_sha256[:16]}" if weights_sha256 else None,
        "crops": f"{crops.name} ({crops.count})",
    }
    source = f"{source} {tokenizer.name} {tokenizer.num_tokens} {tokenizer.codebook_size} {crops}"
    made_from = hashlib.sha256(source.encode()).hexdigest()
    if (out / "index.json").exists():
        check_same_inputs(read_manifest(out).inputs, inputs, out, "OUT")
        writer.remove_records(out)  # left by a kill after the manifest was written
        say(f"{out} is complete")
        return
    out.mkdir(parents=True, exist_ok=True)
    # Shards of whole images, so that the crops of an image stay together.
    per_shard = SHARD_SAMPLES // crops.count * crops.count
    finished: list[writer.FinishedShard] = []
    while (earlier := writer.finished_shard(out, len(finished), fingerprint(inputs))) is not None:
        finished.append(earlier)
    lines = _checked(sequences.read(sum(shard.shard.samples for shard in finished)), tokenizer)
    with progress(f"import {out}", 0, "sequence") as bar:
        bar.total = None  # counting the lines would read the file twice
        while chunk := list(islice(lines, per_shard)):
            tokens = np.stack([row for _, row in chunk])
            labels = np.array([label for label, _ in chunk], dtype=np.int64)
            shard = writer.write_shard(
                out, len(finished), tokens, labels, fingerprint(inputs), samples_per_shard=per_shard
            )
            finished.append(writer.FinishedShard(shard, np.bincount(labels), []))
            bar.update(len(chunk))
    _finish(out, tokenizer, crops, made_from, inputs, weights_sha256, finished, per_shard, class_names)


def _checked(sequences: Iterable[Sequence], tokenizer: TokenizerConfig) -> Iterator[tuple[int, np.ndarray]]:
    """Yields class ids and tokens, uint16 [N]. Raises InputError for a sequence that the tokenizer cannot have made."""
    for where, label, tokens in sequences:
        if tokens.shape != (tokenizer.num_tokens,) or not np.issubdtype(tokens.dtype, np.integer):
            raise InputError(
                f"{where}: {tokens.dtype} of shape {list(tokens.shape)}, but tokenizer.num_tokens={tokenizer.num_tokens} "
                "integers are needed. Name the tokenizer that made them"
            )
        if tokens.min() < 0 or tokens.max() >= tokenizer.codebook_size or not 0 <= label < 65_536:
            raise InputError(
                f"{where}: class {label} and tokens {tokens.min()}..{tokens.max()}, beyond class 65535 or "
                f"tokenizer.codebook_size={tokenizer.codebook_size}. Name the tokenizer that made them"
            )
        yield label, tokens.astype(np.uint16)


def _finish(
    out: Path,
    tokenizer: TokenizerConfig,
    crops: Crops,
    made_from: str,
    inputs: Inputs,
    weights_sha256: str,
    finished: list[writer.FinishedShard],
    per_shard: int,
    class_names: list[str],
) -> None:
    samples = sum(shard.shard.samples for shard in finished)
    if samples == 0 or samples % crops.count:
        raise InputError(
            f"{samples} sequences are not a whole number of images with {crops.count} crops each. Name the right number of crops"
        )
    counts = np.zeros(max(len(class_names), *(len(shard.label_counts) for shard in finished)), dtype=np.int64)
    for shard in finished:
        counts[: len(shard.label_counts)] += shard.label_counts
    codebook_sha256 = None
    if tokenizer.weights is not None:
        codebook = open_tokenizer(tokenizer, torch.device("cpu")).codebook.detach().float().numpy()
        write_array_atomically(out / "codebook.npy", codebook)
        codebook_sha256 = file_sha256(out / "codebook.npy")
    manifest = Manifest(
        tokenizer=tokenizer.name,
        tokenizer_sha256=weights_sha256,
        codebook_size=tokenizer.codebook_size,
        codebook_dim=tokenizer.codebook_dim,
        num_tokens=tokenizer.num_tokens,
        num_samples=samples,
        crops_per_image=crops.count,
        label_counts=counts.tolist(),
        class_names=[*class_names, *(str(number) for number in range(len(class_names), len(counts)))],
        codebook_sha256=codebook_sha256,
        shards=[shard.shard for shard in finished],
        crops=crops.name,
        samples_per_shard=per_shard,
        made_from=made_from,
        inputs=inputs,
    )
    write_manifest(out, manifest)
    writer.remove_records(out)
    say(f"{out}: {samples:,} sequences of {manifest.num_images:,} images in {len(finished)} shards")
