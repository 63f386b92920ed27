"""torch's DistributedDataParallel, and the same code without it for a world of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rear_scale.parallel.strategy import Compute, Kind, Strategy


class DDPStrategy(Strategy):
    """Whole copies of the weights, float32 master weights; bf16 by autocast."""

    def build(self, model: nn.Module) -> None:
        self.model = model.to(self.world.device)
        self.optimizer = self.make_optimizer(self.model)
        self.engine: nn.Module = self.model
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
            with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.cfg.train.precision == "bf16"):
                loss, statistics = compute(self.engine)
            (loss / self.plan.accumulation).backward()
        return statistics

    def grad_norm(self) -> Tensor:
        gradients = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
        self.norm = torch.nn.utils.get_total_norm(gradients)
        return self.norm

    def step(self, lr: float) -> None:
        torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.cfg.optim.grad_clip, self.norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()

    def tensors(self, kind: Kind) -> Iterator[tuple[str, Tensor]]:
        for name, weight in self.model.named_parameters():
            yield name, (weight if kind == "param" else self.optimizer.state[weight][kind]).detach()

    def load_tensors(self, kind: Kind, read: Callable[[str], Tensor], optimizer_step: int) -> None:
        for name, weight in self.model.named_parameters():
            if kind == "param":
                weight.data.copy_(read(name))
                continue
            state = self.optimizer.state[weight]
            state[kind] = read(name).to(weight.device)
            # AdamW's fused kernel wants its step count on the device.
            step_device = weight.device if self.optimizer.defaults["fused"] else "cpu"
            state["step"] = torch.tensor(float(optimizer_step), device=step_device)
