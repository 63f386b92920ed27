"""Opening of a run folder, one of its checkpoints, a weight file of ours, or a released one, as a checkpoint.

Two rules select the checkpoint of a run: `newest_intact` for resuming training, `newest_or_refuse` for everything else.
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
    """A file of weights alone, opened as a checkpoint of the step in its header, or of step 0.

    tensors: memory-mapped where the format allows it, so that ranks of a node share the pages that they read.
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
    """The newest intact checkpoint in a `checkpoints` folder, from which training resumes; None without one.

    A damaged one is skipped: renamed to step_XXXXXXXX.damaged and reported through `report` on rank 0. All ranks must call
    this, with the run locked.
    """
    for path in reversed(world.on_main(lambda: folders(root))):
        # Each rank checks some of the files, and all get the results of all.
        results = world.gather(fault(path, part=slice(world.rank, None, world.size)))
        faults = [reason for reason in results if reason]
        if not faults:
            return open_checkpoint(path)
        if world.is_main:
            report(set_aside(path, faults[0]))
    return None


def newest_or_refuse(path: Path, named: str) -> Path:
    """The checkpoint folder or weight file that a path of a user means. Never falls back to another checkpoint.

    A checkpoint folder means itself, a run folder its newest checkpoint, and a weight file or the folder of a published model
    the weight file. named: the path with its option or key, for errors. Raises InputError for any other path.
    """
    if (path / META).exists():
        # Absolute: results of the checkpoint are written two folders above, which a relative path such as "." does not name.
        return Path(os.path.abspath(path))
    if checkpoints := complete(path / CHECKPOINTS):
        return checkpoints[-1]
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
    """The checkpoint of a path, as `open_with_config`, for callers that do not need the config, or read it from the meta."""
    return open_with_config(path, config_name, overrides)[0]


def open_with_config(
    path: Path, config_name: str | None, overrides: Sequence[str]
) -> tuple[Checkpoint, ExperimentConfig]:
    """The checkpoint of a path by the rule of `newest_or_refuse`, and the config of its training with overrides.

    config_name: for a weight file, the config to use instead of the one in its header or the published one that fits: one of
    ours, or a YAML of the released trainers. Raises InputError for an unknown path, for missing or changed files, for weights
    that do not fit the model of the config, and for overrides that change the model.
    """
    selected = newest_or_refuse(path, f"--checkpoint {path}")
    checkpoint = _intact(selected) if selected.is_dir() else _weight_file(path, selected, config_name, overrides)
    cfg = config.from_file(checkpoint.meta["config"], source=str(checkpoint.path), overrides=overrides)
    lines = config.found_from(cfg, checkpoint.run, config.override_keys(overrides))
    if discover().rank == 0:
        for line in lines:
            say(line)
    check_overrides(checkpoint, cfg)
    _check_fits(checkpoint.shapes(), cfg, str(checkpoint.path))
    return checkpoint, cfg


def read_weights(path: Path, field: str) -> dict[str, Tensor]:
    """All tensors of the checkpoint or file of a path (`newest_or_refuse`), on the CPU, whatever their model.

    `field` is the config key of the path, for errors. Raises InputError for a missing or changed file.
    """
    selected = newest_or_refuse(path, f"{field}={path}")
    if selected.is_file():
        return official.read_weights(selected, field)
    checkpoint = _intact(selected)
    read = checkpoint.reader("param")
    return {name: read(name) for name in checkpoint.shapes()}


def _weight_file(path: Path, file: Path, config_name: str | None, overrides: Sequence[str]) -> WeightFile:
    """The checkpoint of a weight file. overrides: used only where the file does not contain the shape of its model."""
    tensors = official.read_weights(file, "--checkpoint")
    header = _own_header(file)
    if config_name is not None:
        cfg = load_config(config_name, overrides)
    elif header:
        cfg = config.from_file(header["config"], source=str(path))
    else:
        cfg = published.config_of_weights(tensors, str(path), overrides)
    meta: dict[str, Any] = {
        "step": header.get("step", 0),
        "optimizer_step": 0,
        "config": to_dict(cfg),
        "tokenizer_sha256": header.get("tokenizer_sha256", ""),
        "files": [{"file": path.name, "sha256": file_sha256(file)}],
    }
    return WeightFile(path, meta, tensors)


def _intact(folder: Path) -> Checkpoint:
    """The checkpoint of a folder. Raises InputError for missing or changed files.

    Only the first process of a node computes checksums: when it fails, the launcher stops the others.
    """
    checkpoint = open_checkpoint(folder)
    if wrong := damage(checkpoint, checksums=discover().local_rank == 0):
        others = [other for other in complete(folder.parent) if other.name != folder.name]
        raise InputError(f"{folder}/{wrong}. Copy it again, or use {others[-1] if others else 'another checkpoint'}")
    return checkpoint


def check_overrides(checkpoint: Checkpoint, cfg: ExperimentConfig) -> None:
    """Raises InputError when `cfg`, the config of a checkpoint with overrides, has another model than its weights."""
    before, now = leaves(completed(checkpoint.meta["config"])), leaves(to_dict(cfg))
    for key in sorted(now):
        own = declaration(ExperimentConfig, key)
        if own is not None and own.by_weights and before[key] != now[key]:
            raise InputError(
                f"{key}={now[key]}, but {checkpoint.path} was trained with {key}={before[key]}, and its weights are for that. "
                f"Leave {key} out, or name another checkpoint"
            )


def _check_fits(shapes: Mapping[str, tuple[int, ...]], cfg: ExperimentConfig, source: str) -> None:
    """Raises InputError when the shapes of a checkpoint's tensors do not fit the model of its config.

    The depth is checked first, because even a model on the meta device takes time for every block.
    """
    blocks = len({name.split(".")[1] for name in shapes if name.startswith("blocks.") and name.count(".") > 1})
    if cfg.model.depth > blocks:
        raise InputError(
            f"{source} holds {blocks} blocks, but its config says model.depth={cfg.model.depth}. Use the file of this model, or "
            "the config of this file"
        )
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    official.check_fits(weights, meta_model(cfg, with_heads=False), source, heads_optional=True)


def load_config(name: str, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """The config of a YAML of ours or of the released trainers."""
    if published.is_released_yaml(Path(name)):
        return published.config_of_yaml(Path(name), overrides)
    return config.load(name, overrides)


def given_keys(name: str, overrides: Sequence[str] = ()) -> frozenset[str]:
    """The keys that a user sets, as config.given_keys; a YAML of the released trainers sets all that is read from it."""
    if published.is_released_yaml(Path(name)):
        return frozenset(leaves(to_dict(published.config_of_yaml(Path(name), overrides))))
    return config.given_keys(name, overrides)


def _own_header(path: Path) -> dict[str, Any]:
    """The header values of a consolidated file of ours; empty for other files."""
    if path.suffix != ".safetensors":
        return {}
    header = read_header(path, "--checkpoint").own
    if header.get("kind") != CONSOLIDATED:
        return {}
    step, made_by = header.get("step"), header.get("tokenizer_sha256")
    if not is_count(step) or not isinstance(made_by, str) or "config" not in header:
        raise InputError(
            f"--checkpoint {path}: its header has step={shown(step)} and tokenizer_sha256={shown(made_by)}, or no config. "
            "Make the file again with launchers/convert.py"
        )
    return header
