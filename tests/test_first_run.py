"""Images of one's own in class folders, from the first command to scores, each command being the one that the last one named."""

from __future__ import annotations

import json
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image

from rear_scale.config import InputError, load
from rear_scale.run.stages import STAGE_VARIABLE

CLASSES = ("cats", "dogs", "owls")
CONFIG = """
defaults:
  - demo
  - override strategy: single
  - _self_
run: {name: own}
model: {depth: 2, width: 32, num_heads: 2}
tokenizer:
  weights: weights/tokenizer.safetensors
  image_size: 16
  num_tokens: 16
  grid: [4, 4]
  codebook_size: 16
  codebook_dim: 8
  training: {images: photos/train, steps: 6, continuous_steps: 2, batch_size: 4, channels: 16}
data: {train: tokens/train, val: tokens/val, cache_dir: cache}
objective: {heads: {hidden: 32}}
train: {total_steps: 2, global_batch_size: 8, micro_batch_size: 8, val_every: 2}
sample: {num_images: 6, batch_size: 6}
evaluate:
  reference: {training: null, validation: photos/val}
  classifier: {weights: weights/classifier.safetensors, images: photos/train, steps: 4}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for label, name in enumerate(CLASSES):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 90, (20 + number, 24, 3), dtype=np.uint8)
                pixels[:, 8 * label : 8 * label + 8] += 150
                Image.fromarray(pixels).save(folder / f"{number}.png")
    (tmp_path / "own.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(STAGE_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    return tmp_path


def run(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command line of `python launchers/NAME.py`, in this process."""
    python, script, *words = shlex.split(line)
    assert (python, Path(script).parent.name) == ("python", "launchers")
    monkeypatch.setattr(sys, "argv", [script, *words])
    runpy.run_path(str(ROOT / script))["main"]()


def test_every_command_names_its_result_and_the_next_command(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line, done, outputs = "python launchers/train_tokenizer.py --config own.yaml", [], []
    while line:
        run(line, monkeypatch)
        output, said = capsys.readouterr()
        outputs.append(output)
        done += [one.removeprefix("done: ") for one in said.splitlines() if one.startswith("done: ")]
        line = next((one.removeprefix("next: ") for one in said.splitlines() if one.startswith("next: ")), "")
    results = [text.partition(" (")[0] for text in done]
    (samples,) = Path("runs/own/samples").glob("*.npz")
    assert results == [
        "weights/tokenizer.safetensors", "tokens/train", "tokens/val", "runs/own", str(samples), "runs/own/result.json",
    ]  # fmt: skip
    assert all(Path(result).exists() for result in results)
    numbers = [text.partition(" (")[2] for text in done]
    for number, expected in zip(
        numbers, ("PSNR ", "24 sequences of 24 images of 3 classes", "9 sequences", "val_loss ", "6 images", "accuracy "),
        strict=True,
    ):  # fmt: skip
        assert number.startswith(expected)
    # The classes are those of the shards, not the ten of the demo, and the references of the demo are gone.
    saved = load("runs/own/config.yaml")
    assert saved.model.num_classes == 3
    assert json.loads(Path("runs/own/result.json").read_text())["images"]["samples"]["frechet_distance"].keys() == {
        "validation"
    }
    table = outputs[-1].splitlines()
    assert table[0].split() == ["model", "accuracy", "Fréchet", "nearest", "samples", "against"]
    assert table[1].split()[-2:] == ["6", "validation"]
    assert any(line.split()[:4] == ["own,", "step", "2", "data.val"] for line in table)
    run("python launchers/evaluate.py --config own.yaml --reconstruct photos/val", monkeypatch)
    output, said = capsys.readouterr()
    assert output.splitlines()[0].split() == ["model", "PSNR", "LPIPS", "codes", "used", "samples", "against"]
    assert "done: photos/val.reconstruction.json (PSNR " in said
    # Relative paths of the config are found from the folder of the run.
    monkeypatch.chdir(here / "photos")
    run("python launchers/sample.py --checkpoint ../runs/own --dry-run", monkeypatch)
    assert f"tokenizer.weights: {here.resolve()}/weights/tokenizer.safetensors (exists)" in capsys.readouterr().out
    run("python launchers/train_tokenizer.py --config ../runs/own/config.yaml --dry-run", monkeypatch)
    assert f"tokenizer.training.images: {here.resolve()}/photos/train (exists)" in capsys.readouterr().out


def test_all_that_is_missing_is_said_at_once(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"not found: pretokenize.images=none.*not found: tokenizer.weights="):
        run(
            "python launchers/pretokenize.py --config own.yaml pretokenize.images=none pretokenize.out=out", monkeypatch
        )
    with pytest.raises(InputError, match=r"not found: train.init_from=none.*tokens/train.*tokens/val"):
        run("python launchers/train.py --config own.yaml train.init_from=none", monkeypatch)
    assert not (here / "out").exists()
