"""Strong scaling of a run from 8 to 1,024 GPUs: the number of GPUs up to which doubling pays off, and the global batch that
would keep 95% efficiency."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rear_scale.config import ExperimentConfig, InputError
from rear_scale.model.generator import Generator
from rear_scale.scaling.cluster import Cluster, cluster_of
from rear_scale.scaling.planner import Choice, choices, recommend

GPUS = tuple(2**power for power in range(3, 11))
# Doubling the GPUs pays off if the run becomes faster by at least this factor.
PAYS = 1.5
# The efficiency that the recommended global batch keeps.
KEEPS = 0.95
_LARGEST_BATCH = 2**17


@dataclass(frozen=True)
class ScalingRow:
    """The fastest choice on a number of GPUs."""

    gpus: int
    choice: Choice | None  # None = nothing fits, or the batch has fewer images than there are GPUs
    images_per_s: float
    efficiency: float  # images per second and GPU, divided by that of the smallest cluster on which the run fits
    pays: bool  # at least PAYS times as fast as half as many GPUs
    paying_batch: (
        int | None
    )  # the smallest power of two times the global batch that has an efficiency of at least KEEPS


def scaling_rows(
    cfg: ExperimentConfig, cluster: Cluster, model: Generator, fixed: frozenset[str], slowness: float
) -> list[ScalingRow]:
    """One row for each number in GPUS. cluster: gives the model of the GPU."""
    rows: list[ScalingRow] = []
    base: float | None = None
    before: ScalingRow | None = None
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
        before = ScalingRow(gpus, choice, speed, efficiency, pays, batch)
        rows.append(before)
    return rows


def last_that_pays(rows: list[ScalingRow]) -> int | None:
    """The largest number of GPUs up to which every doubling pays off; None when nothing fits."""
    last = None
    for row in rows:
        if row.choice is not None and not row.pays:
            break
        last = row.gpus if row.choice is not None else last
    return last


def _best(
    cfg: ExperimentConfig, cluster: Cluster, model: Generator, fixed: frozenset[str], slowness: float
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
    model: Generator,
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
