"""Steps of a run, made again from one of its checkpoints: the same samples, noise, dropout masks and updates."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rear_scale import rng
from rear_scale.checkpoint.folder import Checkpoint
from rear_scale.config import Plan
from rear_scale.model.compiled import compiles_blocks
from rear_scale.objective import MicroBatch, Objective
from rear_scale.replay.moment import Moment, offset_of
from rear_scale.replay.recorder import Recorder
from rear_scale.shards.reader import TokenSet
from rear_scale.train.loop import build_strategy, learning_rate, load_model
from rear_scale.train.setup import data_order
from rear_scale.world import World


@dataclass(frozen=True)
class Result:
    """The numbers of a step under their names in metrics.jsonl: those of the objective over all ranks, grad_norm and lr."""

    step: int
    numbers: dict[str, float]

    @property
    def finite(self) -> bool:
        return math.isfinite(self.numbers["loss"]) and math.isfinite(self.numbers["grad_norm"])


class Replay:
    """A run from one of its checkpoints on (or from its beginning), step by step. All ranks must call its methods."""

    def __init__(
        self,
        moment: Moment,
        plan: Plan,
        world: World,
        tokens: TokenSet,
        codebook: Tensor,
        checkpoint: Checkpoint | None,
    ) -> None:
        cfg = moment.cfg
        self.moment, self.cfg, self.plan, self.world, self.tokens = moment, cfg, plan, world, tokens
        self.done = checkpoint.step if checkpoint else 0
        self.offset = offset_of(moment, checkpoint)
        self.objective = Objective(cfg, plan, codebook, world.device)
        self.order = data_order(cfg, tokens, self.objective)
        if world.device.type == "cpu" and moment.threads is not None:
            torch.set_num_threads(moment.threads)
        self.strategy = build_strategy(
            cfg, plan, world, load_model(cfg, world, codebook, checkpoint), checkpoint
        )  # as training

    def step(self, recorder: Recorder | None = None, *, skip: bool = False) -> Result:
        """The next step. An update is skipped where loss or gradient are not finite on any rank, and with `skip`."""
        step, strategy, objective, world = self.done + 1, self.strategy, self.objective, self.world
        batches = self.batches(step)
        if recorder is not None:
            recorder.begin(step, strategy, objective, batches)
        compiled = compiles_blocks(self.cfg, world.device)
        with recorder.watching(strategy, compiled=compiled) if recorder is not None else nullcontext():
            statistics = torch.zeros(len(objective.names), device=world.device)
            for micro_step, batch in enumerate(batches):
                torch.manual_seed(self._seed(step, micro_step))
                passes = _Passes(objective, batch.to(world.device), step, recorder)
                if recorder is not None:
                    recorder.micro_step(micro_step, batch)
                statistics += strategy.forward_backward(passes, micro_step) / self.plan.accumulation
        norm = strategy.grad_norm()
        rows = world.table(statistics.tolist(), [norm])
        means = dict(zip(objective.names, rows.mean(0).tolist(), strict=False))
        loss_at = objective.names.index("loss")
        finite = bool(rows[:, loss_at].isfinite().all()) and bool(rows[:, -1].isfinite().all())
        if recorder is not None:
            recorder.gradients(strategy)
        lr = learning_rate(self.cfg, self.plan, step)
        if finite and not skip:
            strategy.step(lr)
        else:
            strategy.skip()
        if recorder is not None:
            recorder.updates(strategy)
        self.done = step
        return Result(step, {**means, "grad_norm": rows[world.rank, -1].item(), "lr": lr})

    def batches(self, step: int) -> list[MicroBatch]:
        """The micro-batches of this rank in a step, on the CPU."""
        of_rank = self.order.rank_batches(step + self.offset, self.world.rank, self.world.size, self.plan.accumulation)
        return [self.objective.micro_batch(*self.tokens.rows(ids), ids, epochs) for ids, epochs in of_rank]

    def _seed(self, step: int, micro_step: int) -> int:
        # The masks of a micro-batch belong to its place among the ranks and micro-steps of the run, which may be others here.
        place = self.world.rank * self.plan.accumulation + micro_step
        rank, number = divmod(place, self.moment.accumulation)
        return rng.fold(self.cfg.run.seed, rng.Purpose.DEVICE_SEED, step, number, rank)


@dataclass
class _Passes:
    """Forward pass and loss of one micro-batch, as training has them."""

    objective: Objective
    batch: MicroBatch
    step: int
    recorder: Recorder | None

    def __call__(self, forward: nn.Module) -> tuple[Tensor, Tensor]:
        batch, recorder = self.batch, self.recorder
        task = self.objective.task(batch, self.step)
        with recorder.forward_pass() if recorder is not None else nullcontext():
            output = forward(task.context, batch.classes, batch.class_index, task.order)
        loss, statistics = self.objective.loss(output, task)
        if recorder is not None:
            recorder.loss(self.objective, output, task, statistics)
        return loss, statistics
