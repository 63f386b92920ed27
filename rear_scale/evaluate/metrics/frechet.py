"""Fréchet distances on the features of a network: FID, sFID, FD-DINOv2."""

# n images, F values of a feature

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import numpy as np
import torch

from rear_scale.evaluate.metrics.base import Column, Inputs, Metric, Output
from rear_scale.evaluate.metrics.distances import frechet_distance
from rear_scale.evaluate.metrics.moments import Moments, MomentSums
from rear_scale.evaluate.networks.base import FeatureNetwork

_EXTRAPOLATION_POINTS = 8
SINGULAR = "singular covariance"  # in the notes of distances


class FrechetDistance(Metric):
    """The Fréchet distance on one feature, with its extrapolation to infinitely many images (evaluate.fid_infinity)."""

    against_references = True
    resamples = True

    def __init__(
        self, name: str, network: str, feature: str, title: str | None = None, published: str | None = None
    ) -> None:
        """title: the title of its column in the printed table; None = no column."""
        self.name, self.network, self.feature = name, network, feature
        if title is not None:
            self.columns = (Column(title, 3, lambda values: values.get(name), published),)

    def tasks(self, inputs: Inputs) -> list[Callable[[], list[Output]]]:
        computations: list[Callable[[], list[Output]]] = [partial(self._distances, inputs)]
        if inputs.cfg.fid_infinity:
            computations.append(partial(self._extrapolated, inputs))
        return computations

    def _distances(self, inputs: Inputs) -> list[Output]:
        own = inputs.samples.moments(self.feature)
        size = cast("FeatureNetwork", inputs.network).sizes[self.feature]
        parts = []
        for reference in inputs.references:
            other = reference.moments(self.feature)
            values = {
                self.name: None if own is None or other is None else frechet_distance(own, other),
                f"{self.name}_reference_images": None if other is None else other.count,
            }
            notes = []
            if other is not None and other.count is not None and other.is_singular:
                notes.append(self._singular(other.count, len(other.mean), "reference"))
            parts.append(Output(values, reference.name, notes))
        if inputs.samples.count <= size:
            parts.append(Output({}, notes=[self._singular(inputs.samples.count, size, "sample")]))
        return parts

    def _singular(self, count: int, size: int, whose: str) -> str:
        return (
            f"{self.name}: {count:,} {whose} images give a {SINGULAR} of {size} features; the value is exact for "
            "these images, but can be compared only with values of the same number of images"
        )

    def _extrapolated(self, inputs: Inputs) -> list[Output]:
        """The distance extrapolated to infinitely many samples, by a linear fit in 1/N over subsets of growing size N (Chong &
        Forsyth 2020, arXiv:1911.07023)."""
        key, count = f"{self.name}_extrapolated", inputs.samples.count
        sizes = np.unique(np.linspace(count / 4, count, _EXTRAPOLATION_POINTS).round().astype(int))
        sizes = sizes[sizes >= 2]  # one image has no covariance
        if len(sizes) < 2:
            return [Output({key: None}, reference.name) for reference in inputs.references]
        values: dict[str, list[float]] = {reference.name: [] for reference in inputs.references}
        for own in self._moments_of_subsets(inputs, sizes):
            for reference in inputs.references:
                other = reference.moments(self.feature)
                if other is not None:
                    values[reference.name].append(frechet_distance(own, other))
        return [
            Output({key: _line(sizes, distances) if distances else None}, name) for name, distances in values.items()
        ]

    def _moments_of_subsets(self, inputs: Inputs, sizes: np.ndarray) -> Iterator[Moments]:
        """Yields the moments of subsets of `sizes` images, each subset within the next."""
        # The subsets follow a random permutation of all images, so that they do not depend on the blocks.
        positions = np.random.default_rng([inputs.cfg.seed, 1]).permutation(inputs.samples.count)
        groups = np.searchsorted(sizes, positions, side="right")
        device = inputs.world.device
        sums: dict[int, MomentSums] = {}
        shift: torch.Tensor | None = None
        for ids, array in inputs.samples.parts(self.feature):
            features = torch.from_numpy(array)
            if shift is None:
                shift = features.to(device).double().mean(0)
            for group in np.unique(groups[ids]):
                sums.setdefault(int(group), MomentSums(features.shape[1], device, shift)).add(
                    features[torch.from_numpy(groups[ids] == group)]
                )
        assert shift is not None
        total = MomentSums(len(shift), device, shift)
        for group in range(len(sizes)):
            total.add_sums(sums[group])
            yield total.moments()

    def resampled(self, inputs: Inputs, weights: np.ndarray) -> dict[str | None, float | None]:
        sums: MomentSums | None = None
        for ids, array in inputs.samples.parts(self.feature):
            sums = sums or MomentSums(array.shape[1], inputs.world.device)
            sums.add(torch.from_numpy(array), torch.from_numpy(weights[ids]).double())
        assert sums is not None
        own = sums.moments() if inputs.samples.count > 1 else None
        distances: dict[str | None, float | None] = {}
        for reference in inputs.references:
            other = reference.moments(self.feature)
            distances[reference.name] = None if own is None or other is None else frechet_distance(own, other)
        return distances


def _line(sizes: np.ndarray, values: list[float]) -> dict[str, Any]:
    slope, intercept = np.polyfit(1 / sizes, values, 1)
    return {"value": float(intercept), "slope": float(slope), "samples": sizes.tolist(), "values": values}
