"""Bytes of one rank while it trains: weights, gradients, optimizer state and what is kept for the backward pass."""

# psi parameters, W ranks

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache

from torch import Tensor, nn

from rear_scale.config import ExperimentConfig
from rear_scale.model import meta_model
from rear_scale.model.activations import activation_bytes, compute_width, one_block_bytes

# Elements in flight per collective of DeepSpeed. More cost gigabytes of buffers and gain nothing.
ZERO_BUCKET_ELEMENTS = 50_000_000
# DeepSpeed's stage3_max_live_parameters: gathered weights that it keeps for later.
ZERO3_LIVE_ELEMENTS = 1_000_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes of the rank that holds most."""

    weights: int  # what the rank keeps between steps, master copies apart
    masters: int  # float32 copies of bf16 weights
    gradients: int  # at the end of the backward pass, after reduction, those below apart
    kept_gradients: int  # what of them stays allocated from step to step
    deferred: int  # whole gradients of earlier micro-steps, until the last one reduces them
    optimizer: int  # both moments, and the moving average where there is one
    buffers: int  # of collectives, kept from step to step
    gathered: int  # whole weights, casts and buckets that are there at the height of a pass
    activations: int  # kept for the backward pass, at its beginning
    first: bool  # whether the only micro-step of an update is its first, which finds no gradients but the kept ones

    @property
    def states(self) -> int:
        """Between two steps, buffers apart."""
        return self.weights + self.masters + self.optimizer + self.kept_gradients

    @property
    def all_gradients(self) -> int:
        """The most there is of gradients at once."""
        return max(self.gradients + self.kept_gradients, self.deferred)

    @property
    def peak(self) -> int:
        lasting = self.weights + self.masters + self.optimizer + self.buffers
        return lasting + self.all_gradients + self.gathered + self.activations

    @property
    def height(self) -> int:
        """The most there is at one time, which is less than `peak`, the sum of all: the gradients of an update's first
        micro-step come while activations go."""
        if not self.first or self.kept_gradients:
            return self.peak
        return self.peak - min(self.activations, self.all_gradients)

    def as_dict(self) -> dict[str, int]:
        return {**asdict(self), "states": self.states, "peak": self.peak}


def memory_per_rank(
    cfg: ExperimentConfig, world_size: int, accumulation: int, model: nn.Module | None = None, device: str = "cpu"
) -> Memory:
    """By the usual formulas: weights 2 psi bytes in bf16 and 4 psi in float32, masters 4 psi, moments 8 psi, gradients as wide
    as their sum is kept, each over W where sharded. So in bf16 ddp takes 16 psi, ZeRO-1 4 psi + 12 psi / W in the textbook.

    Where an engine departs from it, as measured (tests/measured/memory_per_rank.json):

    - ddp trains float32 weights in bf16 by autocast: 4 psi of weights and no masters, the same 16 psi.
    - fsdp2 and hsdp keep float32 shards that are weights and masters at once; deferred gradients are whole and float32.
    - ZeRO in float32 keeps masters beside its weights all the same: 4 psi / W more.
    - ZeRO-1 in bf16 keeps the whole float32 sum of gradients between steps, with the bf16 ones of the last micro-step
      beside it: 6 psi instead of 2 psi. In float32 it frees what it does not own after the last micro-step.
    - ZeRO-2 and 3 keep their share of gradients in float32 (4 psi / W instead of 2 psi / W), because sums over micro-steps
      would lose bits in bf16; deferred, they are whole in the width of the weights.
    - ZeRO-3 keeps the float32 bucket of its reduction from step to step.

    `model` gives the shapes; without one, it is built without memory. device: the kind of the rank's ("cpu" or "cuda"), on which
    activations depend. The allocator's fragments and the runtime's own
    memory come on top.
    """
    if model is None:
        model = meta_model(cfg)
    moments = 3 if cfg.optim.ema_decay else 2
    if cfg.strategy.name in ("single", "ddp"):
        parts = _whole(cfg, world_size, model, moments)
    elif cfg.strategy.name in ("fsdp2", "hsdp"):
        parts = _fsdp(cfg, world_size, accumulation, model, moments, device)
    else:
        parts = _zero(cfg, world_size, accumulation, model, moments)
    return Memory(**{**_NOTHING, **parts}, activations=activation_bytes(cfg, device), first=accumulation == 1)


_NOTHING = {"masters": 0, "gradients": 0, "kept_gradients": 0, "deferred": 0, "buffers": 0, "gathered": 0}


def _whole(cfg: ExperimentConfig, world_size: int, model: nn.Module, moments: int) -> dict[str, int]:
    psi = elements(model)
    # DDP's gradients are views of its buckets, which stay.
    gradients = "gradients" if world_size == 1 else "kept_gradients"
    # Autocast keeps its casts until the end of the forward pass.
    casts = 2 * psi if cfg.train.precision == "bf16" else 0
    return {"weights": 4 * psi, gradients: 4 * psi, "optimizer": moments * 4 * psi, "gathered": casts}


def _fsdp(
    cfg: ExperimentConfig, world_size: int, accumulation: int, model: nn.Module, moments: int, device: str
) -> dict[str, int]:
    strategy, width = cfg.strategy, compute_width(cfg)
    ranks = world_size // (strategy.replicas if strategy.name == "hsdp" else 1)
    shard = 4 * (elements_padded(model, ranks) // ranks)
    psi, block = elements(model), elements(model.blocks[0])
    root = psi - cfg.model.depth * block
    # In the backward pass: gradients of the block before on their way as float32, weights and gradients of this one, weights
    # of the next one. What was kept for the two that are done is gone.
    freed = (2 if cfg.train.activation_checkpointing == "none" else 1) * one_block_bytes(cfg, device)
    passing = 4 * block + width * block - freed
    blocks = 2 * width * block + max(0, passing)
    if not strategy.reshard_after_forward:
        blocks = width * (psi - root) + max(0, passing)
    return {
        "weights": shard,
        "gradients": shard,
        "deferred": 4 * psi if accumulation > 1 and strategy.defer_reduction else 0,
        "optimizer": moments * shard,
        "gathered": width * root + blocks,
    }


def _zero(cfg: ExperimentConfig, world_size: int, accumulation: int, model: nn.Module, moments: int) -> dict[str, int]:
    psi, width, half = elements(model), compute_width(cfg), cfg.train.precision == "bf16"
    stage, shard = int(cfg.strategy.name.removeprefix("zero")), -(-psi // world_size)
    on_device = not cfg.strategy.cpu_offload
    parts = {
        "weights": width * (psi if stage < 3 else shard),
        # In float32 the engine still keeps masters of its own.
        "masters": 4 * shard * on_device,
        "optimizer": moments * 4 * shard * on_device,
        "gradients": 4 * shard,
    }
    if stage == 1 and half and on_device:
        # Another optimizer of the engine: whole bf16 gradients, added up in whole float32 ones that stay.
        return {**parts, "gradients": 2 * psi, "kept_gradients": 4 * psi}
    if accumulation > 1 and (stage == 1 or cfg.strategy.defer_reduction):
        # What a rank does not own is freed as soon as the last micro-step has reduced it.
        parts["deferred"] = width * psi
    bucket = min(psi, ZERO_BUCKET_ELEMENTS)
    if stage < 3:
        # One bucket fills while the other travels, as float32.
        return {**parts, "gathered": (2 * width + 4 * half) * bucket}
    whole = width * min(psi, ZERO3_LIVE_ELEMENTS)
    return {
        **parts,
        "gradients": 0,
        "kept_gradients": 4 * shard,
        "buffers": 4 * ZERO_BUCKET_ELEMENTS,
        "gathered": whole,
    }


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
