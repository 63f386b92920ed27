"""Memory of one rank during training, by formula: weights, gradients, optimizer state and saved activations.

The formulas are in the files of the engines (ddp.py, fsdp.py, zero.py). They start from the usual ones: weights 2 psi bytes in
bf16 and 4 psi in float32, master weights 4 psi, moments 8 psi, gradients by the dtype of their sum, each divided by W where
sharded. In bf16, the textbook gives 16 psi for ddp and 4 psi + 12 psi / W for ZeRO-1. Each file documents where its engine
differs, as measured (tests/measured/memory_per_rank.json).
"""

# psi parameters, W ranks

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from torch import Tensor, nn

from rear_scale.config import ExperimentConfig
from rear_scale.model import meta_model
from rear_scale.model.activations import activation_bytes, compute_itemsize, one_block_bytes
from rear_scale.model.generator import Generator
from rear_scale.optim.groups import states_per_weight
from rear_scale.optim.posthoc_ema import averages
from rear_scale.parallel import facts


@dataclass(frozen=True)
class Memory:
    """Bytes of the rank that needs most, by part."""

    weights: int  # weights kept between steps, without master copies
    optimizer: int  # optimizer states, and averages of the weights
    masters: int = 0  # float32 master copies of bf16 weights
    gradients: int = 0  # gradients at the end of the backward pass, after reduction, without kept_gradients
    kept_gradients: int = 0  # gradients that stay allocated between steps
    deferred: int = 0  # unsharded gradients of earlier micro-steps, until the last micro-step reduces them
    buffers: int = 0  # buffers of collectives, kept between steps
    gathered: int = 0  # gathered weights, casts and buckets at the peak of a pass
    activations: int = 0  # saved for the backward pass, at its beginning
    accumulates: bool = False  # whether gradients of earlier micro-steps exist when a backward pass begins

    @property
    def states(self) -> int:
        """Bytes that stay allocated between two steps, without buffers."""
        return self.weights + self.masters + self.optimizer + self.kept_gradients

    @property
    def all_gradients(self) -> int:
        """Bytes of gradients at their peak."""
        return max(self.gradients + self.kept_gradients, self.deferred)

    @property
    def total(self) -> int:
        """The sum of all parts: an upper bound, because they do not all exist at the same time."""
        lasting = self.weights + self.masters + self.optimizer + self.buffers
        return lasting + self.all_gradients + self.gathered + self.activations

    @property
    def peak(self) -> int:
        """Bytes at the peak. Without gradients from before, gradients are allocated while activations are freed, so that only the
        larger of the two counts."""
        if self.accumulates or self.kept_gradients:
            return self.total
        return self.total - min(self.activations, self.all_gradients)


@dataclass(frozen=True)
class Update:
    """One update of a run: the input of an engine's formulas."""

    cfg: ExperimentConfig
    world_size: int
    accumulation: int  # micro-steps
    model: Generator  # gives the shapes
    itemsize: int  # bytes of a number in matrix products
    block_activations: int = 0  # bytes that one block saves for its backward pass without activation checkpointing

    def optimizer_bytes(self, weights: int) -> int:
        """Bytes of the float32 optimizer states of so many weights, and of averages of the weights."""
        return round(stored_states(self.model, self.cfg) * 4 * weights)


def stored_states(model: nn.Module, cfg: ExperimentConfig) -> float:
    """The mean number of float32 tensors that are kept and stored for each weight beside the weight itself."""
    return states_per_weight(model, cfg) + len(averages(cfg.optim))


def checkpoint_bytes(model: nn.Module, cfg: ExperimentConfig) -> int:
    """The size of a checkpoint: weights, optimizer states and averages in float32, under every strategy."""
    return round((1 + stored_states(model, cfg)) * 4 * elements(model))


def memory_per_rank(
    cfg: ExperimentConfig, world_size: int, accumulation: int, model: Generator | None = None, device: str = "cpu"
) -> Memory:
    """Memory of one rank, by the formula of the strategy's engine.

    model: gives the shapes; None = it is built on the meta device. device: "cpu" or "cuda", whose kernels save different
    activations. Fragmentation of the allocator and the memory of the runtime come on top.
    """
    update = Update(
        cfg, world_size, accumulation, model or meta_model(cfg), compute_itemsize(cfg), one_block_bytes(cfg, device)
    )
    memory = facts.formulas(facts.of(cfg.strategy)).memory(update)
    return replace(memory, activations=activation_bytes(cfg, device), accumulates=accumulation > 1)


@lru_cache(maxsize=256)
def elements(module: nn.Module) -> int:
    """The number of elements of all weights. Cached, because the planner calls this and elements_padded thousands of times."""
    return sum(weight.numel() for weight in module.parameters())


@lru_cache(maxsize=1024)
def elements_padded(module: nn.Module, ranks: int) -> int:
    """The number of elements of all weights as FSDP2 pads them for so many ranks."""
    return sum(padded(weight, ranks) for weight in module.parameters())


def shard_dimension(weight: Tensor, ranks: int) -> int:
    """The dimension along which FSDP2 shards a weight: the first, unless that is too short and another divides evenly.

    Position embeddings are [1, S, D]: sharded along the first dimension, one rank would hold all of them and the others padding.
    """
    if weight.ndim > 1 and weight.shape[0] < ranks:
        for dimension in range(1, weight.ndim):
            if weight.shape[dimension] % ranks == 0:
                return dimension
    return 0


def padded(weight: Tensor, ranks: int) -> int:
    """The number of elements of a weight whose sharded dimension is padded to a multiple of the ranks."""
    length = weight.shape[shard_dimension(weight, ranks)]
    return weight.numel() // length * -(-length // ranks) * ranks
