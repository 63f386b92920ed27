"""Streaming writer of sample files for the ADM evaluation: a .npz with uint8 images in `arr_0`, never whole in memory."""

# n images, S side in pixels

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from rear_scale.files import atomic_file

# A fixed time stamp, so that the same images give the same bytes.
_TIME = (1980, 1, 1, 0, 0, 0)
_LOCAL_HEADER = 30  # bytes


def write_samples(path: Path, images: Iterable[np.ndarray], count: int, image_size: int, labels: np.ndarray) -> None:
    """Writes `arr_0` (uint8 [count, S, S, 3]) from a stream of blocks (uint8 [n, S, S, 3]), and `label` (int64 [count]).

    The file becomes visible when it is complete.
    """
    with (
        atomic_file(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
    ):
        # 50,000 images of 256 pixels exceed 4 GiB; a zip member of that size must be declared as Zip64 before it is written.
        with archive.open(zipfile.ZipInfo("arr_0.npy", _TIME), "w", force_zip64=True) as member:
            shape = (count, image_size, image_size, 3)
            np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": shape})
            written = 0
            for block in images:
                assert block.dtype == np.uint8, block.dtype
                assert block.shape[1:] == shape[1:], (block.shape, shape)
                member.write(np.ascontiguousarray(block).data)
                written += len(block)
        assert written == count, (written, count)
        buffer = io.BytesIO()
        np.save(buffer, labels.astype(np.int64))
        archive.writestr(zipfile.ZipInfo("label.npy", _TIME), buffer.getvalue())


def open_samples(path: Path) -> np.ndarray:
    """The memory-mapped `arr_0` of a file that `write_samples` wrote, uint8 [n, S, S, 3]."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
        assert np.lib.format.read_magic(member) == (1, 0), path
        shape, _, dtype = np.lib.format.read_array_header_1_0(member)
        header = member.tell()
        start = archive.getinfo("arr_0.npy").header_offset
    with open(path, "rb") as file:
        file.seek(start)
        local = file.read(_LOCAL_HEADER)
    # The name and the extra field of a zip member stand between its header and its bytes.
    data = start + _LOCAL_HEADER + sum(struct.unpack("<HH", local[-4:]))
    return np.memmap(path, dtype=dtype, mode="r", offset=data + header, shape=shape)
