"""The layout of checkpoints, in one form for every strategy and world size: float32 weights and states of the optimizer by
parameter name.

    <run>/checkpoints/step_00000100/part-00000.safetensors ...   keys param/NAME, exp_avg/NAME, exp_avg_sq/NAME
    <run>/checkpoints/step_00000100/meta.json                    step, config, data, files with checksums; written last
    <run>/checkpoints/latest                                     the name of the newest
    <run>/checkpoints/step_00000090.damaged                      one whose files have changed since: set aside, and not counted

A checkpoint is written under another name, read back, and renamed when it is complete, so each one that is visible is
whole. This module imports no torch: batch scripts ask it for the last step.
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

CHECKPOINTS = "checkpoints"  # of a run folder
LATEST = "latest"


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint folder."""

    path: Path
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        """Updates done."""
        return self.meta["step"]

    @property
    def run(self) -> Path:
        """The folder that what is made of the checkpoint goes to."""
        return self.path.parent.parent

    def reader(self, state_name: StateName) -> Callable[[str], Tensor]:
        """A function from parameter name to its full float32 tensor on the CPU."""
        index = self.meta["index"]
        handles: dict[str, Any] = {}

        def read(name: str) -> Tensor:
            key = f"{state_name}/{name}"
            if key not in index:
                raise InputError(
                    f"{self.path} has no {key}. It was made by another model: check the model and heads of the config"
                )
            file = index[key]
            if file not in handles:
                handles[file] = safe_open(self.path / file, "pt")
            return handles[file].get_tensor(key)

        return read

    def has(self, state_name: StateName) -> bool:
        return any(key.startswith(f"{state_name}/") for key in self.meta["index"])

    def names(self) -> list[str]:
        """All parameters."""
        return [key.removeprefix("param/") for key in self.meta["index"] if key.startswith("param/")]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all parameters, out of the heads of the files."""
        stored = stored_tensors(self.path, self.meta)
        return {key.removeprefix("param/"): one.shape for key, one in stored.items() if key.startswith("param/")}


def step_name(step: int) -> str:
    """The name of a step's folder, also of what is made of it: its digits sort as its number does."""
    return f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """The step of a checkpoint folder, by its name."""
    return int(folder.name.removeprefix("step_"))


def part_name(rank: int) -> str:
    """The name of the file that a rank writes."""
    return f"part-{rank:05d}.safetensors"


def unpublished(folder: Path) -> Path:
    """Where a checkpoint is written before it becomes visible. The ranks write into it together, so its name is the same on
    all of them and, other than those of files.py, holds no process: who writes there has locked the run."""
    return folder.with_suffix(".tmp")


def folders(root: Path) -> list[Path]:
    """The visible checkpoints in a `checkpoints` folder, oldest first."""
    named = [path for path in root.glob("step_*") if re.fullmatch(r"step_[0-9]{8}", path.name)]
    return sorted(path for path in named if path.is_dir())


def complete(root: Path) -> list[Path]:
    """Those of them that have a meta.json, which is written last."""
    return [path for path in folders(root) if (path / META).is_file()]


def open_checkpoint(path: Path) -> Checkpoint:
    """Raises InputError when the folder is not a complete checkpoint of ours. Its files are not looked at."""
    return Checkpoint(path, read_meta(path))


def damage(found: Checkpoint, *, checksums: bool = True, share: slice = slice(None)) -> str | None:
    """What is wrong with the files of a checkpoint, beginning with a file's name; None when they are as they were written.

    Sizes are compared, and with `checksums` also bytes. share: which of the files. Raises OSError for a file that cannot be
    read.
    """
    for item in found.meta["files"][share]:
        file = found.path / item["file"]
        if not file.is_file():
            return f"{file.name} is listed in meta.json, but not found"
        size = file.stat().st_size
        if size != item["size"]:
            return f"{file.name} has {size} bytes, but meta.json says {item['size']}: it is truncated or altered"
        if checksums and file_sha256(file) != item["sha256"]:
            return f"{file.name} does not match its checksum in meta.json: it is damaged"
    return None


def fault(path: Path, *, share: slice = slice(None)) -> str | None:
    """Why a folder is no intact checkpoint, by its meta.json and by checksums and heads of its files; None when it is one.

    share: which of the files are looked at. Raises nothing.
    """
    try:
        found = open_checkpoint(path)
        wrong = damage(found, share=share)
        if wrong is None:
            stored_tensors(path, found.meta, [item["file"] for item in found.meta["files"][share]])
        return wrong
    except Exception as error:  # corrupt files make the readers raise all kinds of exceptions
        return reason(error)


def saved_steps(run: str | Path) -> list[int]:
    """The steps of a run's checkpoints whose files are there in their sizes, newest first. Checksums are not taken."""
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


def set_aside(path: Path, found: str) -> str:
    """Renames a damaged checkpoint, so that nothing counts it any more. Returns what to say. found: its fault."""
    said = f"{path} is damaged and passed over: {found}"
    names = (path.with_name(f"{path.name}.damaged{number}") for number in ("", *(f".{n}" for n in range(2, 1000))))
    try:
        aside = path.replace(next(name for name in names if not name.exists()))
    except OSError as error:
        return f"{said}. It could not be renamed ({error})"
    return f"{said}. It is kept as {aside.name}: remove it, or rename it back if it is whole after all"


def clear(root: Path) -> None:
    """Removes what a killed run was writing or removing. For the process that has locked the run, while it writes none."""
    for leftover in root.glob("step_*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    remove_leftovers(root, "*")


def reason(error: Exception) -> str:
    """An error in words: its text, with its type where the text alone does not say enough."""
    return (
        str(error) if isinstance(error, OSError | SafetensorError | InputError) else f"{type(error).__name__}: {error}"
    )
