"""meta.json of a checkpoint folder, which may come from anywhere: checked before any of it is used."""

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
CONSOLIDATED = "generator"  # what a weight file of ours says that it is
LARGEST_STEP = 99_999_999  # folders are named by eight digits
_COUNTS = ("step", "optimizer_step", "images_seen", "skipped_updates", "rewinds", "data_offset", "world_size")
_KEY = re.compile(r"[A-Za-z_]\w*/[\w.]+", re.ASCII)  # param, ema or a state that a rule of optim/ names
_TEXTS = ("tokenizer_sha256", "data_fingerprint", "commit")


def read_meta(folder: Path) -> dict[str, Any]:
    """The values of a folder's meta.json: step, config, files with checksums, index of tensors.

    Raises InputError when there is none, when it is of another format or not whole, and for names that are not those of
    files in the folder.
    """
    path = folder / META
    try:
        meta = read_json(path)
    except FileNotFoundError:
        raise InputError(
            f"not found: {path}. A checkpoint folder is named step_XXXXXXXX and lies in RUN/checkpoints"
        ) from None
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is not valid JSON ({error}). Use another checkpoint") from error
    found = meta.get("format") if isinstance(meta, dict) else None
    if found != FORMAT:
        raise InputError(
            f"{folder} has format {shown(found)}, but {FORMAT!r} is wanted. Use a version of rear_scale that reads it"
        )
    if wrong := _wrong(meta, path):
        raise InputError(f"{path}: {wrong}. Copy it again, or use another checkpoint")
    return meta


def _wrong(meta: dict[str, Any], path: Path) -> str | None:
    """What in a meta.json of our format cannot be, or None."""
    for name in _COUNTS:
        if name in meta and not (is_count(meta[name]) and (name != "step" or meta[name] <= LARGEST_STEP)):
            return f"{name}={shown(meta[name])} is not a whole number that it can be"
    for name, kind in (("step", int), ("config", dict), ("files", list), ("index", dict)):
        if not isinstance(meta.get(name), kind):
            return f"it has no {name}: it is not whole"
    for name in _TEXTS:
        if not isinstance(meta.get(name), (str, type(None))):
            return f"{name}={shown(meta[name])} is no text"
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
            return f"the size or checksum of {item['file']} is none"
        names.add(item["file"])
    for key, file in index.items():
        if not _KEY.fullmatch(key):
            return f"its index has the key {shown(key)}, which is no tensor of a checkpoint"
        if not isinstance(file, str) or file not in names:
            return f"its index has {key} in {shown(file)}, which is none of its files"
    return None


def stored_tensors(
    folder: Path, meta: Mapping[str, Any], files: Collection[str] | None = None
) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint folder by key, out of the heads of its files (by default, all of them).

    Raises InputError when a file is missing or none, holds anything but float32, or lacks what the index says of it.
    """
    heads: dict[str, dict[str, StoredTensor]] = {}
    for name in [item["file"] for item in meta["files"]] if files is None else files:
        path = folder / name
        try:
            _, heads[name] = safetensors_header(path)
        except (ValueError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise InputError(f"{path} cannot be read ({reason}). Copy it again, or use another checkpoint") from error
    found = {}
    for key, file in meta["index"].items():
        if file not in heads:
            continue
        stored = heads[file].get(key)
        if stored is None or stored.dtype != "F32":
            what = "lacks" if stored is None else f"has {stored.dtype} instead of F32 for"
            raise InputError(f"{folder / file} {what} {key}, which meta.json lists. Use another checkpoint")
        found[key] = stored
    return found
