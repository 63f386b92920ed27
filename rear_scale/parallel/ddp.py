"""torch's DistributedDataParallel, or the plain model in a world of one; memory and communication per rank by formula.

DDP reduces gradients in buckets, while the backward pass goes on. The last bits of a sum over more than two ranks depend on the
gradient's place in its bucket, and DDP fills its buckets anew after the first backward pass, in the order in which that pass
completed the gradients. So that the first update after a start has the bits of an unbroken run, the first backward pass is one of
a fixed order whose gradients are discarded (`settle_buckets`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rear_scale.objective.terms import Feature
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
            engine = DistributedDataParallel(self.model, device_ids=device_ids, gradient_as_bucket_view=True)
            # The only buffer, a tied codebook, is the same on all ranks and never changes. torch 2.13 renamed the argument.
            engine.broadcast_buffers = False
            settle_buckets(engine, reduction_order(self.model))
            self.engine = engine

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


class _Parts(Protocol):
    """What a generator says of its parts."""

    features: Sequence[Feature]
    blocks: nn.ModuleList

    def heads(self) -> dict[str, nn.Module]: ...


def reduction_order(model: nn.Module) -> list[nn.Parameter]:
    """All parameters, nearly in the order in which a backward pass completes their gradients: from the last block to the first
    with the heads on their outputs, then all others.

    DDP reduces its buckets in order. A gradient that is complete before its turn waits, which costs little; one that is
    complete after its turn, as an embedding's would be anywhere but at the end, keeps all behind it waiting.
    """
    generator = cast("_Parts", model)
    # A head's gradient is complete with that of the earliest feature that passes through it.
    taps = {feature.head: feature.tap for feature in sorted(generator.features, key=lambda feature: -feature.tap)}
    modules: list[nn.Module] = []
    for done in reversed(range(len(generator.blocks) + 1)):
        modules += [head for name, head in generator.heads().items() if taps[name] == done]
        modules += [generator.blocks[done - 1]] if done else []
    ordered = [weight for module in modules for weight in reversed(list(module.parameters()))]
    return list(dict.fromkeys([*ordered, *reversed(list(model.parameters()))]))


class _Sum(nn.Module):
    """The sum of all weights, whose backward pass completes their gradients in the order of the weights."""

    def __init__(self, weights: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, start: Tensor) -> Tensor:
        # A backward pass begins with what the forward pass computed last.
        return functools.reduce(torch.add, [weight.sum() for weight in reversed(self.weights)], start)


def settle_buckets(engine: DistributedDataParallel, order: Sequence[nn.Parameter]) -> None:
    """Has DDP fill its buckets in this order, for good. No gradients stay. All ranks must call this."""
    model, engine.module = engine.module, _Sum(order)
    start = torch.zeros((), device=order[0].device)  # with GPUs, DDP fails without an input to move there
    engine(start).backward()
    model.zero_grad()
    with engine.no_sync():
        engine(start)  # a forward pass makes the buckets in the order of the backward pass before it
    engine.module = model


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


@functools.lru_cache(maxsize=8)
def _buckets(model: nn.Module) -> list[int]:
    """The number of elements of each gradient bucket, in the order of the backward pass."""
    weights = reduction_order(model)
    buckets, _ = torch.distributed._compute_bucket_assignment_by_size(
        [torch.empty(weight.shape, device="meta") for weight in weights], [_MIB, 25 * _MIB]
    )
    return [sum(weights[index].numel() for index in bucket) for bucket in buckets]
