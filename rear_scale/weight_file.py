"""Weight files: those of our own small models (safetensors that say what they are), and published ones, as they are."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rear_scale.config import InputError
from rear_scale.files import atomic_file, unfinished

Model = TypeVar("Model", bound=nn.Module)


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
    # One entry: the library writes several in no fixed order.
    metadata = None if head is None else {"rear_scale": json.dumps(head)}
    save_tensors(path, {name: value.contiguous().cpu() for name, value in tensors.items()}, metadata)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file of contiguous CPU tensors, complete or not at all. Raises OSError as `atomic_file` does."""
    with atomic_file(path) as temporary:
        # The library writes under a name of its own beside the file, where a kill would leave it.
        folder = unfinished(path)
        folder.mkdir()
        try:
            save_file(tensors, folder / "tensors", metadata=metadata)
            (folder / "tensors").replace(temporary)
        except SafetensorError as error:
            raise _as_os_error(error, path) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _as_os_error(error: SafetensorError, path: Path) -> Exception:
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1])), str(path)) if number else error


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


def find_weights(path: str | Path) -> Path:
    """The weight file itself, where a path may name the folder of a published model."""
    path = Path(path)
    inside = (path / name for name in ("model.safetensors", "pytorch_model.bin"))
    return next((file for file in inside if file.is_file()), path)


def load_published(
    model: Model, path: str | Path, field: str, published: str, rename: Callable[[str], str] = str
) -> Model:
    """The model with the weights of a published file in place of its own, float32.

    field: the config key that names the file in errors; published: its name and where it is published; rename: from a
    name in the file to a parameter here. Raises InputError when the file is missing, damaged, or not this model's.
    """
    file = find_weights(path)
    if not file.is_file():
        raise InputError(f"not found: {field}={path}. The file is {published}; download it and set {field} to its path")
    state = {rename(name): value for name, value in read_state(file, field).items()}
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    if found != expected:
        raise InputError(f"{field}={file} does not fit: {_difference(found, expected)}. The file is {published}")
    model.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
    return model.eval()


def read_state(file: Path, field: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a .bin, .pth or .pt by torch, on the CPU.

    Raises InputError when the file cannot be read, holds anything but tensors by name, or is a pickle that needs more.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # weights_only: a pickle may run any code, and these come from elsewhere.
        # mmap: read when used, and once for all processes of a machine; files from before torch 1.6 cannot be mapped.
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{field}={file} is a pickle that holds more than tensors{_what(error)}, which could run any program. "
            "Use a safetensors file, or one that was saved from state_dict()"
        ) from None
    except Exception as error:  # whatever damaged bytes lead the readers to
        raise InputError(
            f"{field}={file} cannot be read ({_first_line(error)}). Is it whole? Download it again"
        ) from None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{field}={file} does not hold tensors by name. Use a file that was saved from state_dict()")
    return dict(state)


def _what(error: BaseException) -> str:
    """What a refused pickle asks for; torch's message around it advises to load the file all the same."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f" ({found[1]})" if found else ""


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def _difference(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> str:
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing:
        return f"{len(missing)} of {len(expected)} weights are missing, {missing[0]} among them"
    if extra:
        return f"it has {len(extra)} weights that the model lacks, {extra[0]} among them"
    name = next(name for name in expected if found[name] != expected[name])
    return f"{name} is {list(found[name])} in the file and {list(expected[name])} in the model"
