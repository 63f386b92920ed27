"""torch's DistributedDataParallel, or the plain model in a world of one; memory and communication per rank by formula."""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rear_scale.optim.whole_matrix import Spread, alone
from rear_scale.parallel.communication import FP32, Traffic
from rear_scale.parallel.memory import Memory, Update, elements
from rear_scale.parallel.strategy import Compute
from rear_scale.parallel.torch_strategy import TorchStrategy
from rear_scale.parallel.whole_matrices import Replicated, add_broadcasts

_MIB = 2**20


class DDPStrategy(TorchStrategy):
    """Data parallelism: every rank has all weights, in float32; bf16 training by autocast."""

    def build(self, model: nn.Module) -> None:
        self.model = model.to(self.world.device)
        self.prepare_optimizer()
        self.engine = self.model
        if self.world.size > 1:
            device_ids = [self.world.device.index] if self.world.device.type == "cuda" else None
            self.engine = DistributedDataParallel(self.model, device_ids=device_ids, gradient_as_bucket_view=True)

    def forward_backward(self, compute: Compute, micro_step: int) -> Tensor:
        last = micro_step == self.plan.accumulation - 1
        # no_sync before the last micro-step, so that gradients are reduced once per update.
        sync = self.engine.no_sync() if not last and isinstance(self.engine, DistributedDataParallel) else nullcontext()
        with sync:
            with self.compute_precision():
                loss, statistics = compute(self.engine)
            (loss / self.plan.accumulation).backward()
        return statistics

    def spread(self) -> Spread:
        return Replicated(self.world.rank, self.world.size) if self.world.size > 1 else alone

    def compute_precision(self) -> torch.autocast:
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.cfg.train.precision == "bf16")


def memory(update: Update) -> Memory:
    """Bytes of a rank. bf16 comes by autocast over float32 weights, so there are 4 psi of weights and no master copies: 16 psi
    in total, as in the textbook."""
    psi = elements(update.model)
    gradients = FP32 * psi
    # DDP's gradients are views of its buckets, which stay allocated between steps.
    kept = gradients if update.world_size > 1 else 0
    # Autocast keeps its bf16 copies of the weights until the end of the forward pass.
    casts = 2 * psi if update.cfg.train.precision == "bf16" else 0
    return Memory(
        FP32 * psi, update.optimizer_bytes(psi), gradients=gradients - kept, kept_gradients=kept, gathered=casts
    )


def traffic(update: Update) -> Traffic:
    """Bytes that a rank sends: one all-reduce per bucket, the first of 1 MiB, the others of 25 MiB."""
    sent = Traffic()
    for bucket in _buckets(update.model):
        sent.add("all_reduce", bucket, FP32)
    add_broadcasts(sent, update)
    return sent


@lru_cache(maxsize=8)
def _buckets(model: nn.Module) -> list[int]:
    """The number of elements of each gradient bucket, in the order of the backward pass."""
    weights = list(reversed(list(model.parameters())))
    buckets, _ = torch.distributed._compute_bucket_assignment_by_size(
        [torch.empty(weight.shape, device="meta") for weight in weights], [_MIB, 25 * _MIB]
    )
    return [sum(weights[index].numel() for index in bucket) for bucket in buckets]
