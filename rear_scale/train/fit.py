"""Whether a rank's share of a run fits into the memory that it has."""

from __future__ import annotations

import psutil
import torch

from rear_scale.config import ExperimentConfig, InputError, Plan
from rear_scale.device import uses_cuda
from rear_scale.parallel import facts
from rear_scale.parallel.memory import Memory, memory_per_rank
from rear_scale.world import Ranks

GIB = 2**30


def check(cfg: ExperimentConfig, plan: Plan, ranks: Ranks) -> None:
    """Raises InputError where the formula's peak is more than the whole memory of the rank's GPU (or its share of the
    machine's, on a CPU), unless train.check_memory is false."""
    if not cfg.train.check_memory:
        return
    device = "cuda" if uses_cuda() else "cpu"
    need, there = memory_per_rank(cfg, plan.world_size, plan.accumulation, device=device), _bytes_there(ranks)
    if need.peak <= there:
        return
    train = cfg.train
    what = f"strategy={facts.of(cfg.strategy).name} train.activation_checkpointing={train.activation_checkpointing}"
    place = "its GPU" if uses_cuda() else f"its share of this machine (ranks: {ranks.local_world_size})"
    raise InputError(
        f"train.micro_batch_size={train.micro_batch_size} {what} needs {need.peak / GIB:.1f} GiB per rank by formula "
        f"({in_words(need)}), and {place} has {there / GIB:.1f}. {_way_out(need, there)}, or try it all the same with "
        "train.check_memory=false"
    )


def in_words(memory: Memory) -> str:
    """The parts that matter, in GiB."""
    parts = {
        "weights, gradients and optimizer": memory.total - memory.activations - memory.buffers - memory.gathered,
        "activations": memory.activations,
        "buffers": memory.buffers + memory.gathered,
    }
    listed = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
    return listed if memory.peak == memory.total else f"{listed}; gradients come while activations go"


def _way_out(need: Memory, there: int) -> str:
    if need.total - need.activations > there:
        return "Use strategy=fsdp2 or more ranks (launchers/plan.py says which fit)"
    return "Use a smaller train.micro_batch_size or train.activation_checkpointing=full"


def _bytes_there(ranks: Ranks) -> int:
    if uses_cuda():
        return torch.cuda.get_device_properties(ranks.local_rank % torch.cuda.device_count()).total_memory
    return psutil.virtual_memory().total // ranks.local_world_size
