"""One published case: its json, its arrays and the rule of its weights."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Case:
    stem: str
    folder: Path
    json: dict[str, Any]
    arrays: dict[str, np.ndarray]
    weights: ModuleType  # fill, normal, image, tokens: deterministic tensors by name

    def __contains__(self, name: str) -> bool:
        return name in self.arrays


def read_case(folder: Path, stem: str) -> Case:
    spec = importlib.util.spec_from_file_location("golden_weights", Path(__file__).parents[1] / "golden" / "weights.py")
    weights = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(weights)
    values = json.loads((folder / f"{stem}.json").read_text())
    npz = folder / f"{stem}.npz"
    return Case(stem, folder, values, dict(np.load(npz)) if npz.exists() else {}, weights)
