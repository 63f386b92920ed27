"""What a training step sends: payload bytes and calls per rank, by formula from the shapes alone.

The textbook (P parameters): 2 P bytes in bf16 for each gather or scatter of weights, 4 P for float32 gradients, an all-reduce
counting twice. Where an engine departs from it:

- DDP fills buckets of 1 and then 25 MiB, in the order of the backward pass.
- FSDP2 pads each parameter to a multiple of the ranks along the dimension that it shards, and keeps the group of the root
  (embeddings, positions, output) gathered between forward and backward pass.
- ZeRO-1 and 2 reduce each slice of a bucket to the rank that owns it (use_multi_rank_bucket_allreduce is off), so their
  gradients travel once, not twice. ZeRO-1 in bf16 is another optimizer of the engine, which all-reduces them whole.
- ZeRO-3 keeps up to 1e9 gathered weights, so the backward pass of a smaller model gathers nothing; weights of fewer than 1e5
  elements are gathered after the update, once.
- Of every payload, (W - 1) / W leaves a rank of a ring of W.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import nn

from rear_scale.config import ExperimentConfig
from rear_scale.model import meta_model
from rear_scale.parallel.memory import ZERO3_LIVE_ELEMENTS, ZERO_BUCKET_ELEMENTS, elements_padded
from rear_scale.parallel.strategy import decays

_MIB = 2**20
_FP32 = 4
_ZERO3_PERSISTENT = 100_000  # DeepSpeed's stage3_param_persistence_threshold


@dataclass
class Traffic:
    """Of one rank in one update. Numbers of a few bytes (norms, flags) are left out."""

    calls: Counter[str] = field(default_factory=Counter)
    payload: Counter[str] = field(default_factory=Counter)  # bytes of the whole tensors

    def add(self, kind: str, elements: float, width: int, times: int = 1) -> None:
        self.calls[kind] += times
        self.payload[kind] += int(elements) * width * times

    @property
    def bytes(self) -> int:
        """Payload with all-reduce counted twice."""
        return sum(self.payload.values()) + self.payload["all_reduce"]


def traffic_per_update(
    cfg: ExperimentConfig, world_size: int, accumulation: int, model: nn.Module | None = None
) -> Traffic:
    """The traffic of a strategy, from the shapes of the model; without one, it is built without memory."""
    if model is None:
        model = meta_model(cfg)
    name, width = cfg.strategy.name, 2 if cfg.train.precision == "bf16" else _FP32
    traffic = Traffic()
    if world_size == 1:
        return traffic
    if name == "ddp":
        for bucket in _ddp_buckets(model):
            traffic.add("all_reduce", bucket, _FP32)
    elif name in ("fsdp2", "hsdp"):
        _fsdp(traffic, cfg, model, world_size, accumulation, width)
    elif name == "zero3":
        _zero3(traffic, cfg, model, world_size, accumulation, width)
    else:
        _zero12(traffic, cfg, model, world_size, accumulation, width)
    return traffic


def fsdp_units(model: nn.Module) -> list[nn.Module]:
    """What FSDP2 gathers at once, the root apart: each block and each reAR head."""
    heads = [child for name, child in model.named_children() if name.endswith("_align_mlp")]
    return [*model.blocks, *heads]


def _fsdp(
    traffic: Traffic, cfg: ExperimentConfig, model: nn.Module, world_size: int, accumulation: int, width: int
) -> None:
    strategy = cfg.strategy
    replicas = strategy.replicas if strategy.name == "hsdp" else 1
    ranks = world_size // replicas
    sizes = [elements_padded(unit, ranks) for unit in fsdp_units(model)]
    root = elements_padded(model, ranks) - sum(sizes)
    gathers = 2 * accumulation if strategy.reshard_after_forward else 1
    reductions = 1 if strategy.defer_reduction else accumulation
    for size in sizes:
        traffic.add("all_gather", size, width, gathers)
    traffic.add("all_gather", root, width, accumulation if strategy.reshard_after_forward else 1)
    for size in (*sizes, root):
        traffic.add("reduce_scatter", size, _FP32, reductions)
        if replicas > 1:
            traffic.add("all_reduce", size / ranks, _FP32)


@lru_cache(maxsize=8)
def _ddp_buckets(model: nn.Module) -> list[int]:
    """Elements per bucket."""
    weights = list(reversed(list(model.parameters())))
    found, _ = torch.distributed._compute_bucket_assignment_by_size(
        [torch.empty(weight.shape, device="meta") for weight in weights], [_MIB, 25 * _MIB]
    )
    return [sum(weights[index].numel() for index in bucket) for bucket in found]


def _zero12(
    traffic: Traffic, cfg: ExperimentConfig, model: nn.Module, world_size: int, accumulation: int, width: int
) -> None:
    groups = _groups(model, cfg.optim.decay)
    total = sum(groups)
    if cfg.strategy.name == "zero1" and width == 2 and not cfg.strategy.cpu_offload:
        for _ in range(-(-total // 500_000_000)):
            traffic.add("all_reduce", total / -(-total // 500_000_000), _FP32)
    else:
        deferred = cfg.strategy.name == "zero1" or cfg.strategy.defer_reduction
        times = 1 if deferred else accumulation
        flushes = -(-total // ZERO_BUCKET_ELEMENTS)
        traffic.calls["reduce"] += (flushes + world_size - 1) * times
        traffic.payload["reduce"] += total * _FP32 * times
    for group in groups:
        traffic.add("all_gather", group, width)


@lru_cache(maxsize=8)
def _groups(model: nn.Module, rule: str) -> list[int]:
    """Elements with and without weight decay."""
    named = list(model.named_parameters())
    return [sum(w.numel() for n, w in named if decays(n, w, rule) is decay) for decay in (True, False)]


@lru_cache(maxsize=64)
def _sizes(model: nn.Module, ranks: int) -> list[int]:
    """Elements of each weight, filled up to a multiple of the ranks."""
    return [-(-weight.numel() // ranks) * ranks for weight in model.parameters()]


def _zero3(
    traffic: Traffic, cfg: ExperimentConfig, model: nn.Module, world_size: int, accumulation: int, width: int
) -> None:
    sizes = _sizes(model, world_size)
    large = sum(size for size in sizes if size > _ZERO3_PERSISTENT)
    small = [size for size in sizes if size <= _ZERO3_PERSISTENT]
    passes = accumulation * (1 if sum(sizes) <= ZERO3_LIVE_ELEMENTS else 2)
    # The first fetch is waited for; the rest is fetched ahead of it, a bucket at once.
    traffic.calls["all_gather"] += (1 + -(-large // ZERO_BUCKET_ELEMENTS)) * passes
    traffic.payload["all_gather"] += large * width * passes
    for size in small:
        traffic.add("all_gather", size, width)
    reductions = 1 if cfg.strategy.defer_reduction else accumulation
    flushes = -(-sum(sizes) // ZERO_BUCKET_ELEMENTS)
    traffic.calls["reduce_scatter"] += flushes * reductions
    traffic.payload["reduce_scatter"] += sum(sizes) * _FP32 * reductions
