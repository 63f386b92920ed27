"""Where weights come from: a run folder, one of its checkpoints, a weight file of ours, or a released one; and the portable
form of what did not come from a strategy."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from rear_scale import config
from rear_scale.checkpoint import folder as checkpoint
from rear_scale.checkpoint import released as official
from rear_scale.checkpoint import released_config as published
from rear_scale.checkpoint.folder import Checkpoint
from rear_scale.checkpoint.meta import stored_tensors
from rear_scale.config import ExperimentConfig, InputError, to_dict
from rear_scale.config.fields import declaration
from rear_scale.config.values import leaves
from rear_scale.files import atomic_folder, file_sha256, write_text_atomically
from rear_scale.model import Generator, meta_model
from rear_scale.parallel.strategy import Kind
from rear_scale.untrusted import is_count, shown
from rear_scale.weight_file import find_weights, read_head, save_tensors, write_tensors
from rear_scale.world import discover

_CONSOLIDATED = "generator"


@dataclass(frozen=True)
class WeightFile(Checkpoint):
    """A file of weights alone, read as a checkpoint of step 0 or of the step that it says.

    tensors: mapped where the format allows it: not in memory until they are read, and ranks of a node share the pages.
    """

    tensors: dict[str, Tensor] = field(repr=False)

    @property
    def run(self) -> Path:
        return Path(self.meta["config"]["run"]["dir"])

    def reader(self, kind: Kind) -> Callable[[str], Tensor]:
        if kind != "param":
            raise InputError(f"{self.path} holds weights alone, no {kind}. Use a checkpoint folder")
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


def open_source(path: Path, config_name: str | None = None, overrides: tuple[str, ...] | list[str] = ()) -> Checkpoint:
    """The checkpoint of a run folder (its newest), a checkpoint folder, or a weight file of ours or of a released model.

    config_name: for a weight file, the config to use instead of the one that it says or that fits it: one of ours, or a
    YAML of the released trainers. overrides are needed early only to tell the shape of a weight file's model. Raises
    InputError when there is no such source, when a file of it is missing or is not the one that was written, and when a
    weight file does not fit its config.
    """
    if (path / "meta.json").exists():
        # Not relative: what is made of a checkpoint goes to the folder two above, whatever the current one is.
        return _intact(Path(os.path.abspath(path)))
    if folders := _complete(path / "checkpoints"):
        return _intact(folders[-1])
    if not path.exists():
        raise InputError(
            f"not found: --checkpoint {path}. Name a run folder with a checkpoint, a checkpoint folder, or a weight file"
        )
    if (path / "checkpoints").is_dir() or find_weights(path).is_dir():
        return checkpoint.find(path)  # its error says what a checkpoint looks like
    tensors = official.read_weights(path, "--checkpoint")
    head = _own_head(path)
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
        "files": [{"file": path.name, "sha256": file_sha256(find_weights(path))}],
    }
    _check_fits({name: tuple(value.shape) for name, value in tensors.items()}, cfg, str(path))
    return WeightFile(path, meta, tensors)


def _complete(root: Path) -> list[Path]:
    """The checkpoint folders that were written to their end, oldest first."""
    named = [path for path in root.glob("step_*") if re.fullmatch(r"step_\d{8}", path.name)]
    return sorted(path for path in named if (path / "meta.json").is_file())


def _intact(folder: Path) -> Checkpoint:
    """The checkpoint of a folder whose files are those that were written. Raises InputError naming what is not.

    Checksums are taken once per node, by its first process: whoever starts the ranks ends the others when it is gone.
    """
    found = checkpoint.open_checkpoint(folder)
    takes_checksums = discover().local_rank == 0
    listed = {item["file"]: (item["size"], item["sha256"]) for item in found.meta["files"]}
    for name, (size, sha256) in sorted(listed.items()):
        file = folder / name
        if not file.is_file():
            raise InputError(f"not found: {file}, which meta.json lists. {_another(folder)}")
        if file.stat().st_size != size:
            raise InputError(
                f"{file} has {file.stat().st_size} bytes, but meta.json says {size}: it is truncated or altered. "
                f"{_another(folder)}"
            )
        if takes_checksums and file_sha256(file) != sha256:
            raise InputError(f"{file} does not match its checksum in meta.json: it is damaged. {_another(folder)}")
    stored = stored_tensors(folder, found.meta)
    cfg = config.from_file(found.meta["config"], source=str(folder / "meta.json"))
    shapes = {key.removeprefix("param/"): one.shape for key, one in stored.items() if key.startswith("param/")}
    _check_fits(shapes, cfg, str(folder))
    return found


def _another(folder: Path) -> str:
    others = [path for path in _complete(folder.parent) if path.name != folder.name]
    return f"Copy it again, or use {others[-1] if others else 'another checkpoint'}"


def check_overrides(found: Checkpoint, cfg: ExperimentConfig) -> None:
    """Raises InputError when `cfg`, the config of a source with overrides, asks for another model than its weights are."""
    # A field that the checkpoint does not know had its default's effect.
    before, now = {**leaves(to_dict(ExperimentConfig())), **leaves(found.meta["config"])}, leaves(to_dict(cfg))
    for key in sorted(now):
        own = declaration(ExperimentConfig, key)
        if own is not None and own.by_weights and before[key] != now[key]:
            raise InputError(
                f"{key}={now[key]}, but {found.path} was trained with {key}={before[key]}: its weights are for that. "
                f"Leave {key} out, or name another checkpoint"
            )


def load_generator_weights(found: Checkpoint, model: Generator) -> None:
    """Fills a model without heads in place, whatever its device and dtype, one weight at a time.

    Raises InputError unless all weights of the source but heads have their place in it, and are finite.
    """
    read, own = found.reader("param"), model.state_dict()
    names = [name for name in found.names() if not official.is_head(name)]
    shapes = {name: read(name).to("meta") for name in names}
    official.check_fits(shapes, model, str(found.path), heads_optional=True)
    for name in names:
        # Through a mapping of its own: what was read through one counts as memory of the process while that one lasts.
        weight = found.reader("param")(name)
        if not weight.isfinite().all():
            raise InputError(
                f"{found.path}: {name} holds values that are not finite, which samples cannot be drawn from. "
                "Use an earlier checkpoint, or get the file again"
            )
        own[name].copy_(weight)


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
    official.check_fits(weights, meta_model(cfg), source, heads_optional=True)


def load_config(name: str, overrides: tuple[str, ...] | list[str] = ()) -> ExperimentConfig:
    """A config of ours, or of a YAML of the released trainers."""
    if published.is_released_yaml(Path(name)):
        return published.config_of_yaml(Path(name), overrides)
    return config.load(name, overrides)


def _own_head(path: Path) -> dict[str, Any]:
    """What a consolidated file of ours says of itself; empty for other files."""
    if path.suffix != ".safetensors":
        return {}
    head = read_head(path, "--checkpoint").own
    if head.get("kind") != _CONSOLIDATED:
        return {}
    step, made_by = head.get("step"), head.get("tokenizer_sha256")
    if not is_count(step) or not isinstance(made_by, str) or "config" not in head:
        raise InputError(
            f"--checkpoint {path}: its head says step={shown(step)} and tokenizer_sha256={shown(made_by)}, or has no config. "
            "Make the file again with launchers/convert.py"
        )
    return head


def write_consolidated(path: Path, source: Checkpoint, weights: dict[str, Tensor]) -> None:
    """One safetensors file of float32 weights by official names, with the config and step of their source in its head."""
    head = {"kind": _CONSOLIDATED, "step": source.step, "config": source.meta["config"]}
    head["tokenizer_sha256"] = source.meta.get("tokenizer_sha256", "")
    write_tensors(path, weights, head)


def write_portable(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], meta: dict[str, Any]) -> None:
    """A checkpoint folder of whole tensors (kind -> name -> tensor), complete when it becomes visible."""
    keyed = {
        f"{kind}/{name}": value.float().contiguous() for kind, named in tensors.items() for name, value in named.items()
    }
    with atomic_folder(folder) as temporary:
        file = temporary / "part-00000.safetensors"
        save_tensors(file, keyed)
        files = [{"file": file.name, "size": file.stat().st_size, "sha256": file_sha256(file)}]
        index = dict.fromkeys(keyed, file.name)
        meta = {"format": checkpoint.FORMAT, "step": step, **meta, "files": files, "index": index}
        write_text_atomically(temporary / "meta.json", json.dumps(meta, indent=1))
