"""Where the samples of a local tar file lie, by reading its headers alone."""

from __future__ import annotations

import re
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

from rear_scale.config import InputError

# As webdataset splits a member's name: the key goes up to the first dot of the file's name.
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")


@dataclass(frozen=True)
class TarSample:
    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)  # extension -> first byte and size of its content

    @property
    def first_byte(self) -> int:
        return min(offset for offset, _ in self.members.values())


def scan(path: Path) -> list[TarSample]:
    """The samples of a tar file in file order. Raises InputError, naming file and byte, when it is missing or damaged."""
    if not path.is_file():
        raise InputError(f"not found: {path}. Copy the shard folder again")
    size = path.stat().st_size
    samples: list[TarSample] = []
    end = 0  # of what was understood so far
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                end = tar.offset
                match = _NAME.fullmatch(info.name)
                if not info.isfile() or match is None:
                    continue
                key, extension = match[1], match[2].lower()
                if not samples or samples[-1].key != key:
                    samples.append(TarSample(key))
                samples[-1].members[extension] = (info.offset_data, info.size)
    except tarfile.TarError as error:
        if end <= size:
            raise InputError(f"{path} is damaged at byte {end}: {error}. Copy it again") from error
    if end > size:
        raise InputError(f"{path} is truncated at byte {size}: its last member goes on to byte {end}. Copy it again")
    # The library takes a damaged header for the end of the file and says nothing.
    with open(path, "rb") as file:
        file.seek(end)
        header = file.read(tarfile.BLOCKSIZE)
    if header.strip(b"\0"):
        raise InputError(f"{path} is damaged at byte {end}: no tar header there. Copy it again")
    return samples


def read_member(path: Path, place: tuple[int, int]) -> bytes:
    """The content of a member that `scan` found at a place."""
    offset, size = place
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)
