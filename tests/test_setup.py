"""Training on every form of token data that it accepts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from helpers import (
    CODEBOOK_DIM,
    CODEBOOK_SIZE,
    NUM_CLASSES,
    metrics,
    run_alone,
    tiny_config,
    tiny_config_file,
    write_checkpoint,
    write_token_shards,
)

from rear_scale.config import ExperimentConfig, InputError, given_keys, load
from rear_scale.shards.reader import open_tokens
from rear_scale.shards.record import read_codebook, read_manifest
from rear_scale.tokenizer.compact import CompactTokenizer
from rear_scale.train import dry_run, setup
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


def test_the_number_of_classes_is_that_of_the_shards_unless_the_user_sets_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens, file = write_token_shards(tmp_path / "tokens", 100), tmp_path / "tiny.yaml"
    tiny_config_file(tmp_path, tokens)
    file.write_text(file.read_text().replace(f", num_classes: {NUM_CLASSES}", ""))

    def followed(*overrides: str) -> tuple[int, str]:
        cfg, note = setup.with_classes(load(str(file), overrides), given_keys(str(file), overrides))
        return cfg.model.num_classes, note or ""

    classes, note = followed()
    assert classes == NUM_CLASSES
    assert f"model.num_classes=5, the number of classes in data.train={tokens}, not the config's default 1000" in note
    assert followed("model.num_classes=8") == (8, "")
    assert followed("model=demo")[0] == NUM_CLASSES  # the file of the group says 10
    assert followed(f"data.train={tmp_path}/none") == (1000, "")
    assert followed("train.init_from=weights.safetensors") == (1000, "")
    with pytest.raises(InputError, match=r"sample.labels=\[7\] must be one or more class ids in 0 .. 4"):
        followed("sample.labels=[7]")
    # A file of the user's that the config is composed of counts as theirs; those of configs/ do not.
    (tmp_path / "model").mkdir()
    (tmp_path / "model/own.yaml").write_text("{depth: 2, width: 32, num_heads: 2, num_classes: 9}")
    file.write_text(file.read_text().replace("  - base\n", "  - base\n  - model: own\n"))
    assert followed() == (9, "")
    # A run goes on with the number that it began with.
    checkpoint = write_checkpoint(tmp_path / "run", 4)
    meta = json.loads((checkpoint / "meta.json").read_text())
    (checkpoint / "meta.json").write_text(json.dumps({**meta, "config": {"model": {"num_classes": 1000}}}))
    file.write_text(file.read_text().replace("  - model: own\n", ""))
    assert followed("model.num_classes=8") == (8, "")
    assert followed()[0] == 1000

    dry_run.show(load(str(file), [f"run.dir={tmp_path}/new"]), discover({}), full=True)
    assert "num_classes: 5" in (shown := capsys.readouterr().out)
    assert "model.num_classes=5, the number of classes in" in shown
    setup.check_data(load(str(file), ["strategy=single"]), discover({}))
    assert "995 of model.num_classes=1,000 classes have no images in data.train" in capsys.readouterr().err
