"""The training loop, for any strategy."""

# B images of a micro-batch

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rear_scale import rng
from rear_scale.config import ExperimentConfig, InputError, Plan, check_resumable, to_dict
from rear_scale.model import build_model
from rear_scale.model.attention import choose_kernel, use_kernel
from rear_scale.objective import MicroBatch, Objective, schedules
from rear_scale.parallel import checkpoint, open_strategy
from rear_scale.parallel.strategy import Strategy
from rear_scale.progress import progress, say
from rear_scale.shards.reader import BatchOrder, TokenSet
from rear_scale.train import start
from rear_scale.train.run_folder import RunFolder, commit, versions
from rear_scale.train.telemetry import Telemetry
from rear_scale.world import World


@dataclass
class Hooks:
    """What else happens during training. Every rank calls them, in step with the others."""

    on_step: list[Callable[[int, nn.Module], None]] = field(default_factory=list)  # (updates done, model)
    on_checkpoint: list[Callable[[int, Path], None]] = field(default_factory=list)  # (updates done, folder)


def train(cfg: ExperimentConfig, plan: Plan, world: World, tokens: TokenSet, codebook: Tensor, hooks: Hooks) -> int:
    """Trains to plan.last_step, from the newest checkpoint of run.dir if there is one. Returns the steps done here.

    All ranks must call this. Raises InputError when the run folder belongs to another run or process, and
    FloatingPointError when the loss or the gradient is not finite; the last checkpoint is kept.
    """
    run = RunFolder(cfg.run.dir)
    with ExitStack() as stack:
        stack.enter_context(world.alone(*run.lock))
        found = checkpoint.newest(run.checkpoints, world, report=say)
        if found is None and cfg.train.init_from is not None:
            found = start.take_over(cfg, tokens, run, world)
        done = found.step if found else 0
        if found:
            _check_same_run(cfg, tokens, found)
        if done >= plan.last_step:
            if world.is_main:
                if run.state() != "done":
                    # Killed between the last checkpoint and its word for it.
                    run.set_status("done", done, _why_done(plan))
                say(f"{run.path} is complete: {done} of {plan.last_step} steps")
            return 0
        if world.is_main:
            run.start(cfg, world)
            run.cut_metrics(done)
            run.set_status("running", done, "")
        try:
            _train_from(cfg, plan, world, tokens, codebook, hooks, run, found)
        except BaseException as error:
            if world.is_main:
                run.set_status("failed", _last_step(run), f"{type(error).__name__}: {error}")
                if isinstance(error, KeyboardInterrupt):
                    say(f"stopped; the same command continues from step {_last_step(run)}")
            raise
        if world.is_main:
            run.set_status("done", plan.last_step, _why_done(plan))
        return plan.last_step - done


def _train_from(
    cfg: ExperimentConfig,
    plan: Plan,
    world: World,
    tokens: TokenSet,
    codebook: Tensor,
    hooks: Hooks,
    run: RunFolder,
    found: checkpoint.Checkpoint | None,
) -> None:
    strategy = _build(cfg, plan, world, codebook, found)
    model = strategy.model
    objective = Objective(cfg, plan, codebook, world.device)
    first = found.step + 1 if found else 1
    batches = _Prefetcher(cfg, plan, world, tokens, objective, first)
    bar = progress(cfg.run.name, plan.last_step, "step", done=first - 1, show=world.is_main)
    with Telemetry(cfg, plan, world, run) as telemetry, bar, batches:
        for step in range(first, plan.last_step + 1):
            started = time.perf_counter()
            micro_batches = next(batches)
            telemetry.waited(time.perf_counter() - started)

            statistics = torch.zeros(5, device=world.device)
            for micro_step, batch in enumerate(micro_batches):
                # Dropout masks belong to the place in the run, so that no generator state needs saving.
                torch.manual_seed(rng.fold(cfg.run.seed, rng.Purpose.DEVICE_SEED, step, micro_step, world.rank))
                compute = _Computation(objective, batch.to(world.device), step)
                statistics += strategy.forward_backward(compute, micro_step) / plan.accumulation
            grad_norm = strategy.grad_norm().item()
            _check_finite(grad_norm, statistics, step, world)
            lr = schedules.learning_rate(
                step,
                peak=cfg.optim.lr,
                end=cfg.optim.end_lr,
                warmup_steps=cfg.optim.warmup_steps,
                total_steps=plan.total_steps,
                form=cfg.optim.schedule,
            )
            strategy.step(lr)

            telemetry.stepped()
            if telemetry.due(step):
                metrics = telemetry.log(step, statistics, grad_norm, lr, objective.noise_max(step))
                bar.set_postfix(
                    loss=f"{metrics['loss']:.4f}", images_per_s=f"{metrics['images_per_s']:.0f}", refresh=False
                )
            for on_step in hooks.on_step:
                on_step(step, model)
            if step % cfg.checkpoint.every_steps == 0 or step == plan.last_step:
                _save(cfg, run, world, tokens, strategy, step, hooks)
            bar.update()


