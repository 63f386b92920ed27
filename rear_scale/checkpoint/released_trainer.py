"""Reading of folders checkpoint-N of the released trainers (accelerate): weights, AdamW moments and step.

checkpoint-N/metadata.json                         {"global_step": N, ...}
checkpoint-N/unwrapped_model/pytorch_model.bin     or model.safetensors beside metadata.json
checkpoint-N/optimizer.bin                         state_dict of torch's AdamW, parameters by number
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rear_scale.checkpoint.meta import LARGEST_STEP
from rear_scale.checkpoint.released import read_weights
from rear_scale.config import InputError
from rear_scale.optim.adamw import STATES
from rear_scale.untrusted import check_file, is_count, read_json, shown


@dataclass(frozen=True)
class ReleasedCheckpoint:
    """The state in a checkpoint-N folder."""

    step: int  # updates done
    tensors: dict[str, dict[str, Tensor]]  # param, exp_avg, exp_avg_sq -> parameter name -> float32


def is_released_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint-N of the released trainers."""
    return path.is_dir() and (path / "optimizer.bin").exists() and (path / "metadata.json").exists()


def weights_folder(path: Path) -> Path:
    """The file or folder of weights in a checkpoint-N folder."""
    return path / "unwrapped_model" if (path / "unwrapped_model").is_dir() else path


def read_checkpoint(path: Path, decays: Callable[[str, Tensor], bool]) -> ReleasedCheckpoint:
    """The weights and optimizer state of a checkpoint-N folder. decays: the released rule of weight decay.

    The optimizer file has numbers for parameters: first those without weight decay, each group in the order of the model's
    state_dict. Raises InputError for missing or inconsistent files.
    """
    weights = read_weights(weights_folder(path), "train.init_from")
    try:
        step = read_json(path / "metadata.json")["global_step"]
        if not is_count(step) or step > LARGEST_STEP:
            raise ValueError(f"global_step={shown(step)} is not a number of steps")
        check_file(path / "optimizer.bin")
        optimizer = torch.load(path / "optimizer.bin", map_location="cpu", weights_only=True)
        groups, state = optimizer["param_groups"], optimizer["state"]
        return ReleasedCheckpoint(step, _tensors(path, weights, groups, state, decays))
    except InputError:
        raise
    except Exception as error:  # damaged bytes make the reader of pickles raise all kinds of exceptions
        raise InputError(
            f"train.init_from={path}: its metadata.json or optimizer.bin cannot be read ({type(error).__name__}: "
            f"{str(error)[:120]}). Name unwrapped_model in it to start from the weights alone"
        ) from None


def _tensors(
    path: Path, weights: dict[str, Tensor], groups: Any, state: Any, decays: Callable[[str, Tensor], bool]
) -> dict[str, dict[str, Tensor]]:
    """The weights and moments by state name and parameter. Raises InputError for inconsistent ones, and other exceptions for
    values of the wrong types."""
    numbered: dict[int, str] = {}
    for group in groups:
        wanted = group["weight_decay"] != 0
        names = [name for name, value in weights.items() if decays(name, value) is wanted]
        if len(groups) == 1:
            names = list(weights)
        if len(names) != len(group["params"]):
            raise InputError(
                f"train.init_from={path}: a group of optimizer.bin has {len(group['params'])} parameters, but {len(names)} of "
                "the weights belong to it. Name unwrapped_model in it to start from the weights alone"
            )
        numbered.update(zip(group["params"], names, strict=True))
    tensors = {"param": {name: value.float() for name, value in weights.items()}}
    for state_name in STATES:
        tensors[state_name] = {}
        for number, name in numbered.items():
            moment = state.get(number, {}).get(state_name)
            if moment is not None and (not isinstance(moment, Tensor) or not moment.is_floating_point()):
                raise ValueError(f"{state_name} of {name} is {shown(type(moment).__name__)}, not a tensor of floats")
            moment = torch.zeros_like(weights[name]) if moment is None else moment
            if moment.shape != weights[name].shape:
                raise InputError(
                    f"train.init_from={path}: optimizer.bin has a moment of shape {list(moment.shape)} where {name} has "
                    f"{list(weights[name].shape)}. Name unwrapped_model in it to start from the weights alone"
                )
            tensors[state_name][name] = moment.float()
    return tensors
