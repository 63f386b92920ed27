"""Inputs that the json of a case describes: images and features from its recipe, networks with its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def recipe(code: str) -> dict[str, Any]:
    """The functions of a recipe in a json."""
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    return namespace


def inception_state(case, network: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict for Inception: drawn by name, variances above 1."""
    shapes = {name: value.shape for name, value in network.state_dict().items() if "num_batches" not in name}
    filled = case.weights.fill(shapes, case.json["seed"], case.json["weights"]["gains"])
    state = {name: torch.from_numpy(value) for name, value in filled.items()}
    return {name: 1 + value.abs() if name.endswith("running_var") else value for name, value in state.items()}
