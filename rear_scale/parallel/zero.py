"""Memory and communication per rank under DeepSpeed ZeRO, by formula. Does not import DeepSpeed.

Differences between the engine and the usual formulas of memory.py:

- In float32 too, it keeps master weights beside its weights: 4 psi / W more.
- ZeRO-1 in bf16 keeps the unsharded float32 sum of gradients between steps, beside the bf16 gradients of the last micro-step:
  6 psi instead of 2 psi. In float32 it frees the gradients of other ranks' shards after the last micro-step.
- ZeRO-2 and 3 keep their shard of the gradients in float32 (4 psi / W instead of 2 psi / W), because sums over micro-steps would
  lose bits in bf16; with deferred reduction, gradients are unsharded, in the dtype of the weights.
- ZeRO-3 keeps the float32 bucket of its reduction between steps.

Differences to the formulas of communication.py:

- ZeRO-1 and 2 reduce each slice of a bucket to the rank that owns it (use_multi_rank_bucket_allreduce is off), so gradients
  are sent once, not twice. ZeRO-1 in bf16 uses another optimizer of DeepSpeed, which all-reduces whole gradients.
- ZeRO-3 keeps up to 1e9 gathered elements, so the backward pass of a smaller model gathers nothing; weights of fewer than 1e5
  elements are gathered once, after the update.
"""

from __future__ import annotations

from functools import lru_cache

from torch import nn

from rear_scale.config import ExperimentConfig
from rear_scale.optim.groups import group_sizes
from rear_scale.parallel import facts
from rear_scale.parallel.communication import FP32, Traffic
from rear_scale.parallel.memory import Memory, Update, elements

# Elements per collective of DeepSpeed. Larger buckets take gigabytes of buffers and are not faster.
BUCKET_ELEMENTS = 50_000_000
# DeepSpeed's stage3_max_live_parameters: the number of gathered elements that it keeps for later use.
LIVE_ELEMENTS = 1_000_000_000
_PERSISTENT = 100_000  # DeepSpeed's stage3_param_persistence_threshold


def stage_of(cfg: ExperimentConfig) -> int:
    """1: optimizer state is sharded; 2: gradients too; 3: weights too."""
    return len(facts.of(cfg.strategy).shards)


def memory(update: Update) -> Memory:
    """Bytes of the rank that holds most under ZeRO, by part."""
    cfg, itemsize, is_bf16 = update.cfg, update.itemsize, update.cfg.train.precision == "bf16"
    psi = elements(update.model)
    shard = -(-psi // update.world_size)
    on_device = not cfg.strategy.cpu_offload
    weights = itemsize * (psi if stage_of(cfg) < 3 else shard)
    # In float32 too, the engine keeps separate master weights.
    masters = FP32 * shard * on_device
    optimizer = update.optimizer_bytes(shard) * on_device
    if stage_of(cfg) == 1 and is_bf16 and on_device:
        # BF16_Optimizer: unsharded bf16 gradients, summed into unsharded float32 gradients that stay allocated.
        return Memory(weights, optimizer, masters, gradients=2 * psi, kept_gradients=FP32 * psi)
    deferring = update.accumulation > 1 and (stage_of(cfg) == 1 or cfg.strategy.defer_reduction)
    # Gradients of other ranks' shards are freed as soon as the last micro-step has reduced them.
    deferred = itemsize * psi if deferring else 0
    if stage_of(cfg) < 3:
        # Two buckets: one is filled while the other is reduced, in float32.
        gathered = (2 * itemsize + 4 * is_bf16) * min(psi, BUCKET_ELEMENTS)
        return Memory(weights, optimizer, masters, gradients=FP32 * shard, deferred=deferred, gathered=gathered)
    return Memory(
        weights,
        optimizer,
        masters,
        kept_gradients=FP32 * shard,
        deferred=deferred,
        buffers=FP32 * BUCKET_ELEMENTS,
        gathered=itemsize * min(psi, LIVE_ELEMENTS),
    )


def traffic(update: Update) -> Traffic:
    """Collectives of one update under ZeRO and the bytes that they move."""
    return _of_stage_3(update) if stage_of(update.cfg) == 3 else _of_stages_1_and_2(update)


def _of_stages_1_and_2(update: Update) -> Traffic:
    cfg, is_stage_1 = update.cfg, stage_of(update.cfg) == 1
    is_bf16 = cfg.train.precision == "bf16"
    sent = Traffic(late_gathers=True, late_reductions=is_stage_1 and is_bf16)
    groups = group_sizes(update.model, cfg).values()
    total = sum(groups)
    if is_stage_1 and is_bf16 and not cfg.strategy.cpu_offload:
        flushes = -(-total // 500_000_000)
        for _ in range(flushes):
            sent.add("all_reduce", total / flushes, FP32)
    else:
        times = 1 if is_stage_1 or cfg.strategy.defer_reduction else update.accumulation
        flushes = -(-total // BUCKET_ELEMENTS)
        sent.calls["reduce"] += (flushes + update.world_size - 1) * times
        sent.payload["reduce"] += total * FP32 * times
    for group in groups:
        sent.add("all_gather", group, update.itemsize)
    return sent


def _of_stage_3(update: Update) -> Traffic:
    sent, itemsize = Traffic(), update.itemsize
    sizes = _sizes(update.model, update.world_size)
    large = sum(size for size in sizes if size > _PERSISTENT)
    small = [size for size in sizes if size <= _PERSISTENT]
    passes = update.accumulation * (1 if sum(sizes) <= LIVE_ELEMENTS else 2)
    # The first gather is a call of its own; the others are prefetched, a bucket per call.
    sent.calls["all_gather"] += (1 + -(-large // BUCKET_ELEMENTS)) * passes
    sent.payload["all_gather"] += large * itemsize * passes
    for size in small:
        sent.add("all_gather", size, itemsize)
    reductions = 1 if update.cfg.strategy.defer_reduction else update.accumulation
    flushes = -(-sum(sizes) // BUCKET_ELEMENTS)
    sent.calls["reduce_scatter"] += flushes * reductions
    sent.payload["reduce_scatter"] += sum(sizes) * FP32 * reductions
    return sent


@lru_cache(maxsize=64)
def _sizes(model: nn.Module, ranks: int) -> list[int]:
    """The number of elements of each weight, padded to a multiple of the ranks."""
    return [-(-weight.numel() // ranks) * ranks for weight in model.parameters()]
