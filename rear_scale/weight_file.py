"""Weight files: safetensors files of our own small models, whose header describes the model, and published files as released."""

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

_LARGEST_SIZE = 65_536  # largest size of an architecture that is accepted from a file's header


def write_weights(
    path: Path, model: nn.Module, model_type: str, architecture: dict[str, Any], training: dict[str, Any] | None = None
) -> None:
    """Writes a model's weights, with its type, architecture and training settings in the file's header. Equal weights and
    settings give equal bytes."""
    header = {"kind": model_type, "architecture": architecture}
    write_tensors(path, model.state_dict(), header if training is None else {**header, "training": training})


def read_training(path: str | Path) -> dict[str, Any]:
    """The training settings in the header of a weight file of ours; empty when there are none."""
    training = read_header(path, "tokenizer.weights").own.get("training", {})
    return training if isinstance(training, dict) else {}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: dict[str, Any] | None) -> None:
    """Writes a safetensors file with `header` as JSON in its metadata."""
    # One metadata entry: the safetensors library writes several entries in no fixed order, and equal files need equal bytes.
    metadata = None if header is None else {"rear_scale": json.dumps(header)}
    save_tensors(path, {name: value.contiguous().cpu() for name, value in tensors.items()}, metadata)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file of contiguous CPU tensors, complete or not at all. Raises OSError as `atomic_file` does."""
    with atomic_file(path) as temporary:
        # The library writes under its own temporary name beside the file, which a killed process would leave behind. In a
        # folder named by `unfinished`, the next process removes it.
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
    """Architecture (its sizes by name) and state dict of a weight file of ours.

    sizes: the names that the architecture must have. field: the config key that names the file in errors. Raises InputError
    when the file is missing, damaged or holds another type of model.
    """
    header = read_header(path, field)
    if header.own.get("kind") != model_type:
        raise InputError(
            f"{field}={path} is not a {model_type} made by rear_scale. Remove it and make it again, or set another file"
        )
    architecture = header.own.get("architecture")
    if (
        not isinstance(architecture, dict)
        or architecture.keys() != set(sizes)
        or not all(untrusted.is_count(size) and 0 < size <= _LARGEST_SIZE for size in architecture.values())
    ):
        raise InputError(
            f"{field}={path}: its header says architecture={shown(architecture)}, but {', '.join(sizes)} are wanted, each an "
            f"integer from 1 to {_LARGEST_SIZE:,}. Make the file again"
        )
    try:
        with safe_open(path, "pt") as file:
            return architecture, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{field}={path} cannot be read ({error}). Remove it and make it again") from error


def fill(model: Model, state: Mapping[str, Tensor], path: str | Path, field: str) -> Model:
    """The model, built on the meta device, with the weights that `read_weights` has read.

    Raises InputError when names or shapes differ. The model is on the meta device so that sizes from an untrusted header are
    compared before any memory is allocated by them.
    """
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    stored = {name: tuple(value.shape) for name, value in state.items()}
    if stored != expected:
        raise InputError(
            f"{field}={path} does not match its header: {_difference(stored, expected)}. Make the file again"
        )
    model.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
    return model


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file."""

    own: dict[str, Any]  # the metadata that this project writes (type, architecture, ...); empty in files of others
    tensors: dict[str, StoredTensor]


def read_header(path: str | Path, field: str) -> Header:
    """The header of a safetensors file of weights. `field` names the file in errors.

    Raises InputError when the file is missing or not safetensors, and for dtypes that weights do not have (integers, bool,
    complex, 8 bits).
    """
    try:
        metadata, tensors = untrusted.safetensors_header(path)
        own = untrusted.parse_json(metadata.get("rear_scale", "{}"))
        if not isinstance(own, dict):
            raise ValueError(f"its rear_scale metadata are {shown(own)}, not an object")
    except FileNotFoundError:
        raise InputError(f"not found: {field}={path}. Make it first, or set the right path") from None
    except (ValueError, OSError) as error:
        raise InputError(_unreadable(path, field, error)) from error
    for name, stored in tensors.items():
        _check_dtype(name, stored.dtype in FLOATS, stored.dtype, math.prod(stored.shape), path, field)
    return Header(own, tensors)


