"""What a sampling job refuses, keeps and clears away."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import run_alone, run_ranks
from test_sample import _refusal, _sample, prepared

from rear_scale.checkpoint.folder import Checkpoint
from rear_scale.config import ExperimentConfig, InputError
from rear_scale.sample import files, job
from rear_scale.world import World


def test_ranks_that_found_another_checkpoint_are_told_before_any_work(tmp_path: Path, tokens: Path) -> None:
    cfg, found = prepared(tmp_path, tokens)
    first, second = run_ranks(2, _refusal_of_a_newer_one, cfg, found, tmp_path / "samples.npz")
    assert first == second
    assert f"rank 0 would sample from {found.path} and rank 1 from {found.path.with_name('step_00000002')}" in first
    assert not list(tmp_path.glob("*samples*"))


def test_settings_count_the_tokens_that_rounding_could_have_decided(tmp_path: Path, tokens: Path) -> None:
    cfg, found = prepared(tmp_path, tokens)
    cfg.train.precision = "bf16"
    made, make_tokens = [], job.make_tokens

    def noted(decoder, ids, *others):
        found = make_tokens(decoder, ids, *others)
        made.append((decoder.near_ties[: len(ids)].clone(), decoder.within_rounding[: len(ids)].clone()))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "make_tokens", noted)
        run_alone(_sample, cfg, found, tmp_path / "samples.npz")
    near, within = map(torch.cat, zip(*made, strict=True))
    settings = json.loads((tmp_path / "samples.json").read_text())
    assert settings["near_ties"] == {"below": 1e-4, "tokens": int(near.sum()), "images": int((near > 0).sum())}
    assert settings["within_rounding"] == {
        "precision": "bf16", "tokens": int(within.sum()), "images": int((within > 0).sum())
    }  # fmt: skip
    assert len(within) == 23
    assert within.sum() > near.sum()


def test_too_little_disk_space_is_said_before_any_work(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, found = prepared(tmp_path, tokens)
    one = 16 * 16 * 3 + 2 * 16 + 16  # bytes of an image: pixels, tokens, class and near ties
    free = [(23 + 23) * one]
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, free[0]))
    made, make = [], job._sample_batch

    def killed(*arguments: object) -> None:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(arguments[-1])
        make(*arguments)

    monkeypatch.setattr(job, "_sample_batch", killed)
    with pytest.raises(
        InputError,
        match=r"files of 23 images .*samples\.npz with all 23\. Free some space there, .*--out",
    ):
        run_alone(_sample, cfg, found, tmp_path / "samples.npz")
    assert made == []
    free[0] = int((23 + 23) * one * 1.03)
    with pytest.raises(KeyboardInterrupt):
        run_alone(_sample, cfg, found, tmp_path / "samples.npz")
    # What is made already needs no more room.
    free[0] = int((23 + 11) * one * 1.03)
    monkeypatch.setattr(job, "_sample_batch", make)
    run_alone(_sample, cfg, found, tmp_path / "samples.npz")
    on_disk = sum((tmp_path / f"samples{suffix}").stat().st_size for suffix in (".npz", ".tokens.npy"))
    assert on_disk < 23 * one * 1.1


def _refusal_of_a_newer_one(world: World, cfg: ExperimentConfig, found: Checkpoint, output: Path) -> str:
    if world.rank == 1:
        files = [{**item, "sha256": "0" * 64} for item in found.meta["files"]]
        found = dataclasses.replace(
            found, path=found.path.with_name("step_00000002"), meta={**found.meta, "step": 2, "files": files}
        )
    return _refusal(world, cfg, found, output)


def test_a_job_is_known_by_all_that_its_images_depend_on(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, found = prepared(tmp_path, tokens)
    identities = [job.job_identity(cfg, found)]
    # What else a weight file's model may be given. (Its own weights stand in for those of a tied model here.)
    cfg.objective.permutation.order = "z_curve"
    identities.append(job.job_identity(cfg, found))
    cfg.objective.permutation.prefix = "fixed"
    identities.append(job.job_identity(cfg, found))
    cfg.model.tie_codebook = "both"
    identities.append(job.job_identity(cfg, found))
    monkeypatch.setattr(job, "codebook_of", lambda *_: torch.ones(32, 8))
    identities.append(job.job_identity(cfg, found))
    monkeypatch.setattr(job, "_ALGORITHM", 0)
    identities.append(job.job_identity(cfg, found))
    assert len(set(identities)) == 6
    # And by nothing else.
    cfg.sample.also_write = "png"
    assert job.job_identity(cfg, found) == identities[-1]


@pytest.mark.parametrize("removed", [1, 2, 100])
def test_a_kill_while_parts_are_removed_leaves_none_for_good(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, removed: int
) -> None:
    cfg, found = prepared(tmp_path, tokens, "sample.num_images=4")
    output, folder = tmp_path / "samples.npz", tmp_path / "samples.parts"
    (folder / "before").mkdir(parents=True)  # of a job of other settings
    (folder / "before" / "unit_000000.tokens.npy").write_bytes(b"")
    calls, unlink, rmdir = [], os.unlink, os.rmdir

    def counted(call):
        def one(*arguments, **named):
            if "samples.parts" in str(arguments[0]) or "dir_fd" in named:
                calls.append(arguments)
                if len(calls) > removed:
                    raise KeyboardInterrupt
            return call(*arguments, **named)

        return one

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", counted(unlink))
        patch.setattr(os, "rmdir", counted(rmdir))
        if removed < 100:
            with pytest.raises(KeyboardInterrupt):
                run_alone(_sample, cfg, found, output)
            assert folder.exists()
        else:
            run_alone(_sample, cfg, found, output)
            assert len(calls) > 2
    run_alone(_sample, cfg, found, output)
    assert not folder.exists()
    # Another job's parts stay when this one is asked for again.
    (folder / "since").mkdir(parents=True)
    run_alone(_sample, cfg, found, output)
    assert (folder / "since").exists()


@pytest.mark.parametrize("text", ["[]", "null", "{}", "not json", '{"identity": 3}'])
def test_settings_that_are_not_ours_are_not_those_of_a_job_that_is_done(tmp_path: Path, text: str) -> None:
    (tmp_path / "samples.npz").write_bytes(b"")
    (tmp_path / "samples.json").write_text(text)
    assert not job.is_done(tmp_path / "samples.npz", "identity")


@pytest.mark.parametrize("name", ["samples.npz", "samples.json", "samples.png", "samples/000003.png"])
def test_files_that_no_job_has_made_are_not_written_over(tmp_path: Path, tokens: Path, name: str) -> None:
    cfg, found = prepared(tmp_path, tokens, "sample.num_images=2")
    (tmp_path / "samples").mkdir()
    (tmp_path / name).write_text("[]")
    with pytest.raises(InputError, match=f"would overwrite .*{name}, which no sampling job has written"):
        run_alone(_sample, cfg, found, tmp_path / "samples.npz")
    assert (tmp_path / name).read_text() == "[]"
    assert not (tmp_path / "samples.tokens.npy").exists()


def test_a_job_is_written_over_an_earlier_one_of_ours(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "samples.npz"
    output.touch()  # nothing to lose
    for count in (2, 3):
        cfg, found = prepared(tmp_path, tokens, f"sample.num_images={count}")
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            # Between the removal of the earlier settings and the new ones.
            patch.setattr(job, "_write_settings", _interrupt)
            run_alone(_sample, cfg, found, output)
        run_alone(_sample, cfg, found, output)
        assert len(np.load(output)["arr_0"]) == count


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
