"""Reads sample files of the ADM evaluation."""

# n images, S side in pixels

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from rear_scale.config import InputError


def read_samples(path: str | Path) -> tuple[np.ndarray, np.ndarray | None]:
    """`arr_0` (uint8 [n, S, S, 3], mapped from the file where it is stored uncompressed) and `label` (int [n]) if it is there.

    Raises InputError for a missing, truncated or foreign file, and for images of another type or shape.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if "arr_0.npy" not in names:
                raise InputError(
                    f"{path} has no arr_0 (it holds {', '.join(names) or 'nothing'}). Write samples as an ADM .npz"
                )
            images = _member(path, archive, "arr_0.npy")
            labels = _member(path, archive, "label.npy") if "label.npy" in names else None
    except FileNotFoundError:
        raise InputError(f"not found: {path}. Make it with launchers/sample.py") from None
    except (zipfile.BadZipFile, ValueError, EOFError, OSError) as error:
        raise InputError(f"{path} cannot be read as .npz ({error}). Is it complete?") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise InputError(
            f"{path}: arr_0 is {images.dtype} {images.shape}, but uint8 [n, height, width, 3] is wanted. "
            "Convert it to 0..255, channels last"
        )
    if len(images) == 0:
        raise InputError(f"{path}: arr_0 holds no images. Generate some first")
    if labels is not None and len(labels) != len(images):
        raise InputError(f"{path}: {len(labels)} labels for {len(images)} images. Write the file again")
    return images, labels


def _member(path: Path, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    info = archive.getinfo(name)
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read_header(member)
        header_size = member.tell()
        if info.compress_type != zipfile.ZIP_STORED or fortran_order or dtype.hasobject:
            member.seek(0)
            return np.lib.format.read_array(member)
    # The local header's own lengths count, not those of the central directory.
    with open(path, "rb") as file:
        file.seek(info.header_offset + 26)
        lengths = np.frombuffer(file.read(4), "<u2")
    start = info.header_offset + 30 + int(lengths.sum()) + header_size
    return np.memmap(path, dtype, "r", offset=start, shape=shape)
