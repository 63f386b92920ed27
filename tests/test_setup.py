"""Training on every form of token data that it accepts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from helpers import CODEBOOK_DIM, CODEBOOK_SIZE, metrics, run_alone, tiny_config, write_token_shards

from rear_scale.config import ExperimentConfig, InputError
from rear_scale.shards.reader import open_tokens
from rear_scale.shards.record import read_codebook, read_manifest
from rear_scale.tokenizer.compact import CompactTokenizer
from rear_scale.train import setup
from rear_scale.train.loop import Hooks, train
from rear_scale.world import World, discover


def run(world: World, cfg: ExperimentConfig) -> int:
    data = setup.check_data(cfg, discover({}))
    return train(cfg, data.plan, world, *data.open(world), Hooks())


def losses(folder: Path, shards: Path, *overrides: str) -> list[float]:
    folder.mkdir(exist_ok=True)
    run_alone(run, tiny_config(folder, shards, "strategy=single", *overrides))
    return [line["loss"] for line in metrics(folder / "run")]


def write_plain(folder: Path, tokens: Path, cache: Path) -> Path:
    folder.mkdir()
    whole = open_tokens(tokens, str(cache))
    with webdataset.TarWriter(f"{folder}/part-0.tar") as tar:
        for number, (row, label) in enumerate(zip(whole.tokens, whole.labels, strict=True)):
            tar.write({"__key__": f"{number:04d}", "tokens.npy": np.array(row), "cls": int(label)})
    return folder


def test_plain_shards_train_as_packed_ones_do(tmp_path: Path) -> None:
    packed = write_token_shards(tmp_path / "packed", 100)
    plain = write_plain(tmp_path / "plain", packed, tmp_path / "cache")
    with pytest.raises(InputError, match="has no codebook.npy, and tokenizer.weights is not set"):
        losses(tmp_path / "none", plain)
    (plain / "codebook.npy").write_bytes((packed / "codebook.npy").read_bytes())
    (plain / "offsets.json").unlink()
    assert losses(tmp_path / "a", packed) == losses(tmp_path / "b", plain)
    cfg = tiny_config(tmp_path, plain, f"data.val={plain}", "data.mode=stream", "strategy=single")
    held_out = run_alone(lambda world: setup.check_data(cfg, discover({})).open_val(world))
    assert np.array_equal(held_out.tokens, open_tokens(packed, str(tmp_path / "cache")).tokens)


def test_the_codebook_of_plain_shards_is_that_of_the_tokenizer(tmp_path: Path) -> None:
    packed = write_token_shards(tmp_path / "packed", 100)
    plain = write_plain(tmp_path / "plain", packed, tmp_path / "cache")
    tokenizer = CompactTokenizer(16, CODEBOOK_SIZE, CODEBOOK_DIM, 16)
    tokenizer.codes.copy_(torch.from_numpy(read_codebook(packed, read_manifest(packed))))
    tokenizer.save(tmp_path / "weights")
    found = losses(tmp_path / "a", plain, f"tokenizer.weights={tmp_path / 'weights'}")
    assert found == losses(tmp_path / "b", packed)


def test_a_streamed_run_resumes_exactly_and_its_order_may_not_change(tmp_path: Path) -> None:
    packed = write_token_shards(tmp_path / "packed", 100)
    stream = ("data.mode=stream", "data.shuffle_streams=4", "data.buffer_samples=8")
    unbroken = losses(tmp_path / "unbroken", packed, *stream)
    assert losses(tmp_path / "broken", packed, *stream, "train.stop_at_step=5") == unbroken[:5]
    for changed in (stream[1:], (*stream[:2], "data.buffer_samples=9")):
        with pytest.raises(InputError, match=r"data\.(mode|buffer_samples)="):
            losses(tmp_path / "broken", packed, *changed)
    assert losses(tmp_path / "broken", packed, *stream) == unbroken
    assert unbroken != losses(tmp_path / "mmap", packed)
