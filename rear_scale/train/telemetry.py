"""Metrics of logged steps, written to metrics.jsonl and the sinks (wandb, TensorBoard); timing and profiling of steps."""

from __future__ import annotations

import math
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from rear_scale.config import ExperimentConfig, Plan
from rear_scale.config.devices import bf16_tflops
from rear_scale.model.flops import distinct_classes_per_image, train_flops_per_image
from rear_scale.run.folder import RunFolder
from rear_scale.run.sinks import open_sinks, show_images_on
from rear_scale.world import World


class Clock:
    """Seconds that this rank spends in each span of its steps. On a GPU, CUDA events measure them without synchronization."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, span: str) -> Iterator[None]:
        start = self._now()
        yield
        self.marks.append((span, start, self._now()))

    def take(self) -> dict[str, float]:
        """Seconds of each span, summed since the last call. Synchronizes with the GPU."""
        totals = dict.fromkeys(("data", "forward", "passes", "optimizer", "checkpoint"), 0.0)
        if self.on_gpu:
            torch.cuda.synchronize()
        for span, start, end in self.marks:
            totals[span] += start.elapsed_time(end) / 1e3 if self.on_gpu else end - start
        self.marks = []
        return totals

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class StepProfiler:
    """Writes a trace of the steps of profile.steps to profile/rank_00000.json, on rank 0."""

    def __init__(self, steps: list[int] | None, run: RunFolder, world: World) -> None:
        self.steps = steps if world.is_main else None
        self.path = run.path / "profile" / "rank_00000.json"
        self.profiler: torch.profiler.profile | None = None

    def __enter__(self) -> StepProfiler:
        self._start(before=1)
        return self

    def __exit__(self, *error: object) -> None:
        self._write()

    def stepped(self, step: int) -> None:
        """To be called after each step: starts or ends the trace where it is due."""
        if self.steps and step >= self.steps[1]:
            self._write()
        else:
            self._start(before=step + 1)

    def _start(self, before: int) -> None:
        if self.steps and self.profiler is None and self.steps[0] <= before <= self.steps[1]:
            self.profiler = torch.profiler.profile()
            self.profiler.start()

    def _write(self) -> None:
        if self.profiler is not None:
            self.profiler.stop()
            self.path.parent.mkdir(exist_ok=True)
            self.profiler.export_chrome_trace(str(self.path))
            self.profiler, self.steps = None, None


class Telemetry:
    """Times steps on every rank and reports them on rank 0. All ranks must call its methods."""

    def __init__(self, cfg: ExperimentConfig, plan: Plan, world: World, run: RunFolder) -> None:
        self.cfg, self.plan, self.world, self.run = cfg, plan, world, run
        self.flops_per_image = train_flops_per_image(cfg, distinct_classes_per_image(cfg))
        on_gpu = world.device.type == "cuda"
        self.peak_tflops = bf16_tflops(torch.cuda.get_device_name(world.device)) if on_gpu else None
        self.hosts = world.gather(socket.gethostname())
        self.clock = Clock(world.device)
        self.steps = 0
        self.since = time.perf_counter()
        self.sinks = open_sinks(cfg, run) if world.is_main else []

    def due(self, step: int) -> bool:
        return step % self.cfg.train.log_every == 0 or step in (1, self.plan.last_step)

    def log(
        self,
        step: int,
        statistics: dict[str, float],
        grad_norm: float,
        lr: float,
        noise_max: float,
        extra: dict[str, Any],
    ) -> dict[str, Any]:
        """The metrics of a step, after writing them. statistics: those of the objective, over this rank's part of the batch."""
        # One collective for the losses and times of all ranks.
        spans = self.clock.take()
        packed = {**statistics, **spans, "peak_mem_gib": _peak_memory_gib(self.world)}
        rows = self.world.table(list(packed.values()))
        means, of_ranks = dict(zip(packed, rows.mean(0).tolist(), strict=True)), dict(zip(packed, rows.T, strict=True))
        steps = max(1, self.steps)
        span_seconds = {span: of_ranks[span] / steps for span in spans}
        now = time.perf_counter()
        step_time_s = (now - self.since) / steps
        images_per_s = self.cfg.train.global_batch_size / step_time_s
        # Backward and optimizer contain collectives, so every rank shows the slowest rank's time there. Only data loading and
        # forward are local to a rank: a slow rank shows in their sum.
        local_s = span_seconds["data"] + span_seconds["forward"]
        slowest = int(local_s.argmax())
        metrics = {
            "step": step,
            "images_seen": step * self.cfg.train.global_batch_size,
            **{name: means[name] for name in statistics},
            "grad_norm": grad_norm,
            "lr": lr,
            "noise_max": noise_max,
            **extra,
            "images_per_s": images_per_s,
            "images_per_s_per_gpu": images_per_s / self.world.size,
            "step_time_s": step_time_s,
            "data_wait_s": span_seconds["data"].mean().item(),
            "forward_s": span_seconds["forward"].mean().item(),
            "backward_s": (span_seconds["passes"] - span_seconds["forward"]).mean().item(),
            "optimizer_s": span_seconds["optimizer"].mean().item(),
            "checkpoint_s": span_seconds["checkpoint"].mean().item(),
            "own_time_min_s": local_s.min().item(),
            "own_time_max_s": local_s.max().item(),
            "slowest_rank": slowest,
            "slowest_host": self.hosts[slowest],
            "mfu": self._mfu(images_per_s),
            "peak_mem_gib": of_ranks["peak_mem_gib"].max().item(),
            "time_left_s": (self.plan.last_step - step) * step_time_s,
        }
        # JSON cannot represent NaN or inf (a term without a head, a loss that is not finite); write null.
        metrics = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in metrics.items()
        }
        self.steps, self.since = 0, now
        if self.world.is_main:
            self.run.log(metrics)
            for sink in self.sinks:
                sink.log(metrics)
        return metrics

    def stepped(self) -> None:
        self.steps += 1

    def __enter__(self) -> Telemetry:
        show_images_on(self.sinks)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        show_images_on([])
        for sink in self.sinks:
            sink.finish(exit_code=0 if kind is None else 1)

    def _mfu(self, images_per_s: float) -> float | None:
        """Model FLOPs utilization: FLOPs per second over the peak of all devices; None where the peak is not known."""
        if self.peak_tflops is None:
            return None
        return images_per_s * self.flops_per_image / (self.peak_tflops * 1e12 * self.world.size)


def _peak_memory_gib(world: World) -> float:
    """Peak GPU memory of this rank in GiB; on a CPU, its peak resident set size."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