def _unreadable(path: str | Path, field: str, error: Exception) -> str:
    reason = first_line(error)
    # Reasons of `mistaken_for` already say what the file is and what to do.
    if reason.startswith("is "):
        return f"{field}={path} {reason}"
    return f"{field}={path} cannot be read ({reason}); it may be damaged. Download it again, or make it again"


def _check_dtype(name: str, is_float: bool, dtype: str, values: int, path: str | Path, field: str) -> None:
    # An integer scalar is allowed: BatchNorm's num_batches_tracked.
    if not is_float and not (values == 1 and dtype in ("I64", "int64")):
        raise InputError(
            f"{field}={path}: {shown(name)} holds {dtype}, but weights are floats of 16, 32 or 64 bits. Use the file "
            "before it was quantized or converted"
        )


def find_weights(path: str | Path) -> Path:
    """The path of the weight file: the path itself, or the weight file in it where it is the folder of a published model."""
    path = Path(path)
    inside = (path / name for name in ("model.safetensors", "pytorch_model.bin"))
    return next((file for file in inside if file.is_file()), path)


def load_published(
    model: Model, path: str | Path, field: str, published: str, rename: Callable[[str], str] = str
) -> Model:
    """The model in eval mode, with the weights of a published file as float32.

    field: the config key that names the file in errors. published: the file's name and where it is published. rename: maps a
    name in the file to a parameter name here. Raises InputError when the file is missing, damaged, or of another model.
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
    """The tensors by name of a .safetensors file, or of a .bin, .pth or .pt file of torch, on the CPU.

    Raises InputError when the file cannot be read, holds anything but named tensors, or is a pickle with other objects.
    """
    if file.suffix == ".safetensors":
        read_header(file, field)
    try:
        untrusted.check_file(file)
        if file.suffix == ".safetensors":
            return load_file(file)
        _check_archive(file)
        # weights_only: a pickle can run any code, and these files are downloaded.
        # mmap: pages are read when used and shared by all processes of a machine; files from before torch 1.6 (not zip
        # archives) cannot be mapped.
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{field}={file} is a pickle that holds more than tensors{_forbidden(error)} and could run arbitrary code. "
            "Use a safetensors file, or one that was saved from state_dict()"
        ) from None
    except Exception as error:  # corrupt files make the readers raise all kinds of exceptions
        raise InputError(_unreadable(file, field, error)) from None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{field}={file} does not hold tensors by name. Use a file that was saved from state_dict()")
    _check_state(state, file, field)
    return dict(state)


def _check_archive(file: Path) -> None:
    """Raises ValueError for a zip with compressed members, which may unpack to any size; torch.save writes none."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            packed = [info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise ValueError(f"its member {shown(packed[0])} is compressed, which torch.save does not do")


def _check_state(state: Mapping[Any, Any], file: Path, field: str) -> None:
    """Raises InputError for names that are not text, and for tensors that are not plain weights or larger than the file."""
    size = file.stat().st_size
    for name, value in state.items():
        if not isinstance(name, str) or not name.isprintable():
            raise InputError(
                f"{field}={file}: a tensor has the name {shown(name)}. Use a file that was saved from state_dict()"
            )
        if value.layout != torch.strided or value.is_quantized or value.is_nested or value.device.type != "cpu":
            raise InputError(
                f"{field}={file}: {name} is not a plain tensor ({value.layout}, on {value.device}). Use a file that was saved "
                "from state_dict() of a plain model"
            )
        if value.nbytes > value.untyped_storage().nbytes() or value.nbytes > size:
            raise InputError(
                f"{field}={file}: {name} would have {value.nbytes:,} bytes, more than are stored for it. Use a file that was "
                "saved from state_dict()"
            )
        dtype = str(value.dtype).removeprefix("torch.")
        is_float = value.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        _check_dtype(name, is_float, dtype, value.numel(), file, field)


def _forbidden(error: BaseException) -> str:
    """The object that a refused pickle names, in parentheses. torch's own message is not shown, because it advises to load the
    file without the check."""
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
