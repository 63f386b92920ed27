"""Every strategy against one process: losses over accumulation and recomputation, and all that happens at one step."""

from __future__ import annotations

import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import find, metrics, run_alone, run_ranks, tiny_config, write_token_shards
from test_evaluate import _Small
from test_evaluate_jobs import reference
from test_parallel import QUIET, TWO_RANKS, build, run_steps

from rear_scale.config import ExperimentConfig
from rear_scale.config.schema import RECOMPUTE_POLICIES
from rear_scale.evaluate.job import Evaluation
from rear_scale.evaluate.training_scores import TrainingScores
from rear_scale.sample.sheets import FOLDER, grid_hooks
from rear_scale.shards.reader import TokenSet
from rear_scale.tokenizer.compact import CompactTokenizer
from rear_scale.train import setup
from rear_scale.train.loop import Hooks, train
from rear_scale.train.validation import Validation
from rear_scale.world import World

SHORT, STEPS = 4, 20
# What bf16 (8 bits of mantissa) makes of STEPS steps, relative to float32. Measured: 4.5e-4.
BF16_BOUND = 2e-3


def _losses(
    world: World, folder: Path, tokens: Path, cells: list[tuple[str, ...]], steps: int
) -> dict[Any, list[float]]:
    found = {}
    for cell in cells:
        cfg = tiny_config(folder, tokens, *QUIET, *cell)
        found[cell] = [loss for loss, _ in run_steps(world, cfg, build(world, cfg), 1, steps, lr=2e-3)]
    return found


def cells_of(strategy: str, world_size: int, everything: bool) -> list[tuple[str, ...]]:
    """Overrides with an accumulation of 1 and of 4, every policy and precision; or every policy once, and bf16 once."""
    sizes = (16 // world_size, 4 // world_size)
    cells = list(itertools.product(sizes, RECOMPUTE_POLICIES, ("fp32", "bf16")))
    if not everything:
        # Which policies meet accumulation differs between strategies.
        turn = len(strategy) % 2
        cells = [(sizes[(number + turn) % 2], policy, "fp32") for number, policy in enumerate(RECOMPUTE_POLICIES)]
        cells.append((sizes[1], "none", "bf16"))
    return [
        (
            f"strategy={strategy}",
            "train.global_batch_size=16",
            f"train.micro_batch_size={size}",
            f"train.activation_checkpointing={policy}",
            f"train.precision={precision}",
        )
        for size, policy, precision in cells
    ]


def _check_losses(folder: Path, tokens: Path, everything: bool) -> None:
    steps = STEPS if everything else SHORT
    reference = tiny_config(
        folder, tokens, *QUIET, "strategy=single", "train.global_batch_size=16", "train.micro_batch_size=16"
    )
    expected = [
        loss
        for loss, _ in run_alone(lambda world: run_steps(world, reference, build(world, reference), 1, steps, lr=2e-3))
    ]
    worst: dict[str, float] = {}
    for world_size, names in ((1, ("single",)), (2, TWO_RANKS), (4, ("hsdp",))):
        cells = [cell for name in names for cell in cells_of(name, world_size, everything)]
        for cell, losses in run_ranks(world_size, _losses, folder, tokens, cells, steps)[0].items():
            error = np.abs(np.array(losses) / expected - 1).max()
            worst[cell[-1]] = max(error, worst.get(cell[-1], 0.0))
            assert error <= (1e-5 if "fp32" in cell[-1] else BF16_BOUND), (cell, error)
    print("largest relative differences:", worst)


def test_losses_of_every_strategy_and_some_policies(tmp_path: Path, tokens: Path) -> None:
    _check_losses(tmp_path, tokens, everything=False)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_losses_of_every_strategy_and_policy(tmp_path: Path, tokens: Path) -> None:
    _check_losses(tmp_path, tokens, everything=True)


def _everything_at_once(world: World, cfgs: list[ExperimentConfig]) -> None:
    for cfg in cfgs:
        data = setup.check_data(cfg, world.ranks)
        tokens, codebook = data.open(world)
        scores = TrainingScores(cfg, world)
        scores.evaluation = Evaluation(cfg, Path(cfg.run.dir) / "features", world)
        scores.evaluation.networks = [_Small()]
        hooks = Hooks(on_checkpoint=[*grid_hooks(cfg, world), scores])
        hooks.validate.append(Validation(cfg, data.open_val(world), codebook, world))
        # A look at the model from outside, as an analysis would take one.
        hooks.on_step.append(partial(_look, tokens))
        train(cfg, data.plan, world, tokens, codebook, hooks)


@torch.no_grad()
def _look(tokens: TokenSet, step: int, model: torch.nn.Module) -> None:
    truth, labels = tokens.rows(torch.arange(2))
    model(truth, labels, None)


def _check_everything_at_once(folder: Path, tokens: Path, world_sizes: dict[int, tuple[str, ...]]) -> None:
    """Validation, a sheet, scores and a checkpoint at each step, the last included."""
    torch.manual_seed(0)
    tokenizer = CompactTokenizer(16, 32, 8, 16)
    tokenizer.codes.normal_()
    tokenizer.save(folder / "weights")
    val, images = write_token_shards(folder / "val", 9, seed=5), reference(folder)
    expected: list[dict[str, float]] = []
    for world_size, names in world_sizes.items():
        cfgs = []
        for name in names:
            (folder / name).mkdir()
            cfgs.append(
                tiny_config(
                    folder / name, tokens, *QUIET, f"strategy={name}", f"data.val={val}", "train.val_every=1",
                    "checkpoint.every_steps=1", "train.total_steps=2", "optim.ema_decay=0.5",
                    f"tokenizer.weights={folder / 'weights'}", "sample.grid_every_images=12", "sample.batch_size=5",
                    "evaluate.training={every_images: 12, num_images: 5}", f"evaluate.reference={images}",
                    *(["train.micro_batch_size=3"] if world_size == 4 else []),
                )
            )  # fmt: skip
        run_ranks(world_size, _everything_at_once, cfgs)
        for name in names:
            run = folder / name / "run"
            values = [{key: line[key] for key in ("loss", "grad_norm")} for line in metrics(run)]
            values += [{key: line[key] for key in line if key.startswith("val_")} for line in metrics(run)]
            expected = expected or values
            assert values == [pytest.approx(line, rel=1e-5) for line in expected], name
            assert [line["step"] for line in metrics(run) if "val_loss" in line] == [1, 2], name
            lines = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
            assert [line["step"] for line in lines] == [1, 2], name
            assert len(list((run / FOLDER).iterdir())) == 2, name
            found = find(run)
            assert found.step == 2, name
            assert {key.split("/")[0] for key in found.meta["index"]} == {"param", "exp_avg", "exp_avg_sq", "ema"}, name


def test_validation_sheets_scores_and_checkpoints_at_one_step(tmp_path: Path, tokens: Path) -> None:
    _check_everything_at_once(tmp_path, tokens, {1: ("single",), 2: TWO_RANKS})


@pytest.mark.long
def test_validation_sheets_scores_and_checkpoints_at_one_step_with_replicas(tmp_path: Path, tokens: Path) -> None:
    _check_everything_at_once(tmp_path, tokens, {1: ("single",), 4: ("hsdp", "fsdp2")})
