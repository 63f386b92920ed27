"""Every strategy against one process: losses over accumulation and recomputation, and resuming each under each."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import run_alone, run_ranks, tiny_config
from test_parallel import QUIET, TWO_RANKS, build, run_steps

from rear_scale.config.validate import RECOMPUTE_POLICIES
from rear_scale.world import World

STEPS = 20
# What bf16 (8 bits of mantissa) makes of 20 steps, relative to float32. Measured: 4.5e-4.
BF16_BOUND = 2e-3


def _losses(world: World, folder: Path, tokens: Path, cells: list[tuple[str, ...]]) -> dict[Any, list[float]]:
    found = {}
    for cell in cells:
        cfg = tiny_config(folder, tokens, *QUIET, *cell)
        found[cell] = [loss for loss, _ in run_steps(world, cfg, build(world, cfg), 1, STEPS, lr=2e-3)]
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
    reference = tiny_config(
        folder, tokens, *QUIET, "strategy=single", "train.global_batch_size=16", "train.micro_batch_size=16"
    )
    expected = [
        loss
        for loss, _ in run_alone(lambda world: run_steps(world, reference, build(world, reference), 1, STEPS, lr=2e-3))
    ]
    worst: dict[str, float] = {}
    for world_size, names in ((1, ("single",)), (2, TWO_RANKS), (4, ("hsdp",))):
        cells = [cell for name in names for cell in cells_of(name, world_size, everything)]
        for cell, losses in run_ranks(world_size, _losses, folder, tokens, cells)[0].items():
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
