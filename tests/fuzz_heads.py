"""Hostile heads, manifests, npz and weight files out of fixed seeds: what reads them may raise InputError and nothing else.

python tests/fuzz_heads.py 10000        prints inputs by kind, the slowest one, seconds and peak memory
"""

from __future__ import annotations

import copy
import io
import json
import random
import resource
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers import tiny_config, write_token_shards
from PIL import Image
from safetensors.torch import save_file

from rear_scale.checkpoint import released_trainer as accelerate
from rear_scale.checkpoint.folder import fault
from rear_scale.checkpoint.open import open_source
from rear_scale.checkpoint.writer import write_portable
from rear_scale.config import InputError, TokenizerConfig, to_dict
from rear_scale.evaluate.images.npz import read_samples, read_sha256
from rear_scale.evaluate.metrics.statistics_file import images_of, read_statistics
from rear_scale.evaluate.networks.classifier import Classifier
from rear_scale.model import build_model
from rear_scale.shards.images import open_images, write_images
from rear_scale.shards.plain import index_plain
from rear_scale.shards.reader import open_tokens
from rear_scale.shards.record import read_codebook, read_manifest
from rear_scale.shards.sources import open_source as open_images_to_encode
from rear_scale.shards.token_files import _alitok_codes, export_alitok
from rear_scale.shards.writer import finished_shard
from rear_scale.tokenizer.compact import CompactTokenizer
from rear_scale.weight_file import read_state, write_tensors

DEEP = object()
_VALUES = (None, True, False, [], {}, [[]], "", 0, -1, 1, 3, 2**31, 2**40, 2**63, 10**12, 10**30, 1e308, -0.5, 1.5,
           float("nan"), float("inf"), "x", "3", "../../x", "/etc/passwd", "a/b", "..", "a\0b", "a\nb", "\ud800", "é" * 300,
           "x" * 6000, "${oc.env:HOME}", "${run.name}", "???", "pipe:touch {mark}; cat {{file}}", "file://{mark}",
           "s3://bucket/x", [1, 2, 3], {"a": 1}, [None] * 3, list(range(70_000)), DEEP)  # fmt: skip
_NUMBERS = ("9" * 5000, "1e99999", "-0", "1E400", "00", "0x10", "NaN", "-Infinity", "1.", "[" * 100_000, '{"a":' * 50_000,
            '"\\ud800"', "/*", "'a'")  # fmt: skip
