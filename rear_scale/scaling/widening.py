"""The same run on 8 to 1,024 GPUs: how far its global batch pays, and what batch would."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from rear_scale.config import ExperimentConfig, InputError
from rear_scale.scaling.devices import Cluster, cluster_of
from rear_scale.scaling.planner import Choice, choices, recommend

GPUS = tuple(2**power for power in range(3, 11))
# Twice the GPUs pay while a run becomes at least so much faster.
PAYS = 1.5
# The batch that would pay keeps this share of the speed of a GPU on one machine.
KEEPS = 0.95
_LARGEST_BATCH = 2**17


@dataclass(frozen=True)
class Width:
    """The fastest way to run on so many GPUs."""

    gpus: int
    choice: Choice | None  # None: nothing fits, or the batch has fewer images than there are GPUs
    images_per_s: float
    efficiency: float  # speed of a GPU over its speed in the smallest cluster on which the run fits
    pays: bool  # at least PAYS times as fast as half as many GPUs
    paying_batch: int | None  # smallest multiple by powers of two of the global batch whose efficiency is KEEPS


def widths(
    cfg: ExperimentConfig, cluster: Cluster, model: nn.Module, fixed: frozenset[str], slowness: float
) -> list[Width]:
    """One row for each of GPUS; the cluster gives the kind of GPU."""
    found: list[Width] = []
    base: float | None = None
    before: Width | None = None
    for gpus in GPUS:
        if gpus % min(gpus, cluster.device.gpus_per_node):
            continue
        wide = cluster_of(gpus, cluster.gpu, cluster.device)
        choice = _best(cfg, wide, model, fixed, slowness)
        speed = _speed(choice)
        if base is None and choice is not None:
            base = speed / gpus
        efficiency = speed / gpus / base if base else 0.0
        pays = choice is not None and (before is None or before.choice is None or speed >= PAYS * before.images_per_s)
        batch = _paying_batch(cfg, wide, model, fixed, slowness, base, choice) if base else None
        before = Width(gpus, choice, speed, efficiency, pays, batch)
        found.append(before)
    return found


def last_that_pays(rows: list[Width]) -> int | None:
    """The most GPUs up to which every doubling pays."""
    last = None
    for row in rows:
        if row.choice is not None and not row.pays:
            break
        last = row.gpus if row.choice is not None else last
    return last


def _best(
    cfg: ExperimentConfig, cluster: Cluster, model: nn.Module, fixed: frozenset[str], slowness: float
) -> Choice | None:
    try:
        return recommend(cfg, cluster, model, choices(cfg, cluster, model, fixed, slowness), fixed)
    except InputError:
        return None


def _speed(choice: Choice | None) -> float:
    return 0.0 if choice is None else choice.cfg.train.global_batch_size / choice.time.total_s


def _paying_batch(
    cfg: ExperimentConfig,
    cluster: Cluster,
    model: nn.Module,
    fixed: frozenset[str],
    slowness: float,
    base: float,
    choice: Choice | None,
) -> int | None:
    batch = cfg.train.global_batch_size
    while batch <= _LARGEST_BATCH:
        if _speed(choice) >= KEEPS * base * cluster.gpus:
            return batch
        batch *= 2
        larger = replace(cfg, train=replace(cfg.train, global_batch_size=batch))
        choice = _best(larger, cluster, model, fixed, slowness)
    return None
