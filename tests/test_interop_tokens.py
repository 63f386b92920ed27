from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CODEBOOK_DIM, CODEBOOK_SIZE, NUM_TOKENS, ROOT, write_token_shards
from omegaconf import OmegaConf

from rear_scale.config import InputError, TokenizerConfig
from rear_scale.files import file_sha256
from rear_scale.shards import record, writer
from rear_scale.shards import token_files as tokens
from rear_scale.shards.reader import open_tokens
from rear_scale.shards.token_files import Crops
from rear_scale.tokenizer.compact import CompactTokenizer

sys.path.insert(0, str(ROOT / "data"))
import convert_tokens  # noqa: E402

TOKENIZER = TokenizerConfig("compact", None, 16, NUM_TOKENS, CODEBOOK_SIZE, CODEBOOK_DIM)
ONE = Crops("center", 1)


def same_samples(one: Path, other: Path, cache: Path) -> None:
    first, second = (open_tokens(folder, str(cache)) for folder in (one, other))
    assert np.array_equal(first.tokens, second.tokens)
    assert np.array_equal(first.labels, second.labels)


def test_jsonl_goes_out_and_comes_back(tmp_path: Path) -> None:
    folder = write_token_shards(tmp_path / "set", 60)
    tokens.export_jsonl(folder, tmp_path / "tokens.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "tokens.jsonl").read_text().splitlines()]
    whole = open_tokens(folder, str(tmp_path / "cache"))
    assert lines[7] == {"class_id": int(whole.labels[7]), "tokens": whole.tokens[7].tolist()}
    assert len(lines) == 60
    tokens.import_jsonl(tmp_path / "tokens.jsonl", tmp_path / "back", TOKENIZER, Crops("ten", 10))
    same_samples(folder, tmp_path / "back", tmp_path / "cache")
    manifest = record.read_manifest(tmp_path / "back")
    assert (manifest.num_images, manifest.crops, manifest.codebook_sha256) == (6, "ten", None)
    assert manifest.label_counts == record.read_manifest(folder).label_counts
    with pytest.raises(InputError, match="60 sequences are not a whole number of images with 7 crops"):
        tokens.import_jsonl(tmp_path / "tokens.jsonl", tmp_path / "seven", TOKENIZER, Crops("seven", 7))


def test_the_codebook_comes_along_with_the_weights(tmp_path: Path) -> None:
    tokens.export_jsonl(write_token_shards(tmp_path / "set", 20), tmp_path / "tokens.jsonl")
    torch.manual_seed(0)
    tokenizer = CompactTokenizer(16, CODEBOOK_SIZE, CODEBOOK_DIM, 16)
    tokenizer.codes.normal_()
    tokenizer.save(tmp_path / "weights")
    cfg = TokenizerConfig(**{**vars(TOKENIZER), "weights": str(tmp_path / "weights")})
    tokens.import_jsonl(tmp_path / "tokens.jsonl", tmp_path / "back", cfg, ONE)
    manifest = record.read_manifest(tmp_path / "back")
    assert np.array_equal(record.read_codebook(tmp_path / "back", manifest), tokenizer.codes.numpy())
    assert manifest.tokenizer_sha256 == file_sha256(tmp_path / "weights")


def test_a_killed_import_continues_with_the_next_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "SHARD_SAMPLES", 25)
    tokens.export_jsonl(write_token_shards(tmp_path / "set", 110), tmp_path / "tokens.jsonl")
    crops = Crops("ten", 10)
    tokens.import_jsonl(tmp_path / "tokens.jsonl", tmp_path / "unbroken", TOKENIZER, crops)
    written = writer.write_shard
    calls: list[int] = []

    def killed(folder, index, *rest, **named):
        calls.append(index)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return written(folder, index, *rest, **named)

    monkeypatch.setattr(writer, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        tokens.import_jsonl(tmp_path / "tokens.jsonl", tmp_path / "killed", TOKENIZER, crops)
    tokens.import_jsonl(tmp_path / "tokens.jsonl", tmp_path / "killed", TOKENIZER, crops)
    assert calls == [0, 1, 2, 3, 3, 4, 5]
    one, other = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("unbroken", "killed")
    )
    assert one == other
    tokens.import_jsonl(tmp_path / "tokens.jsonl", tmp_path / "killed", TOKENIZER, crops)
    assert len(calls) == 7
    with pytest.raises(InputError, match="is finished, but was made from other inputs: crops ten"):
        tokens.import_jsonl(tmp_path / "tokens.jsonl", tmp_path / "killed", TOKENIZER, ONE)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3: not an object"),
        ('{"tokens": [1]}', "line 3: not an object with class_id"),
        (json.dumps({"class_id": 1, "tokens": [1, 2]}), "line 3: int64 of shape .*tokenizer.num_tokens=16"),
        (json.dumps({"class_id": 1, "tokens": [0.5] * 16}), "line 3: float64"),
        (json.dumps({"class_id": 1, "tokens": [32] * 16}), "line 3: .*tokens 32..32, beyond .*codebook_size=32"),
        (json.dumps({"class_id": -1, "tokens": [3] * 16}), "line 3: class -1"),
    ],
)
def test_a_line_that_does_not_fit_is_named(tmp_path: Path, line: str, message: str) -> None:
    good = json.dumps({"class_id": 1, "tokens": [3] * 16})
    (tmp_path / "tokens.jsonl").write_text(f"{good}\n{good}\n{line}\n")
    with pytest.raises(InputError, match=message):
        tokens.import_jsonl(tmp_path / "tokens.jsonl", tmp_path / "out", TOKENIZER, ONE)
    assert not (tmp_path / "out/index.json").exists()


