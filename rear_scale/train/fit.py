"""The check that a run fits into the memory of each rank."""

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
    """Raises InputError where the peak by formula is more than the rank's GPU has (on a CPU: the machine's memory divided by its
    ranks), unless train.check_memory is false."""
    if not cfg.train.check_memory:
        return
    device = "cuda" if uses_cuda() else "cpu"
    needed, available = memory_per_rank(cfg, plan.world_size, plan.accumulation, device=device), _available_bytes(ranks)
    if needed.peak <= available:
        return
    train = cfg.train
    what = f"strategy={facts.of(cfg.strategy).name} train.activation_checkpointing={train.activation_checkpointing}"
    place = "its GPU" if uses_cuda() else f"its part of this machine's memory (ranks: {ranks.local_world_size})"
    raise InputError(
        f"train.micro_batch_size={train.micro_batch_size} {what} needs {needed.peak / GIB:.1f} GiB per rank by formula "
        f"({in_words(needed)}), and {place} has {available / GIB:.1f}. {_way_out(needed, available)}, or skip this check with "
        "train.check_memory=false"
    )


def in_words(memory: Memory) -> str:
    """The main parts of the memory in GiB, for messages."""
    parts = {
        "weights, gradients and optimizer": memory.total - memory.activations - memory.buffers - memory.gathered,
        "activations": memory.activations,
        "buffers": memory.buffers + memory.gathered,
    }
    listed = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
    return listed if memory.peak == memory.total else f"{listed}; gradients take the place of freed activations"


def _way_out(needed: Memory, available: int) -> str:
    if needed.total - needed.activations > available:
        return "Use strategy=fsdp2 or more ranks (launchers/plan.py says which fit)"
    return "Use a smaller train.micro_batch_size or train.activation_checkpointing=full"


def _available_bytes(ranks: Ranks) -> int:
    if uses_cuda():
        return torch.cuda.get_device_properties(ranks.local_rank % torch.cuda.device_count()).total_memory
    return psutil.virtual_memory().total // ranks.local_world_size
