"""data/prepare_fashion_mnist.py, and the parts of a folder of images that data/prepare_imagefolder.py writes."""

from __future__ import annotations

import gzip
import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT / "data"))
import prepare_fashion_mnist as fashion  # noqa: E402
import prepare_imagefolder as folders  # noqa: E402

from rear_scale.config import InputError  # noqa: E402
from rear_scale.shards.images import open_images  # noqa: E402
from rear_scale.shards.sources import Split  # noqa: E402


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The four files with 40 + 20 pictures of noise, whose checksums take the place of the published ones."""
    rng = np.random.default_rng(0)
    checksums = {}
    for split, count in (("train", 40), ("t10k", 20)):
        pixels = rng.integers(0, 256, count * 28 * 28, dtype=np.uint8).tobytes()
        labels = rng.permutation(np.arange(count, dtype=np.uint8) % 10).tobytes()
        for name, head, data in (("images-idx3", 16, pixels), ("labels-idx1", 8, labels)):
            content = bytes(head) + data
            checksums[f"{split}-{name}-ubyte.gz"] = hashlib.sha256(content).hexdigest()
            (tmp_path / f"{split}-{name}-ubyte.gz").write_bytes(gzip.compress(content))
    monkeypatch.setattr(fashion, "_FILES", checksums)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr("sys.argv", ["prepare_fashion_mnist.py", *map(str, words)])
    fashion.main()


def test_clothes_become_shards_of_even_classes(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = source / "out"
    run(monkeypatch, "--source", source, "--out", out, "--fraction", "0.5")
    for name, count in (("train", 20), ("val", 10), ("held_in", 10)):
        shards = open_images(out / name)
        images, labels = shards.load()
        assert images.shape == (count, 32, 32, 3)
        assert np.bincount(labels).tolist() == [count // 10] * 10
        assert not images[:, :2].any()
        assert not images[:, :, 30:].any()
        assert shards.class_names[7] == "sneaker"
    train, held_in = ({image.tobytes() for image in open_images(out / name).load()[0]} for name in ("train", "held_in"))
    assert held_in < train
    before = (out / "train/index.json").stat().st_mtime_ns
    run(monkeypatch, "--source", source, "--out", out, "--fraction", "0.5")
    assert (out / "train/index.json").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="is finished, but was made from other inputs"):
        run(monkeypatch, "--source", source, "--out", out)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda path: path.unlink(), "lacks t10k-labels-idx1-ubyte.gz.*apt install dataset-fashion-mnist"),
        (lambda path: path.write_bytes(path.read_bytes()[:20]), "is damaged"),
        (lambda path: path.write_bytes(b"<html>"), "is damaged"),
        (lambda path: path.write_bytes(gzip.compress(b"other")), "holds other data than the published file"),
    ],
)
def test_files_that_are_not_the_published_ones_are_refused(
    source: Path, monkeypatch: pytest.MonkeyPatch, damage: object, expected: str
) -> None:
    damage(source / "t10k-labels-idx1-ubyte.gz")
    with pytest.raises(InputError, match=expected):
        run(monkeypatch, "--source", source, "--out", source / "out")
    assert not (source / "out").exists()


def test_a_split_is_even_stable_and_leaves_no_part_empty() -> None:
    files = [
        (label, f"{label}/{number}.png") for label, count in (("a", 30), ("b", 2), ("c", 1)) for number in range(count)
    ]
    train, val = (Split(name, 0.1).members(files) for name in ("train", "val"))
    assert [a != b for a, b in zip(train, val, strict=True)] == [True] * len(files)
    chosen = [name for (_, name), member in zip(files, val, strict=True) if member]
    assert [sum(name.startswith(label) for name in chosen) for label in "abc"] == [3, 1, 0]
    held_in = Split("held_in", 0.1).members(files)
    assert sum(held_in) == 4
    assert all(not inner or outer for inner, outer in zip(held_in, train, strict=True))
    more = Split("val", 0.1).members([*files, ("a", "a/new.png")])
    kept = {name for (_, name), member in zip(files, more, strict=False) if member}
    assert len(set(chosen) - kept) <= 1


def test_parts_of_a_folder_have_the_class_ids_of_the_whole(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for label, count in (("ant", 1), ("bee", 12), ("cat", 12)):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(count):
            picture = Image.fromarray(rng.integers(0, 256, (9, 8, 3), dtype=np.uint8))
            picture.save(tmp_path / "photos" / label / f"{number}.png")
    for part in ("train", "val"):
        folders.prepare(tmp_path / "photos", tmp_path / part, 8, None, 0.1, split=part, val_fraction=0.25)
    train, val = (open_images(tmp_path / part) for part in ("train", "val"))
    assert (train.label_counts, val.label_counts) == ([1, 9, 9], [0, 3, 3])
    assert train.class_names == val.class_names == ["ant", "bee", "cat"]
    with pytest.raises(InputError, match="finished, but was made from other inputs: --val-fraction 0.25 then, 0.5 now"):
        folders.prepare(tmp_path / "photos", tmp_path / "val", 8, None, 0.1, split="val", val_fraction=0.5)
    with pytest.raises(InputError, match="--val-fraction=0.5 needs --split"):
        folders.prepare(tmp_path / "photos", tmp_path / "x", 8, None, 0.1, val_fraction=0.5)
