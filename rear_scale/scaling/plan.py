"""From a command line to a plan."""

from __future__ import annotations

from rear_scale.config import ExperimentConfig
from rear_scale.model import meta_model
from rear_scale.model.flops import parameters_by_part
from rear_scale.scaling import planner
from rear_scale.scaling.devices import open_cluster
from rear_scale.scaling.report import Report
from rear_scale.scaling.widening import widths

_KEPT = ("strategy", "strategy.replicas", "strategy.defer_reduction", "train.activation_checkpointing")
_KEPT += ("train.micro_batch_size",)


def make(config: str, cfg: ExperimentConfig, overrides: list[str]) -> Report:
    """The plan of a config. What the overrides say of strategy, recomputation and micro-batch is kept.

    Raises InputError for an unknown GPU, a batch that the GPUs do not divide, and a run that does not fit.
    """
    keys = {text.split("=")[0] for text in overrides}
    fixed = frozenset(key for key in _KEPT if key in keys or (key == "strategy" and "strategy.name" in keys))
    cluster = open_cluster(cfg)
    model = meta_model(cfg)
    slowness, measured = 1.0, None
    found = planner.choices(cfg, cluster, model, fixed, slowness)
    best = planner.recommend(cfg, cluster, model, found, fixed)
    return Report(
        config=config,
        cfg=cfg,
        cluster=cluster,
        parameters=parameters_by_part(cfg, model),
        choices=found,
        best=best,
        command=planner.command(config, overrides, cluster, best),
        widths=widths(cfg, cluster, model, fixed, slowness),
        measured=measured,
        simulated=None,
    )
