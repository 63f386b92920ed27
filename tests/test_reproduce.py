"""Published models: what is asked for where files are absent, and the whole path with tiny stand-ins."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import launch, run_alone, run_ranks, tiny_config_file
from test_evaluate import _Small

from rear_scale import config
from rear_scale.config import InputError
from rear_scale.evaluate.job import Evaluation
from rear_scale.evaluate.networks.weights import PublishedFile
from rear_scale.evaluate.published import ROWS
from rear_scale.evaluate.reproduce import ENTRIES, MASKGIT_VQGAN, Entry, entry_of, reproduce, verdicts
from rear_scale.evaluate.result import NetworkScores
from rear_scale.model import build_model
from rear_scale.tokenizer.compact import CompactTokenizer
from rear_scale.world import World


def test_every_entry_has_a_row_that_names_its_table() -> None:
    assert set(ENTRIES) == set(ROWS)
    for row in ROWS.values():
        assert "Table" in row.source
        assert row.reference


def test_an_unknown_model_is_named() -> None:
    with pytest.raises(InputError, match="rar_m is not one of the published models rar_b, rar_l"):
        entry_of("rar_m")
    result: subprocess.CompletedProcess[str] = launch("python", "launchers/reproduce.py", "rar_m")
    assert result.returncode == 2
    assert result.stderr.startswith("error: rar_m is not one of")


def stand_in(folder: Path, tokens: Path) -> Entry:
    """A published model as small as a test: its files lie in folder/files, with reAR's heads among the weights."""
    files = folder / "files"
    files.mkdir()
    path = tiny_config_file(folder, tokens)
    torch.manual_seed(0)
    tokenizer = CompactTokenizer(16, 32, 8, 16)
    tokenizer.codes.normal_()
    tokenizer.save(files / "tokenizer")
    model = build_model(config.load(str(path)))
    model.init_weights(0)
    torch.save(model.state_dict(), files / "generator.bin")
    (files / "pt_inception-2015-12-05-6726825d.pth").touch()
    images = np.random.default_rng(0).integers(0, 256, (30, 16, 16, 3), dtype=np.uint8)
    np.savez(files / "VIRTUAL_imagenet256_labeled.npz", arr_0=images)
    return Entry(
        "rar_b",
        PublishedFile("generator.bin", "https://example.org/generator", None),
        PublishedFile("tokenizer", "https://example.org/tokenizer", None),
        ("sample.num_images=25", "sample.batch_size=10"),
        config=str(path),
    )


def _reproduce(world: World, entry: Entry, folder: Path, out: Path) -> list[str]:
    cfg = entry.load_config(folder, [])
    assert entry.missing(cfg, folder) == []
    weights, cfg.evaluate.inception_weights = cfg.evaluate.inception_weights, None
    evaluation = Evaluation(cfg, out / "features", world)
    cfg.evaluate.inception_weights = weights
    evaluation.networks = [_Small()]
    return reproduce(entry, cfg, folder, out, evaluation, world)


def test_a_stand_in_is_sampled_scored_and_judged_on_any_number_of_ranks(tmp_path: Path, tokens: Path) -> None:
    entry = stand_in(tmp_path, tokens)
    lines = run_alone(_reproduce, entry, tmp_path / "files", tmp_path / "one")
    assert run_ranks(2, _reproduce, entry, tmp_path / "files", tmp_path / "two") == [lines, lines]
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two"))
    assert one["images"] == two["images"]
    assert "RAR-B" in lines[0]
    assert "not comparable: 25 samples instead of 50,000" in lines[1]
    assert one["images"]["inception"]["samples"] == 25
    assert one["images"]["published"]["fid"] == 1.95
    assert one["samples"]["uint8_rounding"] == "truncate"
    assert len(one["checkpoint"]["sha256"][0]) == 64
    # The features are taken while the images are made; the images are not kept.
    assert not list(tmp_path.rglob("samples*.npz"))


def test_absent_files_are_named_with_their_sources(tmp_path: Path, tokens: Path) -> None:
    entry = stand_in(tmp_path, tokens)
    cfg = entry.load_config(tmp_path / "nowhere", [])
    lines = entry.missing(cfg, tmp_path / "nowhere")
    assert len(lines) == 4
    for name, source in (
        ("generator.bin", "https://example.org/generator"),
        ("tokenizer", "https://example.org/tokenizer"),
        ("pt_inception-2015-12-05-6726825d.pth", "https://github.com/mseitzer/pytorch-fid"),
        ("VIRTUAL_imagenet256_labeled.npz", "https://github.com/openai/guided-diffusion"),
    ):
        assert any(f"nowhere/{name}" in line and source in line for line in lines), name
    unset = entry.load_config(tmp_path / "nowhere", ["evaluate.inception_weights=null"])
    assert any(
        line.startswith("not set: evaluate.inception_weights (pt_inception")
        for line in entry.missing(unset, tmp_path / "nowhere")
    )
    (line,) = entry.left_out(cfg, tmp_path / "files")
    assert "imagenet_val" in line
    (tmp_path / "files/imagenet_val").mkdir()
    both = entry.load_config(tmp_path / "files", [])
    assert set(both.evaluate.reference) == {"adm", "validation"}
    assert entry.left_out(both, tmp_path / "files") == []
    assert MASKGIT_VQGAN.source.startswith("https://")


def test_a_generator_of_another_size_is_named(tmp_path: Path, tokens: Path) -> None:
    entry = stand_in(tmp_path, tokens)
    torch.save({"cls_token": torch.zeros(1, 1, 32)}, tmp_path / "files/generator.bin")
    with pytest.raises(InputError, match=r"generator\.bin lacks .*Use the file of this model"):
        run_alone(_reproduce, entry, tmp_path / "files", tmp_path / "out")
    deeper = build_model(config.load(entry.config, ["model.depth=3"]))
    torch.save(deeper.state_dict(), tmp_path / "files/generator.bin")
    with pytest.raises(InputError, match=r"generator\.bin has blocks\.2\..*, which the model does not have"):
        run_alone(_reproduce, entry, tmp_path / "files", tmp_path / "out")


@pytest.mark.parametrize(
    ("fid", "samples", "published", "accepted"),
    [
        (1.99, 50_000, True, True),
        (1.89, 50_000, True, False),
        (1.95, 1000, True, None),
        (1.95, 50_000, False, None),
        (None, 1, True, None),
    ],
)
def test_a_verdict_needs_the_published_conditions(
    fid: float | None, samples: int, published: bool, accepted: bool | None
) -> None:
    scores = NetworkScores("0" * 64, published, samples, {}, {"adm": {"fid": fid}})
    (verdict,) = verdicts(ROWS["rar_b"], scores)
    assert verdict.accepted is accepted
    assert "RAR-B against adm" in verdict.text
