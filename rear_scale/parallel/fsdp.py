"""Strategies with torch's FSDP2, and their memory and communication per rank by formula. The one file that imports FSDP2.

fsdp2 has a mesh of one axis, over which everything is sharded; hsdp has two axes: it shards inside a group of ranks and
replicates over the groups.

Differences between the engine and the usual formulas of memory.py and communication.py:

- Its float32 shards are weights and master weights at once; deferred gradients are unsharded and float32.
- It pads each parameter to a multiple of the ranks along the sharded dimension, and keeps the root's parameters (embeddings,
  positions, output) gathered between forward and backward pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from rear_scale.optim.whole_matrix import Spread
from rear_scale.parallel import facts
from rear_scale.parallel.communication import FP32, Traffic
from rear_scale.parallel.memory import Memory, Update, elements, elements_padded, shard_dimension
from rear_scale.parallel.strategy import Compute, StateName
from rear_scale.parallel.torch_strategy import TorchStrategy
from rear_scale.parallel.whole_matrices import Sharded, add_exchanges

# The output of a linear layer on [B, S, D] is a view. The warning is about changing it in place, which nothing here does.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


class FSDPStrategy(TorchStrategy):
    """Sharded float32 weights, gradients and optimizer state. In bf16, weights are gathered and used in bf16, and gradients are
    reduced in float32.

    FSDP units (gathered together): each block, each head of a loss term, and the root (embeddings, positions, output).
    """

    def build(self, model: nn.Module) -> None:
        self.sharded = wrap(model.to(self.world.device), self.mesh, self.cfg.train.precision, self._reshard)
        self.model = self.engine = model  # the same object
        self.prepare_optimizer()

    @property
    def _reshard(self) -> bool:
        return self.cfg.strategy.reshard_after_forward

    def spread(self) -> Spread:
        return Sharded(self.mesh)

    def prepare(self) -> None:
        # Creating a mesh reads values of tensors, which fake tensors do not have; so it is created before `build` runs on them.
        _ = self.mesh

    @cached_property
    def mesh(self) -> DeviceMesh:
        """The device mesh: all ranks in one row, or one row per replica. Creating it is collective."""
        device_type, strategy = self.world.device.type, self.cfg.strategy
        if not facts.of(strategy).replicates:
            return init_device_mesh(device_type, (self.world.size,), mesh_dim_names=("shard",))
        shape = (strategy.replicas, self.world.size // strategy.replicas)
        # Consecutive ranks form a sharding group, because they are on one machine.
        return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))

    def evaluate(self, compute: Compute) -> Tensor:
        statistics = super().evaluate(compute)
        # After a forward pass the root keeps its weights gathered for the backward pass, which does not follow here.
        self._shard_weights()
        return statistics

    def tensors(self, state_name: StateName) -> Iterator[tuple[str, Tensor]]:
        self._shard_weights()  # weights may still be gathered after a call of the model outside of this class
        return super().tensors(state_name)

    def load_tensors(self, state_name: StateName, read: Callable[[str], Tensor], optimizer_step: int) -> None:
        self._shard_weights()
        super().load_tensors(state_name, read, optimizer_step)

    def _shard_weights(self) -> None:
        """Frees gathered weights, so that `parameters` returns the sharded ones again, to which optimizer states belong."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def forward_backward(self, compute: Compute, micro_step: int) -> Tensor:
        last = micro_step == self.plan.accumulation - 1
        deferred = self.cfg.strategy.defer_reduction
        # With deferred reduction, gradients stay unsharded until the last micro-step and are reduced once per update.
        self.sharded.set_requires_gradient_sync(last or not deferred)
        # Between replicas, gradients are all-reduced once per update in any case.
        self.sharded.set_requires_all_reduce(last)
        self.sharded.set_is_last_backward(last)
        if not self._reshard:
            # Keep the gathered weights until the last micro-step: they do not change before the update.
            self.sharded.set_reshard_after_backward(last)
        loss, statistics = compute(self.model)
        (loss / self.plan.accumulation).backward()
        return statistics


