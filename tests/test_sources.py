"""What a checkpoint is opened from, what of it is checked, and what may be asked of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import environment, run_alone, tiny_config
from safetensors.torch import save_file

from rear_scale import cli
from rear_scale.checkpoint import folder as layout
from rear_scale.checkpoint import released as official
from rear_scale.checkpoint.convert import convert
from rear_scale.checkpoint.folder import Checkpoint
from rear_scale.checkpoint.open import open_source
from rear_scale.checkpoint.restore import load_generator_weights
from rear_scale.checkpoint.writer import write_portable
from rear_scale.config import InputError, from_dict, load, to_dict, to_yaml
from rear_scale.files import file_sha256
from rear_scale.model import build_model
from rear_scale.sample.job import load_generator
from rear_scale.train import setup
from rear_scale.train.loop import Hooks, train
from rear_scale.world import discover


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> Path:
    """A run folder with checkpoints at steps 1 and 2."""
    folder = tmp_path_factory.mktemp("trained")
    cfg = tiny_config(folder, tokens, "strategy=single", "train.total_steps=2", "checkpoint.every_steps=1")
    data = setup.check_data(cfg, discover({}))
    run_alone(lambda world: train(cfg, data.plan, world, *data.open(world), Hooks()))
    return folder / "run"


@pytest.fixture
def run(tmp_path: Path, trained: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def open_with(path: Path, *overrides: str) -> Checkpoint:
    """As a launcher with --checkpoint does."""
    with mock.patch.object(sys, "argv", ["launcher", "--checkpoint", str(path), *overrides]):
        return cli.parse_checkpoint(cli.make_parser("", from_checkpoint=True)).checkpoint


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        open_with(path, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.depth=1", "model.depth=1, but .*step_00000002 was trained with model.depth=2"),
        ("model.num_heads=4", "trained with model.num_heads=2"),
        ("model.num_classes=3", "trained with model.num_classes=5"),
        ("tokenizer.codebook_size=16", "trained with tokenizer.codebook_size=32"),
        ("objective.permutation.order=z_curve", "trained with objective.permutation.order=row_major"),
        ("objective=ar", "trained with objective.heads.decode_tap=1"),
    ],
)
def test_another_model_cannot_be_asked_of_a_checkpoint(trained: Path, override: str, expected: str) -> None:
    assert re.search(expected, error_of(trained, override))


def test_what_is_not_the_model_may_be_set(trained: Path) -> None:
    free = ["model.kernel=sdpa", "sample.seed=3", "strategy=ddp", "tokenizer.weights=x", "evaluate.batch_size=2"]
    assert open_with(trained, *free).step == 2


def test_a_consolidated_file_holds_on_to_its_model_too(tmp_path: Path, trained: Path) -> None:
    convert(trained, None, [], "consolidated", tmp_path / "all.safetensors")
    assert "model.num_heads=4, but" in error_of(tmp_path / "all.safetensors", "model.num_heads=4")
    assert open_with(tmp_path / "all.safetensors", "sample.seed=3").step == 2
    config = tmp_path / "other.yaml"
    config.write_text((trained / "config.yaml").read_text().replace("depth: 2", "depth: 1"))
    with pytest.raises(InputError, match=r"has blocks\.1\..* which the model does not have"):
        open_source(tmp_path / "all.safetensors", str(config))


def test_converting_does_not_relabel_a_checkpoint(tmp_path: Path, trained: Path) -> None:
    with pytest.raises(InputError, match=r"objective\.permutation\.order=z_curve, but"):
        convert(trained, None, ["objective.permutation.order=z_curve"], "merged", tmp_path / "merged.bin")


def test_all_weights_but_heads_must_have_a_place(trained: Path) -> None:
    found = open_source(trained)
    cfg = from_dict(found.meta["config"], "saved")
    model = load_generator(cfg, found, torch.device("cpu"))
    assert torch.equal(model.state_dict()["lm_head.weight"], found.reader("param")("lm_head.weight"))
    cfg.model.depth = 1
    with pytest.raises(InputError, match=r"has blocks\.1\..* which the model does not have"):
        load_generator_weights(found, build_model(cfg, with_heads=False))


FORMS = {"step_00000002": {}, "one.safetensors": {}, "half.safetensors": {}, "zip.bin": {},
         "old.bin": {"_use_new_zipfile_serialization": False}}  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("form", FORMS)
def test_a_model_filled_in_place_is_the_one_that_was_written(
    tmp_path: Path, trained: Path, form: str, precision: str
) -> None:
    cfg = from_dict(json.loads((trained / "checkpoints/step_00000002/meta.json").read_text())["config"], "saved")
    read = open_source(trained).reader("param")
    path = trained / "checkpoints" / form if form.startswith("step") else tmp_path / form
    weights = {name: read(name).to(torch.float16 if "half" in form else None) for name in open_source(trained).names()}
    if path.suffix == ".safetensors":
        save_file(weights, path)
    elif path.suffix == ".bin":
        torch.save(weights, path, **FORMS[form])
    cfg.train.precision = precision
    expected = build_model(cfg, with_heads=False)
    official.load({name: value.float() for name, value in weights.items()}, expected, "file", heads_optional=True)
    expected = expected.to(torch.bfloat16 if precision == "bf16" else torch.float32).state_dict()
    found = open_source(path, str(trained / "config.yaml"))
    filled = load_generator(cfg, found, torch.device("cpu"))
    assert filled.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in filled.state_dict().items())
    assert all(value.dtype == expected[name].dtype for name, value in filled.state_dict().items())


def test_a_tied_model_filled_in_place_has_its_codebook(tmp_path: Path, tokens: Path) -> None:
    cfg = tiny_config(tmp_path, tokens, "model.tie_codebook=both", "train.precision=bf16")
    model = build_model(cfg, with_heads=False)
    model.init_weights(0)
    torch.save(model.state_dict(), tmp_path / "tied.bin")
    config = str(tmp_path / "config.yaml")
    Path(config).write_text(to_yaml(cfg))
    filled = load_generator(cfg, open_source(tmp_path / "tied.bin", config), torch.device("cpu"))
    codebook = torch.from_numpy(np.load(tokens / "codebook.npy"))
    assert torch.equal(filled.codebook, codebook.to(torch.bfloat16))
    assert not [name for name, value in filled.named_buffers() if value.is_meta]


@pytest.mark.parametrize("source", ["folder", "safetensors"])
def test_a_large_model_is_never_in_memory_twice(tmp_path: Path, source: str) -> None:
    sizes = ["model.depth=10", "model.width=512", "model.num_heads=8", "train.precision=fp32"]
    cfg = load("demo.yaml", sizes)
    model = build_model(cfg, with_heads=False)
    weights = {name: torch.zeros(value.shape) for name, value in model.state_dict().items()}
    size = sum(value.nbytes for value in weights.values())
    assert size > 100 * 2**20
    meta = {"config": to_dict(cfg), "optimizer_step": 0}
    write_portable(tmp_path / "checkpoints/step_00000000", 0, {"param": weights}, meta)
    if source == "safetensors":
        convert(tmp_path, None, [], "consolidated", tmp_path / "all.safetensors")
    code = """
