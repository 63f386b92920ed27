"""What a rank holds and sends under DeepSpeed ZeRO, by formula. Imports no engine.

Where the engine departs from the usual formulas of memory.py:

- In float32 it keeps masters beside its weights all the same: 4 psi / W more.
- ZeRO-1 in bf16 keeps the whole float32 sum of gradients between steps, with the bf16 ones of the last micro-step
  beside it: 6 psi instead of 2 psi. In float32 it frees what it does not own after the last micro-step.
- ZeRO-2 and 3 keep their share of gradients in float32 (4 psi / W instead of 2 psi / W), because sums over micro-steps
  would lose bits in bf16; deferred, they are whole in the width of the weights.
- ZeRO-3 keeps the float32 bucket of its reduction from step to step.

And from those of communication.py:

- ZeRO-1 and 2 reduce each slice of a bucket to the rank that owns it (use_multi_rank_bucket_allreduce is off), so their
  gradients travel once, not twice. ZeRO-1 in bf16 is another optimizer of the engine, which all-reduces them whole.
- ZeRO-3 keeps up to 1e9 gathered weights, so the backward pass of a smaller model gathers nothing; weights of fewer than 1e5
  elements are gathered after the update, once.
"""

from __future__ import annotations

from functools import lru_cache

from torch import nn

from rear_scale.config import ExperimentConfig
from rear_scale.optim.groups import group_sizes
from rear_scale.parallel import facts
from rear_scale.parallel.communication import FP32, Traffic
from rear_scale.parallel.memory import Memory, Update, elements

# Elements in flight per collective of DeepSpeed. More cost gigabytes of buffers and gain nothing.
BUCKET_ELEMENTS = 50_000_000
# DeepSpeed's stage3_max_live_parameters: gathered weights that it keeps for later.
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
    # In float32 the engine still keeps masters of its own.
    masters = FP32 * shard * on_device
    optimizer = update.optimizer_bytes(shard) * on_device
    if stage_of(cfg) == 1 and is_bf16 and on_device:
        # Another optimizer of the engine: whole bf16 gradients, added up in whole float32 ones that stay.
        return Memory(weights, optimizer, masters, gradients=2 * psi, kept_gradients=FP32 * psi)
    deferring = update.accumulation > 1 and (stage_of(cfg) == 1 or cfg.strategy.defer_reduction)
    # What a rank does not own is freed as soon as the last micro-step has reduced it.
    deferred = itemsize * psi if deferring else 0
    if stage_of(cfg) < 3:
        # One bucket fills while the other travels, as float32.
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
    # The first fetch is waited for; the rest is fetched ahead of it, a bucket at once.
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
    """Elements of each weight, filled up to a multiple of the ranks."""
    return [-(-weight.numel() // ranks) * ranks for weight in model.parameters()]
