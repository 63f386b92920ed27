"""A config as plain values, and as YAML."""

from __future__ import annotations

import dataclasses
from typing import Any

from omegaconf import OmegaConf

from rear_scale.config.schema import ExperimentConfig


def to_dict(cfg: ExperimentConfig) -> dict[str, Any]:
    """Plain nested values of the config, in the order of its dataclasses."""
    return dataclasses.asdict(cfg)


def to_yaml(cfg: ExperimentConfig) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(cfg)))


def leaves(values: dict[str, Any]) -> dict[str, Any]:
    """Every single value under its dotted key; an empty section is one value."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found.update({f"{key}.{name}": leaf for name, leaf in leaves(value).items()})
        else:
            found[key] = value
    return found
