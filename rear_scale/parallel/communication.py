"""Communication of a training step: payload bytes and calls per rank, by formula from the shapes alone.

The formulas are in the files of the engines (ddp.py, fsdp.py, zero.py). They start from the textbook (P parameters): 2 P bytes in
bf16 for each gather or scatter of weights, 4 P for float32 gradients, an all-reduce counting twice. Each file documents where
its engine differs. In a ring of W ranks, each rank sends (W - 1) / W of every payload.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from rear_scale.config import ExperimentConfig
from rear_scale.model import meta_model
from rear_scale.model.activations import compute_itemsize
from rear_scale.model.generator import Generator
from rear_scale.parallel import facts
from rear_scale.parallel.memory import Update

FP32 = 4  # bytes


@dataclass
class Traffic:
    """Communication of one rank in one update. Messages of a few bytes (norms, flags) are not counted."""

    calls: Counter[str] = field(default_factory=Counter)
    payload: Counter[str] = field(default_factory=Counter)  # bytes of the whole tensors
    late_gathers: bool = False  # weights are gathered after the update, with no computation left to overlap
    late_reductions: bool = False  # gradients are reduced after the last backward pass

    def add(self, collective: str, elements: float, itemsize: int, times: int = 1) -> None:
        self.calls[collective] += times
        self.payload[collective] += int(elements) * itemsize * times

    @property
    def bytes(self) -> int:
        """Payload with all-reduce counted twice."""
        return sum(self.payload.values()) + self.payload["all_reduce"]


def traffic_per_update(
    cfg: ExperimentConfig, world_size: int, accumulation: int, model: Generator | None = None
) -> Traffic:
    """The traffic of one update, by the formula of the strategy's engine. model: gives the shapes; None = built on meta."""
    if world_size == 1:
        return Traffic()
    update = Update(cfg, world_size, accumulation, model or meta_model(cfg), compute_itemsize(cfg))
    return facts.formulas(facts.of(cfg.strategy)).traffic(update)