def test_an_alitok_cache_goes_in_and_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    expected = {}
    for name in ("n02", "n01"):
        for number in range(3):
            codes = generator.integers(0, CODEBOOK_SIZE, (10, NUM_TOKENS))
            file = tmp_path / "cache" / name / f"{name}_{number}.JPEG.npz"
            file.parent.mkdir(parents=True, exist_ok=True)
            np.savez(file, codes=codes)
            expected[name, number] = codes
    tokens.import_alitok(tmp_path / "cache", tmp_path / "shards", TOKENIZER)
    whole = open_tokens(tmp_path / "shards", str(tmp_path / "unpacked"))
    manifest = whole.manifest
    assert (manifest.num_images, manifest.crops_per_image, manifest.crops) == (6, 10, "ten")
    assert (manifest.class_names, manifest.label_counts) == (["n01", "n02"], [30, 30])
    assert np.array_equal(whole.tokens, np.concatenate([expected[key] for key in sorted(expected)]))
    tokens.export_alitok(tmp_path / "shards", tmp_path / "again")
    tokens.import_alitok(tmp_path / "again", tmp_path / "back", TOKENIZER)
    same_samples(tmp_path / "shards", tmp_path / "back", tmp_path / "unpacked")
    (tmp_path / "map").write_text("n01 1\nn02 0")
    tokens.import_alitok(tmp_path / "cache", tmp_path / "mapped", TOKENIZER, tmp_path / "map")
    assert record.read_manifest(tmp_path / "mapped").class_names == ["n02", "n01"]
    assert "repeats" not in capsys.readouterr().err
    (tmp_path / "twice/n01").mkdir(parents=True)
    np.savez(tmp_path / "twice/n01/a.npz", codes=np.zeros((20, NUM_TOKENS), int))
    tokens.import_alitok(tmp_path / "twice", tmp_path / "out", TOKENIZER)
    assert "every second row repeats" in capsys.readouterr().err
    for codes, message in (
        (np.zeros((1, 2 * NUM_TOKENS), int), "join sequences of two images"),
        (np.zeros((3, NUM_TOKENS), int), r"codes are \[3, 16\], but \[10, 16\]"),
    ):
        np.savez(tmp_path / "cache/n02/n02_9.npz", codes=codes)
        with pytest.raises(InputError, match=message):
            tokens.import_alitok(tmp_path / "cache", tmp_path / message[:4], TOKENIZER)


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_token_shards(tmp_path / "set", 20)
    OmegaConf.save(OmegaConf.structured(TOKENIZER), tmp_path / "mine.yaml")

    def command(*words: object) -> None:
        monkeypatch.setattr(sys, "argv", ["convert_tokens.py", *map(str, words)])
        convert_tokens.main()

    command("export-jsonl", folder, tmp_path / "a.jsonl")
    command("import-jsonl", tmp_path / "a.jsonl", tmp_path / "b", "--tokenizer", tmp_path / "mine.yaml")
    same_samples(folder, tmp_path / "b", tmp_path / "cache")
    command("export-alitok", folder, tmp_path / "cache_out")
    command("import-alitok", tmp_path / "cache_out", tmp_path / "c", "--tokenizer", tmp_path / "mine.yaml")
    assert record.read_manifest(tmp_path / "c").num_samples == 20
    with pytest.raises(InputError, match="not found: .*none"):
        command("import-jsonl", tmp_path / "none", tmp_path / "d", "--tokenizer", "maskgit_vqgan")
    with pytest.raises(InputError, match="--tokenizer nothing: no such file"):
        command("import-jsonl", tmp_path / "a.jsonl", tmp_path / "d", "--tokenizer", "nothing")
