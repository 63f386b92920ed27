"""torch's DistributedDataParallel, and the same code without it for a world of one."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rear_scale.parallel.strategy import Compute
from rear_scale.parallel.torch_strategy import TorchStrategy


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
