from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from helpers import run_alone, run_ranks, tiny_config
from test_parallel import QUIET, build, run_steps
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from rear_scale.checkpoint.folder import open_checkpoint
from rear_scale.checkpoint.writer import save
from rear_scale.config import (
    CheckpointConfig,
    ExperimentConfig,
    InputError,
    OptimConfig,
    check_resumable,
    load,
    to_dict,
)
from rear_scale.config.schema import MuonConfig
from rear_scale.model import meta_model
from rear_scale.optim.groups import Rule, rules_of, states_per_weight
from rear_scale.optim.muon import Muon, NewtonSchulz, make_muon
from rear_scale.optim.whole_matrix import Spread, WholeMatrix, alone, owners
from rear_scale.parallel.communication import traffic_per_update
from rear_scale.parallel.counting import Collectives
from rear_scale.parallel.memory import checkpoint_bytes, memory_per_rank, shard_dimension
from rear_scale.parallel.whole_matrices import Replicated, Sharded, update_flops
from rear_scale.scaling.command import make_plan
from rear_scale.scaling.output import as_dict, as_text
from rear_scale.scaling.simulate import beside_formula
from rear_scale.world import World

CPU = torch.device("cpu")
SHAPES = ((12, 7), (7, 12), (9, 9), (1, 8))
PARTS = 3  # of the first and the third
QUICK = (*QUIET, "optim.name=muon", "model.mlp_width=50")  # 50 rows are not divided evenly among 4 ranks
STEPS = 6


def optimizer_of(weights: list[torch.Tensor], dtype: torch.dtype, settings: MuonConfig, parts: int = 1) -> Muon:
    groups = []
    for number in {1, parts}:
        own = weights if parts == 1 else weights[::2] if number == parts else weights[1::2]
        whole = WholeMatrix(NewtonSchulz(settings.newton_schulz_steps, dtype), number)
        rule = Rule("muon", make_muon, ("momentum",), 0.3, whole_matrix=whole)
        groups.append({"params": own, "weight_decay": 0.3, "rule": rule})
    return make_muon(OptimConfig(muon=settings), groups, CPU)


