"""Weight files: those of our own small models (safetensors that say what they are), and published ones, as they are."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rear_scale import untrusted
from rear_scale.config import InputError, first_line
from rear_scale.files import atomic_file, unfinished
from rear_scale.untrusted import FLOATS, StoredTensor, shown

Model = TypeVar("Model", bound=nn.Module)

_LARGEST_SIZE = 65_536  # of an architecture in the head of a file of ours


def write_weights(
    path: Path, model: nn.Module, model_type: str, architecture: dict[str, Any], training: dict[str, Any] | None = None
) -> None:
    """Writes a model in one piece. The same weights and settings of their training give the same bytes."""
    header = {"kind": model_type, "architecture": architecture}
    write_tensors(path, model.state_dict(), header if training is None else {**header, "training": training})


def read_training(path: str | Path) -> dict[str, Any]:
    """What a file that `read_weights` reads says of its training; empty when it says nothing."""
    training = read_header(path, "tokenizer.weights").own.get("training", {})
    return training if isinstance(training, dict) else {}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: dict[str, Any] | None) -> None:
    """Writes tensors in one piece, with what `head` says of them."""
    # One entry: the library writes several in no fixed order.
    metadata = None if header is None else {"rear_scale": json.dumps(header)}
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


def read_weights(
    path: str | Path, model_type: str, sizes: Collection[str], field: str
) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Architecture (the sizes of those names) and state dict of a file. `field` is the config key that names it in errors.

    Raises InputError when the file is missing, damaged or of another kind.
    """
    header = read_header(path, field)
    if header.own.get("kind") != model_type:
        raise InputError(
            f"{field}={path} is not a {model_type} of ours. Remove it and make it again, or name another file"
        )
    architecture = header.own.get("architecture")
    if (
        not isinstance(architecture, dict)
        or architecture.keys() != set(sizes)
        or not all(untrusted.is_count(size) and 0 < size <= _LARGEST_SIZE for size in architecture.values())
    ):
        raise InputError(
            f"{field}={path}: its head says architecture={shown(architecture)}, but {', '.join(sizes)} are wanted, each a whole "
            f"number from 1 to {_LARGEST_SIZE:,}. Make the file again"
        )
    try:
        with safe_open(path, "pt") as file:
            return architecture, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{field}={path} cannot be read ({error}). Remove it and make it again") from error


def fill(model: Model, state: Mapping[str, Tensor], path: str | Path, field: str) -> Model:
    """A model that was built without memory (on the meta device), with the weights of a file that `read_weights` read.

    Raises InputError when they are not this model's: sizes in the head of a file are checked before anything of them is
    allocated.
    """
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    stored = {name: tuple(value.shape) for name, value in state.items()}
    if stored != expected:
        raise InputError(
            f"{field}={path} does not hold what its head says: {_difference(stored, expected)}. Make the file again"
        )
    model.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
    return model


@dataclass(frozen=True)
class Header:
    """What a safetensors file says before its values."""

    own: dict[str, Any]  # what a file of ours says of itself; empty for others
    tensors: dict[str, StoredTensor]


def read_header(path: str | Path, field: str) -> Header:
    """The head of a safetensors file of weights, within bounds. `field` names the file in errors.

    Raises InputError when the file is missing or none, and for values that are no weights (whole numbers, bool, complex,
    8 bits).
    """
    try:
        metadata, tensors = untrusted.safetensors_header(path)
        own = untrusted.parse_json(metadata.get("rear_scale", "{}"))
        if not isinstance(own, dict):
            raise ValueError(f"it says {shown(own)} of itself, not an object")
    except FileNotFoundError:
        raise InputError(f"not found: {field}={path}. Make it first, or set the right path") from None
    except (ValueError, OSError) as error:
        raise InputError(_unreadable(path, field, error)) from error
    for name, stored in tensors.items():
        _check_dtype(name, stored.dtype in FLOATS, stored.dtype, math.prod(stored.shape), path, field)
    return Header(own, tensors)