def wrap(model: nn.Module, mesh: DeviceMesh, precision: str, reshard_after_forward: bool) -> FSDPModule:
    """Shards a model in place over the ranks of a mesh; its parameters become DTensors under their own names."""
    # cast_forward_inputs=False: activations are in bfloat16 already, and FSDP2 would also cast AliTok's rotary angles, with an
    # error of 1.9e-3.
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    ranks = mesh.size(mesh.ndim - 1)

    def shard(module: nn.Module, reshard: bool) -> FSDPModule:
        return fully_shard(
            module,
            mesh=mesh,
            mp_policy=policy if precision == "bf16" else MixedPrecisionPolicy(),
            shard_placement_fn=lambda weight: Shard(shard_dimension(weight, ranks)),
            reshard_after_forward=reshard,
        )

    for unit in units(model):
        shard(unit, reshard_after_forward)
    # The root's parameters are not resharded after the forward pass, because the backward pass uses them first.
    return shard(model, False)


class _Parts(Protocol):
    """What a generator says of its parts."""

    blocks: Iterable[nn.Module]

    def separate_heads(self) -> list[nn.Module]: ...


def units(model: nn.Module) -> list[nn.Module]:
    """The FSDP units (modules gathered together) except the root: each block, and each head that only one feature uses."""
    parts = cast("_Parts", model)
    return [*parts.blocks, *parts.separate_heads()]


def memory(update: Update) -> Memory:
    """Bytes of the rank that holds most under FSDP2, by part."""
    cfg, itemsize, model = update.cfg, update.itemsize, update.model
    ranks = _sharding_ranks(update)
    shard = elements_padded(model, ranks) // ranks
    psi, block = elements(model), elements(model.blocks[0])
    root = psi - cfg.model.depth * block
    # Peak of the backward pass: float32 gradients of the previous block while they are reduced, weights and gradients of the
    # current block, and prefetched weights of the next one. Activations of the finished blocks are freed by then.
    freed = (2 if cfg.train.activation_checkpointing == "none" else 1) * update.block_activations
    passing = max(0, FP32 * block + itemsize * block - freed)
    blocks = 2 * itemsize * block if cfg.strategy.reshard_after_forward else itemsize * (psi - root)
    deferring = update.accumulation > 1 and cfg.strategy.defer_reduction
    return Memory(
        FP32 * shard,
        update.optimizer_bytes(shard),
        gradients=FP32 * shard,
        deferred=FP32 * psi if deferring else 0,
        gathered=itemsize * root + blocks + passing,
    )


def traffic(update: Update) -> Traffic:
    """Collectives of one update under FSDP2 and the bytes that they move."""
    strategy, model, itemsize, sent = update.cfg.strategy, update.model, update.itemsize, Traffic()
    ranks = _sharding_ranks(update)
    sizes = [elements_padded(unit, ranks) for unit in units(model)]
    root = elements_padded(model, ranks) - sum(sizes)
    gathers = 2 * update.accumulation if strategy.reshard_after_forward else 1
    reductions = 1 if strategy.defer_reduction else update.accumulation
    for size in sizes:
        sent.add("all_gather", size, itemsize, gathers)
    sent.add("all_gather", root, itemsize, update.accumulation if strategy.reshard_after_forward else 1)
    for size in (*sizes, root):
        sent.add("reduce_scatter", size, FP32, reductions)
        if ranks < update.world_size:
            sent.add("all_reduce", size / ranks, FP32)
    add_exchanges(sent, update, ranks)
    return sent


def _sharding_ranks(update: Update) -> int:
    """The number of ranks over which one copy of the model is sharded."""
    strategy = update.cfg.strategy
    return update.world_size // (strategy.replicas if facts.of(strategy).replicates else 1)
