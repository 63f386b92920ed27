"""Reading of a run folder for reports and lists: every file may be missing, incomplete or of an older version."""

from __future__ import annotations

import math
import os
import re
import shlex
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from rear_scale.checkpoint.folder import CHECKPOINTS, last_step
from rear_scale.checkpoint.meta import META
from rear_scale.config import ExperimentConfig, InputError, check_yaml, from_dict
from rear_scale.config.renamed import upgraded
from rear_scale.config.values import leaves
from rear_scale.evaluate.result import Result, read_result
from rear_scale.evaluate.training_scores import FILE as EVALUATIONS
from rear_scale.model.flops import distinct_classes_per_image, train_flops_per_image
from rear_scale.places import as_typed
from rear_scale.report.curves import Curves, read_lines
from rear_scale.sample.sheets import FOLDER as SHEETS
from rear_scale.untrusted import read_json

REPORT = "report.html"
_MOST_STATUS = 1 << 20  # bytes
_MOST_IMAGES = 10**18
_MOST_RESULTS = 40  # result files of one run, the newest
_SILENT_S = 300.0  # without a sign of life for so long, a run whose process cannot be seen from here may have ended


@dataclass(frozen=True)
class Saved:
    """A checkpoint folder."""

    name: str
    bytes: int
    written: float  # seconds since the epoch
    complete: bool

    @property
    def step(self) -> int:
        return int(self.name[5:13])


@dataclass(frozen=True)
class Scored:
    """One result file of evaluation, or the reason why it cannot be read."""

    file: str
    result: Result | None
    problem: str = ""


