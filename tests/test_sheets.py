from __future__ import annotations

import dataclasses
import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import find, run_alone, run_ranks, tiny_config
from PIL import Image

from rear_scale import config
from rear_scale.config import ExperimentConfig, InputError
from rear_scale.sample import job
from rear_scale.sample.sheets import FOLDER, SampleGrids, check_grids, grid_hooks
from rear_scale.shards.record import read_manifest
from rear_scale.tokenizer.compact import CompactTokenizer
from rear_scale.train import setup
from rear_scale.train.loop import Hooks, train
from rear_scale.world import World


def prepared(folder: Path, tokens: Path, *overrides: str) -> ExperimentConfig:
    torch.manual_seed(0)
    tokenizer = CompactTokenizer(16, 32, 8, 16)
    tokenizer.codes.normal_()
    tokenizer.save(folder / "weights")
    batch = tiny_config(folder, tokens).train.global_batch_size
    return tiny_config(
        folder,
        tokens,
        f"tokenizer.weights={folder / 'weights'}",
        "strategy=ddp",
        "train.total_steps=4",
        "checkpoint.every_steps=1",
        f"sample.grid_every_images={2 * batch}",
        "sample.batch_size=30",
        *overrides,
    )


def _train(world: World, cfg: ExperimentConfig) -> None:
    data = setup.check_data(cfg, world.ranks)
    train(cfg, data.plan, world, *data.open(world), Hooks(on_checkpoint=grid_hooks(cfg, world)))


def test_sheets_show_the_samples_of_their_step(tmp_path: Path, tokens: Path) -> None:
    cfg = prepared(tmp_path, tokens)
    check_grids(cfg, read_manifest(tokens))
    run_ranks(2, _train, cfg)
    sheets = sorted((tmp_path / "run" / FOLDER).iterdir())
    assert [sheet.name for sheet in sheets] == ["step_00000002.png", "step_00000004.png"]
    assert len({sheet.read_bytes() for sheet in sheets}) == 2
    # The sampling job draws the same images of the last step.
    cfg.sample.num_images, cfg.sample.batch_size = 25, 25
    found = find(tmp_path / "run")
    run_alone(lambda world: job.sample_images(cfg, found, world, tmp_path / "samples.npz"))
    drawn = np.load(tmp_path / "samples.npz")["arr_0"]
    with Image.open(sheets[1]) as sheet:
        shown = (
            np.asarray(sheet)
            .reshape(5, 66, 5, 66, 3)
            .transpose(0, 2, 1, 3, 4)[:, :, :64:4, :64:4]
            .reshape(-1, 16, 16, 3)
        )
    assert np.array_equal(shown, drawn)


def test_a_sheet_that_a_kill_has_prevented_is_drawn_at_the_next_start(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = prepared(tmp_path, tokens, "strategy=single")
    draw = SampleGrids._draw

    def killed(self: SampleGrids, step: int, path: Path) -> None:
        if step == 4:
            raise RuntimeError("killed")
        draw(self, step, path)

    def start(world: World) -> None:
        data = setup.check_data(cfg, world.ranks)
        (grids,) = grid_hooks(cfg, world)
        train(cfg, data.plan, world, *data.open(world), Hooks(on_checkpoint=[grids], on_resume=[grids.make_missing]))

    monkeypatch.setattr(SampleGrids, "_draw", killed)
    with pytest.raises(RuntimeError, match="killed"):
        run_alone(start)
    # The run has all of its steps, and goes on with the sheet alone; then with a step more.
    monkeypatch.setattr(SampleGrids, "_draw", draw)
    run_alone(start)
    sheet = tmp_path / "run" / FOLDER / "step_00000004.png"
    made = sheet.stat().st_mtime_ns
    sheet.with_name("step_00000002.png").unlink()
    monkeypatch.setattr(SampleGrids, "_draw", killed)
    cfg.train.total_steps = 4
    run_alone(start)
    assert sheet.stat().st_mtime_ns == made
    sheet.unlink()
    monkeypatch.setattr(SampleGrids, "_draw", draw)
    cfg.train.total_steps, cfg.resume.allow = 5, ["train.total_steps"]
    run_alone(start)
    assert [path.name for path in sheet.parent.iterdir()] == [sheet.name]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_sheet_that_the_disk_does_not_take_is_said_and_ends_nothing(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    cfg = prepared(tmp_path, tokens)

    def full(self: SampleGrids, step: int, path: Path) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(SampleGrids, "_draw", full)
    run_alone(lambda world: SampleGrids(cfg, world)(2, tmp_path))
    file = tmp_path / "run" / FOLDER / "step_00000002.png"
    assert f"{file}: {os.strerror(number)}. Training continues without this sheet" in capsys.readouterr().err


def test_sheets_that_could_not_be_drawn_are_refused_before_training(tmp_path: Path, tokens: Path) -> None:
    cfg = prepared(tmp_path, tokens)
    cfg.tokenizer.weights = "/nowhere"
    with pytest.raises(InputError, match="not found: tokenizer.weights=/nowhere, which sample.grid_every_images needs"):
        check_grids(cfg, read_manifest(tokens))
    cfg = prepared(tmp_path, tokens)
    made_by_another = dataclasses.replace(read_manifest(tokens), tokenizer_sha256="f" * 64)
    with pytest.raises(InputError, match="was trained on tokens of a file with sha256 ffffffffffff"):
        check_grids(cfg, made_by_another)
    cfg.sample.grid_every_images = None
    check_grids(cfg, read_manifest(tokens))
    assert grid_hooks(cfg, run_alone(lambda world: world)) == []


def test_fewer_sheets_than_asked_for_are_announced(
    tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = prepared(tmp_path, tokens)
    world = run_alone(lambda world: world)
    capsys.readouterr()
    cfg.checkpoint.every_steps = 2
    assert len(grid_hooks(cfg, world)) == 1
    assert capsys.readouterr().err == ""
    cfg.checkpoint.every_steps = 3
    assert len(grid_hooks(cfg, world)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "note: sample.grid_every_images=24, but sheets are drawn at checkpoints, which are 36 images apart"
    )


def test_a_sheet_has_given_labels_and_few_columns(tmp_path: Path, tokens: Path) -> None:
    cfg = prepared(tmp_path, tokens, "sample.labels=[3,1]")
    grids = SampleGrids(cfg, run_alone(lambda world: world))
    assert (grids.columns, grids.cfg.sample.num_images, grids.cfg.sample.labels) == (2, 10, [3, 1])
    assert cfg.sample.labels == [3, 1]


@pytest.mark.parametrize("name", ["rear_appendix_e_vqgan", "rear_appendix_e_alitok", "rar_figure5"])
def test_a_figure_sets_classes_for_any_size_and_the_schedule_only_where_it_is_printed(name: str) -> None:
    alone = config.load(f"figure/{name}.yaml").sample
    for size in ("rar_b", "rar_xl"):
        own = config.load(f"{size}.yaml").sample
        drawn = config.load(f"{size}.yaml", config.figure_overrides(name)).sample
        assert (drawn.labels, drawn.num_images, drawn.seed) == (alone.labels, alone.num_images, alone.seed)
        assert drawn.num_images % len(drawn.labels) == 0
        if name == "rar_figure5":
            assert drawn.guidance == own.guidance
        else:
            assert (drawn.guidance.schedule, drawn.guidance.scale) == ("constant", 4.0)


def test_an_unknown_figure_is_named() -> None:
    with pytest.raises(InputError, match="--figure rar_figure is not one of .*; did you mean rar_figure5?"):
        config.figure_overrides("rar_figure")
