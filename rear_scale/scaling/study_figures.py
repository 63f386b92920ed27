"""Figures of a study, returned as PNG bytes: loss curves, scores by epoch and size, gaps of objectives, IsoFLOP profiles."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rear_scale.figures import logarithmic, plt, png
from rear_scale.intervals import t_quantile

_PROFILES = 4  # budgets of compute of which a profile is drawn
_FEWEST = 3  # sizes of a profile


@dataclass(frozen=True)
class Curve:
    """The loss of one cell over training."""

    group: str  # cells that differ in the seed alone are one group
    parameters: int
    flops_per_image: float
    images: list[int]
    values: list[float]
    method: str = ""  # runs of one method differ in size, length and seed


@dataclass(frozen=True)
class Gap:
    """The difference of two objectives at one size: of each seed, baseline - other."""

    label: str
    parameters: int
    flops: float
    differences: list[float]
    series: str = ""  # gaps of one series differ in size alone, and are drawn as one line

    @property
    def mean(self) -> float:
        return statistics.mean(self.differences)

    @property
    def half_width(self) -> float | None:
        """Half of the 90% interval of the mean over seeds (Student's t); None for a single seed."""
        if len(self.differences) < 2:
            return None
        return (
            t_quantile(len(self.differences) - 1, 0.9)
            * statistics.stdev(self.differences)
            / math.sqrt(len(self.differences))
        )


def loss_curves(curves: Sequence[Curve], quantity: str) -> bytes:
    """The mean over seeds of each group over images seen, with the range of its seeds."""
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    for group in dict.fromkeys(curve.group for curve in curves):
        own = [curve for curve in curves if curve.group == group]
        shared = [images for images in own[0].images if all(images in curve.images for curve in own)]
        table = np.array([[curve.values[curve.images.index(images)] for images in shared] for curve in own])
        if not shared:
            continue
        (line,) = axes.plot(shared, table.mean(0), linewidth=1.3, label=group)
        if len(own) > 1:
            axes.fill_between(shared, table.min(0), table.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel="images seen", ylabel=quantity)
    return _finished(figure, axes)


def scores_by_size(points: Mapping[str, Sequence[tuple[float, float]]], score: str) -> bytes:
    """A score of finished runs against parameters, one line for each name."""
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for name, pairs in points.items():
        sizes = sorted({size for size, _ in pairs})
        means = [statistics.mean(value for other, value in pairs if other == size) for size in sizes]
        (line,) = axes.plot(sizes, means, linewidth=1.3, label=name)
        axes.scatter([size for size, _ in pairs], [value for _, value in pairs], s=12, color=line.get_color())
    axes.set(xlabel="parameters without heads", ylabel=score)
    logarithmic(axes, [size for pairs in points.values() for size, _ in pairs], "M")
    return _finished(figure, axes)


def scores_by_epoch(series: Mapping[str, Sequence[tuple[float, float]]], score: str) -> bytes:
    """A score during training against epochs, one line for each run (reAR Figure 4)."""
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for name, pairs in series.items():
        axes.plot(*zip(*pairs, strict=True), marker="o", markersize=3, linewidth=1.3, label=name)
    axes.set(xlabel="epochs", ylabel=score)
    return _finished(figure, axes)


def gap_by_size(gaps: Mapping[str, Sequence[Gap]], against: str) -> bytes:
    """The gaps of each quantity against parameters and against compute, with 90% intervals over seeds. against: the words for
    the difference, such as "ar - rear"."""
    figure, rows = plt.subplots(len(gaps), 2, figsize=(9.0, 3.0 * len(gaps)), layout="constrained", squeeze=False)
    for (quantity, of_quantity), (left, right) in zip(gaps.items(), rows, strict=True):
        for axes, field, label in (
            (left, "parameters", "parameters without heads"),
            (right, "flops", "training FLOPs"),
        ):
            for series in dict.fromkeys(gap.series for gap in of_quantity):
                own = sorted((gap for gap in of_quantity if gap.series == series), key=lambda gap: getattr(gap, field))
                widths = [gap.half_width or 0.0 for gap in own]
                axes.errorbar([getattr(gap, field) for gap in own], [gap.mean for gap in own], widths, marker="o",
                              markersize=4, linewidth=1.2, capsize=3, label=series or "as configured")  # fmt: skip
            if len({gap.series for gap in of_quantity}) > 1:
                axes.legend(fontsize=6)
            axes.axhline(0, color="0.5", linewidth=0.8)
            axes.set(xlabel=label, ylabel=f"{quantity}: {against}")
            if field == "parameters":
                logarithmic(axes, [gap.parameters for gap in of_quantity], "M")
            else:
                axes.set_xscale("log")
            axes.grid(alpha=0.3)
    return png(figure)


def isoflop_profiles(curves: Sequence[Curve], quantity: str) -> bytes | None:
    """The loss against parameters at equal compute, read off each run's curve, for each method; None where too few sizes share a
    budget.

    A loss on the way is that of a learning rate that has not decayed, so profiles rank sizes and are not losses of finished runs.
    """
    by_method = {
        method: own
        for method in dict.fromkeys(curve.method for curve in curves)
        if _budgets(own := [curve for curve in curves if curve.method == method])
    }
    if not by_method:
        return None
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for (method, own), style in zip(by_method.items(), itertools.cycle(("-", "--", ":", "-."))):
        axes.set_prop_cycle(None)  # the same colour for the same budget of each method
        for budget in _budgets(own):
            points = [(curve.parameters, value) for curve in own if (value := loss_at(curve, budget)) is not None]
            sizes = sorted({size for size, _ in points})
            means = [statistics.mean(value for other, value in points if other == size) for size in sizes]
            label = " ".join(filter(None, (method, f"{budget:.1e} FLOPs")))
            axes.plot(sizes, means, style, marker="o", markersize=4, linewidth=1.2, label=label)
    axes.set(xlabel="parameters without heads", ylabel=quantity)
    logarithmic(axes, [curve.parameters for curve in curves], "M")
    return _finished(figure, axes)


def _budgets(curves: Sequence[Curve]) -> list[float]:
    """Budgets of compute that several sizes have spent, evenly spaced in logarithms."""
    spans: dict[int, tuple[float, float]] = {}
    for curve in curves:
        if curve.images:
            first, last = curve.images[0] * curve.flops_per_image, curve.images[-1] * curve.flops_per_image
            low, high = spans.get(curve.parameters, (first, last))
            spans[curve.parameters] = min(low, first), max(high, last)
    if len(spans) < _FEWEST:
        return []
    # From where the third size has begun to where only three sizes still go on.
    begin = sorted(low for low, _ in spans.values())[_FEWEST - 1]
    end = sorted(high for _, high in spans.values())[-_FEWEST]
    return [] if begin >= end else np.geomspace(begin, end, _PROFILES).tolist()


def loss_at(curve: Curve, flops: float) -> float | None:
    """The loss of a run after some compute, between the logged steps; None outside of them."""
    spent = [images * curve.flops_per_image for images in curve.images]
    if not spent or not spent[0] <= flops * (1 + 1e-9) or not flops <= spent[-1] * (1 + 1e-9):
        return None
    return float(np.interp(math.log(flops), np.log(spent), curve.values))


def _finished(figure: plt.Figure, axes: Any) -> bytes:
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    return png(figure)
