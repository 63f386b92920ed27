"""The training loop, for any strategy."""

# B images of a micro-batch

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rear_scale import cli, rng
from rear_scale.checkpoint.folder import Checkpoint, clear, last_step
from rear_scale.checkpoint.open import newest_intact
from rear_scale.checkpoint.restore import check_states, load_weights, restore
from rear_scale.checkpoint.snapshots import SNAPSHOTS, SnapshotWriter, remove_later
from rear_scale.checkpoint.writer import Unwritten, Writer
from rear_scale.config import ExperimentConfig, InputError, Plan, check_resumable, required_path, settled, to_dict
from rear_scale.model import Generator, build_model, meta_model
from rear_scale.model.attention import choose_kernel, use_kernel
from rear_scale.model.recompute import prepare_blocks
from rear_scale.objective import MicroBatch, Objective
from rear_scale.optim import schedule
from rear_scale.optim.groups import rules_of
from rear_scale.parallel import open_strategy
from rear_scale.parallel.strategy import Strategy
from rear_scale.peers import LostRanks
from rear_scale.progress import progress, say
from rear_scale.run import fingerprints
from rear_scale.run.folder import RunFolder
from rear_scale.run.versions import commit, versions
from rear_scale.shards.reader import TokenSet
from rear_scale.shards.subset import images_of_share
from rear_scale.train import branch, start
from rear_scale.train.consensus import StepConsensus
from rear_scale.train.garbage import CollectAtSteps
from rear_scale.train.guard import LossSpikeDetector, Preempted, StopSignal, Watchdog, shard_positions
from rear_scale.train.prefetch import Prefetcher
from rear_scale.train.telemetry import Clock, StepProfiler, Telemetry
from rear_scale.world import World


@dataclass
class Hooks:
    """Functions that the loop calls during training, on every rank at the same step."""

    on_step: list[Callable[[int, nn.Module], None]] = field(default_factory=list)  # (updates done, model)
    on_checkpoint: list[Callable[[int, Path], None]] = field(default_factory=list)  # (updates done, folder)
    # (updates done, folder) of the checkpoint that is resumed: completes on_checkpoint work that a kill has interrupted
    on_resume: list[Callable[[int, Path], None]] = field(default_factory=list)
    # every train.val_every steps: (updates done, strategy) -> metrics of the current model
    validate: list[Callable[[int, Strategy], dict[str, float]]] = field(default_factory=list)
    on_log: list[Callable[[dict[str, Any]], None]] = field(default_factory=list)  # the metrics of each logged step


def train(cfg: ExperimentConfig, plan: Plan, world: World, tokens: TokenSet, codebook: Tensor, hooks: Hooks) -> int:
    """The number of steps done by this call, which trains to plan.last_step from the newest checkpoint of run.dir, if any.

    All ranks must call this. Raises InputError when the run folder belongs to another run or is used by another process,
    FloatingPointError when the loss or the gradient is not finite (the last checkpoint is kept), OSError when the last step
    cannot be saved, and Preempted (exit code 75) when a rank received a stop signal, after the step is finished and saved.
    """
    run = RunFolder(cfg.run.dir)
    with ExitStack() as stack:
        stack.enter_context(world.alone(*run.lock))
        if world.is_main:
            clear(run.checkpoints)
            run.clear()
        checkpoint = newest_intact(run.checkpoints, world, report=say)
        fresh = checkpoint is None
        if checkpoint is None and cfg.train.branch_from is not None:
            checkpoint = branch.begin(cfg, plan, tokens.manifest, run, world)
        cfg = settled(cfg, checkpoint.meta["config"] if checkpoint else None)
        if checkpoint is None and cfg.train.init_from is not None:
            checkpoint = start.take_over(cfg, tokens, run, world)
        done = checkpoint.step if checkpoint else 0
        if checkpoint:
            _check_same_run(cfg, tokens, checkpoint)
            rewinds = checkpoint.meta.get("rewinds", 0)
            checkpoint.meta.update(world.on_main(lambda: run.rewind_to(done, rewinds)))
        if done >= plan.last_step:
            assert checkpoint is not None
            for on_resume in hooks.on_resume:
                on_resume(done, checkpoint.path)
            if world.is_main:
                Writer(run.checkpoints, world, cfg.checkpoint, checkpoint).settle()
                if run.state() != "done":
                    # The previous process was killed after the final checkpoint but before it wrote status=done.
                    run.set_status("done", done, _why_done(plan))
                say(f"{run.path} is complete: {done} of {plan.last_step} steps")
            return 0
        hosts = world.gather(socket.gethostname())
        if world.is_main:
            run.start(cfg, world, done, hosts)
            stack.callback(run.close)
        # Held until the status is written: when one rank has failed, its launcher ends all ranks, and the signal must not stop
        # rank 0 before it has recorded the reason.
        stop = stack.enter_context(StopSignal(run, world))
        try:
            with Watchdog(cfg.guard.hang_timeout_s, run, world) as watchdog:
                guards = (LossSpikeDetector(cfg), stop, watchdog)
                parts = (cfg, plan, world, tokens, codebook, hooks, run)
                while checkpoint := _Run(*parts, checkpoint, *guards, fresh=fresh).go():
                    fresh = False
        except Preempted:
            world.barrier()
            raise
        except BaseException as error:
            cause = world.explained(error)
            if world.is_main:
                run.set_status("failed", last_step(run.path), _why_failed(cause))
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(f"the same command continues from step {last_step(run.path)}") from None
            if cause is not error:
                raise cause from None
            raise
        if world.is_main:
            run.set_status("done", plan.last_step, _why_done(plan))
        return plan.last_step - done


