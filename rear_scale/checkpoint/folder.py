"""The layout of checkpoints, the same for every strategy and world size: float32 weights and optimizer states by parameter
name.

    <run>/checkpoints/step_00000100/part-00000.safetensors ...   keys param/NAME, exp_avg/NAME, exp_avg_sq/NAME
    <run>/checkpoints/step_00000100/meta.json                    step, config, data, files with checksums; written last
    <run>/checkpoints/latest                                     the name of the newest
    <run>/checkpoints/step_00000090.damaged                      one whose files have changed since: renamed, and not counted

A checkpoint is written under a temporary name, read back, and renamed when it is complete, so that every visible one is
complete. This module does not import torch, because batch scripts use it to read the last step.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from rear_scale.checkpoint.meta import META, read_meta, stored_tensors
from rear_scale.config import InputError
from rear_scale.files import file_sha256, remove_leftovers

if TYPE_CHECKING:
    from torch import Tensor

    from rear_scale.parallel.strategy import StateName

CHECKPOINTS = "checkpoints"  # folder in a run folder
LATEST = "latest"


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint folder."""

    path: Path
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        """The number of updates done."""
        return self.meta["step"]

    @property
    def run(self) -> Path:
        """The run folder, which is where samples and scores of the checkpoint are written."""
        return self.path.parent.parent

    def reader(self, state_name: StateName) -> Callable[[str], Tensor]:
        """A function from parameter name to its full float32 tensor on the CPU."""
        index = self.meta["index"]
        handles: dict[str, Any] = {}

        def read(name: str) -> Tensor:
            key = f"{state_name}/{name}"
            if key not in index:
                raise InputError(
                    f"{self.path} has no {key}. It is of another model: check the model and heads of the config"
                )
            file = index[key]
            if file not in handles:
                handles[file] = safe_open(self.path / file, "pt")
            return handles[file].get_tensor(key)

        return read

    def has(self, state_name: StateName) -> bool:
        """Whether it holds a state of the parameters."""
        return any(key.startswith(f"{state_name}/") for key in self.meta["index"])

    def names(self) -> list[str]:
        """The names of all parameters."""
        return [key.removeprefix("param/") for key in self.meta["index"] if key.startswith("param/")]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all parameters, from the headers of the files."""
        stored = stored_tensors(self.path, self.meta)
        return {key.removeprefix("param/"): one.shape for key, one in stored.items() if key.startswith("param/")}


def step_name(step: int) -> str:
    """The name of a step's folder, also used for its samples; names sort like the steps."""
    return f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """The step of a folder that is named by `step_name`."""
    return int(folder.name.removeprefix("step_"))


def part_name(rank: int) -> str:
    """The name of the file that a rank writes."""
    return f"part-{rank:05d}.safetensors"


def unpublished(folder: Path) -> Path:
    """The temporary folder of a checkpoint while it is written.

    All ranks write into it, so its name does not contain a process id, unlike the temporary names of files.py. The writer has
    locked the run.
    """
    return folder.with_suffix(".tmp")


def folders(root: Path) -> list[Path]:
    """The checkpoints in a `checkpoints` folder, oldest first."""
    named = [path for path in root.glob("step_*") if re.fullmatch(r"step_[0-9]{8}", path.name)]
    return sorted(path for path in named if path.is_dir())


def complete(root: Path) -> list[Path]:
    """The complete checkpoints among `folders`: those with a meta.json, which is written last."""
    return [path for path in folders(root) if (path / META).is_file()]


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint of a folder. Raises InputError without a valid meta.json. The other files are not checked."""
    return Checkpoint(path, read_meta(path))


def damage(checkpoint: Checkpoint, *, checksums: bool = True, part: slice = slice(None)) -> str | None:
    """The first fault of the files of a checkpoint, beginning with the name of the file; None when they are unchanged.

    Compares sizes, and with `checksums` the content. part: the files to check. Raises OSError for a file that cannot be read.
    """
    for item in checkpoint.meta["files"][part]:
        file = checkpoint.path / item["file"]
        if not file.is_file():
            return f"{file.name} is listed in meta.json, but not found"
        size = file.stat().st_size
        if size != item["size"]:
            return f"{file.name} has {size} bytes, but meta.json says {item['size']}: it is truncated or altered"
        if checksums and file_sha256(file) != item["sha256"]:
            return f"{file.name} does not match its checksum in meta.json: it is damaged"
    return None


def fault(path: Path, *, part: slice = slice(None)) -> str | None:
    """The reason why a folder is no intact checkpoint, from meta.json, checksums and headers; None when it is intact.

    part: the files to check. Raises nothing.
    """
    try:
        checkpoint = open_checkpoint(path)
        wrong = damage(checkpoint, part=part)
        if wrong is None:
            stored_tensors(path, checkpoint.meta, [item["file"] for item in checkpoint.meta["files"][part]])
        return wrong
    except Exception as error:  # corrupt files make the readers raise all kinds of exceptions
        return reason(error)


def saved_steps(run: str | Path) -> list[int]:
    """The steps of a run's checkpoints whose files exist with the right sizes, newest first. Checksums are not computed."""
    return [step_of(path) for path in _sized(run)]


def last_step(run: str | Path) -> int:
    """The newest of `saved_steps`, from which a run can be resumed; 0 without one."""
    return next((step_of(path) for path in _sized(run)), 0)


def _sized(run: str | Path) -> Iterator[Path]:
    return (path for path in reversed(folders(Path(run) / CHECKPOINTS)) if _has_its_files(path))


def _has_its_files(path: Path) -> bool:
    try:
        return damage(open_checkpoint(path), checksums=False) is None
    except (InputError, OSError):
        return False


def set_aside(path: Path, reason: str) -> str:
    """Renames a damaged checkpoint, so that it no longer counts. Returns a message for the user. reason: its fault."""
    message = f"{path} is damaged and skipped: {reason}"
    names = (path.with_name(f"{path.name}.damaged{number}") for number in ("", *(f".{n}" for n in range(2, 1000))))
    try:
        aside = path.replace(next(name for name in names if not name.exists()))
    except OSError as error:
        return f"{message}. It could not be renamed ({error})"
    return f"{message}. It is kept as {aside.name}: remove it, or rename it back if it is intact after all"


def clear(root: Path) -> None:
    """Removes the temporary folders of a killed run. The caller must have locked the run, and must not be writing."""
    for leftover in root.glob("step_*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    remove_leftovers(root, "*")


def reason(error: Exception) -> str:
    """The message of an error, with its type where the message alone is not clear."""
    return (
        str(error) if isinstance(error, OSError | SafetensorError | InputError) else f"{type(error).__name__}: {error}"
    )
