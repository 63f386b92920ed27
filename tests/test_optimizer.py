from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import run_alone, run_ranks, tiny_config
from test_parallel import QUIET, build, run_steps

from rear_scale.checkpoint.folder import open_checkpoint
from rear_scale.checkpoint.writer import save
from rear_scale.config import ExperimentConfig, InputError, OptimConfig, check_resumable, to_dict
from rear_scale.config.devices import devices
from rear_scale.config.schema import OPTIMIZERS
from rear_scale.model import meta_model
from rear_scale.optim.adamw import adamw_rule, make_adamw, set_step
from rear_scale.optim.groups import Groups, Rule, register
from rear_scale.parallel.memory import memory_per_rank
from rear_scale.parallel.strategy import Strategy
from rear_scale.scaling.cluster import cluster_of
from rear_scale.scaling.cost import step_time
from rear_scale.world import World

CPU = torch.device("cpu")
STEPS = 20


def updated(backend: str, device: torch.device, resume_at: int | None = None) -> list[torch.Tensor]:
    """Weights after 20 updates with fixed gradients, in two groups with and without weight decay."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(33, 7), (65,), (4, 3, 5)]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(STEPS)]

    def make(weights: list[torch.Tensor]) -> torch.optim.Optimizer:
        groups = [{"params": weights[:2], "weight_decay": 0.3}, {"params": weights[2:], "weight_decay": 0.0}]
        return make_adamw(OptimConfig(backend=backend), groups, device)

    weights = [torch.nn.Parameter(value.to(device)) for value in start]
    optimizer = make(weights)
    for step, values in enumerate(gradients):
        if step == resume_at:
            # As a checkpoint does it: weights and moments into a new optimizer, and the number of updates.
            moments = [
                {kind: optimizer.state[weight][kind] for kind in ("exp_avg", "exp_avg_sq")} for weight in weights
            ]
            optimizer = make(weights)
            for weight, state in zip(weights, moments, strict=True):
                optimizer.state[weight].update(state)
                set_step(optimizer, weight, step)
        for weight, gradient in zip(weights, values, strict=True):
            weight.grad = gradient.to(device)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (step + 1) / STEPS
        optimizer.step()
    return [weight.detach().cpu() for weight in weights]


def check_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for value, reference in zip(found, expected, strict=True):
        assert (value - reference).abs().max() <= 2e-6


def test_the_fused_backend_gives_the_same_updates_on_a_cpu() -> None:
    check_same(updated("torch_fused", CPU), updated("torch_foreach", CPU))
    check_same(updated("torch_fused", CPU, resume_at=9), updated("torch_foreach", CPU))


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_deepspeed_gives_the_same_updates_on_a_cpu() -> None:
    """Compiles its FusedAdam first, which takes a minute."""
    if shutil.which("c++") is None:
        pytest.skip("DeepSpeed's FusedAdam is compiled when first used, and there is no C++ compiler here")
    found = updated("deepspeed", CPU)
    check_same(found, updated("torch_foreach", CPU))
    check_same(updated("deepspeed", CPU, resume_at=9), found)


def test_a_resumed_optimizer_continues_bitwise() -> None:
    for value, reference in zip(updated("torch_foreach", CPU, 9), updated("torch_foreach", CPU), strict=True):
        assert torch.equal(value, reference)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch_foreach", "deepspeed", "apex"])
def test_backends_give_the_same_updates_on_a_gpu(backend: str) -> None:
    if backend == "apex":
        pytest.importorskip("apex.optimizers", reason="NVIDIA apex is not installed")
    device = torch.device("cuda")
    check_same(updated(backend, device), updated("torch_fused", device))
    check_same(updated(backend, device, resume_at=9), updated("torch_fused", device))


def test_another_package_of_the_name_apex_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").write_text("# a toolkit for web sites\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    with pytest.raises(InputError, match="is not NVIDIA's but another package of that name"):
        updated("apex", torch.device("cpu"))
    monkeypatch.delitem(sys.modules, "apex")


def test_a_missing_apex_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(InputError, match="optim.backend=apex needs NVIDIA apex"):
        updated("apex", torch.device("cpu"))


def test_sharded_tensors_are_left_to_torch(tmp_path: Path, tokens: Path) -> None:
    with pytest.raises(InputError, match="optim.backend=deepspeed cannot update the sharded tensors of strategy=fsdp2"):
        tiny_config(tmp_path, tokens, "strategy=fsdp2", "optim.backend=deepspeed")


def make_sgd(optim: OptimConfig, groups: Groups, device: torch.device) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9)


def mixed_rule(name: str, weight: torch.Tensor, cfg: ExperimentConfig) -> Rule:
    """SGD with momentum, which has one state, at 20 times the rate for the matrices of the blocks; AdamW for the others."""
    if name.startswith("blocks.") and weight.ndim == 2:
        return Rule("sgd", make_sgd, ("momentum_buffer",), weight_decay=cfg.optim.weight_decay, lr_multiplier=20.0)
    return adamw_rule(name, weight, cfg)


@pytest.fixture
def mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """optim.name=mixed, while a test runs."""
    monkeypatch.setitem(OPTIMIZERS, "mixed", __name__)
    register("mixed", mixed_rule)


def mixed_config(folder: Path, tokens: Path, strategy: str, *overrides: str) -> ExperimentConfig:
    return tiny_config(folder, tokens, *QUIET, "optim.name=mixed", f"strategy={strategy}", *overrides)


def _train_and_save(world: World, cfg: ExperimentConfig, root: Path) -> tuple[list, Path]:
    """Four steps with a checkpoint in the middle."""
    strategy = build(world, cfg)
    results = run_steps(world, cfg, strategy, 1, 2)
    path = save(root, 2, strategy, world, {"optimizer_step": 2, "config": {}}, cfg.checkpoint)
    return results + run_steps(world, cfg, strategy, 3, 4), path


def _resume(world: World, cfg: ExperimentConfig, path: Path) -> list:
    return run_steps(world, cfg, build(world, cfg, open_checkpoint(path)), 3, 4)


def _mixed(world: World, folder: Path, tokens: Path, saved: Path, names: tuple[str, ...]) -> dict[str, list]:
    """Per strategy: four steps, the last two of them again after a resume, and after a resume from what another saved."""
    register("mixed", mixed_rule)
    found = {}
    for name in names:
        cfg = mixed_config(folder, tokens, name)
        straight, own = _train_and_save(world, cfg, folder / name)
        found[name] = [straight, _resume(world, cfg, own), _resume(world, cfg, saved)]
        saved = own
    return found


def test_a_rule_of_its_own_trains_and_resumes_under_every_strategy(tmp_path: Path, tokens: Path, mixed: None) -> None:
    cfg = mixed_config(tmp_path, tokens, "single")
    expected, saved = run_alone(_train_and_save, cfg, tmp_path / "single")
    assert run_alone(_resume, cfg, saved) == expected[2:]
    found = run_ranks(2, _mixed, tmp_path, tokens, saved, ("ddp", "fsdp2", "zero1", "zero3"))[0]
    for name, (straight, resumed, crossed) in found.items():
        assert np.array(straight) == pytest.approx(np.array(expected), rel=1e-5), name
        assert resumed == straight[2:], name
        assert np.array(crossed) == pytest.approx(np.array(expected[2:]), rel=1e-5), name
        keys = open_checkpoint(tmp_path / name / "step_00000002").meta["index"]
        states = {key.split("/")[0] for key in keys if key.endswith("/blocks.0.mlp.fc1.weight")}
        assert states == {"param", "momentum_buffer"}, name
        assert {key.split("/")[0] for key in keys if key.endswith("/pos_embed")} == {
            "param",
            "exp_avg",
            "exp_avg_sq",
        }, name


def test_a_rule_has_its_own_rate_and_decay_and_the_others_keep_theirs(
    tmp_path: Path, tokens: Path, mixed: None
) -> None:
    cfg = mixed_config(tmp_path, tokens, "single", "optim.weight_decay=0.5")

    def updated_weights(world: World) -> tuple[Strategy, dict[str, torch.Tensor]]:
        strategy = build(world, cfg)
        before = {name: weight.detach().clone() for name, weight in strategy.model.named_parameters()}
        for weight in strategy.model.parameters():
            weight.grad = torch.full_like(weight, 1e-4)
        assert strategy.grad_norm() < cfg.optim.grad_clip
        strategy.step(0.01)
        return strategy, before

    strategy, before = run_alone(updated_weights)
    for name, weight in strategy.model.named_parameters():
        if strategy.rules[name].name == "sgd":
            change = -0.2 * (1e-4 + 0.5 * before[name])
        else:  # the first update of AdamW is as large as the rate
            change = -0.01 * (1 + strategy.rules[name].weight_decay * before[name])
        assert torch.allclose(weight - before[name], change, rtol=1e-3, atol=1e-6), name
    assert {rule.weight_decay for rule in strategy.rules.values() if rule.name != "sgd"} == {0.0, 0.5}
    # The planner and the check of memory count one state of these weights, not two.
    weights = sum(value.nbytes for _, value in strategy.tensors("param"))
    kept = sum(value.nbytes for kind in strategy.state_names[1:] for _, value in strategy.tensors(kind))
    assert memory_per_rank(cfg, 1, 1).optimizer == kept
    cluster = cluster_of(1, *next(iter(devices().items())))
    adamw = replace(cfg, optim=replace(cfg.optim, name="adamw"))
    times = [step_time(one, cluster, 1, meta_model(one)).update_s for one in (cfg, adamw)]
    assert times[0] / times[1] == pytest.approx((18 + 8 * kept / weights) / 34)


def test_states_of_other_rules_are_refused_on_resume(tmp_path: Path, tokens: Path, mixed: None) -> None:
    cfg = tiny_config(tmp_path, tokens, *QUIET, "strategy=single")
    _, saved = run_alone(_train_and_save, cfg, tmp_path / "adamw")
    other = mixed_config(tmp_path, tokens, "single")
    with pytest.raises(
        InputError, match=r"exp_avg and exp_avg_sq of .*, but optim.name=mixed updates it with momentum_buffer"
    ):
        run_alone(_resume, other, saved)
    before_the_field = to_dict(cfg)
    del before_the_field["optim"]["name"]
    check_resumable(cfg, before_the_field, "step_2")
    with pytest.raises(InputError, match="optim.name=mixed, but step_2 was trained with optim.name=adamw"):
        check_resumable(other, before_the_field, "step_2")


def test_an_unknown_rule_is_named_with_those_that_there_are(tmp_path: Path, tokens: Path, mixed: None) -> None:
    with pytest.raises(InputError, match="optim.name=lion .*adamw, muon, mixed"):
        tiny_config(tmp_path, tokens, "optim.name=lion")
    with pytest.raises(ValueError, match="'param' is not allowed as the name of a state"):
        Rule("mine", make_sgd, ("param",))
