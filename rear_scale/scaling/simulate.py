"""Simulation of an update: runs one training step of the real model and strategy as rank 0 of a fake process group with fake
tensors (which have no memory), and records peak memory and collectives."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rear_scale.config import ExperimentConfig, InputError, Plan, derive
from rear_scale.model import build_model
from rear_scale.model.recompute import prepare_blocks
from rear_scale.objective import Objective, Task
from rear_scale.parallel import facts, open_strategy
from rear_scale.parallel.communication import traffic_per_update
from rear_scale.parallel.counting import Collectives
from rear_scale.parallel.memory import memory_per_rank
from rear_scale.parallel.torch_strategy import TorchStrategy
from rear_scale.progress import progress
from rear_scale.world import Ranks, World

_GIB = 2**30


@dataclass(frozen=True)
class Simulated:
    """Memory and communication of rank 0 in a steady-state update (the optimizer state exists already), in bytes."""

    weights: int
    gradients: int  # at the end of the backward pass
    optimizer: int
    kept: int  # saved by the forward pass of a micro-batch for the backward pass, including gathered weights
    peak: int  # largest total at any time
    calls: dict[str, int]  # number of collectives by name
    sent: dict[str, int]  # payload of collectives by name


class Live(TorchDispatchMode):
    """A context that tracks the bytes of all storages created in it: those alive now (`now`), and their maximum (`peak`)."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, operation: Any, types: Any, inputs: Any = (), named: Any = None) -> Any:
        result = operation(*inputs, **(named or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(_local(leaf).untyped_storage())
        return result

    def __enter__(self) -> Live:
        self.resize = torch.UntypedStorage.resize_
        # FSDP frees and allocates gathered weights by resizing their storage.
        self.replaced = patch.object(
            torch.UntypedStorage, "resize_", lambda storage, size: self._resized(storage, size)
        )
        self.replaced.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.replaced.stop()
        super().__exit__(*error)

    def _resized(self, storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        resized = self.resize(storage, size)
        if storage._cdata in self.sizes:
            self._count(size - self.sizes[storage._cdata])
            self.sizes[storage._cdata] = size
        else:
            self._note(storage)
        return resized

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self._count(self.sizes[key])
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self._count(-self.sizes.pop(key))

    def _count(self, change: int) -> None:
        self.now += change
        self.peak = max(self.peak, self.now)


def simulate(cfg: ExperimentConfig, world_size: int) -> Simulated:
    """Memory and communication of an update of a config's strategy on rank 0 of world_size ranks. Takes seconds per block, and
    little memory.

    At most two micro-steps are run: a first, and the last, which reduces gradients (`shortened`). Raises InputError for
    strategies whose engine cannot run on fake tensors.
    """
    row = facts.of(cfg.strategy)
    if not row.simulated:
        raise InputError(
            f"strategy={row.name} cannot be simulated: its engine does not run on fake tensors. Use one of "
            + ", ".join(f"strategy={one}" for one in facts.names(lambda row: row.simulated))
        )
    if cfg.train.fp8:
        raise InputError(
            "train.fp8=true cannot be simulated: its products need a GPU. Simulate with train.fp8=false, which needs the same "
            "memory"
        )
    # Simulate the GPU's kernels: the fused optimizer, and attention that does not store its probabilities (attention dropout
    # would store them on the CPU).
    cfg = replace(shortened(cfg, world_size), optim=replace(cfg.optim, backend="torch_fused"))
    cfg = replace(cfg, model=replace(cfg.model, attn_dropout=0.0, kernel="sdpa"))
    plan = derive(cfg, world_size, None)
    with fake_world(world_size) as world:
        strategy = open_strategy(cfg, plan, world)
        assert isinstance(strategy, TorchStrategy)
        strategy.prepare()
        with _bool_masks(), FakeTensorMode(allow_non_fake_inputs=True), Live() as live:
            _build(cfg, strategy)
            return _update(cfg, plan, world, strategy, live)


def beside_formula(cfg: ExperimentConfig, world_size: int) -> dict[str, Any]:
    """The results of `simulate` beside those of the formulas for the same micro-steps: memory and payload in GiB."""
    simulated, cfg = simulate(cfg, world_size), shortened(cfg, world_size)
    accumulation = derive(cfg, world_size, None).accumulation
    memory = memory_per_rank(cfg, world_size, accumulation)
    traffic = traffic_per_update(cfg, world_size, accumulation)
    formula = {
        "weights": memory.weights,
        "gradients": memory.gradients + memory.kept_gradients,
        "optimizer": memory.optimizer,
        "total": memory.peak,
    }
    run = {
        "weights": simulated.weights,
        "gradients": simulated.gradients,
        "optimizer": simulated.optimizer,
        "total": simulated.peak,
    }
    return {
        "strategy": facts.of(cfg.strategy).name,
        "checkpointing": cfg.train.activation_checkpointing,
        "world_size": world_size,
        "micro_batch_size": cfg.train.micro_batch_size,
        "micro_steps": accumulation,
        "memory_gib": {part: size / _GIB for part, size in run.items()},
        "formula_memory_gib": {part: size / _GIB for part, size in formula.items()},
        "collectives": {
            collective: {
                "calls": simulated.calls.get(collective, 0),
                "gib": simulated.sent.get(collective, 0) / _GIB,
                "formula_calls": traffic.calls[collective],
                "formula_gib": traffic.payload[collective] / _GIB,
            }
            for collective in sorted(simulated.calls.keys() | traffic.calls.keys())
        },
    }


def shortened(cfg: ExperimentConfig, world_size: int) -> ExperimentConfig:
    """The config with at most two micro-steps per update."""
    train = cfg.train
    batch = min(train.global_batch_size, 2 * world_size * train.micro_batch_size)
    return replace(cfg, train=replace(train, global_batch_size=batch))


@contextmanager
def fake_world(world_size: int) -> Iterator[World]:
    """The World of rank 0 in a fake process group, which sends nothing. Raises RuntimeError where a process group exists."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield World(Ranks(0, 0, world_size, world_size, None, None, "single"), torch.device("cpu"))
    finally:
        dist.destroy_process_group()


@contextmanager
def _bool_masks() -> Iterator[None]:
    """A context in which dropout saves masks of one byte per element, as on a GPU. CPU kernels save masks as floats."""

    def dropout(x: Tensor, p: float, training: bool) -> Tensor:
        return torch.native_dropout(x, p, True)[0] if training and p else x

    with patch.object(nn.functional, "dropout", dropout):
        yield


def _build(cfg: ExperimentConfig, strategy: TorchStrategy) -> None:
    model = build_model(cfg)
    prepare_blocks(model, cfg)
    # The model is on the device already, and fake weights cannot be moved.
    with patch.object(model, "to", lambda device: model):
        strategy.build(model)


def _update(cfg: ExperimentConfig, plan: Plan, world: World, strategy: TorchStrategy, live: Live) -> Simulated:
    B, N, tokenizer = cfg.train.micro_batch_size, cfg.tokenizer.num_tokens, cfg.tokenizer
    codebook = torch.zeros(tokenizer.codebook_size, tokenizer.codebook_dim)
    objective = Objective(cfg, plan, codebook, world.device)
    tokens = torch.zeros(B, N, dtype=torch.long)
    classes = torch.zeros(B, dtype=torch.long)  # with per-image modulation, the largest case
    kept: list[int] = []

    def compute(forward: nn.Module) -> tuple[Tensor, Tensor]:
        before = live.now
        result = objective.loss(forward(tokens, classes, None), Task(tokens, tokens, None, None))
        kept.append(live.now - before)
        return result

    live.peak = live.now
    with Collectives() as sent:
        with progress("simulate", plan.accumulation, "micro-step", show=True) as bar:
            for micro_step in range(plan.accumulation):
                strategy.forward_backward(compute, micro_step)
                bar.update()
        gradients = sum(_local(w.grad).nbytes for w in strategy.model.parameters() if w.grad is not None)
        strategy.grad_norm()
        strategy.step(cfg.optim.lr)
    weights = list(strategy.model.parameters())
    states = [strategy.optimizer.state[weight] for weight in weights]
    return Simulated(
        weights=sum(_local(weight).nbytes for weight in weights),
        gradients=gradients,
        optimizer=sum(_local(v).nbytes for state in states for name, v in state.items() if name != "step"),
        kept=kept[-1],
        peak=live.peak,
        calls=dict(sent.calls),
        sent=dict(sent.bytes),
    )


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor
