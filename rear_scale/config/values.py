"""Conversion of a config to plain values and YAML."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from omegaconf import OmegaConf

from rear_scale.config.schema import ExperimentConfig


def to_dict(cfg: ExperimentConfig) -> dict[str, Any]:
    """The config as nested plain values, in the order of its dataclasses."""
    return dataclasses.asdict(cfg)


def to_yaml(cfg: ExperimentConfig) -> str:
    """The whole config as YAML, with every field."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(cfg)))


def with_home(cfg: ExperimentConfig) -> ExperimentConfig:
    """The same config object, after replacing a leading ~/ in its texts by the user's home folder.

    A shell does not expand it in words such as run.dir=~/runs/x.
    """

    def replaced(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            for field in dataclasses.fields(value):
                setattr(value, field.name, replaced(getattr(value, field.name)))
        elif isinstance(value, dict):
            return {name: replaced(inner) for name, inner in value.items()}
        elif isinstance(value, str) and value.startswith("~/"):
            return os.path.expanduser(value)
        return value

    return replaced(cfg)


def leaves(values: dict[str, Any]) -> dict[str, Any]:
    """The single values of nested ones by dotted key; an empty section is one value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat.update({f"{key}.{name}": leaf for name, leaf in leaves(value).items()})
        else:
            flat[key] = value
    return flat
