"""The finder: a run folder, one of its checkpoints, a weight file of ours, or a released one, opened as a checkpoint.

Two rules say which checkpoint of a run is meant: training resumes by `newest_intact`, everything else by `newest_or_refuse`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from rear_scale import config
from rear_scale.checkpoint import released as official
from rear_scale.checkpoint import released_config as published
from rear_scale.checkpoint.folder import (
    CHECKPOINTS,
    Checkpoint,
    complete,
    damage,
    fault,
    folders,
    open_checkpoint,
    set_aside,
)
from rear_scale.checkpoint.meta import CONSOLIDATED, META
from rear_scale.config import ExperimentConfig, InputError, to_dict
from rear_scale.config.derived import completed
from rear_scale.config.fields import declaration
from rear_scale.config.values import leaves
from rear_scale.files import file_sha256
from rear_scale.model import meta_model
from rear_scale.parallel.strategy import StateName
from rear_scale.progress import say
from rear_scale.untrusted import is_count, shown
from rear_scale.weight_file import find_weights, read_header
from rear_scale.world import World, discover


@dataclass(frozen=True)
class WeightFile(Checkpoint):
    """A file of weights alone, read as a checkpoint of step 0 or of the step that it says.

    tensors: mapped where the format allows it: not in memory until they are read, and ranks of a node share the pages.
    """

    tensors: dict[str, Tensor] = field(repr=False)

    @property
    def run(self) -> Path:
        return Path(self.meta["config"]["run"]["dir"])

    def reader(self, state_name: StateName) -> Callable[[str], Tensor]:
        if state_name != "param":
            raise InputError(f"{self.path} holds weights alone, no {state_name}. Use a checkpoint folder")
        file = find_weights(self.path)

        def read(name: str) -> Tensor:
            if name not in self.tensors:
                raise InputError(f"{self.path} lacks {name}. Use the file of this model, or the config of this file")
            if file.suffix != ".safetensors":
                return self.tensors[name].float()
            with safe_open(file, "pt") as opened:
                return opened.get_tensor(name).float()

        return read

    def names(self) -> list[str]:
        return list(self.tensors)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in self.tensors.items()}


def newest_intact(root: Path, world: World, report: Callable[[str], None]) -> Checkpoint | None:
    """The rule of resuming: the newest intact checkpoint in a `checkpoints` folder, or None when it has none.

    A damaged one is passed over: renamed to step_XXXXXXXX.damaged and named through `report` on rank 0. All ranks must call
    this, with the run locked.
    """
    for path in reversed(world.from_main(folders(root) if world.is_main else None)):
        # The ranks share the reading out among themselves, and learn of each other's findings.
        faults = [found for found in world.gather(fault(path, share=slice(world.rank, None, world.size))) if found]
        if not faults:
            return open_checkpoint(path)
        if world.is_main:
            report(set_aside(path, faults[0]))
    return None


def newest_or_refuse(path: Path, named: str) -> Path:
    """The rule of all else, which never takes another checkpoint by itself: what a path stands for, a folder or a file.

    A checkpoint folder stands for itself, a run folder for its newest checkpoint, a weight file or the folder of a published
    model for the file of weights. named: the path with its option or key, for errors. Raises InputError for any other path.
    """
    if (path / META).exists():
        # Not relative: what is made of a checkpoint goes to the folder two above, whatever the current one is.
        return Path(os.path.abspath(path))
    if found := complete(path / CHECKPOINTS):
        return found[-1]
    if not path.exists():
        raise InputError(
            f"not found: {named}. Name a run folder with a checkpoint, a checkpoint folder, or a weight file"
        )
    weights = find_weights(path)
    if (path / CHECKPOINTS).is_dir() or weights.is_dir():
        raise InputError(
            f"{named}: it has no {CHECKPOINTS}/step_XXXXXXXX. Name a run folder with a checkpoint, or a checkpoint folder"
        )
    return weights


def open_source(path: Path, config_name: str | None = None, overrides: Sequence[str] = ()) -> Checkpoint:
    """`open_with_config` where the config is not wanted, or is read from the checkpoint's meta."""
    return open_with_config(path, config_name, overrides)[0]


def open_with_config(
    path: Path, config_name: str | None, overrides: Sequence[str]
) -> tuple[Checkpoint, ExperimentConfig]:
    """The checkpoint that a path stands for by `newest_or_refuse`, and the config of its training with overrides.

    config_name: for a weight file, the config to use instead of the one that it says or that fits it: one of ours, or a
    YAML of the released trainers. Raises InputError when there is no such source, when a file of it is missing or is not the
    one that was written, when its weights are not those of its config's model, and when overrides ask for another model.
    """
    place = newest_or_refuse(path, f"--checkpoint {path}")
    found = _intact(place) if place.is_dir() else _weight_file(path, place, config_name, overrides)
    cfg = config.from_file(found.meta["config"], source=str(found.path), overrides=overrides)
    lines = config.found_from(cfg, found.run, config.override_keys(overrides))
    if discover().rank == 0:
        for line in lines:
            say(line)
    check_overrides(found, cfg)
    _check_fits(found.shapes(), cfg, str(found.path))
    return found, cfg


