"""What a logged step says, and where it goes: metrics.jsonl, the progress bar, wandb."""

from __future__ import annotations

import math
import resource
import secrets
import time
from typing import Any

import torch

from rear_scale.config import ExperimentConfig, Plan, to_dict
from rear_scale.model.flops import train_flops_per_image
from rear_scale.objective import STATISTICS
from rear_scale.train.run_folder import RunFolder
from rear_scale.world import World

# Dense bf16 peak of one device in TFLOP/s, by a part of its name. An unknown device has no MFU.
_PEAK_TFLOPS = {"A100": 312.0, "A800": 312.0, "H100": 989.0, "H800": 989.0, "H200": 989.0, "B200": 2250.0}


class Telemetry:
    """Times steps on every rank and reports them on rank 0. All ranks must call its methods."""

    def __init__(self, cfg: ExperimentConfig, plan: Plan, world: World, run: RunFolder) -> None:
        self.cfg, self.plan, self.world, self.run = cfg, plan, world, run
        self.flops_per_image = train_flops_per_image(cfg)
        self.steps = 0
        self.data_wait_s = 0.0
        self.since = time.perf_counter()
        self.wandb = self._open_wandb() if world.is_main and cfg.wandb.mode != "disabled" else None

    def waited(self, seconds: float) -> None:
        self.data_wait_s += seconds

    def due(self, step: int) -> bool:
        return step % self.cfg.train.log_every == 0 or step in (1, self.plan.last_step)

    def log(self, step: int, statistics: torch.Tensor, grad_norm: float, lr: float, noise_max: float) -> dict[str, Any]:
        """Writes a logged step. statistics: STATISTICS of this rank's share of the step's batch. Returns the metrics."""
        # One packed collective: losses and times of all ranks.
        packed = self.world.sum([*statistics.double().tolist(), self.data_wait_s, _peak_memory_gib(self.world)])
        losses = dict(zip(STATISTICS, (packed[: len(STATISTICS)] / self.world.size).tolist(), strict=True))
        now = time.perf_counter()
        step_time_s = (now - self.since) / max(1, self.steps)
        images_per_s = self.cfg.train.global_batch_size / step_time_s
        metrics = {
            "step": step,
            "images_seen": step * self.cfg.train.global_batch_size,
            # A term without a head is not a number, and JSON has none.
            **{name: None if math.isnan(value) else value for name, value in losses.items()},
            "grad_norm": grad_norm,
            "lr": lr,
            "noise_max": noise_max,
            "images_per_s": images_per_s,
            "step_time_s": step_time_s,
            "data_wait_s": packed[-2].item() / self.world.size / max(1, self.steps),
            "mfu": self._mfu(images_per_s),
            "peak_mem_gib": packed[-1].item() / self.world.size,
        }
        self.steps, self.data_wait_s, self.since = 0, 0.0, now
        if self.world.is_main:
            self.run.log(metrics)
            if self.wandb is not None:
                self.wandb.log(metrics, step=step)
        return metrics

    def stepped(self) -> None:
        self.steps += 1

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if self.wandb is not None:
            self.wandb.finish(exit_code=0 if kind is None else 1)

    def _mfu(self, images_per_s: float) -> float | None:
        """Model FLOPs of the images over the peak of all devices; None where the peak is not known."""
        if self.world.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(self.world.device)
        peak = next((tflops for part, tflops in _PEAK_TFLOPS.items() if part in name), None)
        return None if peak is None else images_per_s * self.flops_per_image / (peak * 1e12 * self.world.size)

    def _open_wandb(self) -> Any:
        return _open_wandb(self.cfg, self.run)


def log_summary(cfg: ExperimentConfig, run: RunFolder, values: dict[str, float]) -> None:
    """Adds scores to the summary of the run's page in wandb, unless it is disabled. Rank 0 only."""
    if cfg.wandb.mode == "disabled":
        return
    page = _open_wandb(cfg, run)
    page.summary.update(values)
    page.finish()


def _open_wandb(cfg: ExperimentConfig, run: RunFolder) -> Any:
    import wandb

    # The id makes a resumed run continue its curve.
    identity = run.path / "wandb_id"
    if not identity.exists():
        identity.write_text(secrets.token_hex(4))
    return wandb.init(
        project=cfg.wandb.project,
        name=cfg.run.name,
        id=identity.read_text(),
        resume="allow",
        dir=str(run.path),
        mode=cfg.wandb.mode,
        config=to_dict(cfg),
    )


def _peak_memory_gib(world: World) -> float:
    """Peak device memory of this rank; on a CPU, its peak resident size."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
