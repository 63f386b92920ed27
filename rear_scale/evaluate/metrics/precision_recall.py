"""Precision, recall, density and coverage from nearest neighbours, in blocks, so that memory does not grow with the images.

A set's manifold is the union of balls around its images, whose radius is the distance to the third nearest neighbour.
Kynkäänniemi et al. 2019, arXiv:1904.06991; density and coverage: Naeem et al. 2020, arXiv:2002.09797.
"""

# n reference images, m samples, F features

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rear_scale.config import InputError
from rear_scale.config.schema import PRECISION_RECALL_ARITHMETICS
from rear_scale.evaluate.metrics.base import Column, FeatureSet, Inputs, Metric, Output, ReferenceSet, Rows
from rear_scale.evaluate.metrics.bootstrap import fraction_draws, fraction_interval
from rear_scale.evaluate.networks.base import exact_arithmetic
from rear_scale.world import World

NEIGHBOURS = 3  # k

_ROWS = 2000  # rows per task; a rank holds _ROWS x _COLUMNS distances at a time
_COLUMNS = 5000
_ADM_BLOCK = 10_000  # ADM chooses between half and single precision for blocks of this many rows and columns
_HALF_MAX = 65504.0


@dataclass(frozen=True)
class Overlap:
    """The overlap of two manifolds: fractions of images, and density, which may exceed 1."""

    precision: float  # samples inside the reference manifold
    recall: float  # reference images inside the samples' manifold
    density: float  # mean number of balls of reference images that contain a sample, divided by k
    coverage: float  # reference images whose ball contains a sample
    sample_inside: np.ndarray  # bool [m]
    reference_inside: np.ndarray  # bool [n]


class Distances:
    """Squared distances between the images of two sets, in one of two arithmetics.

    exact: float32 throughout; decisions equal those in float64 except for ties within rounding errors.
    adm_fp16: the arithmetic of ADM's evaluation, and therefore of published figures: inputs, norms, products and sums are
    rounded to half precision; a block of 10,000 x 10,000 images with an overflow in half precision is computed in float32.
    """

    def __init__(self, rows: Rows, columns: Rows, mode: str, device: torch.device) -> None:
        assert mode in PRECISION_RECALL_ARITHMETICS, mode
        self.rows, self.columns, self.mode, self.device = rows, columns, mode, device
        self.fits_half: dict[tuple[int, int], bool] = {}
        if mode == "adm_fp16":
            self.row_norms, self.column_norms = self._largest_norms(rows), self._largest_norms(columns)

    def of_rows(self, start: int) -> Iterator[tuple[int, Tensor]]:
        """Yields (first column, distances float32 [r, c]) of the rows start .. start + 2000, for each block of columns."""
        row_part = self._read(self.rows, start, start + _ROWS)
        for column in range(0, len(self.columns), _COLUMNS):
            column_part = self._read(self.columns, column, column + _COLUMNS)
            half = self.mode == "adm_fp16" and self._block_fits_half(start // _ADM_BLOCK, column // _ADM_BLOCK)
            yield column, _half_distances(row_part, column_part) if half else _distances(row_part, column_part)

    def _read(self, rows: Rows, start: int, end: int) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(rows[start : min(end, len(rows))], np.float32)).to(self.device)

    def _largest_norms(self, rows: Rows) -> list[float]:
        """The largest squared norm of each block."""
        norms = []
        for block in range(0, len(rows), _ADM_BLOCK):
            end = min(block + _ADM_BLOCK, len(rows))
            parts = [self._read(rows, start, min(start + _ROWS, end)) for start in range(block, end, _ROWS)]
            norms.append(max(part.square().sum(1).max().item() for part in parts))
        return norms

    def _block_fits_half(self, row_block: int, column_block: int) -> bool:
        """Whether a block has no overflow in half precision. Norms decide, unless they are too large to exclude one."""
        if (row_block, column_block) not in self.fits_half:
            largest = max(self.row_norms[row_block], self.column_norms[column_block])
            # |u - v|^2 is at most four times the larger squared norm, and all intermediate terms are smaller.
            self.fits_half[row_block, column_block] = 4.1 * largest < _HALF_MAX or all(
                _half_distances(self._read(self.rows, *row), self._read(self.columns, *column)).isfinite().all()
                for row in _parts(row_block, len(self.rows), _ROWS)
                for column in _parts(column_block, len(self.columns), _COLUMNS)
            )
        return self.fits_half[row_block, column_block]