_HEADS = (b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", b"<!DOCTYPE html><html></html>",
          b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", b"\0" * 100, b"PK\3\4", b"\x93NUMPY\1\0")  # fmt: skip


@dataclass
class Findings:
    counts: Counter[str] = field(default_factory=Counter)  # inputs by kind
    refused: int = 0
    slowest: tuple[float, str] = (0.0, "")
    faults: list[str] = field(default_factory=list)  # inputs that led to anything but InputError


class Fuzzer:
    """Writes inputs of every type to a folder, and reads them."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random, self.mark = folder, random.Random(seed), folder / "ran"
        self.found = Findings()
        self.tokens = write_token_shards(folder / "tokens", 60)
        cfg = tiny_config(folder, self.tokens)
        model = build_model(cfg)
        model.init_weights(0)
        self.weights = dict(model.state_dict())
        meta = {"optimizer_step": 2, "config": to_dict(cfg), "tokenizer_sha256": "0" * 64}
        self.checkpoint = folder / "run/checkpoints/step_00000002"
        self.checkpoint.parent.mkdir(parents=True)
        write_portable(self.checkpoint, 2, {"param": self.weights}, meta)
        self.meta = json.loads((self.checkpoint / "meta.json").read_text())
        self.head = {"kind": "generator", "step": 2, "config": meta["config"], "tokenizer_sha256": ""}
        self._make_small_files()
        self.kinds: dict[str, Callable[[], None]] = {
            "meta.json": self.meta_json,
            "config of a checkpoint": self.config,
            "head of a weight file": self.safetensors_header,
            "bytes of a weight file": self.weight_bytes,
            "head of a tokenizer or classifier": self.small_head,
            "index.json of tokens": self.token_index,
            "index.json of images": self.image_index,
            "codebook.npy": self.codebook,
            "offsets": self.offsets,
            "record of a shard": self.record,
            "samples .npz": self.samples,
            "statistics .npz": self.statistics,
            "codes .npz": self.codes,
            "state of a trainer": self.trainer,
        }

    def run(self, inputs: int) -> Findings:
        names = list(self.kinds)
        for number in range(inputs):
            name = names[number % len(names)]
            started = time.perf_counter()
            try:
                self.kinds[name]()
            except InputError as error:
                self.found.refused += 1
                if "\n" in str(error):
                    self.found.faults.append(f"{name}, input {number}: more than one line: {error}")
            except Exception:
                self.found.faults.append(f"{name}, input {number}: {traceback.format_exc()}")
            took = time.perf_counter() - started
            self.found.counts[name] += 1
            self.found.slowest = max(self.found.slowest, (took, name))
            assert not self.mark.exists(), f"{name}, input {number} ran a command"
        return self.found

    def _make_small_files(self) -> None:
        folder, generator = self.folder, np.random.default_rng(0)
        torch.manual_seed(0)
        CompactTokenizer(16, 32, 8, 16).save(folder / "compact.safetensors")
        Classifier(16, 5).save(folder / "classifier.safetensors")
        torch.save(self.weights, folder / "weights.bin")
        torch.save(self.weights, folder / "old.bin", _use_new_zipfile_serialization=False)
        save_file(self.weights, folder / "weights.safetensors")
        images = ((Image.fromarray(generator.integers(0, 255, (8, 8, 3), np.uint8)), n % 3) for n in range(7))
        write_images(folder / "images", images, 8, ["a", "b", "c"])
        np.savez(folder / "samples.npz", arr_0=generator.integers(0, 255, (6, 4, 4, 3), np.uint8), label=np.arange(6))
        np.savez_compressed(folder / "packed.npz", arr_0=np.zeros((6, 4, 4, 3), np.uint8), arr_1=np.arange(6))
        square = generator.standard_normal((4, 4))
        manifest = {"format": "rear_scale statistics 1", "networks": {"pool": "net"}, "images": {"count": 3}}
        np.savez(
            folder / "statistics.npz", mu=np.zeros(4), sigma=square @ square.T, manifest=np.array(json.dumps(manifest))
        )
        np.savez(folder / "codes.npz", codes=generator.integers(0, 32, (2, 16)))
        plain = folder / "plain"
        plain.mkdir()
        import webdataset

        with webdataset.TarWriter(str(plain / "a.tar")) as tar:
            for number in range(5):
                tokens = io.BytesIO()
                np.save(tokens, np.full(16, number, np.uint16))
                tar.write({"__key__": f"{number:04d}", "npy": tokens.getvalue(), "cls": str(number % 3).encode()})
        self.tokenizer = TokenizerConfig(name="compact", num_tokens=16, codebook_size=32, codebook_dim=8)
        index_plain(plain, self.tokenizer, plain, on_error="raise", max_skipped_fraction=0.0)
        record = {"file": "shard-000000.tar", "samples": 2, "size": 0, "sha256": sha256(b"").hexdigest(),
                  "block_crc32": [1], "source": "x", "labels": [1, 1], "skipped": [["a", "b"]]}  # fmt: skip
        (folder / "records").mkdir()
        (folder / "records/shard-000000.tar").touch()
        self.shard_record = record
        released = folder / "checkpoint-3"
        released.mkdir()
        torch.save(self.weights, released / "pytorch_model.bin")
        self.metadata = {"global_step": 3}
        self.optimizer: dict[str, Any] = {
            "param_groups": [{"weight_decay": 0.0, "params": list(range(len(self.weights)))}],
            "state": {0: {"exp_avg": next(iter(self.weights.values()))}},
        }

    # What is changed

    def changed(self, values: Any, times: int | None = None) -> Any:
        """A copy of plain values with some of them replaced, removed or repeated."""
        values = json.loads(json.dumps(values))
        for _ in range(times or self.random.choice((1, 1, 1, 2, 4))):
            holder: list[Any] = [values]
            parent, key = holder, 0
            for _ in range(self.random.randint(0, 4)):
                inner = parent[key]
                if not isinstance(inner, (dict, list)) or not inner:
                    break
                parent, key = inner, self.random.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
            if parent is holder:
                holder[0] = self.value()
            else:
                self._change(parent, key)
            values = holder[0]
        return values

    def _change(self, parent: Any, key: Any) -> None:
        what = self.random.random()
        if what < 0.7:
            parent[key] = self.value()
        elif what < 0.8 and isinstance(parent, dict):
            del parent[key]
        elif what < 0.9 and isinstance(parent, dict):
            parent[self.random.choice(("x", "", "a.b", "../x", "\ud800", "a\nb", "pool"))] = parent[key]
        elif isinstance(parent, list):
            parent.append(parent[key])

    def value(self) -> Any:
        value = self.random.choice(_VALUES)
        if value is DEEP:
            for _ in range(self.random.choice((10, 70, 500))):
                value = [] if value is DEEP else [value]
            return value
        value = copy.deepcopy(value)
        return value.format(mark=self.mark) if isinstance(value, str) and "{" in value and "$" not in value else value

    def text(self, values: Any) -> bytes:
        """JSON of changed values, whose text is sometimes damaged."""
        if self.random.random() < 0.1:
            return self.bytes(json.dumps(values).encode())
        text = json.dumps(self.changed(values))
        if self.random.random() < 0.15:
            places = [place for place, letter in enumerate(text) if letter in ":[,"]
            place = self.random.choice(places or [0]) + 1
            text = f"{text[:place]}{self.random.choice(_NUMBERS)}{text[place:]}"
        if self.random.random() < 0.05 and text.startswith("{"):
            text = f'{{"format": 1, "format": 2, {text[1:]}'
        return text.encode(errors="surrogatepass")

    def bytes(self, data: bytes) -> bytes:
        """Bytes with a part of them flipped, cut, repeated or replaced."""
        found = bytearray(data)
        for _ in range(self.random.choice((1, 1, 2, 8))):
            place = self.random.randrange(len(found) + 1) if self.random.random() < 0.6 else self.random.randrange(80)
            what = self.random.random()
            if what < 0.4 and place < len(found):
                found[place] = self.random.randrange(256)
            elif what < 0.55:
                del found[place:]
            elif what < 0.7:
                found[place:place] = self.random.randbytes(self.random.choice((1, 4, 200)))
            elif what < 0.85:
                found[place : place + 8] = self.random.choice((b"\xff" * 8, b"\0" * 8, (2**40).to_bytes(8, "little")))
            elif what < 0.9:
                return self.random.choice(_HEADS)
            else:
                del found[place : place + self.random.choice((1, 8, 100))]
        return bytes(found)

    # What is read

    def meta_json(self) -> None:
        (self.checkpoint / "meta.json").write_bytes(self.text(self.meta))
        fault(self.checkpoint)
        open_source(self.checkpoint)

    def config(self) -> None:
        config = self.changed(self.meta["config"])
        if self.random.random() < 0.5:
            (self.checkpoint / "meta.json").write_text(json.dumps({**self.meta, "config": config}))
            open_source(self.checkpoint)
            return
        path = self.folder / "own.safetensors"
        write_tensors(path, {"x": torch.zeros(1)}, {**self.head, "config": config})
        open_source(path)

    def safetensors_header(self) -> None:
        data = (self.folder / "weights.safetensors").read_bytes()
        length = int.from_bytes(data[:8], "little")
        head = json.loads(data[8 : 8 + length])
        head["__metadata__"] = {"rear_scale": json.dumps(self.changed(self.head)), "format": "pt"}
        text = self.text(head)
        said = self.random.choice((len(text),) * 8 + (0, 1, 2**62, 2**40, 10**8))
        path = self.folder / "head.safetensors"
        path.write_bytes(said.to_bytes(8, "little") + text + data[8 + length :])
        open_source(path)

    def weight_bytes(self) -> None:
        name = self.random.choice(("weights.bin", "old.bin", "weights.safetensors"))
        path = self.folder / f"spoilt.{name}"
        path.write_bytes(self.bytes((self.folder / name).read_bytes()))
        read_state(path, "--checkpoint")

    def small_head(self) -> None:
        name, reader = self.random.choice((("compact", CompactTokenizer), ("classifier", Classifier)))
        data = (self.folder / f"{name}.safetensors").read_bytes()
        length = int.from_bytes(data[:8], "little")
        head = json.loads(data[8 : 8 + length])
        own = json.loads(head["__metadata__"]["rear_scale"])
        head["__metadata__"]["rear_scale"] = self.text(own).decode(errors="replace")
        text = json.dumps(head if self.random.random() < 0.7 else self.changed(head)).encode(errors="surrogatepass")
        path = self.folder / "small.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        reader.from_file(str(path))

    def token_index(self) -> None:
        folder = self.folder / "tokens"
        original = (folder / "index.json").read_bytes()
        try:
            (folder / "index.json").write_bytes(self.text(json.loads(original)))
            manifest = read_manifest(folder)
            if manifest.codebook_sha256 is not None:
                read_codebook(folder, manifest)
            open_tokens(str(folder), str(self.folder / "cache"), manifest=manifest)
            export_alitok(folder, self.folder / "exported")
        finally:
            (folder / "index.json").write_bytes(original)

    def image_index(self) -> None:
        folder = self.folder / "images"
        original = (folder / "index.json").read_bytes()
        try:
            (folder / "index.json").write_bytes(self.text(json.loads(original)))
            source = open_images_to_encode(folder)
            list(source.read(0, len(source)))
            list(open_images(folder).read())
        finally:
            (folder / "index.json").write_bytes(original)

    def codebook(self) -> None:
        folder = self.folder / "tokens"
        original, index = (folder / "codebook.npy").read_bytes(), (folder / "index.json").read_text()
        data = self.random.choice((self.bytes(original), _npy(self.array())))
        try:
            (folder / "codebook.npy").write_bytes(data)
            said = {**json.loads(index), "codebook_sha256": sha256(data).hexdigest()}
            (folder / "index.json").write_text(json.dumps(said))
            found = read_codebook(folder, read_manifest(folder))
            assert found.dtype == np.float32
            assert np.isfinite(found).all()
        finally:
            (folder / "codebook.npy").write_bytes(original)
            (folder / "index.json").write_text(index)

    def array(self) -> np.ndarray:
        """Numbers of any kind and shape, and objects."""
        shape = self.random.choice(((32, 8), (8, 32), (256,), (), (0, 8), (32, 8, 1), (6, 4, 4, 3)))
        kind = self.random.choice(("f4", "f8", "f2", "i8", "u1", "?", "c16", "O", "S3", "U5", "M8[s]", ">f4", "V8"))
        array = np.zeros(shape, kind)
        if array.dtype.kind == "f" and array.size:
            array.flat[0] = self.random.choice((np.nan, np.inf, 1e300 if kind == "f8" else 1.0, 2.0))
        return array

    def offsets(self) -> None:
        folder = self.folder / "plain"
        index, rows = (folder / "offsets.json").read_bytes(), (folder / "a.tar.offsets.npy").read_bytes()
        try:
            if self.random.random() < 0.5:
                values = json.loads(index)
                values["manifest"] = self.changed(values["manifest"])
                (folder / "offsets.json").write_bytes(
                    self.random.choice((self.text(values), json.dumps(values).encode()))
                )
            elif self.random.random() < 0.5:
                (folder / "a.tar.offsets.npy").write_bytes(self.bytes(rows))
            else:
                changed = np.load(io.BytesIO(rows))
                changed.flat[self.random.randrange(changed.size)] = self.random.choice((-1, 2**62, 7, 10**6, 65_535))
                (folder / "a.tar.offsets.npy").write_bytes(_npy(changed))
            manifest = index_plain(folder, self.tokenizer, folder, on_error="raise", max_skipped_fraction=0.0)
            open_tokens(str(folder), tempfile.mkdtemp(dir=self.folder), manifest=manifest)
        finally:
            (folder / "offsets.json").write_bytes(index)
            (folder / "a.tar.offsets.npy").write_bytes(rows)

    def record(self) -> None:
        (self.folder / "records/.shard-000000.tar.json").write_bytes(self.text(self.shard_record))
        finished_shard(self.folder / "records", 0, "x")

    def samples(self) -> None:
        path = self._npz(("samples.npz", "packed.npz"))
        images, _ = read_samples(path)
        images[0 : min(len(images), 100)]
        read_sha256(path)

    def statistics(self) -> None:
        path = self._npz(("statistics.npz",))
        read_statistics(path, {"pool": "net"}, {"pool": 4})
        images_of(path)

    def codes(self) -> None:
        _alitok_codes(self._npz(("codes.npz", "samples.npz")), 16, None)

    def _npz(self, names: tuple[str, ...]) -> Path:
        """One of the files with its bytes spoilt, or with one array in place of another."""
        data = (self.folder / self.random.choice(names)).read_bytes()
        path = self.folder / "spoilt.npz"
        if self.random.random() < 0.5:
            path.write_bytes(self.bytes(data))
            return path
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        chosen = self.random.choice(list(members))
        members[chosen] = self.random.choice((_npy(self.array()), self.bytes(members[chosen]), _npy_head(self.random)))
        if "manifest.npy" in members and self.random.random() < 0.5:
            said = json.loads(str(np.load(io.BytesIO(_member(data, "manifest.npy")))))
            members["manifest.npy"] = _npy(np.array(self.text(said).decode(errors="replace")))
        packed = self.random.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
        with zipfile.ZipFile(path, "w", packed) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        return path

    def trainer(self) -> None:
        folder = self.folder / "checkpoint-3"
        (folder / "metadata.json").write_bytes(self.text(self.metadata))
        if self.random.random() < 0.7:
            (folder / "metadata.json").write_text(json.dumps(self.metadata))
        optimizer = {**self.optimizer}
        if self.random.random() < 0.5:
            optimizer["param_groups"] = self.changed(optimizer["param_groups"])
        else:
            optimizer["state"] = {
                self.random.choice((0, 1, "0")): {"exp_avg": self.random.choice((None, 3, [], torch.zeros(2)))}
            }
        try:
            torch.save(optimizer, folder / "optimizer.bin")
        except RecursionError:
            return  # pickle writes no such thing
        accelerate.read_checkpoint(folder, lambda name, weight: False)


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def _npy_head(random_: random.Random) -> bytes:
    """A header that claims more values than the file has."""
    shape = random_.choice(((2**40,), (2**32, 2**32), (6, 2**32, 2**32, 3), (-1, 4, 4, 3), (10**30,), (6, 4, 4, 3)))
    descr = random_.choice(("|u1", "<f8", "|O", "<U1000000", "[('a', 'u1')]", "x"))
    head = f"{{'descr': '{descr}', 'fortran_order': {random_.choice(('False', 'True', '3'))}, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\1\0" + len(head).to_bytes(2, "little") + head + b"\0" * 288


def _member(data: bytes, name: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.read(name)


def main() -> None:
    inputs, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        found = Fuzzer(Path(folder), seed).run(inputs)
    for name, count in found.counts.items():
        print(f"{name:40} {count:8,}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{inputs:,} inputs, {found.refused:,} refused, {len(found.faults)} faults, {time.monotonic() - started:.0f} s"
    )
    print(f"slowest {found.slowest[0]:.2f} s ({found.slowest[1]}), peak memory {peak:.2f} GiB")
    for line in found.faults[:40]:
        print(line)


if __name__ == "__main__":
    main()
