"""Bytes of one rank while it trains: weights, gradients, optimizer state and what blocks keep for the backward pass."""

# B images of a micro-batch, S positions, D width, psi parameters, W ranks

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from rear_scale.config import ExperimentConfig
from rear_scale.model import build_model

# Elements in flight per collective of DeepSpeed. More cost gigabytes of buffers and gain nothing.
ZERO_BUCKET_ELEMENTS = 50_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes per rank."""

    weights: int  # what the rank keeps between steps, master copies apart
    masters: int  # float32 copies of bf16 weights
    gradients: int  # at the end of the backward pass, after reduction
    optimizer: int  # both moments, and the moving average where there is one
    buffers: int  # of collectives, kept from step to step
    gathered: int  # whole weights that are there at the height of a pass
    activations: int  # kept for the backward pass, at its beginning

    @property
    def states(self) -> int:
        """Between two steps."""
        return self.weights + self.masters + self.optimizer

    @property
    def peak(self) -> int:
        return self.states + self.gradients + self.buffers + self.gathered + self.activations

    def as_dict(self) -> dict[str, int]:
        return {**asdict(self), "states": self.states, "peak": self.peak}


def memory_per_rank(cfg: ExperimentConfig, world_size: int, accumulation: int) -> Memory:
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

    The allocator's fragments, buckets that exist during a pass alone and the runtime's own memory come on top.
    """
    with torch.device("meta"):
        model = build_model(cfg)
    psi = sum(weight.numel() for weight in model.parameters())
    block = sum(weight.numel() for weight in model.blocks[0].parameters())
    name, half = cfg.strategy.name, cfg.train.precision == "bf16"
    W = world_size
    if name == "hsdp":
        W = world_size // cfg.strategy.replicas
    width = 2 if half else 4
    moments = 12 if cfg.optim.ema_decay else 8
    sharded = {"single": 1, "ddp": 1}.get(name, W)
    off_device = name.startswith("zero") and cfg.strategy.cpu_offload
    optimizer = 0 if off_device else moments * psi // sharded
    masters = gathered = buffers = 0
    if name in ("single", "ddp"):
        weights, gradients = 4 * psi, 4 * psi
        gathered = 2 * psi if half else 0  # autocast keeps its casts until the end of the forward pass
    elif name in ("fsdp2", "hsdp"):
        weights = 4 * psi // W
        whole = accumulation > 1 and cfg.strategy.defer_reduction
        gradients = 4 * psi if whole else 4 * psi // W
        root = psi - cfg.model.depth * block
        # Two blocks, one of them fetched ahead, beside the group of the root.
        gathered = width * (root + 2 * block if cfg.strategy.reshard_after_forward else psi)
    else:
        stage = int(name.removeprefix("zero"))
        weights = width * psi if stage < 3 else width * psi // W
        # In float32 the engine still keeps masters of its own.
        masters = 0 if off_device else 4 * psi // W
        # The engine frees what a rank does not own as soon as it is reduced: with the last micro-step also at stage 1. What it
        # keeps is float32, the sum over micro-steps and ranks.
        whole = accumulation > 1 and (stage == 1 or cfg.strategy.defer_reduction)
        gradients = width * psi if whole else 4 * psi // W
        if stage == 1 and half and not off_device:
            # Another optimizer of the engine: a whole float32 sum, beside the bf16 gradients of the last micro-step.
            gradients = 4 * psi + width * psi
        if stage == 3:
            # A bucket travels as float32.
            buffers = 4 * ZERO_BUCKET_ELEMENTS
        gathered = 0 if stage < 3 else width * min(psi, 1_000_000_000)
    return Memory(weights, masters, gradients, optimizer, buffers, gathered, activation_bytes(cfg))


def activation_bytes(cfg: ExperimentConfig) -> int:
    """What the blocks of one micro-batch keep, in bytes: elements of each kind per position and block, times their width.

    Per position, in units of D: the norms' inputs and outputs, the modulated inputs, qkv, attention, both products of the
    feed-forward, and each image's six chunks of modulation.
    """
    width = 2 if cfg.train.precision == "bf16" else 4
    positions = cfg.train.micro_batch_size * (cfg.tokenizer.num_tokens + 1)
    ratio = (cfg.model.mlp_width or 4 * cfg.model.width) / cfg.model.width
    kept = (
        2 + 2 + 2 + 3 + 2 + 2 + 2 * ratio + 2 + 6
    )  # inputs, norms, modulated, qkv, qk-norms, attention, mlp, gates, modulation
    if cfg.model.dropout:
        kept += (2 + ratio) / width  # one byte per mask element
    one = int(kept * positions * cfg.model.width * width)
    boundary = positions * cfg.model.width * width
    depth, policy = cfg.model.depth, cfg.train.activation_checkpointing
    if policy == "none":
        return depth * one
    if policy == "full":
        return depth * boundary + one
    if policy == "every_n":
        recomputed = -(-depth // cfg.train.recompute_every_n)
        return (depth - recomputed) * one + recomputed * boundary + one
    products = int((3 + 1 + 1 + ratio + 1) * positions * cfg.model.width * width) + boundary
    return depth * products + one