def _parts(block: int, count: int, size: int) -> Iterator[tuple[int, int]]:
    end = min((block + 1) * _ADM_BLOCK, count)
    for start in range(block * _ADM_BLOCK, end, size):
        yield start, min(start + size, end)


def _distances(u: Tensor, v: Tensor) -> Tensor:
    products = u @ v.T
    return (u.square().sum(1)[:, None] - 2 * products + v.square().sum(1)).clamp_(min=0)


def _half_distances(u: Tensor, v: Tensor) -> Tensor:
    """Squared distances with each result rounded to half precision; sums within a product or a norm are in float32, and are
    rounded once."""
    u, v = u.half(), v.half()
    u_norms, v_norms = (part.square().float().sum(1).half() for part in (u, v))
    products = (u.float() @ v.float().T).half()
    # torch.where, not clamp: clamp would hide the NaN by which ADM's code detects an overflow.
    distances = u_norms[:, None] - 2 * products + v_norms
    return torch.where(distances < 0, 0, distances).float()


def radii(rows: Rows, mode: str, world: World | None = None, device: torch.device | None = None) -> Tensor:
    """The squared distance of each row to its third nearest neighbour, float32 [n] on the CPU.

    With a world, all ranks must call this: each computes a part of the rows, and all return the whole result.
    Raises InputError for too few rows.
    """
    if len(rows) <= NEIGHBOURS:
        raise InputError(
            f"{len(rows)} images have no {NEIGHBOURS}rd neighbour, which precision and recall need. Use more than {NEIGHBOURS}"
        )
    device = device or (world.device if world else torch.device("cpu"))
    distances = Distances(rows, rows, mode, device)
    squared_radii = torch.zeros(len(rows), dtype=torch.float64)
    with exact_arithmetic():
        for start in _own(range(0, len(rows), _ROWS), world):
            nearest = torch.empty(0)
            for _, part in distances.of_rows(start):
                part = part.topk(min(NEIGHBOURS + 1, part.shape[1]), largest=False).values
                joined = torch.cat([nearest.to(part), part], 1) if nearest.numel() else part
                nearest = joined.topk(min(NEIGHBOURS + 1, joined.shape[1]), largest=False).values
            # The row itself is one of the k + 1 nearest, at distance 0 up to rounding.
            squared_radii[start : start + len(nearest)] = nearest.max(1).values.double().cpu()
    # Each row is computed by one rank and is 0 on the others, so that the sum is exact.
    return (world.sum(squared_radii) if world else squared_radii).float()


def overlap(
    reference: Rows,
    samples: Rows,
    reference_radii: Tensor,
    sample_radii: Tensor,
    mode: str,
    world: World | None = None,
    device: torch.device | None = None,
) -> Overlap:
    """Precision, recall, density and coverage, from the radii of both sets (`radii`, in the same mode).

    With a world, all ranks must call this: each computes a part of the reference rows, and all return the whole result.
    """
    device = device or (world.device if world else torch.device("cpu"))
    distances = Distances(reference, samples, mode, device)
    balls_around_sample = torch.zeros(len(samples), dtype=torch.float64)
    reference_inside = torch.zeros(len(reference), dtype=torch.float64)
    reference_covered = torch.zeros(len(reference), dtype=torch.float64)
    with exact_arithmetic():
        for start in _own(range(0, len(reference), _ROWS), world):
            end = min(start + _ROWS, len(reference))
            row_radii = reference_radii[start:end].to(device)[:, None]
            for column, part in distances.of_rows(start):
                columns = slice(column, column + part.shape[1])
                in_reference_ball = part <= row_radii
                balls_around_sample[columns] += in_reference_ball.sum(0).cpu()
                reference_covered[start:end] += in_reference_ball.any(1).cpu()
                reference_inside[start:end] += (part <= sample_radii[columns].to(device)).any(1).cpu()
    counts = torch.cat([balls_around_sample, reference_inside, reference_covered])
    counts = world.sum(counts) if world else counts
    balls, inside, covered = counts.split([len(samples), len(reference), len(reference)])
    return Overlap(
        precision=(balls > 0).double().mean().item(),
        recall=(inside > 0).double().mean().item(),
        density=balls.mean().item() / NEIGHBOURS,
        coverage=(covered > 0).double().mean().item(),
        sample_inside=(balls > 0).numpy(),
        reference_inside=(inside > 0).numpy(),
    )