def _unreadable(path: str | Path, field: str, error: Exception) -> str:
    reason = first_line(error)
    # Such a reason says by itself what the file is, and what to do.
    if reason.startswith("is "):
        return f"{field}={path} {reason}"
    return f"{field}={path} cannot be read ({reason}). Is it whole? Download it again, or make it again"


def _check_dtype(name: str, is_float: bool, dtype: str, values: int, path: str | Path, field: str) -> None:
    # Networks count their batches in single whole numbers.
    if not is_float and not (values == 1 and dtype in ("I64", "int64")):
        raise InputError(
            f"{field}={path}: {shown(name)} holds {dtype}, but weights are floats of 16, 32 or 64 bits. Use the file "
            "before it was quantized or converted"
        )


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
    stored = {name: tuple(value.shape) for name, value in state.items()}
    if stored != expected:
        raise InputError(f"{field}={file} does not fit: {_difference(stored, expected)}. The file is {published}")
    model.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
    return model.eval()


def read_state(file: Path, field: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a .bin, .pth or .pt by torch, on the CPU.

    Raises InputError when the file cannot be read, holds anything but tensors by name, or is a pickle that needs more.
    """
    if file.suffix == ".safetensors":
        read_header(file, field)
    try:
        untrusted.check_file(file)
        if file.suffix == ".safetensors":
            return load_file(file)
        _check_archive(file)
        # weights_only: a pickle may run any code, and these come from elsewhere.
        # mmap: read when used, and once for all processes of a machine; files from before torch 1.6 cannot be mapped.
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{field}={file} is a pickle that holds more than tensors{_what(error)}, which could run any program. "
            "Use a safetensors file, or one that was saved from state_dict()"
        ) from None
    except Exception as error:  # whatever damaged bytes lead the readers to
        raise InputError(_unreadable(file, field, error)) from None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{field}={file} does not hold tensors by name. Use a file that was saved from state_dict()")
    _check_state(state, file, field)
    return dict(state)


def _check_archive(file: Path) -> None:
    """Raises ValueError for a zip whose members unpack to more than there is: torch writes them as they are."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            packed = [info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise ValueError(f"its member {shown(packed[0])} is compressed, which torch.save does not do")


def _check_state(state: Mapping[Any, Any], file: Path, field: str) -> None:
    """Raises InputError for names that are no text, and for tensors that are no plain weights or larger than the file."""
    size = file.stat().st_size
    for name, value in state.items():
        if not isinstance(name, str) or not name.isprintable():
            raise InputError(
                f"{field}={file}: a tensor has the name {shown(name)}. Use a file that was saved from state_dict()"
            )
        if value.layout != torch.strided or value.is_quantized or value.is_nested or value.device.type != "cpu":
            raise InputError(
                f"{field}={file}: {name} is no plain tensor ({value.layout}, on {value.device}). Use a file that was saved from "
                "state_dict() of a plain model"
            )
        if value.nbytes > value.untyped_storage().nbytes() or value.nbytes > size:
            raise InputError(
                f"{field}={file}: {name} would have {value.nbytes:,} bytes, more than are stored for it. Use a file that was "
                "saved from state_dict()"
            )
        dtype = str(value.dtype).removeprefix("torch.")
        is_float = value.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        _check_dtype(name, is_float, dtype, value.numel(), file, field)


def _what(error: BaseException) -> str:
    """What a refused pickle asks for; torch's message around it advises to load the file all the same."""
    needed = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f" ({needed[1]})" if needed else ""


def _difference(stored: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> str:
    missing, extra = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
    if missing:
        return f"{len(missing)} of {len(expected)} weights are missing, {missing[0]} among them"
    if extra:
        return f"it has {len(extra)} weights that the model lacks, {extra[0]} among them"
    name = next(name for name in expected if stored[name] != expected[name])
    return f"{name} is {list(stored[name])} in the file and {list(expected[name])} in the model"
