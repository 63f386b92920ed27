"""The kind and the scale of a model in words."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from rear_scale.config import ExperimentConfig, to_dict
from rear_scale.config.fields import declaration
from rear_scale.config.values import leaves

_OF_A_SEED = ("run.seed",)


def title_of(cfg: ExperimentConfig) -> str:
    """The name of a config's kind of model: reAR with its noise or heads, RAR with permutations, else AR."""
    objective = cfg.objective
    heads = objective.heads.encode_tap is not None or objective.heads.decode_tap is not None
    if heads or objective.noise.max > 0:
        return "reAR"
    return "RAR" if objective.permutation.active else "AR"


def recipe_of(cfg: ExperimentConfig) -> dict[str, Any]:
    """The fields that tell a training recipe: all that a resumed run may not change, without the seed. Runs of one recipe are
    seeds of one model. Paths are not among them."""
    found = {}
    for key, value in leaves(to_dict(cfg)).items():
        own = declaration(ExperimentConfig, key)
        if key not in _OF_A_SEED and (own is None or not own.may_change):
            found[key] = value
    return found


def recipe_hash(cfg: ExperimentConfig) -> str:
    """16 hexadecimal digits of `recipe_of`."""
    return hashlib.sha256(json.dumps(recipe_of(cfg), sort_keys=True, default=str).encode()).hexdigest()[:16]


def scale_of(cfg: ExperimentConfig) -> dict[str, Any]:
    """The data, size, length and recipe of a run: `data_set`; `scale` in words; `size`, depth times squared width, to sort by;
    `recipe`, the hash of `recipe_of`."""
    depth, width, steps = cfg.model.depth, cfg.model.width, cfg.train.total_steps
    length = f"{steps:,} steps" if steps is not None else f"{cfg.train.epochs:g} epochs"
    return {"data_set": cfg.data.train or "", "scale": f"{depth} x {width}, {length}", "size": depth * width**2,
            "recipe": recipe_hash(cfg)}  # fmt: skip
