"""Muon for the matrices of the blocks, AdamW for everything else (optim.name=muon).

Muon (Keller Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) replaces the momentum of a matrix by a nearly
orthogonal matrix: a few Newton-Schulz iterations bring all its singular values close to 1. With gradient G, weight W and the
schedule's learning rate r times optim.muon.lr_ratio,

    M <- m M + (1 - m) G;   U = (1 - m) G + m M with Nesterov momentum, else M;   W <- (1 - r d) W - r s(rows, columns) NS(U)

where m is optim.muon.momentum and d the weight decay. These are the operations of torch.optim.Muon, in its order. The scale s is
one of optim.muon.lr_adjust: `match_rms_adamw`, 0.2 sqrt(max(rows, columns)), makes the mean square of an update that of AdamW
(Liu et al. 2025, arXiv:2502.16982, Eq. 4), so that learning rate and weight decay found for AdamW fit; `original` is
sqrt(max(1, rows / columns)).

Differences from torch.optim.Muon:

- A matrix that is several below each other is treated as these: queries, keys and values (3), and the six shifts, scales and
  gates of AdaLN. Keller Jordan's post finds that better for queries, keys and values.
- Newton-Schulz is computed in train.precision: in bf16 as in torch, and with the same bits; in fp32 in float32, because in
  bf16 the last bits of a gradient, which depend on the number of ranks, would make updates differ by about 1%.
- On several ranks, each matrix is computed by one (optim/whole_matrix.py).

Embeddings, positions, norms, biases, the output matrix and heads of the loss are trained by AdamW, as both sources do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from rear_scale.config import ExperimentConfig, OptimConfig
from rear_scale.optim.adamw import adamw_rule
from rear_scale.optim.groups import Groups, Rule, decays, register
from rear_scale.optim.whole_matrix import Matrix, WholeMatrix, WholeMatrixOptimizer

# Coefficients of the iteration, and the least norm that is divided by, as in torch.optim.Muon.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_EPSILON = 1e-7
STATE = "momentum"
# The number of matrices below each other, by the end of a parameter's name.
_PARTS = {".attn.qkv.weight": 3, ".adaLN_modulation.1.weight": 6}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class NewtonSchulz:
    """The transform of a matrix to a nearly orthogonal one: singular values between about 0.7 and 1.2, from those that are at
    least a thousandth of the norm."""

    steps: int
    dtype: torch.dtype

    def __call__(self, matrix: Tensor) -> Tensor:
        is_tall = matrix.shape[0] > matrix.shape[1]
        x = matrix.T if is_tall else matrix
        x = x / x.norm().clamp(min=_EPSILON)  # no singular value is above 1
        for _ in range(self.steps):
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
        return x.T if is_tall else x

    def flops(self, rows: int, columns: int) -> int:
        short, long = sorted((rows, columns))
        return self.steps * (4 * short * short * long + 2 * short**3)


class Muon(WholeMatrixOptimizer):
    """Muon over parameter groups with their rules. The gradients are overwritten."""

    def __init__(self, groups: Groups, optim: OptimConfig) -> None:
        super().__init__(groups, {"lr": 0.0})
        self.settings = optim.muon

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no engine passes a closure
        matrices: list[Matrix] = []
        for group in self.param_groups:
            matrices += self._averaged(group)
        for matrix, weight, direction in self.spread(matrices):
            weight.add_(direction, alpha=-matrix.group["lr"] * adjustment(self.settings.lr_adjust, *matrix.shape))

    def _averaged(self, group: dict[str, Any]) -> list[Matrix]:
        """The elementwise part of the update: momentum and weight decay. Returns the matrices to orthogonalize."""
        weights = [weight for weight in group["params"] if weight.grad is not None]
        if not weights:
            return []
        for weight in weights:
            if STATE not in self.state[weight]:
                self.state[weight][STATE] = torch.zeros_like(weight)
        momenta = [self.state[weight][STATE] for weight in weights]
        gradients: list[Tensor] = [weight.grad for weight in weights]
        mine = [[_local(tensor) for tensor in tensors] for tensors in (weights, gradients, momenta)]
        torch._foreach_lerp_(mine[2], mine[1], 1 - self.settings.momentum)
        if self.settings.nesterov:
            torch._foreach_lerp_(mine[1], mine[2], self.settings.momentum)
        torch._foreach_mul_(mine[0], 1 - group["lr"] * group["weight_decay"])
        values = gradients if self.settings.nesterov else momenta
        parts = range(group["rule"].whole_matrix.parts)
        return [
            Matrix(weight, value, part, group) for weight, value in zip(weights, values, strict=True) for part in parts
        ]


def adjustment(lr_adjust: str, rows: int, columns: int) -> float:
    """The factor of the learning rate for a matrix, by optim.muon.lr_adjust."""
    if lr_adjust == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))


def muon_rule(name: str, weight: Tensor, cfg: ExperimentConfig) -> Rule:
    """The rule of a parameter for optim.name=muon: Muon for the matrices of the blocks, else AdamW's."""
    if not name.startswith("blocks.") or weight.ndim != 2:
        return adamw_rule(name, weight, cfg)
    optim = cfg.optim
    parts = next((parts for end, parts in _PARTS.items() if name.endswith(end)), 1)
    transform = NewtonSchulz(optim.muon.newton_schulz_steps, _DTYPES[cfg.train.precision])
    decay = optim.weight_decay if decays(name, weight, optim.decay_parameters) else 0.0
    return Rule(
        f"muon_{parts}" + ("" if decay else "_without_decay"),
        make_muon,
        (STATE,),
        weight_decay=decay,
        lr_multiplier=optim.muon.lr_ratio,
        # Entries of an update as large as AdamW's at any width, or a spectral norm that no width changes
        width_exponent=0.5 if optim.muon.lr_adjust == "match_rms_adamw" else 0.0,
        whole_matrix=WholeMatrix(transform, parts),
    )


def make_muon(optim: OptimConfig, groups: Groups, device: torch.device) -> Muon:
    """The optimizer over parameter groups with their rules. The learning rate is set later."""
    return Muon(groups, optim)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


register("muon", muon_rule, whole_matrices=True)