class _Run:
    """Training from one checkpoint (or none) to the end of the run, or to a loss spike that rewinds to an earlier checkpoint."""

    def __init__(
        self,
        cfg: ExperimentConfig,
        plan: Plan,
        world: World,
        tokens: TokenSet,
        codebook: Tensor,
        hooks: Hooks,
        run: RunFolder,
        resumed: Checkpoint | None,
        spikes: LossSpikeDetector,
        stop: StopSignal,
        watchdog: Watchdog,
        *,
        fresh: bool,
    ) -> None:
        """fresh: whether the run starts here, so that its fingerprints are recorded."""
        self.cfg, self.plan, self.world, self.tokens, self.hooks, self.run = cfg, plan, world, tokens, hooks, run
        self.spikes, self.stop, self.watchdog = spikes, stop, watchdog
        self.resumed, self.first = resumed, resumed.step + 1 if resumed else 1
        meta = resumed.meta if resumed else {}
        self.skips, self.rewinds = meta.get("skipped_updates", 0), meta.get("rewinds", 0)
        # The number of steps whose data were skipped by rewinds.
        self.data_offset = meta.get("data_offset", 0)
        self.origin = {name: meta[name] for name in (branch.KEY,) if name in meta}
        self.objective = Objective(cfg, plan, codebook, world.device)
        self.writer = Writer(run.checkpoints, world, cfg.checkpoint, resumed)
        self.snapshots = SnapshotWriter(run.path / SNAPSHOTS, world, cfg.checkpoint)
        if world.is_main:
            run.cut_metrics(self.first - 1)
            remove_later(run.path, self.first - 1)
            run.set_status("running", self.first - 1, "")
        model = load_model(cfg, world, codebook, resumed)
        if fresh and world.is_main:
            run.record_fingerprints(fingerprints.of_start(cfg, tokens, codebook, model, self.first - 1))
        self.strategy = build_strategy(cfg, plan, world, model, resumed)
        if world.is_main and resumed:
            say(f"resumed from {resumed.path}")

    def go(self) -> Checkpoint | None:
        """None at the end of the run; else the checkpoint to rewind to, with data_offset and rewinds in its meta updated."""
        cfg, plan, world, strategy, objective = self.cfg, self.plan, self.world, self.strategy, self.objective
        batches = Prefetcher(cfg, plan, world, self.tokens, objective, self.first, self.data_offset)
        bar = progress(cfg.run.name, plan.last_step, "step", done=self.first - 1, show=world.is_main)
        profiler = StepProfiler(cfg.profile.steps, self.run, world)
        with (
            self._save_in_progress_kept(),
            Telemetry(cfg, plan, world, self.run) as telemetry,
            bar,
            batches,
            profiler,
            CollectAtSteps() as garbage,
        ):
            clock = telemetry.clock
            if self.resumed is not None and not branch.begins_at(self.resumed):
                with self.watchdog.pause():
                    for on_resume in self.hooks.on_resume:
                        on_resume(self.resumed.step, self.resumed.path)
            for step in range(self.first, plan.last_step + 1):
                self.watchdog.beat("waiting for data", step)
                with clock("data"):
                    micro_batches = next(batches)

                statistics = torch.zeros(len(objective.names), device=world.device)
                for micro_step, batch in enumerate(micro_batches):
                    self.watchdog.beat(f"forward and backward of micro-step {micro_step}", step)
                    # Dropout masks depend on (seed, step, micro-step, rank) alone, so that no generator state needs saving.
                    torch.manual_seed(rng.fold(cfg.run.seed, rng.Purpose.DEVICE_SEED, step, micro_step, world.rank))
                    compute = _Computation(objective, batch.to(world.device), step, clock)
                    with clock("passes"):
                        statistics += strategy.forward_backward(compute, micro_step) / plan.accumulation
                self.watchdog.beat("gradient norm", step)
                with clock("optimizer"):
                    norm = strategy.grad_norm()
                self.watchdog.beat("all-gather of losses and stop requests", step)
                loss = objective.statistic(statistics, "loss")
                consensus = StepConsensus(world, loss, norm, self.stop.received is not None, self.writer)

                if not consensus.finite:
                    self._stop_unless_skipped(step, consensus, micro_batches)
                elif self.spikes(consensus.loss) and (rewound := self._rewind(step, consensus.loss)) is not None:
                    return rewound
                lr = learning_rate(cfg, plan, step)
                self.watchdog.beat("update", step)
                with clock("optimizer"):
                    if consensus.finite:
                        strategy.step(lr)
                    else:
                        strategy.skip()

                telemetry.stepped()
                validated = self._validate(step)
                if validated or telemetry.due(step):
                    extra = {"skipped_updates": self.skips, **validated}
                    named = dict(zip(objective.names, statistics.tolist(), strict=True))
                    metrics = telemetry.log(step, named, consensus.grad_norm, lr, objective.noise_max(step), extra)
                    for on_log in self.hooks.on_log:
                        on_log(metrics)
                    bar.set_postfix(
                        loss=f"{metrics['loss'] or float('nan'):.4f}",
                        images_per_s=f"{metrics['images_per_s']:.0f}",
                        refresh=False,
                    )
                with self.watchdog.pause():
                    for on_step in self.hooks.on_step:
                        on_step(step, strategy.model)
                with clock("checkpoint"):
                    self._snapshot(step)
                    self._save(step, consensus)
                bar.update()
                profiler.stepped(step)
                garbage.stepped(step)
                if consensus.stop_ranks and step < plan.last_step:
                    self._preempt(step, consensus)
        return None

    def _validate(self, step: int) -> dict[str, float]:
        values: dict[str, float] = {}
        if self.cfg.train.val_every and step % self.cfg.train.val_every == 0:
            with self.watchdog.pause():
                for validate in self.hooks.validate:
                    values.update(validate(step, self.strategy))
        return values

    def _save(self, step: int, consensus: StepConsensus) -> None:
        due = step % self.cfg.checkpoint.every_steps == 0 or step == self.plan.last_step or consensus.stop_ranks
        wait = step == self.plan.last_step or consensus.stop_ranks
        # All ranks have the same states from StepConsensus, so either all of them enter this collective or none.
        if self.writer.thread is not None and (due or consensus.all_written):
            self._finish_save()
        if not due:
            return
        self.watchdog.beat("checkpoint", step)
        problem = self.writer.begin(step, self.strategy, self._meta(step))
        if problem is None and wait:
            problem = self._finish_save()
        elif problem is not None:
            self._report_unsaved(step, problem)
        if problem is not None and step == self.plan.last_step:
            raise Unwritten(
                f"the checkpoint of the last step was not written: {problem}. The same command continues from an earlier one"
            )

    def _snapshot(self, step: int) -> None:
        """Writes a snapshot of the averages of optim.posthoc_ema where one is due. Training continues where that fails."""
        every = self.cfg.checkpoint.ema_every_steps
        if every is None or step % every:
            return
        self.watchdog.beat("snapshot of the averages", step)
        problem = self.snapshots.write(step, self.strategy, self._meta(step))
        if problem is not None and self.world.is_main:
            say(f"the snapshot of step {step} was not written: {problem}. Training continues without it")
            self.run.note("snapshot_failed", step, problem=problem)

    def _meta(self, step: int) -> dict[str, Any]:
        """What meta.json of a step says beside the files."""
        return {
            "optimizer_step": step - self.skips,
            "images_seen": step * self.cfg.train.global_batch_size,
            "skipped_updates": self.skips,
            "rewinds": self.rewinds,
            "data_offset": self.data_offset,
            **self.origin,
            "config": to_dict(self.cfg),
            "data_fingerprint": self.tokens.manifest.fingerprint,
            "tokenizer_sha256": self.tokens.manifest.tokenizer_sha256,
            "unique_images": images_of_share(self.tokens.manifest, self.cfg.data.use_share),
            "world_size": self.world.size,
            "versions": versions(),
            "commit": commit(),
        }

    @contextmanager
    def _save_in_progress_kept(self) -> Iterator[None]:
        """Completes the checkpoint that is being written when an error ends the run, where one rank has the whole of it."""
        try:
            yield
        except BaseException:
            # Among several ranks the others may have ended or be waiting in another collective: they would never answer.
            if self.world.size == 1 and self.writer.thread is not None:
                self.writer.finish()
            raise

    def _finish_save(self) -> str | None:
        step = self.writer.meta["step"]
        self.watchdog.beat(f"writing the checkpoint of step {step}", step)
        path, problem = self.writer.finish()
        if path is None:
            self._report_unsaved(step, problem)
            return problem
        if self.world.is_main:
            self.run.set_status("running", step, "")
        with self.watchdog.pause():
            for on_checkpoint in self.hooks.on_checkpoint:
                on_checkpoint(step, path)
        return None

    def _report_unsaved(self, step: int, problem: str | None) -> None:
        if self.world.is_main:
            say(
                f"the checkpoint of step {step} was not written: {problem}. Training continues; older checkpoints are intact"
            )
            self.run.note("checkpoint_failed", step, problem=problem)

    def _preempt(self, step: int, consensus: StepConsensus) -> None:
        if self.world.is_main:
            saved = last_step(self.run.path)
            ranks = ", ".join(map(str, consensus.stop_ranks))
            self.run.set_status("preempted", saved, f"rank {ranks} was asked to stop during step {step}")
            say(f"stopped by a signal to rank {ranks}: step {saved} is saved. The same command continues from there")
        raise Preempted

    def _stop_unless_skipped(self, step: int, consensus: StepConsensus, micro_batches: list[MicroBatch]) -> None:
        """Counts a non-finite update that is skipped. Raises FloatingPointError, on all ranks, where skipping is not allowed."""
        ids = torch.cat([batch.ids for batch in micro_batches]).tolist()
        folder = required_path(self.cfg.data.train, "data.train")
        own_positions = shard_positions(ids, self.tokens.manifest.shards, folder)
        positions = self.world.gather(own_positions)
        suspects = consensus.bad_ranks or list(range(self.world.size))
        named = "; ".join(f"rank {rank} trained on {positions[rank]}" for rank in suspects[:4])
        if consensus.bad_ranks:
            what = f"the loss is not finite on rank {', '.join(map(str, consensus.bad_ranks))}"
        else:
            what = f"the gradient norm is {consensus.grad_norm}, with finite losses on all ranks"
        self.skips += 1
        if self.world.is_main:
            self.run.note("nonfinite", step, what=what, positions={rank: positions[rank] for rank in suspects})
        guard = self.cfg.guard
        if guard.on_nonfinite == "skip" and self.skips <= guard.max_skips:
            if self.world.is_main:
                say(f"step {step}: {what}. Its update is skipped ({self.skips} of at most {guard.max_skips}). {named}")
            return
        if self.writer.thread is not None:
            self._finish_save()
        bound = (
            f" guard.max_skips={guard.max_skips} updates were skipped already." if guard.on_nonfinite == "skip" else ""
        )
        raise FloatingPointError(
            f"step {step}: {what}.{bound} The update was not applied and the last checkpoint is intact. {named}. "
            "Lower optim.lr, use train.precision=fp32, or skip such updates with guard.on_nonfinite=skip. The module where it "
            f"began: {cli.typed('replay', self.run.path, '--step', step, '--until-nonfinite')}"
        )

    def _rewind(self, step: int, loss: float) -> Checkpoint | None:
        """The checkpoint to rewind to after a loss spike, which is reported here; None where rewinding is off or not possible."""
        guard = self.cfg.guard
        wanted = guard.on_spike == "rewind" and self.rewinds < guard.max_rewinds
        if self.world.is_main:
            say(f"step {step}: the loss {loss:.4f} is a spike{', rewinding' if wanted else ''}")
            self.run.note("loss_spike", step, loss=loss, rewind=wanted)
        if not wanted:
            return None
        if self.writer.thread is not None:
            self._finish_save()
        checkpoint = newest_intact(self.run.checkpoints, self.world, report=say)
        if checkpoint is None:
            return None
        # Training continues with the data after the spike; those between the checkpoint and the spike are skipped.
        checkpoint.meta["data_offset"] = self.data_offset + step - checkpoint.step
        checkpoint.meta["rewinds"] = self.rewinds + 1
        if self.world.is_main:
            self.run.note_rewind(checkpoint.step, checkpoint.meta["data_offset"], checkpoint.meta["rewinds"])
        return checkpoint


