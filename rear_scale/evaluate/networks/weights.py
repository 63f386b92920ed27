"""Published weight files of the feature networks: read from local paths, never downloaded, and never executed as pickles."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from rear_scale.config import InputError
from rear_scale.files import file_sha256
from rear_scale.weight_file import read_state


@dataclass(frozen=True)
class PublishedFile:
    """A published weight file."""

    name: str
    source: str  # URL, or where to find it
    sha256_prefix: str | None  # None = its publisher gives no checksum


@dataclass(frozen=True)
class WeightFile:
    """The contents of a weight file."""

    path: str
    sha256: str
    is_published: bool | None  # whether the checksum is the published one; None = no checksum is published
    state: dict[str, Tensor]


def check_weight_file(path: str | Path | None, field: str, published: PublishedFile) -> Path:
    """The path of an existing file. `field` is the config key that names it in errors. Raises InputError if it is missing."""
    if path is None:
        raise InputError(f"{field} is not set. Set it to the path of {published.name}, published at {published.source}")
    if not Path(path).is_file():
        raise InputError(
            f"not found: {field}={path}. Download {published.name} from {published.source} (rear_scale does not download "
            "files), or set the right path"
        )
    return Path(path)


def read_weight_file(path: str | Path | None, field: str, published: PublishedFile) -> WeightFile:
    """The tensors of a .pth (state dict) or .safetensors file, and its checksum.

    Raises InputError when a file with the published name does not have the published checksum, for a missing or damaged file,
    and for a pickle that holds anything but tensors (it is not executed).
    """
    path = check_weight_file(path, field, published)
    sha256 = file_sha256(path)
    is_published = None if published.sha256_prefix is None else sha256.startswith(published.sha256_prefix)
    if is_published is False and path.name == published.name:
        raise InputError(
            f"{field}={path} has sha256 {sha256[:16]}..., but that of the published file of this name begins with "
            f"{published.sha256_prefix}. Download it again from {published.source}"
        )
    return WeightFile(str(path), sha256, is_published, read_state(path, field))


def fill(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Loads a state dict into a network. Batch counters and tensors that the network does not have are ignored.

    `source` names the file in errors. Raises InputError for a tensor that is missing, of another shape or not finite.
    """
    wanted = {name: value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    missing = [name for name in wanted if name not in state]
    if missing:
        raise InputError(f"{source} has no {missing[0]} ({len(missing)} tensors are missing). Is it the right file?")
    for name, value in wanted.items():
        if state[name].shape != value.shape:
            raise InputError(
                f"{source}: {name} is {list(state[name].shape)}, not {list(value.shape)}. Is it the right file?"
            )
        if not state[name].isfinite().all():
            raise InputError(f"{source}: {name} holds values that are not finite. Get the file again")
    model.load_state_dict({name: state[name] for name in wanted}, strict=False)
