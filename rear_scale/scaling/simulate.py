"""One update of the real model under the real strategy in a world of any size, of which one rank is here and no tensor has
memory: what that rank holds and sends."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

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
    """Bytes of rank 0 in an update, its first apart: the optimizer's state is there before."""

    weights: int
    gradients: int  # at the end of the backward pass
    optimizer: int
    kept: int  # what the forward pass of a micro-batch leaves for the backward pass, gathered weights included
    peak: int  # the most that was there at once
    calls: dict[str, int]  # collectives by kind
    sent: dict[str, int]  # their payload in bytes


class Live(TorchDispatchMode):
    """Bytes of all storages that were made inside of it and are still there, and the most there ever were."""

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
        # FSDP frees and fills gathered weights in place.
        torch.UntypedStorage.resize_ = lambda storage, size: self._resized(storage, size)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self.resize
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
    """An update of a config's strategy on rank 0 of world_size ranks. Takes seconds per block, and next to no memory.

    Of an update's micro-steps it runs the first and the last, which reduces (`shortened`). Raises InputError for strategies
    whose engine needs tensors with memory.
    """
    row = facts.of(cfg.strategy)
    if not row.simulated:
        raise InputError(
            f"strategy={row.name} cannot be simulated: its engine needs tensors with memory. Use one of "
            + ", ".join(f"strategy={one}" for one in facts.names(lambda row: row.simulated))
        )
    if cfg.train.fp8:
        raise InputError(
            "train.fp8=true cannot be simulated: its products need a GPU. Simulate with train.fp8=false, which keeps as much"
        )
    # As on a GPU, whatever is here: its update, and its attention, which keeps no probabilities to drop some of.
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
    """What `simulate` found and what the formulas say of the same micro-steps: memory in GiB, payload of collectives in GiB."""
    found, cfg = simulate(cfg, world_size), shortened(cfg, world_size)
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
        "weights": found.weights,
        "gradients": found.gradients,
        "optimizer": found.optimizer,
        "total": found.peak,
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
            kind: {
                "calls": found.calls.get(kind, 0),
                "gib": found.sent.get(kind, 0) / _GIB,
                "formula_calls": traffic.calls[kind],
                "formula_gib": traffic.payload[kind] / _GIB,
            }
            for kind in sorted(found.calls.keys() | traffic.calls.keys())
        },
    }


def shortened(cfg: ExperimentConfig, world_size: int) -> ExperimentConfig:
    """The config with at most two micro-steps per update."""
    train = cfg.train
    batch = min(train.global_batch_size, 2 * world_size * train.micro_batch_size)
    return replace(cfg, train=replace(train, global_batch_size=batch))


@contextmanager
def fake_world(world_size: int) -> Iterator[World]:
    """Rank 0 of a process group that sends nothing. Raises RuntimeError where a process group is open."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield World(Ranks(0, 0, world_size, world_size, None, None, "single"), torch.device("cpu"))
    finally:
        dist.destroy_process_group()


@contextmanager
def _bool_masks() -> Iterator[None]:
    """Dropout that keeps one byte per element, as on a GPU. A CPU keeps its masks as numbers."""
    ordinary = nn.functional.dropout
    nn.functional.dropout = lambda x, p, training: torch.native_dropout(x, p, True)[0] if training and p else x
    try:
        yield
    finally:
        nn.functional.dropout = ordinary


def _build(cfg: ExperimentConfig, strategy: TorchStrategy) -> None:
    model = build_model(cfg)
    prepare_blocks(model, cfg)
    # It is there already, and fake weights cannot be moved.
    model.to = lambda device: model
    strategy.build(model)


def _update(cfg: ExperimentConfig, plan: Plan, world: World, strategy: TorchStrategy, live: Live) -> Simulated:
    B, N, tokenizer = cfg.train.micro_batch_size, cfg.tokenizer.num_tokens, cfg.tokenizer
    codebook = torch.zeros(tokenizer.codebook_size, tokenizer.codebook_dim)
    objective = Objective(cfg, plan, codebook, world.device)
    tokens = torch.zeros(B, N, dtype=torch.long)
    classes = torch.zeros(B, dtype=torch.long)  # one row of modulation per image, the most there can be
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
        optimizer=sum(_local(v).nbytes for state in states for kind, v in state.items() if kind != "step"),
        kept=kept[-1],
        peak=live.peak,
        calls=dict(sent.calls),
        sent=dict(sent.bytes),
    )


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor
