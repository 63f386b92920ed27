"""The dry run of a study: parameters, images, FLOPs and time of every cell, their sums, and whether a law can be fitted."""

# N parameters, D images seen, U different images

from __future__ import annotations

import heapq
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from rear_scale.config import ExperimentConfig, InputError, UnknownLength, derive
from rear_scale.config.devices import devices
from rear_scale.model import meta_model
from rear_scale.model.flops import parameters_by_part, train_flops_per_image
from rear_scale.parallel import facts
from rear_scale.scaling import law
from rear_scale.scaling.cluster import cluster_of
from rear_scale.scaling.cost import step_time
from rear_scale.scaling.planner import USABLE, memory_gib
from rear_scale.scaling.study_file import StudyFile
from rear_scale.scaling.study_grid import Cell, training_identity, varied
from rear_scale.shards.codebook import is_packed, read_checked
from rear_scale.shards.subset import images_of_share
from rear_scale.text_table import aligned


@dataclass(frozen=True)
class Size:
    """The costs of a model that no length and no seed changes."""

    parameters: int  # without the heads of loss terms, which only training has
    flops_per_image: int  # of training
    step_s: float | None  # of one update on the cluster of the config; None = it is not known
    fits: bool  # in the memory of that cluster's GPUs


@dataclass(frozen=True)
class CellPlan:
    """The size of one cell."""

    size: Size
    images: int
    unique_images: int | None  # None = the size of the data is not known
    steps: int
    gpus: int

    @property
    def flops(self) -> int:
        return self.images * self.size.flops_per_image

    @property
    def gpu_hours(self) -> float | None:
        return None if self.size.step_s is None else self.steps * self.size.step_s * self.gpus / 3600


class CellPlanner:
    """Plans cells; those of the same model on the same cluster share the work."""

    def __init__(self) -> None:
        self._devices = devices()
        self._sizes: dict[str, Size] = {}
        self._epochs: dict[tuple[str, float], int | None] = {}

    def __call__(self, cfg: ExperimentConfig) -> CellPlan:
        """Raises InputError for a length in epochs of data that are not known."""
        epoch, gpus = self._images_per_epoch(cfg), self._gpus(cfg)
        try:
            plan = derive(cfg, gpus, epoch)
        except UnknownLength:
            raise
        except InputError:
            # Its batch is made for another number of ranks, of which the length does not depend.
            gpus = 0
            plan = derive(_in_one_micro_step(cfg), 1, epoch)
        images = plan.last_step * cfg.train.global_batch_size
        key = _key(cfg, gpus, plan.accumulation)
        if key not in self._sizes:
            self._sizes[key] = self._size(cfg, gpus, plan.accumulation)
        unique = None if plan.images_per_epoch is None else min(images, plan.images_per_epoch)
        return CellPlan(self._sizes[key], images, unique, plan.last_step, gpus)

    def _gpus(self, cfg: ExperimentConfig) -> int:
        """The number of GPUs that a cell is planned for: cluster.gpus, or one full machine; 1 for a strategy of one process."""
        if facts.of(cfg.strategy).alone:
            return 1
        device = self._devices.get(cfg.cluster.gpu)
        return cfg.cluster.gpus or (device.gpus_per_node if device else 1)

    def _size(self, cfg: ExperimentConfig, gpus: int, accumulation: int) -> Size:
        model, device = meta_model(cfg), self._devices.get(cfg.cluster.gpu)
        step_s, fits = None, True
        if device is not None and gpus and device.fills_machines(gpus):
            step_s = step_time(cfg, cluster_of(gpus, cfg.cluster.gpu, device), accumulation, model).total_s
            fits = memory_gib(cfg, gpus, accumulation, model)["peak"] <= USABLE * device.memory_gib
        return Size(parameters_by_part(cfg, model)["without_heads"], train_flops_per_image(cfg), step_s, fits)

    def _images_per_epoch(self, cfg: ExperimentConfig) -> int | None:
        """The number of different images that a run trains on, from its shards; None where they are not here."""
        folder, share = cfg.data.train, cfg.data.use_share
        if not is_packed(folder):
            return None
        if (folder, share) not in self._epochs:
            try:
                self._epochs[folder, share] = images_of_share(read_checked(cfg, folder), share)
            except InputError:
                self._epochs[folder, share] = None
        return self._epochs[folder, share]


def _in_one_micro_step(cfg: ExperimentConfig) -> ExperimentConfig:
    return replace(cfg, train=replace(cfg.train, micro_batch_size=cfg.train.global_batch_size))


def _key(cfg: ExperimentConfig, gpus: int, accumulation: int) -> str:
    """The values that the size of a cell depends on."""
    sections: list[Any] = [cfg.model, cfg.tokenizer, cfg.objective.heads, cfg.strategy, cfg.cluster]
    train = cfg.train
    others = [cfg.objective.class_dropout, cfg.objective.terms, cfg.data.group_by_class, cfg.optim.name, cfg.optim.ema_decay,
              train.global_batch_size, train.micro_batch_size, train.precision, train.fp8, train.activation_checkpointing,
              train.recompute_every_n, train.compile, gpus, accumulation]  # fmt: skip
    return json.dumps([*map(asdict, sections), *others], sort_keys=True)


def dry_run(study: StudyFile, cells: Sequence[Cell], done: Sequence[bool], jobs: int = 1) -> str:
    """The text of a dry run: a row for each cell, and their sums. done: whether each cell is finished. jobs: cells that run at a
    time."""
    planner = CellPlanner()
    plans = [planner(cell.cfg) for cell in cells]
    columns = varied(cells)
    header = ["cell", *columns, "parameters", "images", "of them different", "FLOPs", "GPU-hours", ""]
    rows = [
        [
            cell.name,
            *(str(values[number]) for values in columns.values()),
            f"{plan.size.parameters:,}",
            f"{plan.images:,}",
            "?" if plan.unique_images is None else f"{plan.unique_images:,}",
            f"{plan.flops:.3g}",
            "-" if study.machine or plan.gpu_hours is None else f"{plan.gpu_hours:,.1f}",
            "done"
            if done[number]
            else ""
            if plan.size.fits or study.machine
            else "does not fit: see launchers/plan.py",
        ]
        for number, (cell, plan) in enumerate(zip(cells, plans, strict=True))
    ]
    commands = ", ".join(study.commands)
    return "\n".join(
        [
            f"{study.title} ({study.source}{f', --scale {study.scale}' if study.scale else ''})",
            f"{len(cells)} cells, each: {commands}; runs, tables and figures in {study.folder}",
            "",
            aligned([header, *rows], left=range(1 + len(columns))),
            "",
            *(_sums(study, cells, plans, done, jobs) if "train" in study.commands else []),
            *(_design(plans) if "train" in study.commands and study.table is None else []),
        ]
    )


def _sums(
    study: StudyFile, cells: Sequence[Cell], plans: Sequence[CellPlan], done: Sequence[bool], jobs: int
) -> list[str]:
    # Cells that differ in sampling and evaluation alone are trained once.
    trained = {training_identity(cell.cfg): plan for cell, plan in zip(cells, plans, strict=True)}.values()
    flops = sum(plan.flops for plan in trained)
    lines = [f"training in all: {sum(plan.images for plan in trained):,} images, {flops:.3g} FLOPs"]
    left = [plan for plan, is_done in zip(plans, done, strict=True) if not is_done]
    if study.machine is not None:
        lines.append(
            f"time by measured rates of {study.machine.name}: {_seconds(study, left, jobs) / 60:.0f} minutes for the {len(left)} "
            f"cells that are left, {jobs} at a time"
        )
    elif all(plan.gpu_hours is not None for plan in plans):
        hours = sum(plan.gpu_hours or 0.0 for plan in trained)
        to_train = {
            training_identity(cell.cfg): plan
            for cell, plan, is_done in zip(cells, plans, done, strict=True)
            if not is_done
        }
        rest = sum(plan.gpu_hours or 0.0 for plan in to_train.values())
        gpus = f"{plans[0].gpus} x {cells[0].cfg.cluster.gpu}"
        lines.append(f"GPU-hours by formula, on {gpus}: {hours:,.0f}, of which {rest:,.0f} are left")
    return lines


def _design(plans: Sequence[CellPlan]) -> list[str]:
    """How well the constants of the law of loss that these cells are made for can be told apart: that of parameters alone where
    nothing else differs, else that of parameters and images, and with repeated images the law for repeats."""
    columns = {
        "N": np.array([plan.size.parameters for plan in plans], np.float64),
        "D": np.array([plan.images for plan in plans], np.float64),
    }
    form, names = law.THREE_TERM, ["parameters", "images"]
    if len({(plan.images, plan.unique_images) for plan in plans}) == 1:
        form, columns, names = law.POWER, {"x": columns["N"]}, names[:1]
    elif all(plan.unique_images is not None for plan in plans):
        unique = np.array([plan.unique_images for plan in plans], np.float64)
        if (unique < columns["D"]).any():
            form, columns, names = law.REPEATED_DATA, {**columns, "U": unique}, [*names, "different images"]
    number = law.condition(form, law.assumed_constants(form, **columns), **columns)
    line = f"law of {', '.join(names)} ({form.name}): condition number {number:.3g}"
    note = law.warning(number)
    return [line, *([f"warning: {note}"] if note else [])]


def _seconds(study: StudyFile, plans: Sequence[CellPlan], jobs: int) -> float:
    """Estimated seconds until the last cell has ended on the machine of a scale, where each job takes the next cell when it is
    free: starts, updates, and evaluations."""
    machine = study.machine
    assert machine is not None
    evaluations = sum(command in ("evaluate", "unguided") for command in study.commands)
    free_at = [0.0] * jobs
    for plan in plans:
        gflops = plan.size.flops_per_image / 1e9
        training = plan.steps * machine.step_s + plan.images * gflops / machine.gflops_per_s
        evaluation = machine.evaluate_s + gflops * machine.evaluate_s_per_gflop
        seconds = len(study.commands) * machine.start_s + training + evaluations * evaluation
        heapq.heapreplace(free_at, free_at[0] + seconds)
    return max(free_at)
