"""What the training loop needs of any engine. All ranks call every method in the same order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from rear_scale.config import ExperimentConfig, Plan
from rear_scale.optim.groups import Rule, make_optimizer, rules_of
from rear_scale.world import World

# What a checkpoint holds of a parameter, as one float32 tensor of its shape each: "param" (the weight), the states that its
# rule names, and "ema".
StateName = str

# Gets the module to call, returns (loss of the micro-batch, its detached statistics).
Compute = Callable[[nn.Module], tuple[Tensor, Tensor]]


class Strategy(ABC):
    """An engine around a model whose weights are already in it."""

    model: nn.Module  # as it was handed to `build`: names are its own, the engine's wrappers aside
    rules: dict[str, Rule]  # by parameter name; set by `build`

    def __init__(self, cfg: ExperimentConfig, plan: Plan, world: World) -> None:
        self.cfg, self.plan, self.world = cfg, plan, world

    @property
    def state_names(self) -> tuple[StateName, ...]:
        """What there is of the parameters: weights, all states that their rules name, and the average of optim.ema_decay."""
        states = dict.fromkeys(state for rule in self.rules.values() for state in rule.states)
        return ("param", *states, *(("ema",) if self.cfg.optim.ema_decay else ()))

    def parameters_with(self, state_name: StateName) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter), as the engine has it, of every parameter of which there is a kind."""
        for name, weight in self.model.named_parameters():
            if state_name in ("param", "ema") or state_name in self.rules[name].states:
                yield name, weight

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
        """Clips to optim.grad_clip and updates, at `lr` times the multiplier of each parameter's rule. After `grad_norm`."""

    @abstractmethod
    def skip(self) -> None:
        """Drops the gradients of this update: weights, moments and their step count stay as they are. After `grad_norm`."""

    @abstractmethod
    def tensors(self, state_name: StateName) -> Iterator[tuple[str, Tensor]]:
        """Yields (name, full float32 tensor) of every parameter that has this kind, in one order on all ranks, on every
        rank."""

    @abstractmethod
    def load_tensors(self, state_name: StateName, read: Callable[[str], Tensor], optimizer_step: int) -> None:
        """Sets the kind of every parameter that has it from `read(name)` (full float32 tensors on the CPU)."""

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer over one group of parameters per rule; sets `rules`. Raises InputError (optim.groups.make_optimizer)."""
        self.rules = rules_of(model, self.cfg)
        return make_optimizer(model, self.rules, self.cfg.optim, self.world.device)
