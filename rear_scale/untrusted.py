"""Strict readers for file headers and manifests that come with weights and data, bounded in time and memory.

All of them raise ValueError with a short reason, to which callers add the file, the field and a way out.
"""

from __future__ import annotations

import io
import json
import math
import stat
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

MOST_JSON = 64 << 20  # bytes; a manifest of 100,000 shards has half as many
_MOST_CONTAINERS = 1 << 20  # lists and objects of one JSON file
_DEEPEST = 64  # levels of nesting
_MOST_DIGITS = 20  # of a whole number, which then fits into 64 bits
_MAX_HEADER_BYTES = 32 << 20  # of a safetensors file; 10,000 tensors take 2 MiB
_MOST_DIMENSIONS = 8
_MAX_NPY_HEADER_BYTES = 10_000  # numpy's own limit

# dtype in a safetensors header -> bytes per value
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2,
               "I8": 1, "U8": 1, "BOOL": 1, "C64": 8, "F8_E4M3": 1, "F8_E5M2": 1}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")  # the dtypes in which weights are stored


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's description in the header of a safetensors file."""

    dtype: str  # as safetensors writes it: F32, BF16, ...
    shape: tuple[int, ...]


def mistaken_for(data: bytes) -> str | None:
    """The usual result of a failed download that the first bytes show (empty, git-lfs pointer, HTML page), with a way out; None
    for any other file."""
    start = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not data:
        return "is empty. Download or copy it again"
    if start.startswith(b"version https://git-lfs.github.com/spec/") or start.startswith(b"version https://hawser"):
        return "is a git-lfs pointer, not the file itself. Run git lfs pull in its folder, or download the file"
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "is an HTML page that was saved in place of the file. Download the file itself"
    if start.startswith(b"<?xml"):
        what = "an HTML page" if b"<html" in start else "an XML text, such as a server's refusal,"
        return f"is {what} that was saved in place of the file. Download the file itself"
    return None


def check_file(path: str | Path) -> None:
    """Checks that a path is a regular file and no failed download. Raises ValueError otherwise (see `mistaken_for`), OSError
    when the file cannot be read."""
    if not stat.S_ISREG(Path(path).stat().st_mode):
        raise ValueError("is no regular file. Name the file itself")
    with open(path, "rb") as file:
        mistaken = mistaken_for(file.read(512))
    if mistaken is not None:
        raise ValueError(mistaken)


def read_bytes(path: str | Path, most: int = MOST_JSON) -> bytes:
    """The contents of a regular file of at most `most` bytes. Raises ValueError for other files, OSError when unreadable."""
    status = Path(path).stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("no regular file")
    if status.st_size > most:
        raise ValueError(f"{status.st_size:,} bytes, more than the {most:,} that such a file may have")
    with open(path, "rb") as file:
        return file.read(most)


def read_json(path: str | Path, most: int = MOST_JSON) -> Any:
    """The values of a JSON file. Raises ValueError as `parse_json`, OSError when it cannot be read."""
    return parse_json(read_bytes(path, most), most)


def parse_json(text: str | bytes, most: int = MOST_JSON) -> Any:
    """The values of a JSON text.

    Raises ValueError for invalid JSON (also NaN, duplicate keys, half a surrogate pair) and beyond limits that no file of this
    project reaches: `most` bytes, 64 levels of nesting, a million lists and objects, 20 digits.
    """
    if len(text) > most:
        raise ValueError(f"{len(text):,} bytes, more than the {most:,} that such a file may have")
    if isinstance(text, bytes):
        if mistaken := mistaken_for(text):
            raise ValueError(f"the file {mistaken.split('. ')[0]}")
        text = text.decode()
    if text.count("[") + text.count("{") > _MOST_CONTAINERS:
        raise ValueError(f"more than {_MOST_CONTAINERS:,} lists and objects")
    try:
        values = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_number, parse_int=_whole, parse_float=_finite
        )
    except RecursionError:
        raise ValueError(f"more than {_DEEPEST} levels of nesting") from None
    _check_values(values)
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in values if names.count(name) > 1)
        raise ValueError(f"the key {shown(twice)} occurs twice")
    return values


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is not a number in JSON")


