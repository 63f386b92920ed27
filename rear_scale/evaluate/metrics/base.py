"""The interface of metrics: the features that a metric reads, its computation, and the names and formats of its numbers.

A new metric is a subclass of SampleMetric (a number of the scored images alone) or ReferenceMetric (a number against each
reference set), with one instance in the list of metrics/__init__.py. It then appears in result.json, in the scores during
training, in the summary for wandb and, if it has columns, in the printed table.
"""

# n images, F values of a feature

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Protocol

import numpy as np
import torch

from rear_scale.config import EvaluateConfig
from rear_scale.evaluate.metrics.moments import Moments, moments_of
from rear_scale.evaluate.networks.base import Extractor
from rear_scale.evaluate.networks.feature_cache import FeatureBlocks
from rear_scale.world import World


class Rows(Protocol):
    """Features that can be read in slices of rows: an array, a mapped file, or blocks on disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice) -> np.ndarray: ...


class FeatureSet:
    """The stored features of one set of images by one network."""

    def __init__(self, name: str, blocks: FeatureBlocks, device: torch.device) -> None:
        self.name, self.blocks, self.device = name, blocks, device
        self.kept: dict[Any, Any] = {}  # values of this set that metrics cache for the next comparison
        self._moments: dict[str, Moments] = {}

    @property
    def count(self) -> int:
        """The number of images."""
        return self.blocks.count

    def moments(self, feature: str) -> Moments | None:
        """Mean and covariance of a feature, summed block by block; None for fewer than two images."""
        if self.count < 2:
            return None
        if feature not in self._moments:
            self._moments[feature] = moments_of((part for _, part in self.parts(feature)), self.device)
        return self._moments[feature]

    def rows(self, feature: str, most: int | None = None) -> Rows:
        """A feature of all images, or of at most `most` evenly spaced images: [n, F], in the order of the blocks."""
        rows = self.blocks.rows(feature)
        if most is None or len(rows) <= most:
            return rows
        chosen = np.arange(most) * len(rows) // most
        return np.concatenate([rows[int(number) : int(number) + 1] for number in chosen])

    def parts(self, feature: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (image numbers int64 [n], a feature of these images [n, F]) of each block."""
        for number, ids in enumerate(self.blocks.ids):
            yield ids, self.blocks.array(number, feature)

    def column(self, name: str) -> np.ndarray | None:
        """One value per image in the order of the images; None where the set has no such values."""
        return self.blocks.column(name)


class ReferenceSet(Protocol):
    """The interface of a reference for metrics. A reference may be a file of statistics without images."""

    name: str
    kept: dict[Any, Any]  # as in FeatureSet

    def moments(self, feature: str) -> Moments | None:
        """Mean and covariance of a feature; None without statistics and images. Not a collective."""
        ...

    def rows(self, feature: str, most: int | None = None) -> Rows | None:
        """A feature as of FeatureSet.rows; None where the reference has no images."""
        ...


@dataclass(frozen=True)
class Inputs:
    """The inputs of one network's metrics."""

    network: Extractor  # the opened network; of a published one, a FeatureNetwork
    samples: FeatureSet
    references: Sequence[ReferenceSet]
    cfg: EvaluateConfig
    world: World


@dataclass(frozen=True)
class Output:
    """The result of one computation of a metric."""

    values: Mapping[str, Any]  # by key of result.json
    reference: str | None = None  # None = values without a reference
    notes: Sequence[
        str
    ] = ()  # remarks for the reader of the numbers; those without a reference are shown with every reference
    intervals: Mapping[str, Any] = field(default_factory=dict)  # by key: bootstrap intervals that need no resampling


@dataclass(frozen=True)
class Column:
    """A column of the printed table."""

    title: str
    digits: int
    read: Callable[[Mapping[str, Any]], float | None]  # from the values of the metric, see Metric.numbers
    published: str | None = None  # the field of PublishedRow that stands in this column
    published_digits: int = 2


class Metric(ABC):
    """One entry of the list of metrics."""

    name: str  # unique in the list; the key in result.json, unless `numbers` says otherwise
    network: str  # whose features it reads: a row of networks/__init__.py, `classifier`, `pixels` or `reconstruction`
    against_references: ClassVar[bool]  # False = a number of the scored images alone
    columns: Sequence[Column] = ()  # in the printed table
    label: str = ""  # in reports, with {reference} in place of the name of a reference
    digits: int = 3  # decimal places in reports
    resamples: ClassVar[bool] = (
        False  # whether `resampled` is defined, for bootstrap intervals; such a metric has one number
    )

    def tasks(self, inputs: Inputs) -> list[Callable[[], list[Output]]]:
        """Computations that are distributed over ranks: each runs on one rank, and all ranks get its result."""
        return []

    def together(self, inputs: Inputs) -> list[Output]:
        """The result of a computation in which all ranks take part, the same on each rank."""
        return []

    def resampled(self, inputs: Inputs, weights: np.ndarray) -> dict[str | None, float | None]:
        """The number by reference (None: without a reference), where image i counts weights[i] times (int64 [n]).

        Called only for metrics with `resamples`, which must define it.
        """
        raise NotImplementedError

    def numbers(self, values: Mapping[str, Any]) -> dict[str, float | None]:
        """The numbers under flat names for dashboards. values: the dict of result.json that holds this metric's keys."""
        return {self.name: values.get(self.name)}

    def training_numbers(self, values: Mapping[str, Any]) -> dict[str, float | None]:
        """The numbers as in `numbers`, for the few images that are scored during training."""
        return self.numbers(values)


class SampleMetric(Metric):
    """A metric of the scored images alone."""

    against_references = False

    def tasks(self, inputs: Inputs) -> list[Callable[[], list[Output]]]:
        return [partial(self._parts, inputs)]

    def _parts(self, inputs: Inputs) -> list[Output]:
        return [Output({self.name: self.score(inputs)})]

    @abstractmethod
    def score(self, inputs: Inputs) -> float | Mapping[str, Any] | None:
        """The value in result.json: a number, None or a dict, to which bootstrap intervals are added as `bootstrap`."""


class ReferenceMetric(Metric):
    """A metric of the scored images against each reference."""

    against_references = True

    def tasks(self, inputs: Inputs) -> list[Callable[[], list[Output]]]:
        return [partial(self._parts, inputs)]

    def _parts(self, inputs: Inputs) -> list[Output]:
        return [Output({self.name: self.score(inputs, other)}, other.name) for other in inputs.references]

    @abstractmethod
    def score(self, inputs: Inputs, reference: ReferenceSet) -> float | Mapping[str, Any] | None:
        """The value in result.json, a number or several by key; None where the reference or the number of images does not
        allow one."""