@dataclass
class _Computation:
    """Forward pass and loss of one micro-batch, for the strategy to run under its own precision and engine."""

    objective: Objective
    batch: MicroBatch
    step: int

    def __call__(self, forward: nn.Module) -> tuple[Tensor, Tensor]:
        batch, task = self.batch, self.objective.task(self.batch, self.step)
        output = forward(task.context, batch.classes, batch.rows, task.order)
        return self.objective.loss(output, task)


def _build(
    cfg: ExperimentConfig, plan: Plan, world: World, codebook: Tensor, found: checkpoint.Checkpoint | None
) -> Strategy:
    """The strategy around a model with its first or its saved weights."""
    model = build_model(cfg)
    kernel = choose_kernel(cfg.model.kernel, world.device, cfg.train.precision)
    use_kernel(model, kernel)
    model.set_codebook(codebook)
    if world.is_main:
        say(f"attention kernel: {kernel}")
    if found is None:
        start.first_weights(cfg, model, world)
    else:
        # Before the engine takes over: the copies that it makes are right from the start.
        checkpoint.load_weights(found, model)
    strategy = open_strategy(cfg, plan, world)
    strategy.build(model)
    if found is not None:
        checkpoint.restore(found, strategy)
        if world.is_main:
            say(f"resumed from {found.path}")
    return strategy


def _save(
    cfg: ExperimentConfig, run: RunFolder, world: World, tokens: TokenSet, strategy: Strategy, step: int, hooks: Hooks
) -> None:
    meta: dict[str, Any] = {
        "optimizer_step": step,
        "images_seen": step * cfg.train.global_batch_size,
        "config": to_dict(cfg),
        "data_fingerprint": tokens.manifest.fingerprint,
        "tokenizer_sha256": tokens.manifest.tokenizer_sha256,
        "world_size": world.size,
        "versions": versions(),
        "commit": commit(),
    }
    path = checkpoint.save(run.checkpoints, step, strategy, world, meta, cfg.checkpoint.keep_last)
    if world.is_main:
        run.set_status("running", step, "")
    for on_checkpoint in hooks.on_checkpoint:
        on_checkpoint(step, path)


def _check_same_run(cfg: ExperimentConfig, tokens: TokenSet, found: checkpoint.Checkpoint) -> None:
    check_resumable(cfg, found.meta["config"], str(found.path))
    before, now = found.meta["data_fingerprint"], tokens.manifest.fingerprint
    if before != now and "data.train" not in cfg.resume.allow:
        raise InputError(
            f"data.train={cfg.data.train} holds other samples (fingerprint {now[:12]}) than {found.path} was trained on "
            f"({before[:12]}). Use those shards, start another run.dir, or allow it with resume.allow=[data.train]"
        )


def _check_finite(grad_norm: float, statistics: Tensor, step: int, world: World) -> None:
    # A loss that is not finite on any rank makes the global norm so on all of them: they stop together.
    if not torch.isfinite(torch.tensor(grad_norm)):
        raise FloatingPointError(
            f"step {step}: the gradient norm is {grad_norm} (loss {statistics[0].item()} on rank {world.rank}). The update was "
            "not applied and the last checkpoint is intact. Lower optim.lr, or use train.precision=fp32"
        )


def _why_done(plan: Plan) -> str:
    return f"train.stop_at_step={plan.last_step}" if plan.last_step < plan.total_steps else ""


def _last_step(run: RunFolder) -> int:
    """The step of the newest checkpoint folder: what a failed run can be resumed from."""
    return max((int(path.name.removeprefix("step_")) for path in run.checkpoints.glob("step_????????")), default=0)


class _Prefetcher:
    """Prepares the next steps' micro-batches in one thread: gathering rows, dropping labels, pinning memory."""

    def __init__(
        self, cfg: ExperimentConfig, plan: Plan, world: World, tokens: TokenSet, objective: Objective, first: int
    ) -> None:
        self.order = BatchOrder(len(tokens), cfg.train.global_batch_size, cfg.run.seed)
        self.plan, self.world, self.tokens, self.objective = plan, world, tokens, objective
        self.steps = range(first, plan.last_step + 1)
        self.ready: queue.Queue[list[MicroBatch] | BaseException] = queue.Queue(maxsize=2)
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Iterator[list[MicroBatch]]:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopped.set()
        while self.thread.is_alive():
            try:
                self.ready.get(timeout=0.1)
            except queue.Empty:
                continue

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        return self

    def __next__(self) -> list[MicroBatch]:
        item = self.ready.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def _run(self) -> None:
        try:
            for step in self.steps:
                batches = [self._prepare(ids, epochs) for ids, epochs in self._shares(step)]
                if self.stopped.is_set():
                    return
                self.ready.put(batches)
        except BaseException as error:
            self.ready.put(error)

    def _shares(self, step: int) -> list[tuple[Tensor, Tensor]]:
        return self.order.rank_batches(step, self.world.rank, self.world.size, self.plan.accumulation)

    def _prepare(self, ids: Tensor, epochs: Tensor) -> MicroBatch:
        tokens, labels = self.tokens.rows(ids)
        batch = self.objective.micro_batch(tokens, labels, ids, epochs)
        return batch.pinned() if self.world.device.type == "cuda" else batch