import re, sys
from pathlib import Path
import torch
from rear_scale.config import from_dict
from rear_scale.checkpoint.open import open_source
from rear_scale.sample.job import load_generator

def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

before = status("VmRSS")
found = open_source(Path(sys.argv[1]))
model = load_generator(from_dict(found.meta["config"], "saved"), found, torch.device("cpu"))
print(status("VmHWM") - before)
"""
    path = tmp_path / "all.safetensors" if source == "safetensors" else tmp_path
    result = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, env=environment(), check=True
    )
    assert 0.9 * size < int(result.stdout) < 1.4 * size, int(result.stdout) / size


def test_weights_that_are_not_finite_draw_no_samples(tmp_path: Path, trained: Path) -> None:
    found = open_source(trained)
    cfg = from_dict(found.meta["config"], "saved")
    state = load_generator(cfg, found, torch.device("cpu")).state_dict()
    state["lm_head.weight"][3, 1] = torch.nan
    torch.save(state, tmp_path / "spoiled.bin")
    spoiled = open_source(tmp_path / "spoiled.bin", str(trained / "config.yaml"))
    with pytest.raises(InputError, match=r"spoiled\.bin: lm_head\.weight holds values that are not finite"):
        load_generator(cfg, spoiled, torch.device("cpu"))


def zero_some_bytes(part: Path) -> None:
    with open(part, "r+b") as file:
        file.seek(-4000, os.SEEK_END)
        file.write(b"\0" * 4000)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (zero_some_bytes, "does not match its checksum in meta.json"),
        (lambda part: os.truncate(part, 5000), "has 5000 bytes, but meta.json says"),
        (Path.unlink, "not found"),
    ],
    ids=["zeroed", "truncated", "missing"],
)
def test_a_damaged_part_is_named_with_an_intact_checkpoint(run: Path, spoil, expected: str) -> None:
    part = run / "checkpoints/step_00000002/part-00000.safetensors"
    spoil(part)
    intact = run / "checkpoints/step_00000001"
    for path in (run, part.parent):
        message = error_of(path)
        assert expected in message
        assert str(part) in message
        assert message.endswith(f"or use {intact}")
    assert open_with(intact).step == 1


def test_a_node_takes_checksums_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    monkeypatch.setattr(layout, "file_sha256", lambda path: read.append(path) or file_sha256(path))
    for rank, parts_read in ((8, 1), (9, 0)):
        ranks = {
            "RANK": rank,
            "WORLD_SIZE": 16,
            "LOCAL_RANK": rank - 8,
            "LOCAL_WORLD_SIZE": 8,
            "MASTER_ADDR": "here",
            "MASTER_PORT": 1,
        }
        for name, value in ranks.items():
            monkeypatch.setenv(name, str(value))
        read.clear()
        assert open_source(run).step == 2
        assert len(read) == parts_read


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda meta: [], "has format None"),
        (lambda meta: {**meta, "config": None}, "has no config"),
        (lambda meta: {name: value for name, value in meta.items() if name != "files"}, "has no files"),
        (lambda meta: {**meta, "files": [{"file": "part-00000.safetensors"}]}, "without file, size and sha256"),
        (lambda meta: {**meta, "files": []}, "which is not one of its files"),
    ],
)
def test_a_meta_file_that_is_not_whole_is_named(run: Path, change, expected: str) -> None:
    path = run / "checkpoints/step_00000002/meta.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    assert expected in error_of(run)


def test_folders_that_are_no_checkpoints_are_passed_over(run: Path) -> None:
    (run / "checkpoints/step_00000003").mkdir()
    shutil.copytree(run / "checkpoints/step_00000001", run / "checkpoints/step_0000best")
    assert open_with(run).step == 2


def test_samples_of_a_checkpoint_named_by_a_dot_go_to_its_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run / "checkpoints/step_00000002")
    assert open_with(Path(".")).run.resolve() == run.resolve()
