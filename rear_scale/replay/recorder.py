"""Values of a step by module: outputs, gradients of outputs, weights, their gradients and updates, as numbers and digests.

Hooks read tensors and change none, so a step computes the same bits with them and without.
"""

# B images of a micro-batch

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rear_scale.objective import MicroBatch, Objective, Task
from rear_scale.parallel.strategy import Strategy
from rear_scale.run.fingerprints import digest
from rear_scale.world import World

ROOT = "model"  # the name of the whole model among its modules


class Key(NamedTuple):
    """The place of a value: the same in another replay of the step in the same layout of ranks and micro-steps."""

    order: int  # of its computation in the step, counted on each rank
    rank: int
    micro_step: int  # -1 = of the whole step
    name: str  # of a module, parameter, input or term of the loss
    what: str  # input | weight | output | loss | gradient (of an output) | weight gradient | update


@dataclass(frozen=True)
class Row:
    """One value in numbers: rms and largest magnitude of its finite entries, nonfinite is the fraction of the others."""

    step: int
    key: Key
    shape: tuple[int, ...]
    rms: float
    largest: float
    nonfinite: float
    first: tuple[int, ...] | None  # index of the first entry that is not finite
    digest: str


@dataclass
class Recorder:
    """Records the steps between `begin` and the end of the `with` block of `watching`.

    only_faults: keep rows with entries that are not finite, and no digests. wanted: keys whose tensors are kept in `captured`.
    """

    world: World
    only_faults: bool = False
    wanted: Collection[Key] = ()
    rows: list[Row] = field(default_factory=list)
    captured: dict[Key, Tensor] = field(default_factory=dict)
    batches: list[MicroBatch] = field(default_factory=list)  # of the current step, on the CPU
    lost: tuple[int, list[str]] | None = None  # index in its micro-batch and terms of the first sample with such a loss
    _passing: bool = False
    _step: int = 0
    _micro_step: int = -1
    _order: int = 0
    _before: dict[str, Tensor] = field(default_factory=dict)

    @contextmanager
    def watching(self, strategy: Strategy, *, compiled: bool) -> Iterator[None]:
        """Hooks on every module of the strategy's model, but not inside of compiled blocks, whose graph they would change."""
        handles = []
        for name, module in strategy.model.named_modules():
            if compiled and name.startswith("blocks.") and name.count(".") > 1:
                continue
            handles.append(module.register_forward_hook(self._hook(name or ROOT)))
        handles.append(strategy.model.register_forward_pre_hook(self._inputs))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def begin(self, step: int, strategy: Strategy, objective: Objective, batches: list[MicroBatch]) -> None:
        """Notes weights, buffers and codebook before a step. All ranks must call this and the other methods."""
        self._step, self._order, self._micro_step, self.batches, self.lost = step, 0, -1, batches, None
        self._before = {}
        self._parameters("weight", strategy.tensors("param"), keep=not self.only_faults)
        for name, buffer in strategy.model.named_buffers():
            self._note("weight", name, buffer)
        self._note("input", "codebook", objective.directions)

    def micro_step(self, number: int, batch: MicroBatch) -> None:
        """Notes the samples of a micro-step, whose passes follow."""
        self._micro_step = number
        for name, tensor in (("sample ids", batch.ids), ("tokens", batch.tokens), ("classes", batch.classes)):
            self._note("input", name, tensor)

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """The block in which hooks note outputs: a backward pass may compute blocks again."""
        self._passing = True
        try:
            yield
        finally:
            self._passing = False

    def loss(self, objective: Objective, output: dict[str, Tensor], task: Task, statistics: Tensor) -> None:
        """Notes the loss of a micro-step and its terms; where one is not finite, finds the sample with `only_faults`."""
        for name, value in zip(objective.names, statistics, strict=True):
            if not value.isnan() or _is_there(objective, name, output):
                self._note("loss", name, value)
        if self.only_faults and self.lost is None and not statistics[0].isfinite():
            self.lost = _first_lost(objective, output, task)

    def gradients(self, strategy: Strategy) -> None:
        """Notes the mean gradient of every weight, before the update."""
        self._micro_step = -1
        self._parameters("weight gradient", strategy.gradients())

    def updates(self, strategy: Strategy) -> None:
        """Notes the difference of every weight after the step from that before it."""
        if self.only_faults:
            return
        for number, (name, weight) in enumerate(strategy.tensors("param")):
            own = number % self.world.size == self.world.rank
            self._note("update", name, weight.cpu().float() - self._before.pop(name) if own else None)

    def _parameters(self, what: str, named: Iterable[tuple[str, Tensor]], keep: bool = False) -> None:
        # Every rank has all of them; each notes some, so that none is noted twice.
        for number, (name, tensor) in enumerate(named):
            own = number % self.world.size == self.world.rank
            self._note(what, name, tensor if own else None)
            if own and keep:
                self._before[name] = tensor.to("cpu", torch.float32, copy=True)

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not self._passing:
                return
            for label, tensor in _tensors(name, output):
                self._note("output", label, tensor)
                if tensor.requires_grad:
                    tensor.register_hook(self._gradient_hook(label))

        return hook

    def _gradient_hook(self, label: str) -> Any:
        def hook(gradient: Tensor) -> None:
            self._note("gradient", label, gradient)

        return hook

    def _inputs(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self._passing:
            for name, tensor in zip(("context", "classes of the pass", "class index", "order"), inputs, strict=True):
                self._note("input", name, tensor)

    @torch.no_grad()
    def _note(self, what: str, name: str, tensor: Tensor | None) -> None:
        """tensor: None = another rank notes it, or there is none; the order of the others is the same all the same."""
        key = Key(self._order, self.world.rank, self._micro_step, name, what)
        self._order += 1
        if tensor is None or (self.only_faults and bool(tensor.isfinite().all())):
            return
        if key in self.wanted:
            self.captured[key] = tensor.detach().to("cpu", copy=True)
        self.rows.append(
            Row(
                self._step,
                key,
                tuple(tensor.shape),
                *_numbers(tensor.detach()),
                "" if self.only_faults else digest(tensor),
            )
        )


def _tensors(name: str, output: Any) -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors in a module's output, each with a label."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield name, output
    elif isinstance(output, dict):
        for key, value in output.items():
            yield from _tensors(f"{name}[{key}]", value)
    elif isinstance(output, (tuple, list)):
        for key, value in enumerate(output):
            yield from _tensors(f"{name}[{key}]", value)


def _numbers(tensor: Tensor) -> tuple[float, float, float, tuple[int, ...] | None]:
    """rms and largest magnitude of the finite entries, the fraction of the others, and the index of the first of them."""
    if not tensor.numel():
        return 0.0, 0.0, 0.0, None
    finite = tensor.isfinite()
    lost = tensor.numel() - int(finite.sum())
    values = tensor.double().where(finite, 0.0)
    known = max(1, tensor.numel() - lost)
    rms, largest = math.sqrt(float(values.square().sum()) / known), float(values.abs().max())
    return rms, largest, lost / tensor.numel(), first_index(~finite) if lost else None


def first_index(mask: Tensor) -> tuple[int, ...]:
    """The index of the first true entry."""
    at = int(mask.flatten().nonzero()[0, 0])
    return tuple(int(part) for part in torch.unravel_index(torch.tensor(at), mask.shape))


def _is_there(objective: Objective, name: str, output: dict[str, Tensor]) -> bool:
    """Whether the model's output has the features of the term that a statistic belongs to: NaN means something then."""
    for term in objective.terms:
        if name == f"loss_{term.name}" or name in term.reports:
            return all(feature in output for feature in term.reads)
    return True


def _first_lost(objective: Objective, output: dict[str, Tensor], task: Task) -> tuple[int, list[str]] | None:
    """The first sample whose own loss is not finite, and the terms that are not; None where each loss alone is finite."""
    for index in range(len(task.tokens)):
        one = slice(index, index + 1)
        order = task.order if task.order is None or len(task.order) == 1 else task.order[one]
        alone = Task(task.context[one], task.tokens[one], order, None if task.replaced is None else task.replaced[one])
        features = {name: value[one] for name, value in output.items()}
        _, statistics = objective.loss(features, alone)
        names = [
            name
            for name, value in zip(objective.names, statistics.tolist(), strict=True)
            if not math.isfinite(value) and name != "loss" and _is_there(objective, name, features)
        ]
        if names:
            return index, names
    return None


def totals(rows: Iterable[Row]) -> tuple[float, float, float]:
    """rms, largest and non-finite fraction of several rows together."""
    squares, entries, lost, largest = 0.0, 0, 0.0, 0.0
    for row in rows:
        size = math.prod(row.shape)
        lost += row.nonfinite * size
        squares += row.rms**2 * (size - row.nonfinite * size)
        entries += size
        largest = max(largest, row.largest)
    return math.sqrt(squares / max(1.0, entries - lost)), largest, lost / max(1, entries)


def names_of(rows: Iterable[Row], *what: str) -> list[str]:
    """The names of rows of some kinds, in the order of their first appearance."""
    return list(Counter(row.key.name for row in rows if row.key.what in what))
