"""Reading of ADM .npz files in parts, so that memory does not grow with their size."""

# n images, H and W their size in pixels

from __future__ import annotations

import hashlib
import math
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from rear_scale.config import InputError
from rear_scale.untrusted import check_file, npy_header, shown

_LOCAL_HEADER, _LENGTHS = 30, 26  # bytes: size of a zip member's fixed header, and offset of the name's length in it
_CHUNK = 1 << 20
_MOST_ROWS = 2**48


class StoredArray:
    """One array of an .npz, read in slices of rows. It is not memory-mapped: mapped pages would count as process memory.

    A compressed array is unpacked while it is read; reading rows before the current position starts again from the beginning.
    """

    def __init__(self, path: Path, name: str) -> None:
        """Raises KeyError when the file has no such array, and what zipfile and numpy raise for a damaged one."""
        self.path, self.member = path, f"{name}.npy"
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo(self.member)
            with archive.open(info) as member:
                self.shape, fortran_order, self.dtype = npy_header(member)
                header_size = member.tell()
        if fortran_order and len(self.shape) > 1:
            raise ValueError(f"{name} is stored column by column")
        # math.prod on Python integers: numpy's integers would overflow for a forged header.
        self.row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        self.stored = info.compress_type == zipfile.ZIP_STORED
        self._stream: tuple[IO[bytes], int] | None = None  # an open member, and the rows read from it
        if self.stored:
            with open(path, "rb") as file:
                self.start = _start(info, file) + header_size
            if self.start - header_size + info.file_size > path.stat().st_size:
                raise EOFError(f"{name} ends early")
        # With too many rows in the header, bytes after the array would be read as images.
        rows = self.shape[0] if self.shape else 1
        if header_size + rows * self.row_bytes != info.file_size or rows > _MOST_ROWS:
            raise ValueError(f"its header says {rows:,} rows, which its {info.file_size} bytes do not match")

    def __len__(self) -> int:
        return self.shape[0] if self.shape else 1

    def __getitem__(self, part: slice) -> np.ndarray:
        start, end, step = part.indices(len(self))
        assert step == 1, part
        count = max(0, end - start)
        if self.stored:
            with open(self.path, "rb") as file:
                file.seek(self.start + start * self.row_bytes)
                data = file.read(count * self.row_bytes)
        else:
            try:
                data = self._unpack(start, count)
            except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
                raise InputError(
                    f"{self.path}: {self.member} is damaged before row {end} ({error}). Write the file again"
                ) from error
        if len(data) != count * self.row_bytes:
            raise InputError(f"{self.path}: {self.member} ends before row {end}. Write the file again")
        # bytearray makes the array writable, as torch expects.
        return np.frombuffer(bytearray(data), self.dtype).reshape(count, *self.shape[1:])

    def _unpack(self, start: int, count: int) -> bytes:
        if self._stream is None or self._stream[1] > start:
            member = zipfile.ZipFile(self.path).open(self.member)  # noqa: SIM115 - kept for the next part
            npy_header(member)
            self._stream = (member, 0)
        member, row = self._stream
        for _ in range(row, start):
            member.read(self.row_bytes)
        self._stream = (member, start + count)
        return member.read(count * self.row_bytes)


