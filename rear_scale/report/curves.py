"""The curves of metrics.jsonl, reduced while the file is read: mean, smallest and largest value of every metric in each column of
a chart, so that a spike of one step stays visible among 250,000."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

COLUMNS = 160  # the fewest columns of a long curve; there are up to twice as many
_BLOCK_BYTES = 1 << 22  # read at a time
_LONGEST_LINE = 1 << 16  # bytes; a line of ours has a thousand
_MOST_NAMES = 200  # metrics of one file
_LONGEST_NAME = 200  # characters
_LARGEST_STEP = 10**12
_NUMBERS = {float, int, type(None)}
_NO_METRICS = ("step", "images_seen", "slowest_rank", "slowest_host")
_TAIL_BYTES = 256  # before the position that was read to, by which a rewritten file is recognized


@dataclass(frozen=True)
class Curve:
    """One metric over the columns that have a finite value; all arrays are float64 of one length."""

    steps: np.ndarray  # the last step of each column
    images: np.ndarray  # images seen by then
    hours: np.ndarray  # hours of training by then, without those between two starts
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Curves:
    """Reads metrics.jsonl from where it ended the last time. Lines that are no JSON objects with a step are counted and left out.

    Column c holds the steps from 1 + c * width to (c + 1) * width. The width doubles whenever there are 2 * COLUMNS columns.
    """

    def __init__(self, path: Path, columns: int = COLUMNS) -> None:
        self.path, self.capacity = path, 2 * columns
        self._clear()

    def _clear(self) -> None:
        self.width = 1
        self.lines = self.left_out = 0
        self.first: dict[str, Any] = {}
        self.last: dict[str, Any] = {}
        self._position, self._tail = 0, b""
        self._step = self._seconds = 0.0
        self._ends = np.full((3, self.capacity), np.nan)  # last step, images and hours of each column
        self._metrics: dict[str, np.ndarray] = {}  # count, sum, smallest and largest value of each column

    @property
    def names(self) -> list[str]:
        """The metrics with at least one finite value, in the order of their first appearance."""
        return [name for name, values in self._metrics.items() if values[0].any()]

    @property
    def most_in_a_column(self) -> int:
        """The most logged steps that one column holds."""
        return int(max((values[0].max() for values in self._metrics.values()), default=0))

    @property
    def hours(self) -> float:
        """Hours of training up to the last line."""
        return self._seconds / 3600

    def curve(self, name: str) -> Curve | None:
        """The columns of a metric; None where it has no finite value."""
        if name not in self._metrics:
            return None
        count, total, low, high = self._metrics[name]
        there = count > 0
        if not there.any():
            return None
        steps, images, hours = self._ends[:, there]
        return Curve(steps, images, hours, total[there] / count[there], low[there], high[there])

    def spread_at_end(self, name: str) -> tuple[float, float] | None:
        """Mean of the last tenth of the columns of a metric, and the deviation of their means; None for fewer than three."""
        curve = self.curve(name)
        if curve is None:
            return None
        last = curve.mean[-max(3, len(curve.mean) // 10) :]
        return (float(last.mean()), float(last.std(ddof=1))) if len(last) >= 3 else None

    def update(self) -> None:
        """Reads the lines that were added. A file that was cut or rewritten meanwhile, as at a resume, is read from its start.
        Raises nothing for a missing file."""
        try:
            with open(self.path, "rb") as file:
                if not self._continues(file.fileno()):
                    self._clear()
                file.seek(self._position)
                self._read(file)
        except FileNotFoundError:
            self._clear()

    def _continues(self, handle: int) -> bool:
        start = self._position - len(self._tail)
        return os.pread(handle, len(self._tail), start) == self._tail

    def _read(self, file: Any) -> None:
        rest = b""
        while block := file.read(_BLOCK_BYTES):
            *whole, rest = (rest + block).split(b"\n")
            if len(rest) > 4 * _BLOCK_BYTES:
                self.left_out += 1
                return  # no file of lines
            if whole:
                self._position = file.tell() - len(rest)
                self._tail = (b"\n".join(whole[-3:]) + b"\n")[-_TAIL_BYTES:]
                self._add([values for line in whole if line and (values := self._parsed(line)) is not None])

    def _parsed(self, line: bytes) -> dict[str, Any] | None:
        try:
            values = json.loads(line) if len(line) <= _LONGEST_LINE else {}
            step = values["step"]
            if isinstance(step, int) and not isinstance(step, bool) and 0 <= step <= _LARGEST_STEP:
                return values
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        self.left_out += 1
        return None

    def _add(self, lines: list[dict[str, Any]]) -> None:
        if not lines:
            return
        self.lines += len(lines)
        self.first = self.first or lines[0]
        self.last = lines[-1]
        steps = np.array([line["step"] for line in lines], dtype=float)
        self._widen(steps.max())
        column = np.maximum(steps - 1, 0).astype(np.int64) // self.width
        seconds = np.nan_to_num(_numbers([line.get("step_time_s") for line in lines]), nan=0.0)
        # A line's step time is the mean since the line before it.
        apart = np.diff(steps, prepend=self._step).clip(0)
        elapsed = self._seconds + np.cumsum(seconds * apart)
        self._step, self._seconds = steps[-1], float(elapsed[-1])
        images = _numbers([line.get("images_seen") for line in lines])
        self._ends[:, column] = np.stack([steps, images, elapsed / 3600])  # of equal columns the last one stays
        order = np.argsort(column, kind="stable")
        firsts = np.flatnonzero(np.diff(column[order], prepend=-1))
        for name in dict.fromkeys(chain.from_iterable(lines)):
            if name not in self._metrics and (len(self._metrics) >= _MOST_NAMES or len(name) > _LONGEST_NAME):
                continue
            if name not in _NO_METRICS:
                values = _numbers([line.get(name) for line in lines])[order]
                self._add_metric(name, column[order][firsts], values, firsts)

    def _add_metric(self, name: str, columns: np.ndarray, values: np.ndarray, firsts: np.ndarray) -> None:
        """Adds values in the order of their columns. firsts: the index of the first value of each column."""
        if name not in self._metrics:
            zeros, largest = np.zeros(self.capacity), np.full(self.capacity, np.inf)
            self._metrics[name] = np.stack([zeros, zeros, largest, -largest])
        finite = np.isfinite(values)
        metric = self._metrics[name]
        metric[0, columns] += np.add.reduceat(finite.astype(float), firsts)
        metric[1, columns] += np.add.reduceat(np.where(finite, values, 0.0), firsts)
        metric[2, columns] = np.minimum(
            metric[2, columns], np.minimum.reduceat(np.where(finite, values, np.inf), firsts)
        )
        metric[3, columns] = np.maximum(
            metric[3, columns], np.maximum.reduceat(np.where(finite, values, -np.inf), firsts)
        )

    def _widen(self, step: float) -> None:
        """Doubles the width of the columns until `step` is in one of them."""
        while (step - 1) // self.width >= self.capacity:
            self.width *= 2
            ends = self._ends.reshape(3, -1, 2)
            self._ends = _padded(np.where(np.isnan(ends[..., 1]), ends[..., 0], ends[..., 1]), np.nan)
            for name, values in self._metrics.items():
                count, total, low, high = values.reshape(4, -1, 2)
                self._metrics[name] = np.stack(
                    [
                        _padded(count.sum(-1), 0.0),
                        _padded(total.sum(-1), 0.0),
                        _padded(low.min(-1), np.inf),
                        _padded(high.max(-1), -np.inf),
                    ]
                )


def _padded(half: np.ndarray, value: float) -> np.ndarray:
    """The array with as many columns more, all of one value."""
    return np.concatenate([half, np.full_like(half, value)], axis=-1)


def _numbers(values: list[Any]) -> np.ndarray:
    """Values out of JSON as float64; NaN for those that are no numbers."""
    if not {*map(type, values)} <= _NUMBERS:
        values = [value if type(value) in _NUMBERS else None for value in values]
    try:
        return np.array(values, dtype=float)  # None becomes NaN
    except OverflowError:  # a whole number beyond all floats
        return np.array([None if value is None or abs(value) > 1e300 else value for value in values], dtype=float)


def read_lines(path: Path, most: int = 1 << 22) -> list[dict[str, Any]]:
    """The JSON objects in the last `most` bytes of a file of lines, without lines that are none; empty for a missing file."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - most))
            data = file.read(most)
    except OSError:
        return []
    lines = data.split(b"\n")[1 if size > most else 0 :]
    found = []
    for line in lines:
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(values, dict):
            found.append(values)
    return found