def _own(tasks: Sequence[int], world: World | None) -> Sequence[int]:
    return tasks[world.rank :: world.size] if world else tasks


_NAMES = ("precision", "recall", "density", "coverage")


def _column(name: str) -> Column:
    return Column(name, 4, lambda values: _as_adm(values.get(name)), name)


class NeighbourMetrics(Metric):
    """Precision, recall, density and coverage on one feature, each in the arithmetics of evaluate.precision_recall_arithmetic."""

    against_references = True

    def __init__(self, network: str, feature: str, prefix: str = "", *, in_table: bool = False) -> None:
        """prefix: precedes the names on dashboards, where several networks have the same metrics."""
        self.name, self.network, self.feature, self.prefix = f"{prefix}precision_recall", network, feature, prefix
        if in_table:
            self.columns = tuple(map(_column, ("precision", "recall")))

    def together(self, inputs: Inputs) -> list[Output]:
        """The outputs of all references. All ranks work on one reference at a time, because its pairwise distances take long."""
        return [self._against(inputs, reference) for reference in inputs.references]

    def _against(self, inputs: Inputs, reference: ReferenceSet) -> Output:
        cfg, world, samples = inputs.cfg, inputs.world, inputs.samples
        rows = reference.rows(self.feature, cfg.precision_recall_reference_images)
        if rows is None or min(len(rows), samples.count) <= NEIGHBOURS:
            return Output(dict.fromkeys(_NAMES), reference.name)
        sample_rows = samples.rows(self.feature)
        values_by_name: dict[str, dict[str, float]] = {name: {} for name in _NAMES}
        for mode in cfg.precision_recall_arithmetic:
            reference_radii = self._radii(reference, rows, mode, world)
            sample_radii = self._radii(samples, sample_rows, mode, world)
            both = overlap(rows, sample_rows, reference_radii, sample_radii, mode, world)
            for name in _NAMES:
                values_by_name[name][mode] = getattr(both, name)
        values = {**values_by_name, "neighbours": NEIGHBOURS, "neighbour_reference_images": len(rows)}
        counts = {"precision": samples.count, "recall": len(rows)} if cfg.bootstrap else {}
        return Output(values, reference.name, intervals=_intervals(values_by_name, counts, cfg.seed))

    def _radii(self, images: FeatureSet | ReferenceSet, rows: Rows, mode: str, world: World) -> Tensor:
        """The radii of a set, computed once and cached in `kept`. All ranks must call this."""
        key = ("radii", self.feature, mode)
        if key not in images.kept:
            images.kept[key] = radii(rows, mode, world)
        return images.kept[key]

    def numbers(self, values: Mapping[str, Any]) -> dict[str, float | None]:
        return {
            f"{self.prefix}{name}_{mode}": value for name in _NAMES for mode, value in (values.get(name) or {}).items()
        }

    def training_numbers(self, values: Mapping[str, Any]) -> dict[str, float | None]:
        return {}  # with few images, the manifold is too coarse


def _intervals(
    fractions: Mapping[str, Mapping[str, float]], counts: Mapping[str, int], seed: int
) -> dict[str, dict[str, Any]]:
    """Bootstrap intervals by metric and arithmetic.

    Precision and recall are means of 0/1 flags, so with the balls held fixed their bootstrap distribution is exactly
    binomial and no images need resampling.
    """
    intervals = {}
    for name, count in counts.items():
        generator = fraction_draws(seed)
        intervals[name] = {
            mode: fraction_interval(fraction, count, generator) for mode, fraction in fractions[name].items()
        }
    return intervals


def _as_adm(values: Mapping[str, float] | None) -> float | None:
    """The value in ADM's arithmetic, as in published figures, or in the only arithmetic that was computed."""
    return None if values is None else values.get("adm_fp16", next(iter(values.values()), None))