@dataclass
class RunFiles:
    """What a run folder says. Nothing here raises for a file that is missing or damaged; `problems` names those that are."""

    folder: Path
    read_before: Curves | None = None  # of the same run: only the lines added since then are read
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.curves = self.read_before or Curves(self.folder / "metrics.jsonl")
        self.curves.update()

    @cached_property
    def status(self) -> dict[str, Any]:
        """status.json; empty where there is none."""
        return read_status(self.folder)

    @cached_property
    def starts(self) -> list[dict[str, Any]]:
        """The lines of starts.jsonl, oldest first."""
        return read_lines(self.folder / "starts.jsonl")

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """The lines of events.jsonl with a step, oldest first."""
        return [event for event in read_lines(self.folder / "events.jsonl") if _is_step(event.get("step"))]

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """The lines of evaluations.jsonl: scores during training."""
        return [line for line in read_lines(self.folder / EVALUATIONS) if _is_step(line.get("step"))]

    @cached_property
    def config_text(self) -> str:
        """config.yaml as it stands; empty where it cannot be read."""
        try:
            text = (self.folder / "config.yaml").read_text(encoding="utf-8")
            check_yaml(text, "config.yaml")
        except FileNotFoundError:
            return ""
        except (OSError, ValueError, InputError) as error:
            self.problems.append(f"config.yaml: {error}")
            return ""
        return text

    @cached_property
    def config(self) -> dict[str, Any]:
        """The values of config.yaml, nested; empty where it holds none."""
        try:
            values = yaml.safe_load(self.config_text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            self.problems.append(f"config.yaml: {' '.join(str(error).split())[:200]}")
            return {}
        return values if isinstance(values, dict) else {}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The values of config.yaml by dotted key."""
        return leaves({str(key): value for key, value in self.config.items()})

    @cached_property
    def cfg(self) -> ExperimentConfig | None:
        """The typed config; None where config.yaml is not one of this version."""
        try:
            return from_dict(upgraded(self.config), "config.yaml") if self.config else None
        except Exception as error:  # the report of a run of another version has no use for more
            self.problems.append(f"config.yaml is not a config of this version: {str(error)[:200]}")
            return None

    @cached_property
    def flops_per_image(self) -> int | None:
        """Operations of the training of one image; None where the config cannot be read."""
        if self.cfg is None:
            return None
        try:
            return train_flops_per_image(self.cfg, distinct_classes_per_image(self.cfg))
        except Exception as error:
            self.problems.append(f"the operations per image are not known: {str(error)[:200]}")
            return None

    @cached_property
    def name(self) -> str:
        """The name of the run, or that of its folder."""
        name = self.settings.get("run.name")
        return str(name) if name else folder_name(self.folder)

    @cached_property
    def checkpoints(self) -> list[Saved]:
        """The checkpoint folders, oldest first, those set aside as damaged included."""
        found = []
        for path in _entries(self.folder / CHECKPOINTS):
            if re.fullmatch(r"step_[0-9]{8}(\.damaged[.0-9]*)?", path.name) and path.is_dir():
                sizes = [_size(entry) for entry in _scan(path) if entry.is_file(follow_symlinks=False)]
                found.append(Saved(path.name, sum(sizes), _changed(path), (Path(path) / META).is_file()))
        return sorted(found, key=lambda saved: saved.name)

    @cached_property
    def last_saved(self) -> int:
        """The step from which the same command continues; 0 = the start."""
        try:
            return last_step(self.folder)
        except Exception:
            return 0

    @cached_property
    def sheets(self) -> list[tuple[int, Path]]:
        """(step, file) of the sample sheets made during training, oldest first."""
        named = [(re.fullmatch(r"step_([0-9]{8})\.png", path.name), path) for path in _entries(self.folder / SHEETS)]
        return sorted((int(match[1]), Path(path)) for match, path in named if match)

    @cached_property
    def samples(self) -> list[Path]:
        """The grids (.png) of sampling jobs, the newest first."""
        here = [path for path in _entries(self.folder) if path.name.startswith("samples")]
        grids = [Path(path) for path in [*here, *_entries(self.folder / "samples")] if path.name.endswith(".png")]
        return sorted(grids, key=lambda path: (-_changed(path), path.name))

    @cached_property
    def results(self) -> list[Scored]:
        """The results of evaluation, the newest first."""
        files = [path for path in _entries(self.folder) if re.fullmatch(r"result.*\.json", path.name)]
        files.sort(key=lambda path: (-_changed(path), path.name))
        found = []
        for path in files[:_MOST_RESULTS]:
            try:
                result = read_result(Path(path))
                _check_shape(result)
                found.append(Scored(path.name, result))
            except Exception as error:  # result files of another version hold other fields
                found.append(Scored(path.name, None, str(error)[:200]))
        return found

    @property
    def last_change(self) -> float:
        """Seconds since the epoch of the newest sign of life; 0 where there is none."""
        return last_change(self.folder)

    @property
    def step(self) -> int:
        """The last logged step, or that of status.json."""
        logged, noted = self.curves.last.get("step", 0), self.status.get("step")
        return max(logged, noted if _is_step(noted) else 0)

    @property
    def total_steps(self) -> int | None:
        """The step at which the run ends, as its telemetry saw it."""
        last = self.curves.last
        left, step_time = last.get("time_left_s"), last.get("step_time_s")
        if not isinstance(left, (int, float)) or not isinstance(step_time, (int, float)) or step_time <= 0:
            return None
        total = last["step"] + left / step_time
        return round(total) if math.isfinite(total) else None

    @property
    def images(self) -> int:
        images = self.curves.last.get("images_seen")
        return images if isinstance(images, int) and _is_step(images) and images < _MOST_IMAGES else 0

    @property
    def flops(self) -> float | None:
        """Operations of the training so far."""
        return None if self.flops_per_image is None else float(self.flops_per_image) * self.images

    @property
    def state(self) -> str:
        """running, done, preempted, failed, killed (no process runs it, and none has said why), or unknown."""
        return state_of(self.folder, self.status, self.starts[-1] if self.starts else {})

    @property
    def command(self) -> str:
        """The command that continues the run, as well as it is known from its last start; empty where it is not."""
        return command_of(self.starts[-1]) if self.starts else ""


def _check_shape(result: Result) -> None:
    """Raises an error for a result whose values are not of the types that reports show."""
    counts = [
        result.samples.images,
        *result.samples.size,
        *([] if result.checkpoint is None else [result.checkpoint.step]),
    ]
    objects = [value for value in (result.sample, result.tokens) if value is not None]
    if (
        len(result.samples.size) != 2
        or not all(map(_is_step, counts))
        or not all(isinstance(one, dict) for one in objects)
    ):
        raise TypeError("it has values of other types than results have")
    result.images.numbers()


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run: training has written its files there."""
    return any((folder / name).is_file() for name in ("starts.jsonl", "status.json", "metrics.jsonl"))


def folder_name(folder: Path) -> str:
    """The name of a folder, also of one such as `.`, which has none."""
    return os.path.basename(os.path.abspath(folder))


def read_status(folder: Path) -> dict[str, Any]:
    """The values of status.json; empty where there is none, or one that is damaged."""
    try:
        values = read_json(folder / "status.json", _MOST_STATUS)
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def state_of(folder: Path, status: dict[str, Any], start: dict[str, Any]) -> str:
    """As `RunFiles.state`. start: the last line of starts.jsonl."""
    state = status.get("state")
    if state not in ("running", "done", "preempted", "failed"):
        return "unknown"
    if state == "running" and not _holds_lock(folder):
        silent = time.time() - last_change(folder)
        # Where it would run on this machine its lock is seen; the process that has just begun may not have taken it yet.
        if silent > (10.0 if start.get("host") == socket.gethostname() and _locks() is not None else _SILENT_S):
            return "killed"
    return state


def last_change(folder: Path) -> float:
    """Seconds since the epoch of the newest change of status, metrics or starts; 0 where there is none."""
    newest = 0.0
    for name in ("status.json", "metrics.jsonl", "starts.jsonl"):
        try:
            newest = max(newest, (folder / name).stat().st_mtime)
        except OSError:
            continue
    return newest


def command_of(start: dict[str, Any]) -> str:
    """The command line of a start, with its launcher; empty where the start does not say it."""
    try:
        script, *words = shlex.split(str(start["command"]))
    except (KeyError, ValueError):
        return ""
    words = [word for word in words if not re.match(r"--local[_-]rank=", word)]
    hosts = start.get("hosts") if isinstance(start.get("hosts"), dict) else {}
    ranks, count = start.get("world_size"), max(1, len(hosts or {}))
    if script.endswith("launchers/train.py") or script == "launchers/train.py":
        script = "launchers/train.py"
    if start.get("launcher") == "slurm":
        return f"sbatch --nodes {count} launchers/slurm/train.sbatch {shlex.join(words)}".strip()
    if isinstance(ranks, int) and ranks > 1:
        begin = f"torchrun --nproc-per-node {max(1, ranks // count)}"
        if count > 1:
            begin += f" --nnodes {count} --rdzv-backend c10d --rdzv-endpoint HOST:PORT"
        return as_typed(f"{begin} {script} {shlex.join(words)}".strip())
    return as_typed(f"python {script} {shlex.join(words)}".strip())


def _holds_lock(folder: Path) -> bool:
    """Whether a process of this machine holds the run's lock. The lock itself is not touched."""
    try:
        status = (folder / ".lock").stat()
    except OSError:
        return False
    return status.st_ino in (_locks() or ())


def _locks() -> set[int] | None:
    """The inodes of all files that processes of this machine have locked; None where the system does not say."""
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return None
    # 1: FLOCK  ADVISORY  WRITE 1234 08:01:5678 0 EOF
    return {int(match[1]) for line in lines if (match := re.search(r" [0-9a-f]+:[0-9a-f]+:(\d+) ", line))}


def _scan(folder: Path | os.DirEntry[str]) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError:
        return


def _changed(path: Path | os.DirEntry[str]) -> float:
    """Seconds since the epoch of the last change; 0 for a file that was removed meanwhile, or a link to nothing."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:
        return 0


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    return list(_scan(folder))


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
