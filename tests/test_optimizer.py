from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny_config

from rear_scale.config import InputError, OptimConfig
from rear_scale.optim.adamw import make_adamw, set_step

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
    with pytest.raises(InputError, match="is not NVIDIA's but another one of that name"):
        updated("apex", torch.device("cpu"))
    monkeypatch.delitem(sys.modules, "apex")


def test_a_missing_apex_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(InputError, match="optim.backend=apex needs NVIDIA apex"):
        updated("apex", torch.device("cpu"))


def test_sharded_tensors_are_left_to_torch(tmp_path: Path, tokens: Path) -> None:
    with pytest.raises(InputError, match="optim.backend=deepspeed cannot update the sharded tensors of strategy=fsdp2"):
        tiny_config(tmp_path, tokens, "strategy=fsdp2", "optim.backend=deepspeed")
