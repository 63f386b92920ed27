"""The interface between the training loop and any engine. All ranks must call every method in the same order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from rear_scale.config import ExperimentConfig, InputError, Plan
from rear_scale.optim.groups import Rule, make_optimizer, rules_of
from rear_scale.optim.posthoc_ema import averages, is_average
from rear_scale.parallel import facts
from rear_scale.world import World

# A state of a parameter that checkpoints store, as one float32 tensor of the parameter's shape: "param" (the weight itself), an
# optimizer state that the parameter's rule names ("exp_avg", ...), or an average of the weights (optim.posthoc_ema.averages).
StateName = str

# A function of the module to call, which returns (loss of the micro-batch, its detached statistics).
Compute = Callable[[nn.Module], tuple[Tensor, Tensor]]


class Strategy(ABC):
    """An engine that trains a model. The model's weights must be loaded before `build`, because engines copy them."""

    model: nn.Module  # the module given to `build`; its parameter names have no prefixes of the engine's wrappers
    rules: dict[str, Rule]  # by parameter name; set by `build`
    updates = 0  # applied so far; the optimizer_step of the checkpoint that was loaded, and those after it

    def __init__(self, cfg: ExperimentConfig, plan: Plan, world: World) -> None:
        self.cfg, self.plan, self.world = cfg, plan, world

    @property
    def state_names(self) -> tuple[StateName, ...]:
        """The names of all stored states: "param", the optimizer states that rules name, and the averages of the weights."""
        states = dict.fromkeys(state for rule in self.rules.values() for state in rule.states)
        return ("param", *states, *averages(self.cfg.optim))

    def parameters_with(self, state_name: StateName) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields (name, parameter as the engine stores it) of every parameter that has the state."""
        for name, weight in self.model.named_parameters():
            if state_name == "param" or is_average(state_name) or state_name in self.rules[name].states:
                yield name, weight

    @abstractmethod
    def build(self, model: nn.Module) -> None:
        """Wraps the model (float32, on the CPU, equal on all ranks) and creates its optimizer."""

    @abstractmethod
    def forward_backward(self, compute: Compute, micro_step: int) -> Tensor:
        """The statistics of one micro-step (0 .. plan.accumulation - 1), whose gradients are added to those of the update."""

    @abstractmethod
    def evaluate(self, compute: Compute) -> Tensor:
        """The statistics of a forward pass in evaluation mode, without gradients, in the training precision."""

    @abstractmethod
    def grad_norm(self) -> Tensor:
        """The global norm (scalar) of the mean gradient before clipping. Called after the last micro-step of an update."""

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yields (name, full mean gradient before clipping) of every parameter that has one, on every rank in the same order.
        Called after `grad_norm`, before `step` or `skip`, and only where a step is inspected. Raises InputError for an engine
        that does not give its gradients away: training works without."""
        raise InputError("this strategy does not give its gradients away. Use another one, such as strategy=ddp")

    @abstractmethod
    def step(self, lr: float) -> None:
        """Clips the gradients to optim.grad_clip and updates the weights, each parameter with `lr` times the multiplier of its
        rule. Called after `grad_norm`."""

    @abstractmethod
    def skip(self) -> None:
        """Discards the gradients of this update; weights, optimizer states and their step count do not change. Called after
        `grad_norm` in place of `step`."""

    @abstractmethod
    def tensors(self, state_name: StateName) -> Iterator[tuple[str, Tensor]]:
        """Yields (name, full float32 tensor of the state) of every parameter that has the state, on every rank, in an order that
        is the same on all ranks."""

    @abstractmethod
    def load_tensors(self, state_name: StateName, read: Callable[[str], Tensor], optimizer_step: int) -> None:
        """Sets a state of every parameter that has it to `read(name)` (full float32 tensors on the CPU).

        optimizer_step: the number of updates behind the states.
        """

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """A new optimizer with one parameter group per rule; sets `rules`.

        Raises InputError as optim.groups.make_optimizer, and for updates that this strategy cannot compute.
        """
        self.rules = rules_of(model, self.cfg)
        row = facts.of(self.cfg.strategy)
        if row.no_whole_matrices is not None and any(rule.whole_matrix for rule in self.rules.values()):
            raise InputError(
                f"optim.name={self.cfg.optim.name} is not offered with strategy={row.name}: {row.no_whole_matrices}. Use "
                f"strategy={', '.join(facts.names(lambda row: row.no_whole_matrices is None))}, or optim.name=adamw"
            )
        return make_optimizer(model, self.rules, self.cfg.optim, self.world.device)
