"""Reading and checking of meta.json, the untrusted description of a checkpoint folder."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from rear_scale.config import InputError
from rear_scale.files import checked_name
from rear_scale.untrusted import StoredTensor, is_count, is_sha256, read_json, safetensors_header, shown

META = "meta.json"
FORMAT = "rear_scale checkpoint 1"
CONSOLIDATED = "generator"  # the `kind` in the header of a consolidated weight file
LARGEST_STEP = 99_999_999  # names of folders have eight digits
_COUNTS = (
    "step",
    "optimizer_step",
    "images_seen",
    "skipped_updates",
    "rewinds",
    "data_offset",
    "unique_images",
    "world_size",
)
_KEY = re.compile(r"[A-Za-z_]\w*/[\w.]+", re.ASCII)  # param, ema or a state of a rule in optim/
_TEXTS = ("tokenizer_sha256", "data_fingerprint", "commit")


def read_meta(folder: Path) -> dict[str, Any]:
    """The values of a folder's meta.json: step, config, files with checksums, index of tensors.

    Raises InputError when it is missing, of another format or incomplete, and for names of files outside of the folder.
    """
    path = folder / META
    try:
        meta = read_json(path)
    except FileNotFoundError:
        raise InputError(
            f"not found: {path}. A checkpoint folder is named step_XXXXXXXX and is in RUN/checkpoints"
        ) from None
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is not valid JSON ({error}). Use another checkpoint") from error
    format_name = meta.get("format") if isinstance(meta, dict) else None
    if format_name != FORMAT:
        raise InputError(
            f"{folder} has format {shown(format_name)}, but {FORMAT!r} is needed. Use a version of rear_scale that reads it"
        )
    if wrong := _wrong(meta, path):
        raise InputError(f"{path}: {wrong}. Copy it again, or use another checkpoint")
    return meta


def _wrong(meta: dict[str, Any], path: Path) -> str | None:
    """The first fault of a meta.json of our format, or None."""
    for name in _COUNTS:
        if name in meta and not (is_count(meta[name]) and (name != "step" or meta[name] <= LARGEST_STEP)):
            return f"{name}={shown(meta[name])} is not a possible whole number"
    for name, value_type in (("step", int), ("config", dict), ("files", list), ("index", dict)):
        if not isinstance(meta.get(name), value_type):
            return f"it has no {name}: it is incomplete"
    for name in _TEXTS:
        if not isinstance(meta.get(name), (str, type(None))):
            return f"{name}={shown(meta[name])} is not a text"
    return _wrong_files(meta["files"], meta["index"], path)


def _wrong_files(files: list[Any], index: dict[str, Any], path: Path) -> str | None:
    names = set()
    for item in files:
        if not isinstance(item, dict) or not item.keys() >= {"file", "size", "sha256"}:
            return f"a file is listed as {shown(item)}, without file, size and sha256"
        checked_name(item["file"], path, "file")
        if item["file"] in names:
            return f"it lists the file {item['file']} twice"
        if not is_count(item["size"]) or not is_sha256(item["sha256"]):
            return f"the size or checksum of {item['file']} is invalid"
        names.add(item["file"])
    for key, file in index.items():
        if not _KEY.fullmatch(key):
            return f"its index has the key {shown(key)}, which is not a tensor of a checkpoint"
        if not isinstance(file, str) or file not in names:
            return f"its index has {key} in {shown(file)}, which is not one of its files"
    return None


def stored_tensors(
    folder: Path, meta: Mapping[str, Any], files: Collection[str] | None = None
) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint folder by key, from the headers of its files (by default, all of them).

    Raises InputError for a file that is missing or invalid, holds anything but float32, or lacks a tensor of the index.
    """
    heads: dict[str, dict[str, StoredTensor]] = {}
    for name in [item["file"] for item in meta["files"]] if files is None else files:
        path = folder / name
        try:
            _, heads[name] = safetensors_header(path)
        except (ValueError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise InputError(f"{path} cannot be read ({reason}). Copy it again, or use another checkpoint") from error
    tensors = {}
    for key, file in meta["index"].items():
        if file not in heads:
            continue
        stored = heads[file].get(key)
        if stored is None or stored.dtype != "F32":
            what = "lacks" if stored is None else f"has {stored.dtype} instead of F32 for"
            raise InputError(f"{folder / file} {what} {key}, which meta.json lists. Use another checkpoint")
        tensors[key] = stored
    return tensors
