"""Precision, recall, density and coverage from nearest neighbours, in memory that does not grow with the images.

A set's manifold is the union of balls around its images, each as wide as the distance to the third neighbour.
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
from rear_scale.evaluate.metrics.bootstrap import share_draws, share_interval
from rear_scale.evaluate.networks.base import exact_arithmetic
from rear_scale.world import World

NEIGHBOURS = 3  # k

_ROWS = 2000  # of a task; a rank holds _ROWS x _COLUMNS distances at a time
_COLUMNS = 5000
_ADM_BLOCK = 10_000  # side of the blocks in which ADM decides between half and single precision
_HALF_MAX = 65504.0


@dataclass(frozen=True)
class Overlap:
    """How two manifolds overlap; shares of images, and density, which may exceed 1."""

    precision: float  # samples inside the reference manifold
    recall: float  # reference images inside the samples' manifold
    density: float  # balls of reference images around a sample, per k
    coverage: float  # reference images with a sample inside their own ball
    sample_inside: np.ndarray  # bool [m]
    reference_inside: np.ndarray  # bool [n]


class Distances:
    """Squared distances of two sets in one of two arithmetics.

    exact: float32 throughout, equal to float64 but for ties closer than its rounding.
    adm_fp16: what ADM's evaluation computes, and so what published figures carry: inputs, norms, products and sums rounded
    to half precision; a block of 10,000 x 10,000 images in which a half overflows is done in float32.
    """

    def __init__(self, rows: Rows, columns: Rows, mode: str, device: torch.device) -> None:
        assert mode in PRECISION_RECALL_ARITHMETICS, mode
        self.rows, self.columns, self.mode, self.device = rows, columns, mode, device
        self.fits_half: dict[tuple[int, int], bool] = {}
        if mode == "adm_fp16":
            self.row_norms, self.column_norms = self._largest_norms(rows), self._largest_norms(columns)

    def of_rows(self, start: int) -> Iterator[tuple[int, Tensor]]:
        """(first column, float32 [r, c]) of the rows start .. start + 2000, column part by column part."""
        row_part = self._read(self.rows, start, start + _ROWS)
        for column in range(0, len(self.columns), _COLUMNS):
            column_part = self._read(self.columns, column, column + _COLUMNS)
            half = self.mode == "adm_fp16" and self._block_fits_half(start // _ADM_BLOCK, column // _ADM_BLOCK)
            yield column, _half_distances(row_part, column_part) if half else _distances(row_part, column_part)

    def _read(self, rows: Rows, start: int, end: int) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(rows[start : min(end, len(rows))], np.float32)).to(self.device)

    def _largest_norms(self, rows: Rows) -> list[float]:
        """The largest squared norm of each block."""
        found = []
        for block in range(0, len(rows), _ADM_BLOCK):
            end = min(block + _ADM_BLOCK, len(rows))
            parts = [self._read(rows, start, min(start + _ROWS, end)) for start in range(block, end, _ROWS)]
            found.append(max(part.square().sum(1).max().item() for part in parts))
        return found

    def _block_fits_half(self, row_block: int, column_block: int) -> bool:
        """Whether no half of a block overflows. Norms say so at once unless they are large."""
        if (row_block, column_block) not in self.fits_half:
            largest = max(self.row_norms[row_block], self.column_norms[column_block])
            # |u - v|^2 is at most four times the larger squared norm; every term on the way is smaller.
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
    """The same with each result rounded to half; sums inside a product or a norm run in float32 and are rounded once."""
    u, v = u.half(), v.half()
    u_norms, v_norms = (part.square().float().sum(1).half() for part in (u, v))
    products = (u.float() @ v.float().T).half()
    # Not clamp: a nan stays one and tells of an overflow, as there.
    found = u_norms[:, None] - 2 * products + v_norms
    return torch.where(found < 0, 0, found).float()


def radii(rows: Rows, mode: str, world: World | None = None, device: torch.device | None = None) -> Tensor:
    """float32 [n] on the CPU: squared distance of each row to its third neighbour.

    With a world, all ranks must call this: each does some rows, and all get the whole result.
    Raises InputError for fewer rows than that takes.
    """
    if len(rows) <= NEIGHBOURS:
        raise InputError(
            f"{len(rows)} images have no {NEIGHBOURS}rd neighbour, which precision and recall need. Use more than {NEIGHBOURS}"
        )
    device = device or (world.device if world else torch.device("cpu"))
    distances = Distances(rows, rows, mode, device)
    found = torch.zeros(len(rows), dtype=torch.float64)
    with exact_arithmetic():
        for start in _own(range(0, len(rows), _ROWS), world):
            nearest = torch.empty(0)
            for _, part in distances.of_rows(start):
                part = part.topk(min(NEIGHBOURS + 1, part.shape[1]), largest=False).values
                joined = torch.cat([nearest.to(part), part], 1) if nearest.numel() else part
                nearest = joined.topk(min(NEIGHBOURS + 1, joined.shape[1]), largest=False).values
            # The row itself is among them, at distance 0 or what rounding makes of it.
            found[start : start + len(nearest)] = nearest.max(1).values.double().cpu()
    # Each row is one rank's: adding zeros is exact.
    return (world.sum(found) if world else found).float()


def overlap(
    reference: Rows,
    samples: Rows,
    reference_radii: Tensor,
    sample_radii: Tensor,
    mode: str,
    world: World | None = None,
    device: torch.device | None = None,
) -> Overlap:
    """Precision, recall, density and coverage from the radii of both sets (`radii`, in the same mode).

    With a world, all ranks must call this: each does some reference rows, and all get the whole result.
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


