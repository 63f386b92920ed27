"""The row of a feature network: its name, weight files, config fields and the arrays of its statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rear_scale.config import EvaluateConfig
from rear_scale.evaluate.networks.base import FeatureNetwork, PairDistance
from rear_scale.evaluate.networks.weights import PublishedFile, check_weight_file

PACKAGED = "package"  # in place of a path: the weight file inside an installed Python package


@dataclass(frozen=True)
class StatisticsArrays:
    """The arrays of a statistics file that hold the moments of one feature."""

    mean: str
    covariance: str
    is_published: bool = False  # whether published statistics files may hold these arrays


@dataclass(frozen=True)
class NetworkRow:
    """One feature network."""

    name: str  # the name of its section in result.json
    # By field of `evaluate`, or `network_weights.NAME` for a network without its own field. The network is used if one of
    # them is set.
    weights: Mapping[str, PublishedFile]
    make: Callable[..., Any]  # (path of each weight file, device) -> FeatureNetwork, or PairDistance if `of_pairs`
    statistics: Mapping[str, StatisticsArrays] = field(default_factory=dict)  # by feature, for features with moments
    of_pairs: bool = False  # whether it compares images with their reconstructions
    # By field that may be PACKAGED, a function that finds the weight file which that stands for.
    packaged: Mapping[str, Callable[[], Path | None]] = field(default_factory=dict)

    def paths(self, cfg: EvaluateConfig) -> dict[str, str | None]:
        """The path of the weight file of each field, by full name (`evaluate.inception_weights`)."""
        return {f"evaluate.{name}": self._path(cfg, name) for name in self.weights}

    def _path(self, cfg: EvaluateConfig, name: str) -> str | None:
        value = _value(cfg, name)
        if value == PACKAGED and name in self.packaged and (path := self.packaged[name]()) is not None:
            return str(path)
        return value

    def is_set(self, cfg: EvaluateConfig) -> bool:
        return any(path is not None for path in self.paths(cfg).values())

    def check(self, cfg: EvaluateConfig) -> None:
        """Raises InputError when a weight file is missing."""
        for (name, path), published in zip(self.paths(cfg).items(), self.weights.values(), strict=True):
            check_weight_file(path, name, published)

    def open(self, cfg: EvaluateConfig, device: torch.device) -> FeatureNetwork:
        """The network with its weights. Raises InputError for a missing or damaged weight file, or one of another network."""
        return self.make(*self.paths(cfg).values(), device)

    def open_distance(self, cfg: EvaluateConfig, device: torch.device) -> PairDistance:
        """As `open`, where `of_pairs`."""
        return self.make(*self.paths(cfg).values(), device)


def _value(cfg: EvaluateConfig, name: str) -> str | None:
    section, _, key = name.partition(".")
    value = getattr(cfg, section)
    return value.get(key) if key else value
