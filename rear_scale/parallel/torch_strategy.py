"""The base class of the strategies of torch itself: an optimizer over named weights, which are tensors or DTensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from rear_scale.optim.groups import optimizers_in, prepare_states, set_rates
from rear_scale.optim.posthoc_ema import averages, new_fractions
from rear_scale.optim.whole_matrix import Spread, WholeMatrixOptimizer, alone
from rear_scale.parallel.strategy import Compute, StateName, Strategy


class TorchStrategy(Strategy):
    """Optimizer, clipping and named states for torch's engines. Subclasses set `model` and `engine`, and run the passes."""

    engine: nn.Module  # the module to call: the model or its wrapper
    optimizer: torch.optim.Optimizer

    def spread(self) -> Spread:
        """How updates of whole matrices are computed: here, where every rank has all weights and no other rank is asked."""
        return alone

    def prepare(self) -> None:
        """Creates what `build` needs from the process group. Called first where `build` runs on fake tensors."""

    def grad_norm(self) -> Tensor:
        gradients = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
        self.norm = torch.nn.utils.get_total_norm(gradients)
        return _whole(self.norm)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        for name, weight in self.model.named_parameters():
            if weight.grad is not None:
                yield name, _whole(weight.grad)

    def step(self, lr: float) -> None:
        torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.cfg.optim.grad_clip, self.norm)
        set_rates(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1
        self._average()

    def skip(self) -> None:
        self.optimizer.zero_grad()

    @torch.no_grad()
    def evaluate(self, compute: Compute) -> Tensor:
        self.model.eval()
        with self.compute_precision():
            _, statistics = compute(self.engine)
        self.model.train()
        return statistics

    def compute_precision(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def prepare_optimizer(self) -> None:
        """Creates the optimizer with its states. Averages of the weights are more states, so that they are sharded and stored
        alike."""
        self.optimizer = self.make_optimizer(self.model)
        for one in optimizers_in(self.optimizer):
            if isinstance(one, WholeMatrixOptimizer):
                one.spread = self.spread()
        for name, weight in self.model.named_parameters():
            prepare_states(self.optimizer, self.rules[name], weight, 0)
            for average in averages(self.cfg.optim):
                self.optimizer.state[weight][average] = weight.detach().clone()

    @torch.no_grad()
    def _average(self) -> None:
        weights = list(self.model.parameters())
        for average, fraction in new_fractions(self.cfg.optim, self.updates).items():
            values = [_local(self.optimizer.state[weight][average]) for weight in weights]
            torch._foreach_lerp_(values, [_local(weight) for weight in weights], fraction)

    def tensors(self, state_name: StateName) -> Iterator[tuple[str, Tensor]]:
        for name, weight in self.parameters_with(state_name):
            yield name, _whole((weight if state_name == "param" else self.optimizer.state[weight][state_name]).detach())

    def load_tensors(self, state_name: StateName, read: Callable[[str], Tensor], optimizer_step: int) -> None:
        self.updates = optimizer_step
        for name, weight in self.parameters_with(state_name):
            value = _like(weight, read(name))
            if state_name == "param":
                weight.data.copy_(value)
                continue
            self.optimizer.state[weight][state_name] = value
            prepare_states(self.optimizer, self.rules[name], weight, optimizer_step)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _like(weight: nn.Parameter, value: Tensor) -> Tensor:
    """The value (a full CPU tensor) on the weight's device, sharded as the weight is. No communication: every rank has read
    the same file."""
    if not isinstance(weight, DTensor):
        return value.to(weight.device)
    # DTensors are sharded as torch.chunk splits: the last ranks may have smaller shards, or none.
    axis, placement = next((axis, found) for axis, found in enumerate(weight.placements) if isinstance(found, Shard))
    chunks = value.chunk(weight.device_mesh.size(axis), placement.dim)
    place = weight.device_mesh.get_local_rank(axis)
    like = torch.zeros_like(weight)
    if place < len(chunks):
        _local(like).copy_(chunks[place])
    return like