class NeighbourShares(Metric):
    """Precision, recall, density and coverage on one feature, each in the arithmetics of evaluate.precision_recall_arithmetic."""

    against_references = True

    def __init__(self, network: str, feature: str, prefix: str = "", *, in_table: bool = False) -> None:
        """prefix: of the names on dashboards, where several networks give the same numbers."""
        self.name, self.network, self.feature, self.prefix = f"{prefix}precision_recall", network, feature, prefix
        if in_table:
            self.columns = tuple(
                Column(name, 4, lambda values, name=name: _as_adm(values.get(name)), name)
                for name in ("precision", "recall")
            )

    def together(self, inputs: Inputs) -> list[Output]:
        """The distances of all pairs are the work, so that all ranks share it out within one reference."""
        return [self._against(inputs, reference) for reference in inputs.references]

    def _against(self, inputs: Inputs, reference: ReferenceSet) -> Output:
        cfg, world, samples = inputs.cfg, inputs.world, inputs.samples
        rows = reference.rows(self.feature, cfg.precision_recall_reference_images)
        if rows is None or min(len(rows), samples.count) <= NEIGHBOURS:
            return Output(dict.fromkeys(_NAMES), reference.name)
        sample_rows = samples.rows(self.feature)
        found: dict[str, dict[str, float]] = {name: {} for name in _NAMES}
        for mode in cfg.precision_recall_arithmetic:
            reference_radii = self._radii(reference, rows, mode, world)
            sample_radii = self._radii(samples, sample_rows, mode, world)
            both = overlap(rows, sample_rows, reference_radii, sample_radii, mode, world)
            for name in _NAMES:
                found[name][mode] = getattr(both, name)
        values = {**found, "neighbours": NEIGHBOURS, "neighbour_reference_images": len(rows)}
        counts = {"precision": samples.count, "recall": len(rows)} if cfg.bootstrap else {}
        return Output(values, reference.name, intervals=_intervals(found, counts, cfg.seed))

    def _radii(self, images: FeatureSet | ReferenceSet, rows: Rows, mode: str, world: World) -> Tensor:
        """Computed once per set. All ranks must call this."""
        key = ("radii", self.feature, mode)
        if key not in images.kept:
            images.kept[key] = radii(rows, mode, world)
        return images.kept[key]

    def numbers(self, values: Mapping[str, Any]) -> dict[str, float | None]:
        return {
            f"{self.prefix}{name}_{mode}": value for name in _NAMES for mode, value in (values.get(name) or {}).items()
        }

    def training_numbers(self, values: Mapping[str, Any]) -> dict[str, float | None]:
        return {}  # a manifold of a few images says little


def _intervals(
    shares: Mapping[str, Mapping[str, float]], counts: Mapping[str, int], seed: int
) -> dict[str, dict[str, Any]]:
    """Bootstrap intervals by name and arithmetic.

    Precision and recall are means of 0/1 flags, so with the balls held fixed their bootstrap distribution is exactly
    binomial and no images need resampling.
    """
    found = {}
    for name, count in counts.items():
        generator = share_draws(seed)
        found[name] = {mode: share_interval(share, count, generator) for mode, share in shares[name].items()}
    return found


def _as_adm(values: Mapping[str, float] | None) -> float | None:
    """The value in ADM's arithmetic where it was taken, as published figures have it."""
    return None if values is None else values.get("adm_fp16", next(iter(values.values()), None))
