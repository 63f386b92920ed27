"""The scripts and texts of data/ that no module mirrors."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, write_token_shards
from PIL import Image

from rear_scale.config import InputError
from rear_scale.files import file_sha256
from rear_scale.shards import record
from rear_scale.shards.images import write_images
from rear_scale.tokenizer.compact import CompactTokenizer

sys.path.insert(0, str(ROOT / "data"))
from show_shards import show  # noqa: E402


def test_token_shards_are_summed_up_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_token_shards(tmp_path / "set", 100)
    torch.manual_seed(0)
    tokenizer = CompactTokenizer(16, 32, 8, 16)
    tokenizer.codes.normal_()
    tokenizer.save(tmp_path / "weights")
    manifest = record.read_manifest(folder)
    sha256 = file_sha256(tmp_path / "weights")
    for name, weights in (("compact", sha256), ("compact", "0" * 64)):
        values = {**manifest.as_dict(), "tokenizer": name, "tokenizer_sha256": weights}
        record.write_manifest(folder, record.manifest_from(values, folder))
        if weights == sha256:
            show(folder, tmp_path / "weights", 20, tmp_path / "grid.png")
    said = capsys.readouterr().out
    assert "100 sequences of 16 tokens out of 32 codes of width 8" in said
    assert (
        f"5 classes with {min(manifest.label_counts)} to {max(manifest.label_counts)} sequences, 0 without any" in said
    )
    assert "20 samples" in said
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (8 * 66, 3 * 66)
    with pytest.raises(InputError, match="--weights .* has hash"):
        show(folder, tmp_path / "weights", 20, None)
    show(folder, None, 20, None)
    assert "no picture" in capsys.readouterr().out


def test_image_shards_are_drawn_as_they_are(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    write_images(tmp_path / "set", ((Image.fromarray(image), 0) for image in pixels), 64, ["a"])
    show(tmp_path / "set", None, 48, tmp_path / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert np.array_equal(grid[:64, 66:130], pixels[1])