@dataclass
class _Computation:
    """Forward pass and loss of one micro-batch: a function that the strategy calls in its own precision with its engine."""

    objective: Objective
    batch: MicroBatch
    step: int
    clock: Clock

    def __call__(self, forward: nn.Module) -> tuple[Tensor, Tensor]:
        batch = self.batch
        with self.clock("forward"):
            task = self.objective.task(batch, self.step)
            output = forward(task.context, batch.classes, batch.class_index, task.order)
            return self.objective.loss(output, task)


def load_model(cfg: ExperimentConfig, world: World, codebook: Tensor, checkpoint: Checkpoint | None) -> Generator:
    """The model with its initial or its checkpoint's weights: float32, on the CPU, equal on all ranks."""
    model = build_model(cfg)
    kernel = choose_kernel(cfg.model.kernel, world.device, cfg.train.precision, say if world.is_main else None)
    use_kernel(model, kernel)
    model.set_codebook(codebook)
    if world.is_main:
        say(f"attention kernel: {kernel}")
    if checkpoint is None:
        start.first_weights(cfg, model, world)
    else:
        load_weights(checkpoint, model)
    return model


def build_strategy(
    cfg: ExperimentConfig, plan: Plan, world: World, model: Generator, checkpoint: Checkpoint | None
) -> Strategy:
    """The strategy around a model that `load_model` returned, with the optimizer states of its checkpoint."""
    # The weights are loaded before wrapping: FSDP and ZeRO copy them when they wrap the model.
    prepare_blocks(model, cfg, world.device)
    strategy = open_strategy(cfg, plan, world)
    strategy.build(model)
    if checkpoint is not None:
        restore(checkpoint, strategy)
    return strategy