def read_sha256(path: str | Path) -> str:
    """The sha256 of a file, whose uncompressed members are checked against their checksums in the same pass.

    Raises InputError for a member that does not match.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            members = [_Member(info, file) for info in archive.infolist() if info.compress_type == zipfile.ZIP_STORED]
            digest, place = hashlib.sha256(), 0
            file.seek(0)
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                for member in members:
                    member.add(chunk, place)
                place += len(chunk)
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise _unreadable(path, error) from error
    for member in members:
        if member.crc != member.expected:
            raise InputError(
                f"{path}: {member.name} is damaged: it does not match its checksum. Copy or write it again"
            )
    return digest.hexdigest()


class _Member:
    """The running checksum of an uncompressed zip member, while its file is read."""

    def __init__(self, info: zipfile.ZipInfo, file: IO[bytes]) -> None:
        self.name, self.expected, self.crc = info.filename, info.CRC, 0
        self.start = _start(info, file)
        self.end = self.start + info.file_size

    def add(self, chunk: bytes, offset: int) -> None:
        """Adds a chunk of the file that begins at byte `offset`. The chunks must come in order."""
        first, last = max(self.start - offset, 0), min(self.end - offset, len(chunk))
        if first < last:
            self.crc = zlib.crc32(memoryview(chunk)[first:last], self.crc)


def _start(info: zipfile.ZipInfo, file: IO[bytes]) -> int:
    """The offset of a member's bytes in the file. It depends on lengths in the member's local header, which may differ from
    those in the central directory."""
    file.seek(info.header_offset + _LENGTHS)
    lengths = file.read(4)
    if len(lengths) < 4:
        raise zipfile.BadZipFile(f"{info.filename} begins after the end of the file")
    return (
        info.header_offset
        + _LOCAL_HEADER
        + int.from_bytes(lengths[:2], "little")
        + int.from_bytes(lengths[2:], "little")
    )


def array_names(path: str | Path) -> list[str]:
    """The names of the arrays of an .npz. Raises InputError when the file is missing, truncated or no .npz."""
    try:
        check_file(path)
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if len(set(names)) < len(names):
            raise ValueError(f"it holds {shown(next(name for name in names if names.count(name) > 1))} twice")
        return [name.removesuffix(".npy") for name in names]
    except FileNotFoundError:
        raise InputError(f"not found: {path}. Make it with launchers/sample.py, or set the right path") from None
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str | Path, error: Exception) -> InputError:
    reason = str(error)
    # Reasons of `mistaken_for` already say what the file is and what to do.
    if reason.startswith("is "):
        return InputError(f"{path} {reason}")
    return InputError(f"{path} cannot be read as .npz ({reason}). Is it complete?")


def open_array(path: str | Path, name: str) -> StoredArray:
    """An array of an .npz, to be read in slices. Raises InputError when it cannot be read."""
    try:
        return StoredArray(Path(path), name)
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError, RuntimeError) as error:
        raise InputError(f"{path}: {name} cannot be read ({error}). Is it complete?") from error


def read_samples(path: str | Path) -> tuple[StoredArray, np.ndarray | None]:
    """`arr_0` (uint8 [n, H, W, 3]), to be read in slices, and the classes (int [n]; `label`, or ADM's `arr_1`), if there are any.

    Raises InputError for a missing, truncated or other file, and for images of another type or shape.
    """
    names = array_names(path)
    if "arr_0" not in names:
        raise InputError(
            f"{path} has no arr_0 (it holds {', '.join(names) or 'nothing'}). Write samples as an ADM .npz"
        )
    images = open_array(path, "arr_0")
    if images.dtype != np.uint8 or len(images.shape) != 4 or images.shape[3] != 3:
        raise InputError(
            f"{path}: arr_0 is {images.dtype} {images.shape}, but uint8 [n, height, width, 3] is wanted. "
            "Convert it to 0..255, channels last"
        )
    if 0 in images.shape[1:]:
        raise InputError(f"{path}: arr_0 is {images.shape}: its images have no pixels. Write the file again")
    if len(images) == 0:
        raise InputError(f"{path}: arr_0 holds no images. Generate some first")
    return images, _labels(path, names, len(images))


def _labels(path: str | Path, names: list[str], count: int) -> np.ndarray | None:
    if "label" in names:
        labels = open_array(path, "label")
        if labels.shape != (count,) or labels.dtype.kind not in "iu":
            raise InputError(
                f"{path}: {len(labels)} labels for {count} images are {labels.dtype} {labels.shape}, but integers of shape "
                f"({count},) are wanted. Write them again, or leave them out"
            )
        return labels[:]
    if "arr_1" in names:
        labels = open_array(path, "arr_1")
        if labels.shape == (count,) and labels.dtype.kind in "iu":
            return labels[:]
    return None
