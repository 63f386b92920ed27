"""What the training loop needs of any engine. All ranks call every method in the same order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from rear_scale.config import ExperimentConfig, Plan
from rear_scale.optim.adamw import make_adamw
from rear_scale.world import World

# One float32 value per weight and kind makes a checkpoint.
Kind = Literal["param", "exp_avg", "exp_avg_sq", "ema"]
KINDS: tuple[Kind, ...] = ("param", "exp_avg", "exp_avg_sq")

# Gets the module to call, returns (loss of the micro-batch, its detached statistics).
Compute = Callable[[nn.Module], tuple[Tensor, Tensor]]

# The published rule (train_utils.py of the released code): a name with one of these, or fewer than two dimensions,
# means no weight decay. "ln" takes the final AdaLN (adaln_before_head) out too.
_NO_DECAY = ("ln", "bias", "latent_tokens", "mask_token", "embedding", "norm", "gamma", "embed")


def decays(name: str, weight: Tensor, rule: str) -> bool:
    """Whether weight decay applies to a parameter: optim.decay names the rule."""
    return weight.ndim >= 2 and (rule == "matrices" or not any(fragment in name for fragment in _NO_DECAY))


class Strategy(ABC):
    """An engine around a model whose weights are already in it."""

    model: nn.Module  # as it was handed to `build`: names are its own, the engine's wrappers aside

    def __init__(self, cfg: ExperimentConfig, plan: Plan, world: World) -> None:
        self.cfg, self.plan, self.world = cfg, plan, world

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What there is of each weight: the moving average of optim.ema_decay comes on top."""
        return (*KINDS, "ema") if self.cfg.optim.ema_decay else KINDS

    @abstractmethod
    def build(self, model: nn.Module) -> None:
        """Takes over the model (float32, on the CPU, the same on all ranks) and makes its optimizer."""

    @abstractmethod
    def forward_backward(self, compute: Compute, micro_step: int) -> Tensor:
        """Runs one micro-step (from 0 to plan.accumulation - 1) and adds its gradients. Returns its statistics."""

    @abstractmethod
    def evaluate(self, compute: Compute) -> Tensor:
        """The statistics of a forward pass in evaluation mode, without gradients, in the precision of training."""

    @abstractmethod
    def grad_norm(self) -> Tensor:
        """The global norm (scalar) of the mean gradient, before clipping. After the last micro-step of an update."""

    @abstractmethod
    def step(self, lr: float) -> None:
        """Clips to optim.grad_clip and updates. After `grad_norm`."""

    @abstractmethod
    def skip(self) -> None:
        """Drops the gradients of this update: weights, moments and their step count stay as they are. After `grad_norm`."""

    @abstractmethod
    def tensors(self, kind: Kind) -> Iterator[tuple[str, Tensor]]:
        """Yields (name, full float32 tensor) of every parameter, in one order on all ranks, on every rank."""

    @abstractmethod
    def load_tensors(self, kind: Kind, read: Callable[[str], Tensor], optimizer_step: int) -> None:
        """Sets every parameter's value of a kind from `read(name)` (full float32 tensors on the CPU)."""

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """AdamW over the published groups: with weight decay first, without it second. Raises InputError (make_adamw)."""
        optim = self.cfg.optim
        named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
        groups = [
            {
                "params": [weight for name, weight in named if decays(name, weight, optim.decay) is decay],
                "weight_decay": rate,
            }
            for decay, rate in ((True, optim.weight_decay), (False, 0.0))
        ]
        return make_adamw(optim, groups, self.world.device)
