"""Samples per second of the token reader, compared with plain readers of the same samples.

Each reader runs in its own process. The readers take turns, so that load on the machine affects all of them alike.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import multiprocessing
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from rear_scale.bench import reference
from rear_scale.config import DataConfig, InputError
from rear_scale.files import file_sha256, write_text_atomically
from rear_scale.progress import progress, say
from rear_scale.shards import writer
from rear_scale.shards.reader import TokenSet, open_set
from rear_scale.shards.record import Manifest, TarShard, read_manifest, write_manifest

_TOKENS, _CODES, _CLASSES = 256, 1024, 1000
_BATCH = 256  # samples
_SLICE_S = 0.5  # approximate duration of a reader's turn
_CALIBRATION_BATCHES = 8

Batches = Iterator[tuple[Tensor, Tensor]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=int, default=1_048_576, help="samples of 256 tokens (default: 1,048,576)")
    parser.add_argument("--shards", type=int, default=64, help="number of tar shards (default: 64)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each reader; medians are reported (default: 7)")
    parser.add_argument(
        "--folder", type=Path, help="folder in which the sets are written and kept (default: a temporary folder)"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Rates, sizes and memory. Raises InputError for fewer samples than shards or than one batch."""
    if min(arguments.samples // max(arguments.shards, 1), arguments.samples // _BATCH, arguments.rounds) < 1:
        raise InputError(
            f"--samples={arguments.samples} --shards={arguments.shards} --rounds={arguments.rounds}: at least one round, one "
            f"batch of {_BATCH} and one sample per shard are needed. Use the defaults"
        )
    if arguments.folder is not None:
        return _measure(arguments, arguments.folder)
    with tempfile.TemporaryDirectory(prefix="rear_scale-bench-") as folder:
        return _measure(arguments, Path(folder))


def _measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    _write_sets(folder, arguments.samples, arguments.shards)
    rates = _interleaved(folder, arguments.rounds)
    medians = {name: statistics.median(rounds) for name, rounds in rates.items()}
    packed = read_manifest(folder / "packed")
    empty, peak = (_in_process(_peak_memory, folder / name, folder / "cache") for name in ("empty", "packed"))
    return {
        "images_per_s": medians["mmap"],
        "reference_images_per_s": medians["jsonl"],
        "ratio": medians["mmap"] / medians["jsonl"],
        "variants": {
            name: {
                "images_per_s": medians[name],
                "us_per_sample": 1e6 / medians[name],
                "ratio": medians[name] / medians["jsonl"],
                "rounds": rounds,
            }
            for name, rounds in rates.items()
        },
        "samples": arguments.samples,
        "shards": len(packed.shards),
        "batch_size": _BATCH,
        "bytes_per_sample": sum(shard.size for shard in packed.shards) / arguments.samples,
        "reference_bytes_per_sample": {
            "webdataset": sum(tar.stat().st_size for tar in (folder / "plain").glob("*.tar")) / arguments.samples,
            "jsonl": (folder / "tokens.jsonl").stat().st_size / arguments.samples,
        },
        # Peak while unpacking and reading one epoch, minus that of the same process with an empty set.
        "anonymous_bytes_per_sample": (peak - empty) / arguments.samples,
    }


# The readers. Each is opened in its own process.


def _open(folder: Path, mode: str, cache: Path) -> TokenSet:
    data = DataConfig(train=str(folder), mode=mode, cache_dir=str(cache))
    return open_set(data, read_manifest(folder), world_size=1)


def _ours(tokens: TokenSet) -> Batches:
    order = tokens.order(_BATCH, seed=0)
    step = 0
    while True:
        step += 1
        yield tokens.rows(order.global_batch(step)[0])


def _mmap(folder: Path) -> Batches:
    return _ours(_open(folder / "packed", "mmap", folder / "cache"))


def _stream(folder: Path) -> Batches:
    return _ours(_open(folder / "packed", "stream", folder / "cache"))


def _webdataset(folder: Path) -> Batches:
    tars = sorted(str(tar) for tar in (folder / "plain").glob("*.tar"))
    return reference.load("token_readers").webdataset_batches(tars, _BATCH)


def _jsonl(folder: Path) -> Batches:
    return reference.load("token_readers").jsonl_batches(folder / "tokens.jsonl", _BATCH)


_READERS: dict[str, Callable[[Path], Batches]] = {
    "mmap": _mmap,
    "stream": _stream,
    "webdataset": _webdataset,
    "jsonl": _jsonl,
}


def _interleaved(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Samples per second of each reader in each round."""
    context = multiprocessing.get_context("spawn")
    workers = {}
    for name in _READERS:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(name, folder, theirs), daemon=True)
        process.start()
        workers[name] = ours, process
    rates: dict[str, list[float]] = {name: [] for name in workers}
    for name, (pipe, process) in workers.items():
        _answer(name, pipe, process)  # wait until it is open and warmed up
    with progress("bench data", rounds * len(workers), "turn") as bar:
        for _ in range(rounds):
            for name, (pipe, process) in workers.items():
                pipe.send("go")
                rates[name].append(_answer(name, pipe, process))
                bar.update()
    for pipe, process in workers.values():
        pipe.send("end")
        process.join()
    return rates


def _answer(name: str, pipe: Connection, process: multiprocessing.process.BaseProcess) -> float:
    while not pipe.poll(1.0):
        if not process.is_alive():
            raise RuntimeError(f"the {name} reader ended with exit code {process.exitcode}")
    return pipe.recv()


def _serve(name: str, folder: Path, pipe: Connection) -> None:
    batches = _READERS[name](folder)
    next(batches)
    count = _CALIBRATION_BATCHES
    rate = _rate(batches, count)
    pipe.send(rate)
    while pipe.recv() == "go":
        count = max(_CALIBRATION_BATCHES, round(rate * _SLICE_S / _BATCH))
        rate = _rate(batches, count)
        pipe.send(rate)


def _rate(batches: Batches, count: int) -> float:
    started = time.perf_counter()
    for _ in range(count):
        tokens, _ = next(batches)
        assert tokens.shape == (_BATCH, _TOKENS), tokens.shape
    return count * _BATCH / (time.perf_counter() - started)


def _peak_memory(folder: Path, cache: Path) -> int:
    """Peak of anonymous memory in bytes while a set is opened, unpacked, and read for one epoch."""
    peak = [_anonymous_bytes()]

    def note(line: str = "") -> None:
        peak[0] = max(peak[0], _anonymous_bytes())

    data = DataConfig(train=str(folder), cache_dir=str(cache / "memory"))
    tokens = open_set(data, read_manifest(folder), world_size=1, say=note)  # called at each shard
    order = tokens.order(_BATCH, seed=0)
    for step in range(1, len(tokens) // _BATCH + 1):
        tokens.rows(order.global_batch(step)[0])
        note()
    note()
    return peak[0]


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon: the bench needs Linux 4.5 or later")


def _in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(function, arguments)


# The sets: the same samples in four formats.


def _write_sets(folder: Path, samples: int, shards: int) -> None:
    """Writes packed/, empty/, plain/ and tokens.jsonl, with the same random samples, unless they exist."""
    marker, wanted = folder / "written.json", {"samples": samples, "shards": shards}
    if marker.exists():
        if json.loads(marker.read_text()) != wanted:
            raise InputError(f"--folder={folder} holds sets of {marker.read_text()}. Use another folder, or remove it")
        return
    per_shard = -(-samples // shards)
    for name in ("packed", "empty", "plain"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    written = []
    words = [str(code) for code in range(_CODES)]
    with (
        open(folder / "tokens.jsonl", "w") as lines,
        progress("bench data: write sets", samples, "sample") as bar,
    ):
        for index, start, end in writer.shard_ranges(samples, per_shard):
            generator = np.random.default_rng([index, samples])
            tokens = generator.integers(0, _CODES, (end - start, _TOKENS), dtype=np.uint16)
            labels = generator.integers(0, _CLASSES, end - start)
            written.append(
                writer.write_shard(folder / "packed", index, tokens, labels, "bench", samples_per_shard=per_shard)
            )
            _write_plain(folder / "plain" / f"part-{index:06d}.tar", tokens, labels, start)
            for row, label in zip(tokens.tolist(), labels.tolist(), strict=True):
                lines.write(f'{{"class_id": {label}, "tokens": [{", ".join([words[code] for code in row])}]}}\n')
            bar.update(end - start)
    for name, entries, count in (("packed", written, samples), ("empty", [], 0)):
        np.save(folder / name / "codebook.npy", np.zeros((_CODES, 4), np.float32))
        write_manifest(folder / name, _manifest(folder / name, entries, count, per_shard))
        writer.remove_records(folder / name)
    write_text_atomically(marker, json.dumps(wanted))
    say(f"sets of {samples:,} samples are in {folder}")


def _manifest(folder: Path, shards: list[TarShard], samples: int, per_shard: int) -> Manifest:
    return Manifest(
        tokenizer="random",
        tokenizer_sha256=hashlib.sha256(b"").hexdigest(),
        codebook_size=_CODES,
        codebook_dim=4,
        num_tokens=_TOKENS,
        num_samples=samples,
        crops_per_image=1,
        label_counts=[0] * _CLASSES,
        class_names=[str(label) for label in range(_CLASSES)],
        codebook_sha256=file_sha256(folder / "codebook.npy"),
        shards=shards,
        samples_per_shard=per_shard,
    )


def _write_plain(path: Path, tokens: np.ndarray, labels: np.ndarray, first: int) -> None:
    """Writes a tar with one sample per key, in the layout of webdataset's own writer."""
    with tarfile.open(path, "w") as tar:
        for number, (row, label) in enumerate(zip(tokens, labels.tolist(), strict=True), start=first):
            buffer = io.BytesIO()
            np.save(buffer, row)
            for extension, content in (("cls", str(label).encode()), ("tokens.npy", buffer.getvalue())):
                info = tarfile.TarInfo(f"{number:08d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
