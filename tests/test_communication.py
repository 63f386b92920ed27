from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import run_ranks, tiny_config
from test_parallel import QUIET, build, run_steps

from rear_scale.config import ExperimentConfig
from rear_scale.parallel.communication import traffic_per_update
from rear_scale.parallel.counting import Collectives
from rear_scale.parallel.memory import shard_dimension
from rear_scale.world import World

CELLS = {
    2: [
        ["strategy=ddp"],
        ["strategy=fsdp2"],
        ["strategy=fsdp2", "train.precision=bf16", "strategy.reshard_after_forward=false"],
        ["strategy=zero1"],
        ["strategy=zero1", "train.precision=bf16"],
        ["strategy=zero2"],
        ["strategy=zero2", "strategy.defer_reduction=true"],
        ["strategy=zero3"],
        ["strategy=zero3", "train.precision=bf16"],
    ],
    4: [
        ["strategy=ddp"],
        ["strategy=fsdp2"],
        ["strategy=hsdp"],
        ["strategy=zero1"],
        ["strategy=zero2"],
        ["strategy=zero3"],
    ],
}


def config(folder: Path, tokens: Path, world_size: int, accumulation: int, cell: list[str]) -> ExperimentConfig:
    size = 16 // world_size // accumulation
    return tiny_config(
        folder, tokens, *QUIET, "model.width=192", "model.depth=3", "train.global_batch_size=16",
        f"train.micro_batch_size={size}", *cell,
    )  # fmt: skip


def _counted(world: World, folder: Path, tokens: Path, accumulations: list[int]) -> list[dict[str, dict[str, int]]]:
    found = []
    for cell in CELLS[world.size]:
        for accumulation in accumulations:
            cfg = config(folder, tokens, world.size, accumulation, cell)
            strategy = build(world, cfg)
            # ZeRO-3 settles on its order of fetching in the first steps.
            before = 0 if cell == ["strategy=ddp"] else 2
            run_steps(world, cfg, strategy, 1, before)
            with Collectives() as count:
                run_steps(world, cfg, strategy, before + 1, before + 1)
            found.append({"calls": dict(count.calls), "bytes": dict(count.bytes)})
    return found


@pytest.mark.parametrize(("world_size", "accumulations"), [(2, [1, 2]), pytest.param(4, [1], marks=pytest.mark.long)])
def test_what_travels_is_within_one_percent_of_the_formula(
    tmp_path: Path, tokens: Path, world_size: int, accumulations: list[int]
) -> None:
    found = run_ranks(world_size, _counted, tmp_path, tokens, accumulations)[0]
    wrong = []
    cells = [(cell, accumulation) for cell in CELLS[world_size] for accumulation in accumulations]
    for (cell, accumulation), counted in zip(cells, found, strict=True):
        expected = traffic_per_update(
            config(tmp_path, tokens, world_size, accumulation, cell), world_size, accumulation
        )
        for kind in expected.payload.keys() | counted["bytes"].keys():
            ours = (expected.calls[kind], expected.payload[kind])
            theirs = (counted["calls"].get(kind, 0), counted["bytes"].get(kind, 0))
            if any(abs(a - b) > 0.01 * max(a, b) for a, b in zip(ours, theirs, strict=True)):
                wrong.append((cell, accumulation, kind, "formula", ours, "counted", theirs))
    assert not wrong, "\n".join(map(str, wrong))


def test_a_table_with_one_row_is_sharded_along_what_divides() -> None:
    assert shard_dimension(torch.empty(1, 1280, 3072, device="meta"), 512) == 2
    assert shard_dimension(torch.empty(1, 1280, 3072, device="meta"), 4) == 1
    assert shard_dimension(torch.empty(1, 7, 5, device="meta"), 4) == 0
    assert shard_dimension(torch.empty(30, 8, device="meta"), 4) == 0
