"""Compiled blocks under every strategy that offers them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers import run_alone, run_ranks, tiny_config
from test_parallel import QUIET, build, run_steps

from rear_scale.world import World

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on CPUs")

# More blocks than torch compiles versions of one function: all of them must share one.
DEPTH = 10
POLICIES = ("none", "every_n")
# Compiled kernels add up in another order. Measured: 2e-7.
BOUND = 1e-5


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that another, killed program has left half written are loaded all the same."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))


def _losses(
    world: World, folder: Path, tokens: Path, names: list[str], policies: tuple[str, ...], depth: int
) -> dict[str, dict[str, list[float]]]:
    """Per strategy: the losses of three steps without compilation, and with it under each policy."""
    found: dict[str, dict[str, list[float]]] = {}
    for name in names:
        found[name] = {}
        for form in ("eager", *policies):
            policy = "none" if form == "eager" else form
            cfg = tiny_config(
                folder, tokens, *QUIET, f"model.depth={depth}", f"strategy={name}", "train.global_batch_size=8",
                f"train.micro_batch_size={4 // world.size}", f"train.compile={form != 'eager'}",
                f"train.activation_checkpointing={policy}",
            )  # fmt: skip
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            found[name][form] = [loss for loss, _ in run_steps(world, cfg, build(world, cfg), 1, 3, lr=2e-3)]
            counters = torch._dynamo.utils.counters
            frames, breaks = counters["frames"], sum(counters["graph_break"].values())
            found[name][f"{form} graphs"] = [
                counters["stats"]["unique_graphs"],
                frames["total"] - frames["ok"] + breaks,
            ]
    return found


def _check(found: dict[str, dict[str, list[float]]], bound: float = BOUND) -> None:
    for name, losses in found.items():
        print(name, losses)
        for policy in losses.keys() & set(POLICIES):
            assert losses[policy] == pytest.approx(losses["eager"], rel=bound), (name, policy)
            graphs, broken = losses[f"{policy} graphs"]
            assert 1 <= graphs <= 2, (name, policy)
            assert broken == 0, (name, policy)
        assert losses["eager graphs"] == [0, 0]


@pytest.mark.long  # a minute and a half of the compiler; test_recompute.py has the captured graphs of one rank
def test_compiled_blocks_train_alike_under_fsdp2(tmp_path: Path, tokens: Path) -> None:
    _check(run_ranks(2, _losses, tmp_path, tokens, ["fsdp2"], ("none",), 2)[0])


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_compiled_blocks_train_alike_under_every_strategy(tmp_path: Path, tokens: Path) -> None:
    _check(run_alone(_losses, tmp_path, tokens, ["single"], POLICIES, DEPTH))
    for name in ("ddp", "fsdp2", "zero1", "zero2"):
        _check(run_ranks(2, _losses, tmp_path, tokens, [name], POLICIES, DEPTH)[0])
    _check(run_ranks(4, _losses, tmp_path, tokens, ["hsdp"], POLICIES, DEPTH)[0])


@pytest.mark.gpu
def test_compiled_blocks_train_alike_on_a_gpu(tmp_path: Path, tokens: Path) -> None:
    _check(run_alone(_losses, tmp_path, tokens, ["single"], ("none",), 2), bound=1e-4)