def _whole(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"a whole number of {len(text):,} digits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text) if len(text) <= 1000 else math.inf
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is too large for 64 bits")
    return value


def _check_values(values: Any) -> None:
    level = [values]
    for _ in range(_DEEPEST + 1):
        following: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                following += value.keys()
                following += value.values()
            elif isinstance(value, list):
                following += value
            elif isinstance(value, str) and not value.isascii():
                _check_text(value)
        level = following
        if not level:
            return
    raise ValueError(f"more than {_DEEPEST} levels of nesting")


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("a text with half a surrogate pair, which is not a character") from None


def shown(value: Any, most: int = 80) -> str:
    """The text of an untrusted value for a message: on one line, printable, cut to `most` characters."""
    if isinstance(value, (dict, list, tuple)) and len(value) > 8:
        return f"a {type(value).__name__} of {len(value):,} values"
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def safetensors_header(path: str | Path) -> tuple[dict[str, str], dict[str, StoredTensor]]:
    """Metadata and tensor descriptions of a safetensors file, from its header alone.

    Raises ValueError when the header is malformed, larger than 32 MiB or does not match the size of the file; OSError when
    the file cannot be read.
    """
    check_file(path)
    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= size - 8:
            raise ValueError(f"its header would have {length:,} bytes, but the file has {size:,}")
        if length > _MAX_HEADER_BYTES:
            raise ValueError(f"its header of {length:,} bytes is larger than the limit of {_MAX_HEADER_BYTES:,}")
        header = parse_json(file.read(length), _MAX_HEADER_BYTES)
    if not isinstance(header, dict):
        raise ValueError(f"its header is {shown(header)}, not an object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its __metadata__ does not hold texts by name")
    return metadata, {name: _stored(name, entry, size - 8 - length) for name, entry in header.items()}


def _stored(name: str, entry: Any, size: int) -> StoredTensor:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{shown(name)} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not dtype.isprintable() or len(dtype) > 20:
        raise ValueError(f"{shown(name)} has dtype {shown(dtype)}")
    if not isinstance(shape, list) or len(shape) > _MOST_DIMENSIONS or not all(map(is_count, shape)):
        raise ValueError(f"{shown(name)} has shape {shown(shape)}")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(map(is_count, offsets))
        or not offsets[0] <= offsets[1] <= size
    ):
        raise ValueError(f"{shown(name)} has data_offsets {shown(offsets)} in {size:,} bytes")
    # dtypes of less than a byte are not checked here: the safetensors library checks them, and they are refused as weights.
    if dtype in _ITEM_BYTES and math.prod(shape) * _ITEM_BYTES[dtype] != offsets[1] - offsets[0]:
        raise ValueError(f"{shown(name)} of {dtype} {shape} does not take {offsets[1] - offsets[0]:,} bytes")
    return StoredTensor(dtype, tuple(shape))


def is_count(value: Any) -> bool:
    """Whether a value out of JSON is a whole number of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_sha256(value: Any) -> bool:
    """Whether a value out of JSON is a SHA-256 checksum in lower-case hexadecimal digits."""
    return isinstance(value, str) and len(value) == 64 and all(letter in "0123456789abcdef" for letter in value)


def npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and dtype of the .npy array that begins at the file's position; reads up to its values.

    Raises ValueError for a file that is no .npy, Python objects, named fields and negative sizes.
    """
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f".npy version {version} is not supported")
    first = version == (1, 0)
    prefix = file.read(2 if first else 4)
    length = int.from_bytes(prefix, "little")
    # Checked before reading: a compressed zip member of a few MiB may expand to a header of 4 GiB.
    if length > _MAX_NPY_HEADER_BYTES:
        raise ValueError(f"its header of {length:,} bytes is larger than the limit of {_MAX_NPY_HEADER_BYTES:,}")
    read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
    try:
        shape, by_columns, dtype = read(io.BytesIO(prefix + file.read(length)))
    except Exception as error:  # numpy parses the header as a Python literal and raises all kinds of exceptions
        raise ValueError(f"its header cannot be read ({type(error).__name__})") from None
    if dtype.hasobject or dtype.names is not None or dtype.subdtype is not None:
        raise ValueError(f"it holds {shown(str(dtype))}, not plain numbers")
    if len(shape) > _MOST_DIMENSIONS or not all(map(is_count, shape)):
        raise ValueError(f"its shape is {shown(shape)}")
    return shape, by_columns, dtype


def npy_array(data: bytes, kinds: str = "iuf", shape: Collection[int] | None = None) -> np.ndarray:
    """The array of an .npy file in memory. kinds: the allowed values of dtype.kind. shape: the required shape, if given.

    Raises ValueError for any other content; nothing larger than `data` is allocated.
    """
    file = io.BytesIO(data)
    stored_shape, by_columns, dtype = npy_header(file)
    if dtype.kind not in kinds:
        raise ValueError(f"it holds {dtype}, not numbers")
    if shape is not None and stored_shape != tuple(shape):
        raise ValueError(f"it has shape {list(stored_shape)}, not {list(shape)}")
    if math.prod(stored_shape) * dtype.itemsize != len(data) - file.tell():
        raise ValueError(
            f"its header says {dtype} {list(stored_shape)}, which its {len(data) - file.tell():,} bytes do not match"
        )
    flat = np.frombuffer(data, dtype, offset=file.tell())
    return flat.reshape(stored_shape, order="F" if by_columns else "C")
