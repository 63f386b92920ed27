from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import run_alone, run_ranks
from PIL import Image

from rear_scale import config
from rear_scale.config import ExperimentConfig, InputError
from rear_scale.shards import pretokenize, record, writer
from rear_scale.shards.images import write_images
from rear_scale.shards.reader import open_tokens
from rear_scale.tokenizer.compact import CompactTokenizer
from rear_scale.world import World

NUM_IMAGES = 107


def settings(folder: Path, out: str) -> ExperimentConfig:
    """107 images and an untrained tokenizer in `folder`, to be written to folder/out."""
    if not (folder / "weights").exists():
        torch.manual_seed(0)
        tokenizer = CompactTokenizer(16, 32, 8, 16)
        tokenizer.codes.copy_(torch.randn(32, 8) * 0.1)
        tokenizer.save(folder / "weights")
        pixels = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 16, 16, 3), dtype=np.uint8)
        write_images(
            folder / "images", ((Image.fromarray(image), n % 3) for n, image in enumerate(pixels)), 16, ["a", "b", "c"]
        )
    return config.load(
        "demo.yaml",
        [
            f"tokenizer.weights={folder / 'weights'}",
            "tokenizer.image_size=16",
            "tokenizer.num_tokens=16",
            "tokenizer.codebook_size=32",
            "tokenizer.codebook_dim=8",
            f"pretokenize.images={folder / 'images'}",
            f"pretokenize.out={folder / out}",
            "pretokenize.batch_size=8",
        ],
    )


def write(world: World, cfg: ExperimentConfig) -> None:
    # Several small shards, so that there is something to share out.
    writer.SHARD_SAMPLES, writer.BLOCK_SAMPLES, writer.BLOCKS_PER_SHARD = 20, 10, 2
    pretokenize.pretokenize(cfg, pretokenize.check_pretokenize(cfg), world)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def restored_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undoes what `write` sets in this process."""
    for name in ("SHARD_SAMPLES", "BLOCK_SAMPLES", "BLOCKS_PER_SHARD"):
        monkeypatch.setattr(writer, name, getattr(writer, name))


@pytest.mark.usefixtures("restored_sizes")
def test_the_bytes_do_not_depend_on_ranks_or_kills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_alone(write, settings(tmp_path, "one"))
    expected = files(tmp_path / "one")
    assert sorted(expected) == ["codebook.npy", "index.json", *(f"shard-{n:06d}.tar" for n in range(6))]
    run_ranks(2, write, settings(tmp_path, "two"))
    assert files(tmp_path / "two") == expected

    written = writer.write_shard

    def killed(folder, index, *rest, **named):
        if index == 3:
            (folder / "shard-000003.part").write_bytes(b"half")
            raise KeyboardInterrupt
        return written(folder, index, *rest, **named)

    cfg = settings(tmp_path, "killed")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(writer, "write_shard", killed)
        run_alone(write, cfg)
    assert not (tmp_path / "killed/index.json").exists()
    again: list[int] = []
    monkeypatch.setattr(
        writer,
        "write_shard",
        lambda folder, index, *rest, **named: again.append(index) or written(folder, index, *rest, **named),
    )
    run_alone(write, cfg)
    assert again == [3, 4, 5]
    assert files(tmp_path / "killed") == expected
    run_alone(write, cfg)
    assert again == [3, 4, 5]


def test_tokens_labels_and_manifest_are_those_of_the_images(tmp_path: Path) -> None:
    cfg = settings(tmp_path, "out")
    images = pretokenize.check_pretokenize(cfg)
    run_alone(lambda world: pretokenize.pretokenize(cfg, images, world))
    opened = open_tokens(tmp_path / "out", str(tmp_path / "cache"))
    pixels, labels = images.load()
    tokenizer = CompactTokenizer.from_file(str(tmp_path / "weights"))
    ids = tokenizer.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255)
    assert np.array_equal(opened.tokens, ids.numpy())
    assert np.array_equal(opened.labels, labels)
    manifest = opened.manifest
    assert (manifest.num_samples, manifest.num_images, manifest.num_tokens, manifest.codebook_size) == (
        107,
        107,
        16,
        32,
    )
    assert (manifest.label_counts, manifest.class_names) == ([36, 36, 35], ["a", "b", "c"])
    assert manifest.tokenizer_sha256 == record.file_sha256(tmp_path / "weights")
    assert np.array_equal(record.read_codebook(tmp_path / "out", manifest), tokenizer.codebook.numpy())


def test_what_is_missing_or_does_not_fit_is_named(tmp_path: Path) -> None:
    cfg = settings(tmp_path, "out")
    for name in ("images", "out"):
        changed = config.from_dict(config.to_dict(cfg), "test", [f"pretokenize.{name}=null"])
        with pytest.raises(InputError, match=f"pretokenize.{name} is not set"):
            pretokenize.check_pretokenize(changed)
    changed = config.from_dict(config.to_dict(cfg), "test", ["tokenizer.image_size=24"])
    with pytest.raises(InputError, match="tokenizer.image_size=24"):
        pretokenize.check_pretokenize(changed)
    run_alone(lambda world: pretokenize.pretokenize(cfg, pretokenize.check_pretokenize(cfg), world))
    tokenizer = CompactTokenizer.from_file(str(tmp_path / "weights"))
    tokenizer.codes.add_(1)
    tokenizer.save(tmp_path / "weights")
    with pytest.raises(InputError, match="already holds 107 samples"):
        run_alone(lambda world: pretokenize.pretokenize(cfg, pretokenize.check_pretokenize(cfg), world))
