"""Weight files of our own small models: safetensors that say what they are and how to build the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rear_scale.config import InputError


def write_weights(path: Path, model: nn.Module, kind: str, architecture: dict[str, Any]) -> None:
    """Writes a model in one piece. The same weights give the same bytes."""
    part = path.with_name(f"{path.name}.part")
    state = {name: value.contiguous().cpu() for name, value in model.state_dict().items()}
    # One entry: the library writes several in no fixed order.
    save_file(state, part, metadata={"rear_scale": json.dumps({"kind": kind, "architecture": architecture})})
    part.replace(path)


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
