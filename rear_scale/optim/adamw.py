"""Implementations of AdamW: torch's (fused or foreach), DeepSpeed's and NVIDIA apex's. Their updates agree up to rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rear_scale.config import ExperimentConfig, InputError, OptimConfig
from rear_scale.optim.groups import Groups, Rule, decays, register
from rear_scale.places import how_to_install

STATES = ("exp_avg", "exp_avg_sq")


def adamw_rule(name: str, weight: Tensor, cfg: ExperimentConfig) -> Rule:
    """The rule of a parameter for optim.name=adamw: AdamW in the two published groups, with and without weight decay."""
    optim = cfg.optim
    if decays(name, weight, optim.decay_parameters):
        return Rule("adamw", make_adamw, STATES, weight_decay=optim.weight_decay, set_step=set_step)
    return Rule("adamw_without_decay", make_adamw, STATES, set_step=set_step)


def make_adamw(optim: OptimConfig, groups: Groups, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of optim.backend over parameter groups with their own weight decay. The learning rate is set later.

    Raises InputError when the backend is not installed, cannot be compiled, or does not work on this device.
    """
    first, second = optim.betas
    common: dict[str, Any] = {"lr": 0.0, "betas": (first, second), "eps": 1e-8}
    backend = optim.backend
    if backend == "auto":
        backend = "torch_fused" if device.type == "cuda" else "torch_foreach"
    if backend in ("torch_fused", "torch_foreach"):
        return torch.optim.AdamW(groups, **common, fused=backend == "torch_fused", foreach=backend == "torch_foreach")
    make = _deepspeed_adam() if backend == "deepspeed" else _apex_adam(device)
    return make(groups, **common, adam_w_mode=True)


def set_step(optimizer: torch.optim.Optimizer, weight: Tensor, step: int) -> None:
    """Sets the number of updates that a weight has had, where this type of optimizer stores it."""
    state = optimizer.state[weight]
    if isinstance(optimizer, torch.optim.AdamW):
        # The fused kernel needs the count on the device.
        state["step"] = torch.tensor(float(step), device=weight.device if optimizer.defaults["fused"] else "cpu")
        return
    state["step"] = step  # DeepSpeed
    for group in optimizer.param_groups:
        group["step"] = step  # apex


def _deepspeed_adam() -> Any:
    try:
        from rear_scale.optim.deepspeed_adam import fused_adam
    except ImportError as error:
        raise InputError(
            f"optim.backend=deepspeed needs DeepSpeed ({error}). Install it: {how_to_install('deepspeed')}, or use "
            "optim.backend=auto"
        ) from None
    return fused_adam()


def _apex_adam(device: torch.device) -> Any:
    try:
        import apex
    except ImportError:
        raise InputError(
            "optim.backend=apex needs NVIDIA apex, which is built from its own repository (see docs/training.md). "
            "Use optim.backend=auto, whose fused kernel does the same"
        ) from None
    if not hasattr(apex, "optimizers"):
        try:
            import apex.optimizers  # noqa: F401
        except ImportError:
            raise InputError(
                f"optim.backend=apex: the package apex in {getattr(apex, '__path__', ['?'])[0]} is not NVIDIA's but another "
                "package of that name on PyPI. Uninstall it and build NVIDIA's (see docs/training.md), or use optim.backend=auto"
            ) from None
    if device.type != "cuda":
        raise InputError("optim.backend=apex works on CUDA devices only. Use optim.backend=auto")
    return apex.optimizers.FusedAdam


register("adamw", adamw_rule)