def updated(make: Callable[[list[Any]], torch.optim.Optimizer], spread: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Matrices after updates with fixed gradients, each as `spread` makes it."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(spread(torch.randn(shape, generator=generator))) for shape in SHAPES]
    optimizer = make(weights)
    for step in range(STEPS):
        for weight in weights:
            weight.grad = spread(torch.randn(weight.shape, generator=generator))
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (step + 1) / STEPS
        optimizer.step()
    return [weight.detach() for weight in weights]


@pytest.mark.parametrize(
    "settings",
    [MuonConfig(), MuonConfig(lr_adjust="original", nesterov=False, momentum=0.8, newton_schulz_steps=3)],
)
def test_updates_are_those_of_torch(settings: MuonConfig) -> None:
    def torchs(weights: list[Any]) -> torch.optim.Optimizer:
        return torch.optim.Muon(
            weights, weight_decay=0.3, momentum=settings.momentum, nesterov=settings.nesterov,
            ns_steps=settings.newton_schulz_steps, adjust_lr_fn=settings.lr_adjust,
        )  # fmt: skip

    expected = updated(torchs, torch.clone)
    for dtype, bound in ((torch.bfloat16, 0.0), (torch.float32, 1e-2)):
        found = updated(lambda weights, dtype=dtype: optimizer_of(weights, dtype, settings), torch.clone)
        for value, reference in zip(found, expected, strict=True):
            assert (value - reference).abs().max() <= bound, dtype


def test_an_update_is_orthogonal_whatever_the_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((16, 16), (16, 48), (48, 16)):
        found = NewtonSchulz(5, torch.float32)(1e-9 * torch.randn(rows, columns, generator=generator) ** 3 * 1e4)
        values = torch.linalg.svdvals(found)
        assert values.min() > 0.3, (rows, columns)
        assert values.max() < 1.3, (rows, columns)
    assert not NewtonSchulz(5, torch.bfloat16)(torch.zeros(3, 4)).any()


def test_work_is_balanced_and_in_one_order() -> None:
    flops = [18, 6, 36, 18, 6, 18, 6, 36, 18, 6]
    assert owners(flops, 1) == ([2, 7, 0, 3, 5, 8, 1, 4, 6, 9],)
    found = owners(flops, 3)
    assert sorted(sum(found, [])) == list(range(10))
    assert [sum(flops[index] for index in own) for own in found] == [60, 54, 54]
    assert owners([5], 3) == ([0], [], [])


def _bits(world: World, mesh_shape: tuple[int, ...]) -> tuple[float, list[int]]:
    """How far updates of shards and of copies are from those of whole matrices, and how many matrices this rank transformed."""
    mesh = init_device_mesh("cpu", mesh_shape)
    replicated = [Replicate()] * (mesh.ndim - 1)
    transformed: list[int] = []
    transform = NewtonSchulz.__call__

    def counted(self: NewtonSchulz, matrix: Tensor) -> Tensor:
        transformed[-1] += 1
        return transform(self, matrix)

    def sharded(value: Tensor) -> Tensor:
        return distribute_tensor(value, mesh, [*replicated, Shard(shard_dimension(value, mesh_shape[-1]))])

    def make(spread: Spread) -> Callable[[list[Any]], Muon]:
        def optimizer(weights: list[Any]) -> Muon:
            made = optimizer_of(weights, torch.float32, MuonConfig(), PARTS)
            made.spread = spread
            return made

        return optimizer

    far = 0.0
    whole = updated(make(alone), torch.clone)
    with patch.object(NewtonSchulz, "__call__", counted):
        for spread, placed in ((Sharded(mesh), sharded), (Replicated(world.rank, world.size), torch.clone)):
            transformed.append(0)
            found = updated(make(spread), placed)
            full = [value.full_tensor() if isinstance(value, DTensor) else value for value in found]
            far = max(far, *((a - b).abs().max().item() for a, b in zip(whole, full, strict=True)))
    return far, transformed


def check_bits(found: list[tuple[float, list[int]]]) -> None:
    assert [far for far, _ in found] == [0.0] * len(found)
    # Three parts of the first and third weight, the second and the fourth: each once in an update, not once per rank.
    for counts in zip(*(counts for _, counts in found), strict=True):
        assert sum(counts) == 8 * STEPS
        assert min(counts) >= STEPS


def _bits_and_runs(world: World, folder: Path, tokens: Path) -> tuple[tuple[float, list[int]], dict[str, Any]]:
    runs = {name: _train_and_save(world, config(folder, tokens, name), folder / name) for name in ("ddp", "fsdp2")}
    return _bits(world, (2,)), runs


def config(folder: Path, tokens: Path, strategy: str, *overrides: str) -> ExperimentConfig:
    return tiny_config(folder, tokens, *QUICK, f"strategy={strategy}", *overrides)


def _train_and_save(world: World, cfg: ExperimentConfig, root: Path, steps: int = STEPS) -> dict[str, Any]:
    """The steps with a checkpoint in the middle, bytes of optimizer states and collectives of a step."""
    strategy = build(world, cfg)
    half = steps // 2
    losses = run_steps(world, cfg, strategy, 1, half, lr=5e-3)
    path = save(root, half, strategy, world, {"optimizer_step": half, "config": {}}, CheckpointConfig())
    with Collectives() as count:
        losses += run_steps(world, cfg, strategy, half + 1, half + 1, lr=5e-3)
    losses += run_steps(world, cfg, strategy, half + 2, steps, lr=5e-3)
    states = [value for state in strategy.optimizer.state.values() for key, value in state.items() if key != "step"]
    kept = sum((value.to_local() if isinstance(value, DTensor) else value).nbytes for value in states)
    return {"losses": losses, "path": path, "kept": kept, "sent": dict(count.bytes)}


def _resume(world: World, cfg: ExperimentConfig, path: Path, steps: int = STEPS) -> list[tuple[float, float]]:
    return run_steps(world, cfg, build(world, cfg, open_checkpoint(path)), steps // 2 + 1, steps, lr=5e-3)


def near(losses: list[tuple[float, float]]) -> Any:
    return pytest.approx(np.array(losses), rel=1e-5)


def test_ranks_share_the_work_and_train_as_one_does(tmp_path: Path, tokens: Path) -> None:
    """What is saved continues under every strategy and number of ranks in the test below, which takes longer."""
    cfg = config(tmp_path, tokens, "single")
    alone = run_alone(_train_and_save, cfg, tmp_path / "single")
    assert run_alone(_resume, cfg, alone["path"]) == alone["losses"][STEPS // 2 :]
    bits, runs = zip(*run_ranks(2, _bits_and_runs, tmp_path, tokens), strict=True)
    check_bits(bits)
    model = meta_model(cfg)
    for name, run in {"single": alone, **runs[0]}.items():
        cfg = config(tmp_path, tokens, name)
        ranks = 1 if name == "single" else 2
        assert np.array(run["losses"]) == near(alone["losses"]), name
        assert memory_per_rank(cfg, ranks, 1).optimizer == pytest.approx(run["kept"], rel=0.05), name
        traffic = traffic_per_update(cfg, ranks, 1)
        assert dict(traffic.payload) == pytest.approx(run["sent"], rel=0.15), name
        checkpoint = open_checkpoint(run["path"])
        size = sum(file["size"] for file in checkpoint.meta["files"])
        assert checkpoint_bytes(model, cfg) == pytest.approx(size, rel=0.15), name
        states = {key.rpartition("/blocks.0.mlp.fc1.weight")[0] for key in checkpoint.meta["index"]}
        assert states - {""} == {"param", "momentum"}, name


Cells = tuple[tuple[str, ...], ...]  # strategies with further overrides
# By the number of ranks.
CELLS: dict[int, Cells] = {
    1: (("single",), ("fsdp2",)),
    2: (("ddp",), ("fsdp2",), ("fsdp2", "train.micro_batch_size=2")),
    4: (("ddp",), ("fsdp2",), ("hsdp",)),
}
LONG = 20
BF16_BOUND = (
    2e-3  # of losses in bf16 against those in float32, as for AdamW (test_strategy_matrix.py); measured: 7.3e-5
)


def _all_cells(world: World, folder: Path, tokens: Path, cells: Cells) -> list[dict[str, Any]]:
    found = []
    for number, cell in enumerate(cells):
        root = folder / f"{world.size}-{number}"
        size = f"train.micro_batch_size={12 // world.size}"
        cfg = config(folder, tokens, cell[0], size, *cell[1:])
        half = config(folder, tokens, cell[0], size, *cell[1:], "train.precision=bf16")
        strategy = build(world, half)
        found.append(
            {
                **_train_and_save(world, cfg, root, LONG),
                "cell": (world.size, *cell),
                "bf16": run_steps(world, half, strategy, 1, STEPS, lr=5e-3),
            }
        )
    return found


def _resume_all(
    world: World, folder: Path, tokens: Path, cells: Cells, paths: list[Path]
) -> dict[Any, list[tuple[float, float]]]:
    found = {}
    for cell in cells:
        cfg = config(folder, tokens, cell[0], f"train.micro_batch_size={12 // world.size}", *cell[1:])
        for path in paths:
            found[(world.size, *cell), path] = _resume(world, cfg, path, LONG)
    return found


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_every_strategy_and_number_of_ranks_has_one_trajectory(tmp_path: Path, tokens: Path) -> None:
    runs = [run for size in CELLS for run in run_ranks(size, _all_cells, tmp_path, tokens, CELLS[size])[0]]
    expected = runs[0]["losses"]
    worst = {run["cell"]: np.abs(np.array(run["losses"]) / expected - 1).max() for run in runs}
    worst_bf16 = {
        run["cell"]: np.abs(np.array(run["bf16"])[:, 0] / np.array(expected)[:STEPS, 0] - 1).max() for run in runs
    }
    paths = {run["path"]: run for run in runs}
    for size in CELLS:
        for (cell, path), losses in run_ranks(size, _resume_all, tmp_path, tokens, CELLS[size], list(paths))[0].items():
            run = paths[path]
            if run["cell"] == cell:
                assert losses == run["losses"][LONG // 2 :], cell
            far = np.abs(np.array(losses) / expected[LONG // 2 :] - 1).max()
            worst[cell, run["cell"]] = far
    for shape in ((4,), (2, 2), (4, 1)):
        check_bits(run_ranks(4, _bits, shape))
    for what, values in (("losses and norms", worst), ("losses in bf16", worst_bf16)):
        print(f"largest relative differences of {what}:", {key: f"{value:.1e}" for key, value in values.items()})
    assert max(worst.values()) <= 1e-5
    assert max(worst_bf16.values()) <= BF16_BOUND


def test_strategies_without_whole_matrices_refuse(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("zero1", "zero2", "zero3"):
        with pytest.raises(
            InputError,
            match=f"optim.name=muon is not offered with strategy={name}: DeepSpeed hands its optimizer flat pieces of many .*Use "
            "strategy=fsdp2, hsdp, single or ddp, or optim.name=adamw",
        ):
            config(tmp_path, tokens, name)
    # Also where validation does not know of it: an optimizer of somebody's own, registered without saying so.
    monkeypatch.setattr("rear_scale.config.validate.WHOLE_MATRIX_OPTIMIZERS", set())
    cfg = config(tmp_path, tokens, "single")
    cfg = replace(cfg, strategy=replace(cfg.strategy, name="zero1"))
    with pytest.raises(InputError, match="optim.name=muon is not offered with strategy=zero1: DeepSpeed"):
        run_alone(build, cfg)
    monkeypatch.undo()
    cfg = config(tmp_path, tokens, "single")
    for other in ("optim.name=adamw", "optim.muon.momentum=0.9"):
        with pytest.raises(InputError, match=f"{other}, but step_2 was trained with"):
            check_resumable(config(tmp_path, tokens, "single", other), to_dict(cfg), "step_2")
    with pytest.raises(InputError, match=r"optim.muon.momentum=1.* must lie in \[0, 1\)"):
        config(tmp_path, tokens, "single", "optim.muon.momentum=1.0")


def test_only_matrices_of_blocks_have_one_state(tmp_path: Path, tokens: Path) -> None:
    cfg = config(tmp_path, tokens, "single", "optim.muon.lr_ratio=3", "optim.weight_decay=0.5")
    model = meta_model(cfg)
    rules = rules_of(model, cfg)
    parts = {name: rule.whole_matrix.parts for name, rule in rules.items() if rule.whole_matrix is not None}
    block = {"attn.qkv": 3, "attn.proj": 1, "mlp.fc1": 1, "mlp.fc2": 1, "adaLN_modulation.1": 6}
    assert parts == {f"blocks.{number}.{name}.weight": count for number in range(2) for name, count in block.items()}
    for name, rule in rules.items():
        assert rule.states == (("momentum",) if name in parts else ("exp_avg", "exp_avg_sq")), name
        assert rule.lr_multiplier == (3 if name in parts else 1), name
    named = dict(model.named_parameters())
    size = sum(named[name].numel() for name in parts)
    assert states_per_weight(model, cfg) == pytest.approx(2 - size / sum(weight.numel() for weight in named.values()))
    for lr_adjust, power in (("match_rms_adamw", 0.5), ("original", 0.0)):
        wide = config(
            tmp_path,
            tokens,
            "single",
            f"optim.muon.lr_adjust={lr_adjust}",
            "optim.parametrization=mup",
            "optim.base_width=8",
        )
        rates = {rule.lr_multiplier for rule in rules_of(model, wide).values() if rule.whole_matrix is not None}
        assert rates == {(32 / 8) ** -power}, lr_adjust
    # A planner's time of an update has the work of Newton-Schulz in it, shared among the ranks.
    work = [update_flops(cfg, model, ranks) for ranks in (1, 2, 4)]
    assert work[0] == sum(
        parts[name] * rules[name].whole_matrix.transform.flops(weight.shape[0] // parts[name], weight.shape[1])
        for name, weight in named.items()
        if name in parts
    )
    assert work[0] / 2 <= work[1] <= 1.05 * work[0] / 2
    assert work[0] / 4 <= work[2] <= 1.2 * work[0] / 4
    assert update_flops(replace(cfg, optim=replace(cfg.optim, name="adamw")), model, 4) == 0


@pytest.mark.parametrize("name", ["fsdp2", pytest.param("hsdp", marks=pytest.mark.long)])
def test_a_simulated_world_holds_and_sends_what_the_formulas_say(tmp_path: Path, tokens: Path, name: str) -> None:
    # Large matrices beside the embeddings, because this is about them.
    cfg = config(tmp_path, tokens, name, "model.width=64", "train.micro_batch_size=1", "train.global_batch_size=8")
    found = beside_formula(cfg, 8)
    for part in ("weights", "gradients", "optimizer"):
        assert found["memory_gib"][part] == pytest.approx(found["formula_memory_gib"][part], rel=0.15), part
    for kind, sent in found["collectives"].items():
        assert sent["gib"] == pytest.approx(sent["formula_gib"], rel=0.15), kind
    assert found["collectives"]["all_to_all"]["calls"] == found["collectives"]["all_to_all"]["formula_calls"] > 0


def test_a_plan_names_the_strategies_that_refuse() -> None:
    overrides = ["strategy=fsdp2", "optim.name=muon", "cluster.gpus=8"]
    report = make_plan("rear_s.yaml", load("rear_s.yaml", overrides), overrides)
    assert {choice.name for choice in report.choices} == {"ddp", "fsdp2"}
    assert as_dict(report)["refused"].keys() == {"zero1", "zero2", "zero3"}
    assert (
        "\nnot offered with optim.name=muon: zero1, zero2, zero3 (DeepSpeed hands its optimizer flat pieces"
        in as_text(report)
    )
    assert report.command.startswith("torchrun")
    adamw = load("rear_s.yaml", ["strategy=fsdp2", "cluster.gpus=8"])
    model = meta_model(adamw)
    muon = report.best.cfg
    # One state less for the blocks' matrices, which are nearly all of this model: 3 to 2 tensors in a checkpoint.
    assert 0.66 < checkpoint_bytes(model, muon) / checkpoint_bytes(model, adamw) < 0.8
    assert as_dict(make_plan("rear_s.yaml", adamw, []))["refused"] == {}