def learning_rate(cfg: ExperimentConfig, plan: Plan, step: int) -> float:
    """The learning rate of a step (from 1)."""
    return schedule.learning_rate(
        step,
        peak=cfg.optim.lr,
        end=cfg.optim.end_lr,
        warmup_steps=cfg.optim.warmup_steps,
        total_steps=plan.total_steps,
        form=cfg.optim.schedule,
        decay_steps=plan.decay_steps,
        decay_form=cfg.optim.decay_form,
    )


def _check_same_run(cfg: ExperimentConfig, tokens: TokenSet, checkpoint: Checkpoint) -> None:
    check_resumable(cfg, checkpoint.meta["config"], str(checkpoint.path))
    before, now = checkpoint.meta["data_fingerprint"], tokens.manifest.fingerprint
    if before != now and "data.train" not in cfg.resume.allow:
        raise InputError(
            f"data.train={cfg.data.train} holds other samples (fingerprint {now[:12]}) than {checkpoint.path} was trained on "
            f"({before[:12]}). Use those shards, start another run.dir, or allow it with resume.allow=[data.train]"
        )
    check_states(checkpoint, rules_of(meta_model(cfg), cfg), cfg)


def _why_failed(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "ended by Ctrl-C"
    return str(error) if isinstance(error, LostRanks) else f"{type(error).__name__}: {error}"


def _why_done(plan: Plan) -> str:
    return f"train.stop_at_step={plan.last_step}" if plan.last_step < plan.total_steps else ""
