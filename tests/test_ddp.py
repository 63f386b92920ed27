from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import run_ranks, tiny_config
from test_parallel import QUIET, build, everything, run_steps

from rear_scale.checkpoint.folder import open_checkpoint
from rear_scale.checkpoint.writer import save
from rear_scale.config import CheckpointConfig
from rear_scale.model import meta_model
from rear_scale.parallel.ddp import reduction_order
from rear_scale.world import World

STEPS = 3


def _resumed_at_each_step(world: World, folder: Path, tokens: Path) -> dict[int, bool]:
    """Whether a run of STEPS updates and its continuation from the checkpoint of a step have the same bits, by the step."""
    # Three micro-steps, of which the last one is reduced.
    cfg = tiny_config(folder, tokens, *QUIET, "strategy=ddp", "train.micro_batch_size=1")
    strategy = build(world, cfg)
    losses, paths = [], []
    for step in range(1, STEPS + 1):
        losses += run_steps(world, cfg, strategy, step, step)
        meta = {"optimizer_step": step, "config": {}}
        paths.append(save(folder / "checkpoints", step, strategy, world, meta, CheckpointConfig(keep_last=STEPS)))
    expected = everything(strategy)
    same = {}
    for step in range(1, STEPS):
        strategy = build(world, cfg, open_checkpoint(paths[step - 1]))
        same_losses = run_steps(world, cfg, strategy, step + 1, STEPS) == losses[step:]
        state = everything(strategy)
        same[step] = same_losses and all(np.array_equal(state[key], expected[key]) for key in expected)
    return same


def test_four_ranks_resume_with_the_bits_of_an_unbroken_run(tmp_path: Path, tokens: Path) -> None:
    assert run_ranks(4, _resumed_at_each_step, tmp_path, tokens) == [dict.fromkeys(range(1, STEPS), True)] * 4


@pytest.mark.parametrize(
    "overrides",
    [
        ["objective.heads.form=paper"],
        ["objective.heads.form=released", "objective.heads.positions=all"],
        ["model.architecture=alitok", "tokenizer.grid=[4,4]", "model.tie_codebook=both"],
        ["model.conditioning=in_context"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_no_block_waits_for_gradients_that_are_complete_later(
    tmp_path: Path, tokens: Path, overrides: list[str]
) -> None:
    """A gradient of a block or head waits for none but others of it. The few outside, in the end, wait for all."""
    model = meta_model(tiny_config(tmp_path, tokens, *QUIET, "model.depth=4", *overrides))
    names = {weight: name for name, weight in model.named_parameters()}
    found: list[str] = []
    for weight in names:
        weight.register_post_accumulate_grad_hook(lambda weight: found.append(names[weight]))
    context = torch.zeros(2, model.num_tokens, dtype=torch.int64, device="meta")
    torch.stack([value.sum() for value in model(context, context[:, 0]).values()]).sum().backward()
    order = [names[weight] for weight in reduction_order(model)]
    assert sorted(found) == sorted(order)
    inside = [name for name in order if unit(name)]
    assert order[: len(inside)] == inside
    for turn, name in enumerate(inside):
        late = {other for other in inside[:turn] if found.index(other) > found.index(name)}
        assert {unit(other) for other in late} <= {unit(name)}, (name, late)


def unit(name: str) -> str:
    """The block or head of a parameter; "" for all others."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] in ("blocks", "term_heads") else parts[0] if "align_mlp" in name else ""
