"""The kind and the scale of a model in words."""

from __future__ import annotations

from typing import Any

from rear_scale.config import ExperimentConfig


def title_of(cfg: ExperimentConfig) -> str:
    """The name of a config's kind of model: reAR with its noise or heads, RAR with permutations, else AR."""
    objective = cfg.objective
    heads = objective.heads.encode_tap is not None or objective.heads.decode_tap is not None
    if heads or objective.noise.max > 0:
        return "reAR"
    return "RAR" if objective.permutation.active else "AR"


def scale_of(cfg: ExperimentConfig) -> dict[str, Any]:
    """The data, size and length of a run: `data_set`; `scale` in words; `size`, depth times squared width, to sort by."""
    depth, width, steps = cfg.model.depth, cfg.model.width, cfg.train.total_steps
    length = f"{steps:,} steps" if steps is not None else f"{cfg.train.epochs:g} epochs"
    return {"data_set": cfg.data.train or "", "scale": f"{depth} x {width}, {length}", "size": depth * width**2}
