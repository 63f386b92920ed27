"""torch's DistributedDataParallel, and the same code without it for a world of one; what a rank holds and sends, by formula."""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rear_scale.parallel.communication import FP32, Traffic
from rear_scale.parallel.memory import Memory, Update, elements
from rear_scale.parallel.strategy import Compute
from rear_scale.parallel.torch_strategy import TorchStrategy

_MIB = 2**20


class DDPStrategy(TorchStrategy):
    """Whole copies of the weights, float32 master weights; bf16 by autocast."""

    def build(self, model: nn.Module) -> None:
        self.model = model.to(self.world.device)
        self.prepare_optimizer()
        self.engine = self.model
        if self.world.size > 1:
            device_ids = [self.world.device.index] if self.world.device.type == "cuda" else None
            self.engine = DistributedDataParallel(self.model, device_ids=device_ids, gradient_as_bucket_view=True)

    def forward_backward(self, compute: Compute, micro_step: int) -> Tensor:
        last = micro_step == self.plan.accumulation - 1
        # Gradients travel once per update, with the last micro-step.
        quiet = (
            self.engine.no_sync() if not last and isinstance(self.engine, DistributedDataParallel) else nullcontext()
        )
        with quiet:
            with self.compute_precision():
                loss, statistics = compute(self.engine)
            (loss / self.plan.accumulation).backward()
        return statistics

    def compute_precision(self) -> torch.autocast:
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.cfg.train.precision == "bf16")


def memory(update: Update) -> Memory:
    """Float32 weights trained in bf16 by autocast: 4 psi of weights and no masters, the same 16 psi as in the textbook."""
    psi = elements(update.model)
    gradients = FP32 * psi
    # DDP's gradients are views of its buckets, which stay.
    kept = gradients if update.world_size > 1 else 0
    # Autocast keeps its casts until the end of the forward pass.
    casts = 2 * psi if update.cfg.train.precision == "bf16" else 0
    return Memory(
        FP32 * psi, update.optimizer_bytes(psi), gradients=gradients - kept, kept_gradients=kept, gathered=casts
    )


def traffic(update: Update) -> Traffic:
    """Buckets of 1 and then 25 MiB, in the order of the backward pass."""
    sent = Traffic()
    for bucket in _buckets(update.model):
        sent.add("all_reduce", bucket, FP32)
    return sent


@lru_cache(maxsize=8)
def _buckets(model: nn.Module) -> list[int]:
    """Elements per bucket."""
    weights = list(reversed(list(model.parameters())))
    buckets, _ = torch.distributed._compute_bucket_assignment_by_size(
        [torch.empty(weight.shape, device="meta") for weight in weights], [_MIB, 25 * _MIB]
    )
    return [sum(weights[index].numel() for index in bucket) for bucket in buckets]
