"""Weight files of our own small models: safetensors that say what they are and how to build the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rear_scale.config import InputError


def write_weights(
    path: Path, model: nn.Module, kind: str, architecture: dict[str, Any], training: dict[str, Any] | None = None
) -> None:
    """Writes a model in one piece. The same weights and settings of their training give the same bytes."""
    head = {"kind": kind, "architecture": architecture}
    write_tensors(path, model.state_dict(), head if training is None else {**head, "training": training})


def read_training(path: str | Path) -> dict[str, Any]:
    """What a file that `read_weights` reads says of its training; empty when it says nothing."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["rear_scale"]).get("training", {})


def write_tensors(path: Path, tensors: Mapping[str, Tensor], head: dict[str, Any] | None) -> None:
    """Writes tensors in one piece, with what `head` says of them."""
    part = path.with_name(f"{path.name}.part")
    # One entry: the library writes several in no fixed order.
    metadata = None if head is None else {"rear_scale": json.dumps(head)}
    save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, part, metadata=metadata)
    part.replace(path)


def find_weights(path: str | Path) -> Path:
    """The weight file itself, where a path may name the folder of a published model."""
    path = Path(path)
    inside = (path / name for name in ("model.safetensors", "pytorch_model.bin"))
    return next((file for file in inside if file.is_file()), path)


def read_weights(path: str | Path, kind: str, field: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Architecture and state dict of a file. `field` is the config key that names it in errors.

    Raises InputError when the file is missing, damaged or of another kind.
    """
    try:
        with safe_open(path, "pt") as file:
            head = json.loads((file.metadata() or {}).get("rear_scale", "{}"))
            if head.get("kind") != kind:
                raise InputError(
                    f"{field}={path} is not a {kind} of ours. Remove it and make it again, or name another file"
                )
            return head["architecture"], {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise InputError(f"not found: {field}={path}. Make it first, or set the right path") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{field}={path} cannot be read ({error}). Remove it and make it again") from error
