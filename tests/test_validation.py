from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import own_term
import pytest
import torch
from helpers import metrics, run_alone, run_ranks, tiny_config, write_token_shards
from test_parallel import QUIET, build, run_steps

from rear_scale.analysis import token_prediction
from rear_scale.config import InputError
from rear_scale.objective import Objective, Task
from rear_scale.objective.prediction import batches_of_rank
from rear_scale.shards.reader import open_tokens
from rear_scale.shards.record import read_codebook
from rear_scale.train import setup, validation
from rear_scale.train.loop import Hooks, train
from rear_scale.train.validation import Validation
from rear_scale.world import Ranks, World, discover

# Terms that read features, one of them through a head of its own: engines gather its weights.
OWN = ["objective.terms={smooth: {weight: 0.5, tap: 2}, ahead: {}}"]
# No number of ranks or micro-batch divides it.
HELD_OUT = 29


def _validated(world: World, folder: Path, tokens: Path, val: Path, names: list[str]) -> dict[str, dict[str, float]]:
    assert own_term
    found = {}
    for name in names:
        cfg = tiny_config(folder, tokens, f"strategy={name}", f"data.val={val}", *QUIET, *OWN)
        strategy = build(world, cfg)
        held_out = open_tokens(val, cfg.data.cache_dir)
        codebook = torch.from_numpy(read_codebook(val, held_out.manifest))
        validate = Validation(cfg, held_out, codebook, world)
        before = validate(0, strategy)
        losses = run_steps(world, cfg, strategy, 1, 2)
        found[name] = {**validate(2, strategy), "before": before["val_loss"], "losses": losses}
    return found


@pytest.fixture(scope="module")
def val(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_token_shards(tmp_path_factory.mktemp("val") / "val", HELD_OUT, seed=5)


def test_validation_is_the_same_for_any_number_of_ranks(tmp_path: Path, tokens: Path, val: Path) -> None:
    alone = run_alone(_validated, tmp_path, tokens, val, ["single"])["single"]
    parts = ("val_loss_ar", "val_loss_encode", "val_loss_decode", "val_loss_ahead")
    expected = sum(alone[name] for name in parts) + 0.5 * alone["val_loss_smooth"]
    assert alone["val_loss"] == pytest.approx(expected, rel=1e-6)
    assert 0 < alone["val_ctr_noisy"] <= alone["val_ctr"] < 1
    # A share of correct predictions is a whole number of them.
    assert alone["val_ctr"] * HELD_OUT * 16 == pytest.approx(round(alone["val_ctr"] * HELD_OUT * 16), abs=1e-4)
    for name, found in run_ranks(2, _validated, tmp_path, tokens, val, ["zero3", "fsdp2"])[0].items():
        losses, expected = found.pop("losses"), alone["losses"]
        assert found == pytest.approx({key: alone[key] for key in found}, rel=1e-5), name
        # And it leaves no trace in training.
        assert [loss for loss, _ in losses] == pytest.approx([loss for loss, _ in expected], rel=1e-5)


def test_validation_and_evaluation_agree_to_the_bit_on_every_number_of_ranks(
    tmp_path: Path, tokens: Path, val: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks of a world one after the other, in one process."""
    monkeypatch.setattr(token_prediction, "DRAW_SEED", validation._DRAW_SEED)

    def scores(world: World) -> None:
        cfg = tiny_config(tmp_path, tokens, "strategy=single", f"data.val={val}", *QUIET)
        strategy, held_out = build(world, cfg), open_tokens(val, cfg.data.cache_dir)
        codebook = torch.from_numpy(read_codebook(val, held_out.manifest))
        found = []
        for size in (1, 2, 3, 7):
            worlds = [replace(world, ranks=Ranks(r, r, size, size, None, None, "single")) for r in range(size)]
            rows = [Validation(cfg, held_out, codebook, one).rows(strategy) for one in worlds]
            found.append(Validation(cfg, held_out, codebook, world).metrics(rows))
        assert all(one == found[0] for one in found), found
        settings = {"batch_size": cfg.train.micro_batch_size, "replace_rate": cfg.evaluate.replace_rate}
        clean, noisy = (
            token_prediction.predict_tokens(strategy.model, held_out, world, draws=draws, **settings)
            for draws in (0, 1)
        )
        assert (clean.ctr, noisy.ctr) == (found[0]["val_ctr"], found[0]["val_ctr_noisy"])
        assert clean.perplexity == math.exp(found[0]["val_loss_ar"])

    run_alone(scores)


@pytest.mark.parametrize(
    ("sequences", "batch_size", "ranks"), [(29, 6, 1), (29, 6, 3), (29, 6, 5), (4, 6, 3), (12, 6, 2)]
)
def test_each_batch_counts_on_one_rank_in_as_many_passes_as_on_the_others(
    sequences: int, batch_size: int, ranks: int
) -> None:
    passes = [list(batches_of_rank(sequences, batch_size, rank, ranks)) for rank in range(ranks)]
    assert len({len(one) for one in passes}) == 1
    turns = [turn for together in zip(*passes, strict=True) for turn in together]
    assert torch.equal(torch.cat([ids for ids, counted in turns if counted]), torch.arange(sequences))
    alone = [ids.tolist() for ids, _ in batches_of_rank(sequences, batch_size, 0, 1)]
    assert all(ids.tolist() in alone for ids, _ in turns)


def test_the_loss_is_that_of_a_plain_model(tmp_path: Path, tokens: Path, val: Path) -> None:
    def both(world: World) -> tuple[float, float]:
        cfg = tiny_config(tmp_path, tokens, "strategy=single", f"data.val={val}", *QUIET)
        strategy = build(world, cfg)
        held_out = open_tokens(val, cfg.data.cache_dir)
        codebook = torch.from_numpy(read_codebook(val, held_out.manifest))
        truth, labels = held_out.rows(torch.arange(HELD_OUT))
        with torch.no_grad():
            loss, _ = Objective(cfg, strategy.plan, codebook, world.device).loss(
                strategy.model.eval()(truth, labels, None), Task(truth, truth, None, None)
            )
        return Validation(cfg, held_out, codebook, world)(0, strategy)["val_loss"], loss.item()

    found, expected = run_alone(both)
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_run_validates_every_so_often(tmp_path: Path, tokens: Path, val: Path) -> None:
    cfg = tiny_config(
        tmp_path, tokens, "strategy=single", f"data.val={val}", "train.val_every=5", "train.log_every=100"
    )

    def run(world: World) -> int:
        data = setup.check_data(cfg, discover({}))
        read, codebook = data.open(world)
        validation = Validation(cfg, data.open_val(world), codebook, world)
        return train(cfg, data.plan, world, read, codebook, Hooks(validate=[validation]))

    run_alone(run)
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 5, 10, 12]
    assert [("val_loss" in line, "val_ctr" in line) for line in lines] == [
        (False, False), (True, True), (True, True), (False, False)
    ]  # fmt: skip
    with pytest.raises(InputError, match="train.val_every=5 needs data.val"):
        tiny_config(tmp_path, tokens, "train.val_every=5")
