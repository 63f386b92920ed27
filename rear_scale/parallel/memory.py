"""Bytes of one rank while it trains: weights, gradients, optimizer state and what is kept for the backward pass.

The formulas are in the files of the engines (ddp.py, fsdp.py, zero.py). They begin at the usual ones: weights 2 psi bytes in bf16
and 4 psi in float32, masters 4 psi, moments 8 psi, gradients as wide as their sum is kept, each over W where sharded. So in bf16
ddp takes 16 psi, ZeRO-1 4 psi + 12 psi / W in the textbook. Each file says where its engine departs from that, as measured
(tests/measured/memory_per_rank.json).
"""

# psi parameters, W ranks

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from torch import Tensor, nn

from rear_scale.config import ExperimentConfig
from rear_scale.model import meta_model
from rear_scale.model.activations import activation_bytes, compute_itemsize, one_block_bytes
from rear_scale.optim.groups import states_per_weight
from rear_scale.parallel import facts


@dataclass(frozen=True)
class Memory:
    """Bytes of the rank that holds most."""

    weights: int  # what the rank keeps between steps, master copies apart
    optimizer: int  # the states that the rules of the weights name, and the moving average where there is one
    masters: int = 0  # float32 copies of bf16 weights
    gradients: int = 0  # at the end of the backward pass, after reduction, those below apart
    kept_gradients: int = 0  # what of them stays allocated from step to step
    deferred: int = 0  # whole gradients of earlier micro-steps, until the last one reduces them
    buffers: int = 0  # of collectives, kept from step to step
    gathered: int = 0  # whole weights, casts and buckets that are there at the height of a pass
    activations: int = 0  # kept for the backward pass, at its beginning
    accumulates: bool = False  # whether gradients of earlier micro-steps are there when a backward pass begins

    @property
    def states(self) -> int:
        """Between two steps, buffers apart."""
        return self.weights + self.masters + self.optimizer + self.kept_gradients

    @property
    def all_gradients(self) -> int:
        """The most there is of gradients at once."""
        return max(self.gradients + self.kept_gradients, self.deferred)

    @property
    def total(self) -> int:
        """The sum of all parts, which are not all there at one time."""
        lasting = self.weights + self.masters + self.optimizer + self.buffers
        return lasting + self.all_gradients + self.gathered + self.activations

    @property
    def peak(self) -> int:
        """The most there is at one time: the gradients of an update's first micro-step come while activations go."""
        if self.accumulates or self.kept_gradients:
            return self.total
        return self.total - min(self.activations, self.all_gradients)


@dataclass(frozen=True)
class Update:
    """One update of a run, as the formulas of an engine take it."""

    cfg: ExperimentConfig
    world_size: int
    accumulation: int  # micro-steps
    model: nn.Module  # gives the shapes
    itemsize: int  # bytes of a number in matrix products
    block_activations: int = 0  # bytes that one block keeps for its backward pass where it computes nothing again

    def optimizer_bytes(self, weights: int) -> int:
        """Of the optimizer's float32 states of so many weights: those that their rules name, and the moving average where there
        is one."""
        return round((states_per_weight(self.model, self.cfg) + bool(self.cfg.optim.ema_decay)) * 4 * weights)


def memory_per_rank(
    cfg: ExperimentConfig, world_size: int, accumulation: int, model: nn.Module | None = None, device: str = "cpu"
) -> Memory:
    """By the formula of the strategy's engine.

    `model` gives the shapes; without one, it is built without memory. device: the kind of the rank's ("cpu" or "cuda"), on which
    activations depend. The allocator's fragments and the runtime's own memory come on top.
    """
    update = Update(
        cfg, world_size, accumulation, model or meta_model(cfg), compute_itemsize(cfg), one_block_bytes(cfg, device)
    )
    memory = facts.formulas(facts.of(cfg.strategy)).memory(update)
    return replace(memory, activations=activation_bytes(cfg, device), accumulates=accumulation > 1)


@lru_cache(maxsize=256)
def elements(module: nn.Module) -> int:
    """Of all weights. Remembered, as is elements_padded: the planner asks thousands of times."""
    return sum(weight.numel() for weight in module.parameters())


@lru_cache(maxsize=1024)
def elements_padded(module: nn.Module, ranks: int) -> int:
    """Of all weights as FSDP2 pads them for so many ranks."""
    return sum(padded(weight, ranks) for weight in module.parameters())


def shard_dimension(weight: Tensor, ranks: int) -> int:
    """The dimension along which FSDP2 shards a weight: the first, unless that is too short and another divides evenly.

    The tables of positions are [1, S, D]: along their first dimension one rank would hold everything, padded by all others.
    """
    if weight.ndim > 1 and weight.shape[0] < ranks:
        for dimension in range(1, weight.ndim):
            if weight.shape[dimension] % ranks == 0:
                return dimension
    return 0


def padded(weight: Tensor, ranks: int) -> int:
    """Elements of a weight whose dimension of sharding is filled up to a multiple of the ranks."""
    length = weight.shape[shard_dimension(weight, ranks)]
    return weight.numel() // length * -(-length // ranks) * ranks
