"""The list of runs in a terminal: the command of launchers/runs.py."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rear_scale import cli
from rear_scale.config import InputError
from rear_scale.evaluate.result import read_result
from rear_scale.evaluate.training_scores import FILE as EVALUATIONS
from rear_scale.progress import say
from rear_scale.report.charts import short
from rear_scale.report.curves import read_lines
from rear_scale.report.reading import is_run, last_change, read_status, state_of
from rear_scale.report.run_page import duration, size
from rear_scale.text_table import aligned

_DEEPEST = 4  # folders below the one that is listed
_MOST_FOLDERS = 20_000  # looked into for runs
_FIND_S = 20.0  # for finding the runs
_TAIL_BYTES = 1 << 16  # of logs
_DISK_S = 1.0  # for the sum of the sizes of one run's files
_ALL_DISK_S = 20.0  # for those of all runs
_UNCHECKED = 256  # files between two looks at the clock
_HEADER = ["run", "state", "step", "images/s", "loss", "last score", "age", "disk"]


@dataclass(frozen=True)
class Row:
    """A run in the list. All texts are of one line."""

    name: str
    changed: float  # seconds since the epoch
    cells: list[str]


def list_runs(description: str | None = None) -> None:
    """Parses the command line and prints the list. Raises InputError for a folder that does not exist."""
    parser = cli.Parser(description=description)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs"), metavar="FOLDER", help="default: runs")
    folder = parser.parse_args().folder
    if not folder.is_dir():
        raise InputError(f"not found: {folder}, a folder of runs. Name one: launchers/runs.py FOLDER")
    rows = rows_of(folder)
    print(aligned([_HEADER, *(row.cells for row in rows)], left=(0, 1, 5)) if rows else f"no runs in {folder}")


def rows_of(folder: Path) -> list[Row]:
    """The runs in a folder and in the folders below it, those that changed last first."""
    found = list(_found(folder))
    until = time.monotonic() + _ALL_DISK_S
    rows = [_row(path, folder, problem, until) for path, problem in found]
    return sorted(rows, key=lambda row: (-row.changed, row.name))


def _found(root: Path) -> Iterator[tuple[Path, str]]:
    """Yields (folder of a run, "") and (folder that cannot be read, why). Tells the user where there are too many folders."""
    waiting, looked, until = [(root, 0)], 0, time.monotonic() + _FIND_S
    while waiting:
        folder, depth = waiting.pop()
        looked += 1
        if looked > _MOST_FOLDERS or time.monotonic() > until:
            say(f"note: {root} holds too many folders; {looked - 1:,} were looked into. Name a folder further down")
            return
        try:
            if is_run(folder):
                yield folder, ""
                continue
            with os.scandir(folder) as entries:
                inside = [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
        except OSError as error:
            yield folder, error.strerror or type(error).__name__
            continue
        if depth < _DEEPEST:
            waiting += [(path, depth + 1) for path in sorted(inside, reverse=True)]


def _row(folder: Path, root: Path, problem: str, until: float) -> Row:
    name = str(folder.relative_to(root)) if folder != root else str(folder)
    if not problem:
        try:
            changed = last_change(folder)
            return Row(name, changed, [_plain(cell) for cell in [name, *_cells(folder, changed, until)]])
        except Exception as error:  # whatever damaged files lead to: the others are listed all the same
            problem = f"{type(error).__name__}: {error}"
    return Row(name, 0.0, [_plain(name), _plain(f"unreadable: {problem}"[:100])])


def _cells(folder: Path, changed: float, until: float) -> list[str]:
    status = read_status(folder)
    starts = read_lines(folder / "starts.jsonl", _TAIL_BYTES)
    lines = read_lines(folder / "metrics.jsonl", _TAIL_BYTES)
    last = lines[-1] if lines else {}
    losses = [line["loss"] for line in lines if isinstance(line.get("loss"), float)]
    speed, step = last.get("images_per_s"), last.get("step", status.get("step"))
    return [
        state_of(folder, status, starts[-1] if starts else {}),
        f"{step:,}" if isinstance(step, int) else "-",
        f"{speed:,.1f}" if isinstance(speed, (int, float)) else "-",
        f"{losses[-1]:.4f}" if losses else "-",
        _last_score(folder),
        duration(max(0.0, time.time() - changed)) if changed else "-",
        _disk_use(folder, min(until, time.monotonic() + _DISK_S)),
    ]


def _last_score(folder: Path) -> str:
    """The first number of the newest result, or of the newest scores during training."""
    with os.scandir(folder) as entries:
        results = [entry for entry in entries if re.fullmatch(r"result.*\.json", entry.name) and entry.is_file()]
    for entry in sorted(results, key=lambda entry: -entry.stat().st_mtime)[:3]:
        try:
            result = read_result(Path(entry.path))
            number = result.images.numbers()[0]
        except Exception:  # a result of another version, or half of one
            continue
        return f"{'/'.join(filter(None, (number.name, number.reference)))} {short(number.value)} (n = {result.samples.images:,})"
    for line in reversed(read_lines(folder / EVALUATIONS, _TAIL_BYTES)):
        for name, value in line.items():
            if name not in ("step", "images_seen") and isinstance(value, float):
                return f"{name} {short(value)}"
    return "-"


def _disk_use(folder: Path, until: float) -> str:
    """The sum of the sizes of all files; with > in front where there was no time for all of them."""
    total, seen, waiting = 0, 0, [os.fspath(folder)]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    seen += 1
                    if seen % _UNCHECKED == 0 and time.monotonic() > until:
                        return f"> {size(total)}"
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    else:
                        total += entry.stat(follow_symlinks=False).st_size
        except OSError:
            continue  # removed meanwhile, or of another user
    return size(total)


def _plain(text: str) -> str:
    """The text without characters that would act on the terminal."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
