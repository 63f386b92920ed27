"""What the strategies of torch itself share: AdamW over named weights, whole or as DTensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from rear_scale.parallel.strategy import Kind, Strategy


class TorchStrategy(Strategy):
    """Optimizer, clipping and state by name. Subclasses set `model` and `optimizer`, and run the passes."""

    optimizer: torch.optim.Optimizer

    def grad_norm(self) -> Tensor:
        gradients = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
        self.norm = torch.nn.utils.get_total_norm(gradients)
        return _whole(self.norm)

    def step(self, lr: float) -> None:
        torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.cfg.optim.grad_clip, self.norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()

    def skip(self) -> None:
        self.optimizer.zero_grad()

    def tensors(self, kind: Kind) -> Iterator[tuple[str, Tensor]]:
        for name, weight in self.model.named_parameters():
            yield name, _whole((weight if kind == "param" else self.optimizer.state[weight][kind]).detach())

    def load_tensors(self, kind: Kind, read: Callable[[str], Tensor], optimizer_step: int) -> None:
        for name, weight in self.model.named_parameters():
            value = _like(weight, read(name))
            if kind == "param":
                weight.data.copy_(value)
                continue
            state = self.optimizer.state[weight]
            state[kind] = value
            # AdamW's fused kernel wants its step count on the device.
            step_device = weight.device if self.optimizer.defaults.get("fused") else "cpu"
            state["step"] = torch.tensor(float(optimizer_step), device=step_device)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(weight: nn.Parameter, value: Tensor) -> Tensor:
    """A full tensor on the CPU, placed as the weight is."""
    if isinstance(weight, DTensor):
        # Every rank has read the same file, so nothing needs to travel.
        return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)
    return value.to(weight.device)