def read_weights(path: Path, field: str) -> dict[str, Tensor]:
    """All tensors of what a path stands for by `newest_or_refuse`, on the CPU, whatever model they are of.

    `field` is the config key that names the path in errors. Raises InputError when a file is missing or is not the one that
    was written.
    """
    place = newest_or_refuse(path, f"{field}={path}")
    if place.is_file():
        return official.read_weights(place, field)
    found = _intact(place)
    read = found.reader("param")
    return {name: read(name) for name in found.shapes()}


def _weight_file(path: Path, file: Path, config_name: str | None, overrides: Sequence[str]) -> WeightFile:
    """overrides are needed here only to tell the shape of the model of a file that does not say it."""
    tensors = official.read_weights(file, "--checkpoint")
    head = _own_head(file)
    if config_name is not None:
        cfg = load_config(config_name, overrides)
    elif head:
        cfg = config.from_file(head["config"], source=str(path))
    else:
        cfg = published.config_of_weights(tensors, str(path), overrides)
    meta: dict[str, Any] = {
        "step": head.get("step", 0),
        "optimizer_step": 0,
        "config": to_dict(cfg),
        "tokenizer_sha256": head.get("tokenizer_sha256", ""),
        "files": [{"file": path.name, "sha256": file_sha256(file)}],
    }
    return WeightFile(path, meta, tensors)


def _intact(folder: Path) -> Checkpoint:
    """The checkpoint of a folder whose files are those that were written. Raises InputError naming what is not.

    Checksums are taken once per node, by its first process: whoever starts the ranks ends the others when it is gone.
    """
    found = open_checkpoint(folder)
    if wrong := damage(found, checksums=discover().local_rank == 0):
        others = [other for other in complete(folder.parent) if other.name != folder.name]
        raise InputError(f"{folder}/{wrong}. Copy it again, or use {others[-1] if others else 'another checkpoint'}")
    return found


def check_overrides(found: Checkpoint, cfg: ExperimentConfig) -> None:
    """Raises InputError when `cfg`, the config of a source with overrides, asks for another model than its weights are."""
    before, now = leaves(completed(found.meta["config"])), leaves(to_dict(cfg))
    for key in sorted(now):
        own = declaration(ExperimentConfig, key)
        if own is not None and own.by_weights and before[key] != now[key]:
            raise InputError(
                f"{key}={now[key]}, but {found.path} was trained with {key}={before[key]}: its weights are for that. "
                f"Leave {key} out, or name another checkpoint"
            )


def _check_fits(shapes: Mapping[str, tuple[int, ...]], cfg: ExperimentConfig, source: str) -> None:
    """Raises InputError when a source's tensors are not those of its config's model. Only their shapes are looked at, and
    the depth comes first: a model, even without memory, takes time for every block."""
    blocks = len({name.split(".")[1] for name in shapes if name.startswith("blocks.") and name.count(".") > 1})
    if cfg.model.depth > blocks:
        raise InputError(
            f"{source} holds {blocks} blocks, but its config says model.depth={cfg.model.depth}. Use the file of this model, or "
            "the config of this file"
        )
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    official.check_fits(weights, meta_model(cfg, with_heads=False), source, heads_optional=True)


def load_config(name: str, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """A config of ours, or of a YAML of the released trainers."""
    if published.is_released_yaml(Path(name)):
        return published.config_of_yaml(Path(name), overrides)
    return config.load(name, overrides)


def given_keys(name: str, overrides: Sequence[str] = ()) -> frozenset[str]:
    """As config.given_keys; a YAML of the released trainers sets all that is read from it."""
    if published.is_released_yaml(Path(name)):
        return frozenset(leaves(to_dict(published.config_of_yaml(Path(name), overrides))))
    return config.given_keys(name, overrides)


def _own_head(path: Path) -> dict[str, Any]:
    """What a consolidated file of ours says of itself; empty for other files."""
    if path.suffix != ".safetensors":
        return {}
    head = read_header(path, "--checkpoint").own
    if head.get("kind") != CONSOLIDATED:
        return {}
    step, made_by = head.get("step"), head.get("tokenizer_sha256")
    if not is_count(step) or not isinstance(made_by, str) or "config" not in head:
        raise InputError(
            f"--checkpoint {path}: its head says step={shown(step)} and tokenizer_sha256={shown(made_by)}, or has no config. "
            "Make the file again with launchers/convert.py"
        )
    return head
