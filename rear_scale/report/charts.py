"""Charts as SVG: their geometry and the numbers that the page shows under the pointer. page.html draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

WIDTH, HEIGHT = 360, 190  # of the drawing, in its own units, about one pixel each on a phone
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 24  # margins
_TICKS = 4
_DOTS = 40  # a curve of at most so many points has a dot at each
_MOST_MARKS = 150  # of one kind in one chart
# A range of values that is this many times that of nearly all of them is cut off, and the chart says so.
_OUTLIERS = 8.0
_ENOUGH = 40  # values, of which nearly all can be told from the others
_PREFIXES = ((1e24, ""), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Line:
    """One curve of a chart. low and high, where given, are drawn as a band behind the means."""

    label: str
    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    color: int = 0  # 0 .. 9

    @property
    def lowest(self) -> np.ndarray:
        return self.mean if self.low is None else self.low

    @property
    def highest(self) -> np.ndarray:
        return self.mean if self.high is None else self.high

    @property
    def banded(self) -> bool:
        return bool((self.highest > self.lowest).any())


@dataclass(frozen=True)
class Mark:
    """An event at one place of the horizontal axis."""

    x: float
    kind: str  # a class of the page's style: spike, skipped, rewind, start, stop, failed
    text: str


@dataclass(frozen=True)
class Chart:
    """A chart of one or several lines over a common horizontal axis."""

    title: str
    lines: Sequence[Line]
    x_label: str = "step"
    unit: str = ""
    marks: Sequence[Mark] = ()
    note: str = ""
    from_zero: bool = False

    @cached_property
    def x_range(self) -> tuple[float, float]:
        values = np.concatenate([line.x for line in self.lines])
        low, high = float(values.min()), float(values.max())
        return low, high if high > low else low + max(1.0, abs(low) * 1e-6)  # 1e18 + 1 is 1e18

    @cached_property
    def y_range(self) -> tuple[float, float]:
        """The drawn range: that of all values, or of nearly all where the others would flatten the curves."""
        values = np.concatenate([ends for line in self.lines for ends in (line.lowest, line.highest)])
        low, high = float(values.min()), float(values.max())
        if len(values) >= _ENOUGH:
            near_low, near_high = np.percentile(values, (1, 97)).tolist()
            usual = near_high - near_low
            if usual > 0 and high - low > _OUTLIERS * usual:
                low, high = max(low, near_low - usual), min(high, near_high + usual)
        if self.from_zero:
            low = min(0.0, low)
        if high <= low:
            apart = abs(low) * 0.1 or 1.0
            low, high = low - apart, high + apart
        margin = 0.04 * (high - low)
        return low if self.from_zero and low == 0 else low - margin, high + margin

    @property
    def cut_off(self) -> str:
        """Says which values lie outside of the drawing; empty where none do."""
        low, high = self.y_range
        highest = max(float(line.highest.max()) for line in self.lines)
        lowest = min(float(line.lowest.min()) for line in self.lines)
        parts = [f"up to {short(highest)}"] if highest > high else []
        parts += [f"down to {short(lowest)}"] if lowest < low else []
        return f"values {' and '.join(parts)} are cut off" if parts else ""

    @property
    def x_ticks(self) -> list[tuple[float, str]]:
        low, high = self.x_range
        return [(round(self._at_x(value), 1), short(value)) for value in ticks(low, high)]

    @property
    def y_ticks(self) -> list[tuple[float, str]]:
        low, high = self.y_range
        return [(round(self._at_y(value), 1), short(value)) for value in ticks(low, high)]

    def path(self, line: Line) -> str:
        """The `d` of the curve through the means."""
        points = zip(self._at_x(line.x), self._at_y(line.mean), strict=True)
        return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)

    def band(self, line: Line) -> str:
        """The `d` of the area between the smallest and the largest values."""
        x = self._at_x(line.x)
        above = [f"{at:.1f} {y:.1f}" for at, y in zip(x, self._at_y(line.highest), strict=True)]
        below = [f"{at:.1f} {y:.1f}" for at, y in zip(x, self._at_y(line.lowest), strict=True)]
        return f"M{'L'.join(above)}L{'L'.join(reversed(below))}Z"

    def dots(self, line: Line) -> list[tuple[float, float]]:
        """The points of a short curve."""
        if len(line.x) > _DOTS:
            return []
        return [(round(x, 1), round(y, 1)) for x, y in zip(self._at_x(line.x), self._at_y(line.mean), strict=True)]

    @property
    def mark_paths(self) -> list[tuple[str, str]]:
        """(kind, `d` of its vertical lines) of the marks inside of the drawing."""
        low, high = self.x_range
        places: dict[str, dict[float, None]] = {}
        for mark in self.marks:
            if low <= mark.x <= high:
                of_kind = places.setdefault(mark.kind, {})
                if len(of_kind) < _MOST_MARKS:
                    of_kind[round(float(self._at_x(mark.x)))] = None
        return [
            (kind, "".join(f"M{x:.0f} {TOP}V{HEIGHT - BOTTOM}" for x in of_kind)) for kind, of_kind in places.items()
        ]

    @property
    def data(self) -> dict[str, Any]:
        """The numbers for the pointer: of each line its label, x, mean and, where there is a band, low and high."""
        lines = []
        for line in self.lines:
            values = {"label": line.label, "x": _listed(line.x, 7), "y": _listed(line.mean, 5)}
            if line.banded:
                values |= {"low": _listed(line.lowest, 4), "high": _listed(line.highest, 4)}
            lines.append(values)
        return {"range": [*self.x_range], "axis": self.x_label, "unit": self.unit, "lines": lines}

    def _at_x(self, values: Any) -> Any:
        low, high = self.x_range
        return LEFT + (values - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def _at_y(self, values: Any) -> Any:
        low, high = self.y_range
        return TOP + (high - np.clip(values, low, high)) / (high - low) * (HEIGHT - TOP - BOTTOM)


def ticks(low: float, high: float) -> list[float]:
    """A few round numbers from low to high."""
    rough = (high - low) / _TICKS
    if not math.isfinite(rough) or rough <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    first = math.ceil(low / step - 1e-9)
    numbers = [number * step for number in range(first, first + 2 * _TICKS + 2) if number * step <= high + 1e-9 * step]
    return [0.0 if abs(number) < step * 1e-6 else number for number in numbers]


def short(value: float) -> str:
    """A number in a few characters: 12.3k, 0.00123, 1.5e-09."""
    size = abs(value)
    for factor, prefix in _PREFIXES:
        if size >= 0.99995 * factor:
            return f"{value:.3g}" if not prefix else f"{value / factor:.4g}{prefix}"
    return f"{value:.4g}"


def _listed(values: np.ndarray, digits: int) -> list[float]:
    """Values with a few digits, whole numbers without a decimal point, for JSON."""
    rounded = [float(f"{value:.{digits}g}") for value in values.tolist()]
    return [int(value) if value.is_integer() and abs(value) < 1e15 else value for value in rounded]
