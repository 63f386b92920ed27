"""data.use_share: a subset of the images of each class, the same for all runs, and a part of every larger one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import find, metrics, run_alone, tiny_config
from test_train import run, without_times

from rear_scale.config import InputError, derive
from rear_scale.shards.reader import open_manifest, open_set, open_tokens
from rear_scale.shards.record import read_manifest
from rear_scale.shards.subset import images_of_share, samples_of_share
from rear_scale.train import dry_run
from rear_scale.world import Ranks

ALONE = Ranks(0, 0, 1, 1, None, None, "single")


@pytest.mark.parametrize("crops", [1, 2, 10])
def test_a_share_is_nested_takes_the_same_part_of_each_class_and_whole_images(tokens: Path, crops: int) -> None:
    generator = np.random.default_rng(0)
    of_images = generator.integers(0, 4, 300)
    labels = np.repeat(of_images, crops).astype(np.uint16)
    counts = np.bincount(labels, minlength=5).tolist()  # the last class has no images
    manifest = replace(read_manifest(tokens), num_samples=len(labels), crops_per_image=crops, label_counts=counts)
    before: set[int] = set()
    for share in (0.001, 0.1, 0.25, 0.5, 0.99, 1.0):
        ids = samples_of_share(manifest, labels, share)
        assert len(ids) == images_of_share(manifest, share) * crops
        found = set(ids.tolist())
        assert before <= found
        assert len(found) == len(ids)
        images = {number // crops for number in found}
        assert found == {image * crops + crop for image in images for crop in range(crops)}
        for label, count in enumerate(np.bincount(of_images, minlength=5)):
            taken = sum(of_images[image] == label for image in images)
            assert taken == (max(1, round(share * count)) if count else 0), (share, label)
        before = found
    assert len(before) == len(labels)
    # Not the front of the folder, whose order may say something about the images.
    half = samples_of_share(manifest, labels, 0.5)
    assert 0.3 < (half < len(labels) / 2).float().mean() < 0.7


def test_an_epoch_has_the_samples_of_the_share_for_every_seed(tmp_path: Path, tokens: Path) -> None:
    cfg = tiny_config(tmp_path, tokens, "data.use_share=0.3", "train.total_steps=null", "train.epochs=4")
    manifest = open_manifest(str(tokens), cfg.tokenizer, cfg.data)
    opened = open_set(cfg.data, manifest, 1)
    images = images_of_share(manifest, 0.3)
    assert len(opened) == 100  # ids stay those of the folder
    expected = samples_of_share(manifest, open_tokens(tokens, str(tmp_path / "cache")).labels, 0.3)
    sequences = []
    for seed in (0, 1):
        order = opened.order(images, seed)
        first, second = (order.global_batch(step)[0] for step in (1, 2))
        assert torch.equal(first.sort()[0], expected)
        assert torch.equal(second.sort()[0], expected)
        sequences.append(first.tolist())
    assert sequences[0] != sequences[1]
    assert derive(cfg, 1, images).total_steps == round(4 * images / 12)


def test_a_run_on_a_share_resumes_exactly_and_says_how_many_images_it_has(
    tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [tmp_path / name for name in ("unbroken", "resumed")]
    for folder in folders:
        folder.mkdir()
    share = ("strategy=single", "data.use_share=0.4")
    for folder, stops in zip(folders, ((), ("train.stop_at_step=4",)), strict=True):
        run_alone(run, tiny_config(folder, tokens, *share, *stops))
    run_alone(run, tiny_config(folders[1], tokens, *share))
    ours, theirs = (without_times(metrics(folder / "run")) for folder in folders)
    assert ours == theirs
    images = images_of_share(read_manifest(tokens), 0.4)
    assert find(folders[0] / "run").meta["unique_images"] == images
    capsys.readouterr()
    dry_run.show(tiny_config(folders[0], tokens, *share), ALONE)
    assert f"data.use_share=0.4: {images} different images are trained on" in capsys.readouterr().out
    with pytest.raises(InputError, match="data.use_share=0.5, but .* was trained with data.use_share=0.4"):
        run_alone(run, tiny_config(folders[1], tokens, "strategy=single", "data.use_share=0.5", "train.total_steps=14",
                                   "resume.allow=[train.total_steps]"))  # fmt: skip


def test_a_share_that_cannot_be_taken_is_refused(tmp_path: Path, tokens: Path) -> None:
    for value in ("0", "1.5"):
        with pytest.raises(InputError, match=r"data.use_share=.* must lie in \(0, 1\]"):
            tiny_config(tmp_path, tokens, f"data.use_share={value}")
    with pytest.raises(InputError, match="data.mode=stream does not know"):
        tiny_config(tmp_path, tokens, "data.use_share=0.5", "data.mode=stream")
    uncounted = replace(read_manifest(tokens), label_counts=[0] * 5)
    assert images_of_share(uncounted, 1.0) == 100
    with pytest.raises(InputError, match="data.use_share=0.5 .* not counted"):
        images_of_share(uncounted, 0.5)
    cfg = tiny_config(tmp_path, tokens, "data.use_share=0.5", "data.assumed_images=1000")
    assert derive(cfg, 1, None).images_per_epoch == 500
