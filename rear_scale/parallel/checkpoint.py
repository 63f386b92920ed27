"""Checkpoints in one form for every strategy and world size: float32 weights and AdamW moments by parameter name.

    <run>/checkpoints/step_00000100/part-00000.safetensors ...   keys param/NAME, exp_avg/NAME, exp_avg_sq/NAME
    <run>/checkpoints/step_00000100/meta.json                    step, config, data, files with checksums; written last
    <run>/checkpoints/latest                                     the name of the newest

A checkpoint is written under another name and renamed when it is complete, so each one that is visible is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rear_scale.config import InputError
from rear_scale.parallel.strategy import KINDS, Kind, Strategy
from rear_scale.shards.record import file_sha256, write_text_atomically
from rear_scale.world import World

FORMAT = "rear_scale checkpoint 1"


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

    def reader(self, kind: Kind) -> Callable[[str], Tensor]:
        """A function from parameter name to its full float32 tensor on the CPU."""
        index = self.meta["index"]
        handles: dict[str, Any] = {}

        def read(name: str) -> Tensor:
            key = f"{kind}/{name}"
            if key not in index:
                raise InputError(
                    f"{self.path} has no {key}. It was made by another model: check the model and heads of the config"
                )
            file = index[key]
            if file not in handles:
                handles[file] = safe_open(self.path / file, "pt")
            return handles[file].get_tensor(key)

        return read

    def names(self) -> list[str]:
        """All parameters."""
        return [key.removeprefix("param/") for key in self.meta["index"] if key.startswith("param/")]


def save(root: Path, step: int, strategy: Strategy, world: World, meta: dict[str, Any], keep_last: int) -> Path:
    """Writes the checkpoint of a step; each rank writes a part. All ranks must call this. Returns its folder."""
    final = root / _folder_name(step)
    part = final.with_suffix(".tmp")
    if world.is_main:
        # Left behind by a killed run.
        for leftover in root.glob("step_*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        part.mkdir(parents=True)
    world.barrier()
    file = f"part-{world.rank:05d}.safetensors"
    mine: dict[str, Tensor] = {}
    for kind in KINDS:
        # Gathering is collective, so every rank walks through all of them and keeps its own.
        for number, (name, tensor) in enumerate(strategy.tensors(kind)):
            if number % world.size == world.rank:
                mine[f"{kind}/{name}"] = tensor.float().cpu().clone()
    save_file(mine, part / file)
    sync(part / file)
    size, checksum = (part / file).stat().st_size, file_sha256(part / file)
    written = world.gather({"file": file, "size": size, "sha256": checksum, "keys": list(mine)})
    if world.is_main:
        files = [{name: item[name] for name in ("file", "size", "sha256")} for item in written]
        index = {key: item["file"] for item in written for key in item["keys"]}
        meta = {"format": FORMAT, "step": step, **meta, "files": files, "index": index}
        (part / "meta.json").write_text(json.dumps(meta, indent=1))
        sync(part / "meta.json")
        shutil.rmtree(final, ignore_errors=True)  # the same step, saved again after a resume from before it
        part.replace(final)
        write_text_atomically(root / "latest", f"{final.name}\n")
        for old in _folders(root)[:-keep_last]:
            shutil.rmtree(old)
    world.barrier()
    return final


def newest(root: Path, world: World, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest intact checkpoint of a run, or None when it has none. All ranks must call this.

    A damaged one is named through `report` on rank 0 and passed over.
    """
    for path in reversed(world.from_main(_folders(root) if world.is_main else None)):
        # The ranks share the reading out among themselves, and learn of each other's findings.
        faults = [fault for fault in world.gather(_fault(path, world.rank, world.size)) if fault]
        if not faults:
            return open_checkpoint(path)
        if world.is_main:
            report(f"{path} is damaged and passed over: {faults[0]}")
    return None


def open_checkpoint(path: Path) -> Checkpoint:
    """Raises InputError when the folder is not a complete checkpoint of ours."""
    try:
        meta = json.loads((path / "meta.json").read_text())
    except FileNotFoundError:
        raise InputError(
            f"not found: {path / 'meta.json'}. A checkpoint folder is named step_XXXXXXXX and lies in RUN/checkpoints"
        ) from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path / 'meta.json'} is not valid JSON ({error}). Use another checkpoint") from error
    found = meta.get("format") if isinstance(meta, dict) else None
    if found != FORMAT:
        raise InputError(
            f"{path} has format {found!r}, but {FORMAT!r} is wanted. Use a version of rear_scale that reads it"
        )
    return Checkpoint(path, meta)


def find(path: Path) -> Checkpoint:
    """The newest checkpoint of a run folder, or a checkpoint folder itself. Raises InputError when there is none."""
    if (path / "meta.json").exists():
        return open_checkpoint(path)
    folders = _folders(path / "checkpoints")
    if not folders:
        raise InputError(
            f"--checkpoint {path}: it has no checkpoints/step_XXXXXXXX. "
            "Name a run folder with a checkpoint, or a checkpoint folder"
        )
    return open_checkpoint(folders[-1])


def load_weights(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Fills a plain model. It may lack parameters of the checkpoint (the heads), but not have others."""
    read = checkpoint.reader("param")
    model.load_state_dict({name: read(name) for name, _ in model.named_parameters()})


def restore(checkpoint: Checkpoint, strategy: Strategy) -> None:
    """Sets master weights and moments of a strategy that was built around a model with the checkpoint's weights in it.

    All ranks must call this. (An engine's copies of the weights are made when it is built, and not set again here.)
    """
    for kind in KINDS:
        strategy.load_tensors(kind, checkpoint.reader(kind), checkpoint.meta["optimizer_step"])


def _folders(root: Path) -> list[Path]:
    """Visible checkpoints, oldest first."""
    return sorted(path for path in root.glob("step_????????") if path.is_dir())


def _folder_name(step: int) -> str:
    return f"step_{step:08d}"


def _fault(path: Path, rank: int, world_size: int) -> str | None:
    """What is wrong with this rank's share of a checkpoint's files, or None."""
    try:
        for number, item in enumerate(open_checkpoint(path).meta["files"]):
            if number % world_size != rank:
                continue
            file = path / item["file"]
            if file.stat().st_size != item["size"]:
                return f"{file.name} has {file.stat().st_size} bytes, not {item['size']}"
            if file_sha256(file) != item["sha256"]:
                return f"{file.name} does not match its checksum"
            with safe_open(file, "pt"):
                pass
    except (InputError, OSError, KeyError, TypeError, SafetensorError) as error:
        return str(error)
    return None


def sync(path: Path) -> None:
    """Down to the disk, so that a rename never shows a file whose bytes are not there yet."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
