"""The plan of a command line (launchers/plan.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rear_scale.config import ExperimentConfig, check_override
from rear_scale.config.schema import STRATEGY_KEY
from rear_scale.config.values import leaves
from rear_scale.model import meta_model
from rear_scale.model.flops import parameters_by_part
from rear_scale.scaling import planner
from rear_scale.scaling.cluster import Cluster, open_cluster
from rear_scale.scaling.output import Report
from rear_scale.scaling.planner import Choice
from rear_scale.scaling.strong_scaling import scaling_rows

if TYPE_CHECKING:
    from rear_scale.scaling.measure import Measured

_KEPT = ("strategy", *planner.STRATEGY_KEYS, "train.activation_checkpointing", "train.micro_batch_size")


def make_plan(
    config: str, cfg: ExperimentConfig, overrides: list[str], *, measured: bool = False, simulated: bool = False
) -> Report:
    """The plan of a config. Overrides of strategy, recomputation and micro-batch size are not varied.

    measured: use the rate of a few steps on this machine's device. simulated: run the recommended strategy, or the fastest that
    can be simulated, on rank 0 of a fake process group. Raises InputError for an unknown GPU, a batch that the number of GPUs
    does not divide, and a run that does not fit.
    """
    parsed = [check_override(text) for text in overrides]
    # Nested overrides too: train={micro_batch_size: 16} sets train.micro_batch_size.
    keys = {key for one in parsed for key in leaves({one.key: one.value})}
    fixed = frozenset(key for key in _KEPT if key in keys or (key == "strategy" and STRATEGY_KEY in keys))
    cluster = open_cluster(cfg)
    model = meta_model(cfg)
    rate = _measure(cfg, cluster) if measured else None
    slowness = rate.slowness if rate else 1.0
    choices = planner.choices(cfg, cluster, model, fixed, slowness)
    best = planner.recommend(cfg, cluster, model, choices, fixed)
    return Report(
        config=config,
        cfg=cfg,
        cluster=cluster,
        parameters=parameters_by_part(cfg, model),
        choices=choices,
        best=best,
        command=planner.command(config, overrides, cluster, best),
        scaling_rows=scaling_rows(cfg, cluster, model, fixed, slowness),
        measured=rate.as_dict() if rate else None,
        simulated=_simulate(cluster, choices, best, fixed) if simulated else None,
    )


def _measure(cfg: ExperimentConfig, cluster: Cluster) -> Measured:
    # Imported here, because a plan without --measure needs neither engines nor the objective.
    from rear_scale.scaling.measure import measure

    return measure(cfg, cluster)


def _simulate(cluster: Cluster, candidates: list[Choice], best: Choice, fixed: frozenset[str]) -> dict[str, Any]:
    from rear_scale.scaling.simulate import beside_formula

    chosen = best
    others = [one for one in candidates if one.fits and one.row.simulated]
    if not best.row.simulated and "strategy" not in fixed and others:
        chosen = min(others, key=lambda one: one.time.total_s)
    return beside_formula(chosen.cfg, cluster.gpus)
