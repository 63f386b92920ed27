"""Inputs that the json of a case describes: images and features from its recipe, networks with its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn


def recipe(code: str) -> dict[str, Any]:
    """The functions of a recipe in a json."""
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    return namespace


def images_of(case, description: str) -> list[np.ndarray]:
    """What a json describes as images(seed, first, count[, height, width]), one set for each such call in the text."""
    draw = recipe(case.json["images"]["python"])["images"]
    calls = re.findall(r"images\(seed,\s*([\d,\s]+)\)", description)
    return [draw(case.json["seed"], *map(int, numbers.split(","))) for numbers in calls]


def stored(values: Mapping[str, Any], *keys: str) -> Any:
    """A value of a json below these keys; None where it is not there."""
    for key in keys:
        if not isinstance(values, Mapping) or key not in values:
            return None
        values = values[key]
    return values


def inception_state(case, network: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict for Inception: drawn by name, variances above 1."""
    shapes = {name: value.shape for name, value in network.state_dict().items() if "num_batches" not in name}
    filled = case.weights.fill(shapes, case.json["seed"], case.json["weights"]["gains"])
    state = {name: torch.from_numpy(value) for name, value in filled.items()}
    return {name: 1 + value.abs() if name.endswith("running_var") else value for name, value in state.items()}
