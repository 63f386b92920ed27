"""Offsets and sizes of the members of a local tar file, from its headers alone.

Stricter than `tarfile`, which stops silently at some damaged headers and so would lose samples: every byte must be
understood, or the file is refused.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from rear_scale.config import InputError
from rear_scale.shards.walk import HIDDEN, LeftOut, is_hidden, shown
from rear_scale.untrusted import mistaken_for

_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 1 << 20  # bytes
_LONGEST_RECORD = 1 << 20  # bytes of an extension record (long name, pax) before a header

_RECORD_LENGTH = re.compile(rb"([0-9]{1,8}) ")
_COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst|zstd|lz4|lzma|br|z)|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
_STARTS = {
    b"\x1f\x8b": "compressed (gzip)",
    b"\x28\xb5\x2f\xfd": "compressed (zstd)",
    b"\xfd7zXZ\0": "compressed (xz)",
    b"BZh": "compressed (bzip2)",
    b"\x04\x22\x4d\x18": "compressed (lz4)",
    b"PK\x03\x04": "a zip file",
}


class Member(NamedTuple):
    """A file in a tar."""

    name: str  # without a leading "./"
    offset: int  # of its first byte in the tar
    size: int  # bytes

    @property
    def location(self) -> tuple[int, int]:
        """First byte and size in bytes."""
        return self.offset, self.size


@dataclass(frozen=True)
class TarSample:
    """The members of one key of a tar."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)  # extension -> first byte and size of its content

    @property
    def first_byte(self) -> int:
        """The offset of the first of its members."""
        return min(offset for offset, _ in self.members.values())


def tar_shards(folder: str | Path) -> list[Path]:
    """The tar files directly in a folder, sorted by name, without hidden ones. Raises InputError for a compressed one."""
    paths = sorted(
        path
        for path in Path(folder).iterdir()
        if (path.suffix == ".tar" or _COMPRESSED.search(path.name)) and not is_hidden(path.name) and not path.is_dir()
    )
    for path in paths:
        check_not_compressed(path)
    return paths


def check_not_compressed(path: Path) -> None:
    """Raises InputError for a tar whose name says that it is compressed, because members are read by offset."""
    if _COMPRESSED.search(path.name):
        raise InputError(_unreadable(path, "compressed"))


def members(path: Path, left_out: LeftOut | None = None) -> list[Member]:
    """The files of a tar in its order, with hard links to earlier ones resolved and without hidden names.

    left_out: collects the names that are left out. Raises InputError, with file and byte, for a tar that is missing,
    compressed, truncated or damaged, that has data after its end mark or a member twice, and for symbolic links, sparse files
    and devices.
    """
    if not path.is_file():
        what = "a broken link" if path.is_symlink() else "not found"
        raise InputError(f"{what}: {shown(path)}. Copy the shard folder again")
    return _Reader(path, left_out or LeftOut()).read()


def scan(path: Path, left_out: LeftOut | None = None) -> list[TarSample]:
    """The samples of a tar file in file order: consecutive members with one key, as webdataset groups them.

    Raises InputError as `members` does, and for a key or extension that occurs twice.
    """
    samples: dict[str, TarSample] = {}
    last: TarSample | None = None
    for member in members(path, left_out):
        key, extension = split_name(member.name)
        if not extension:
            if left_out is not None:
                left_out.add_format(member.name)
            continue
        if last is None or last.key != key:
            if key in samples:
                raise InputError(
                    f"{shown(path)}: the key {shown(key)} occurs again at byte {member.offset}, apart from its other members. "
                    "Make the tar with its names in order (tar --sort=name), each key once"
                )
            last = samples[key] = TarSample(key)
        if extension in last.members:
            raise InputError(
                f"{shown(path)}: the key {shown(key)} has .{shown(extension)} twice, again at byte {member.offset}. Make the "
                "tar with each name once"
            )
        last.members[extension] = member.location
    return list(samples.values())


def split_name(name: str) -> tuple[str, str]:
    """The key and the extension (in lower case) of a member, as webdataset splits them: at the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def read_member(path: Path, location: tuple[int, int]) -> bytes:
    """The content of a member of a tar. location: first byte and size, from `members` or `scan`."""
    with open(path, "rb") as file:
        return read_at(file, location)


def read_at(file: BinaryIO, location: tuple[int, int]) -> bytes:
    """The content of a member of an open tar, as `read_member`."""
    offset, size = location
    file.seek(offset)
    return file.read(size)


class _Reader:
    """Reads the headers of a tar in one pass."""

    def __init__(self, path: Path, left_out: LeftOut) -> None:
        self.path, self.left_out = path, left_out
        self.size = path.stat().st_size
        self.locations: dict[str, tuple[int, int]] = {}  # of all files, by name
        self.records: dict[str, str] = {}  # extension records for the next header: path, linkpath, size

    def read(self) -> list[Member]:
        files = []
        with open(self.path, "rb") as file:
            for position, info in self._headers(file):
                member = self._member(position, info)
                if member is not None:
                    files.append(member)
        return files

    def _headers(self, file: BinaryIO) -> Iterator[tuple[int, tarfile.TarInfo]]:
        """Yields the position and header of each member up to the end mark. Checks that only zeros follow it."""
        position = 0
        while True:
            file.seek(position)
            block = file.read(_BLOCK)
            if len(block) < _BLOCK and position:
                raise self._truncated("it has no end mark")
            if block and not block.strip(b"\0"):
                if self.records:
                    raise self._damaged(position, "a member's header is missing")
                self._check_rest(file, position)
                return
            try:
                info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except (tarfile.HeaderError, ValueError) as error:
                if position == 0:
                    if block and (what := mistaken_for(block)):
                        raise InputError(f"{shown(self.path)} {what}") from None
                    for start, what in _STARTS.items():
                        if block.lower().startswith(start.lower()):
                            raise InputError(_unreadable(self.path, what)) from None
                raise self._damaged(position, f"not a tar header ({error})") from error
            if info.type in _RECORDS:
                position = self._record(file, position, info)
                continue
            info.size = self._recorded_size(position, info.size)
            end = position + _BLOCK + (0 if info.type in _WITHOUT_CONTENT else _blocks(info.size))
            if end > self.size:
                raise self._truncated(f"its last member ends at byte {end}")
            yield position, info
            self.records = {}
            position = end

    def _member(self, position: int, info: tarfile.TarInfo) -> Member | None:
        """The file of a header; None for a folder, and for a name that is left out."""
        name = _plain(self.records.get("path", info.name))
        parts = name.split("/")
        if info.type == tarfile.DIRTYPE or info.type == _VOLUME_LABEL:
            return None
        if ".." in parts or not name:
            raise self._damaged(position, f"the name {shown(info.name)!r} is not a path inside of a folder")
        location = (position + _BLOCK, info.size)
        if info.type == tarfile.LNKTYPE:
            location = self.locations.get(_plain(self.records.get("linkpath", info.linkname)), location)
        if name in self.locations:
            raise InputError(
                f"{shown(self.path)}: {shown(name)} occurs twice, again at byte {position}. Make the tar with each name once"
            )
        hidden = any(map(is_hidden, parts))
        problem = self._not_a_file(info)
        if problem is not None and not hidden:
            raise InputError(f"{shown(self.path)}, byte {position}: {shown(name)} is {problem}")
        self.locations[name] = location
        if hidden:
            self.left_out.add(HIDDEN, name)
            return None
        return Member(name, *location)

    def _not_a_file(self, info: tarfile.TarInfo) -> str | None:
        """A description, with a way out, of a member without content of its own; None for a file."""
        if info.type == tarfile.GNUTYPE_SPARSE or "sparse" in self.records:
            return "a sparse file, whose content is not contiguous. Make the tar without --sparse"
        if info.type == tarfile.SYMTYPE:
            return f"a link to {shown(info.linkname)}. Make the tar with the files themselves (tar --dereference)"
        if info.type == tarfile.LNKTYPE:
            target = self.records.get("linkpath", info.linkname)
            if _plain(target) in self.locations:
                return None
            return f"a link to {shown(target)}, which is not before it in the tar. Make the tar with --hard-dereference"
        if info.type not in _FILES:
            return f"of type {info.type!r}, which is not a file. Make the tar of ordinary files"
        return None

    def _record(self, file: BinaryIO, position: int, info: tarfile.TarInfo) -> int:
        """Stores an extension record for the next header. Returns the position after it."""
        end = position + _BLOCK + _blocks(max(info.size, 0))
        if not 0 <= info.size <= _LONGEST_RECORD:
            raise self._damaged(position, f"an extension record of {info.size} bytes")
        if end > self.size:
            raise self._truncated(f"its last member ends at byte {end}")
        content = file.read(info.size)
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            field_name = "path" if info.type == tarfile.GNUTYPE_LONGNAME else "linkpath"
            text = content.rstrip(b"\0")
            if b"\0" in text:
                raise self._damaged(position, "a malformed long name")
            records = {field_name: text.decode("utf-8", "surrogateescape")}
        else:
            records = self._pax(position, content)
        if info.type == tarfile.XGLTYPE:
            if records.keys() & {"path", "linkpath", "size", "sparse"}:
                raise self._damaged(position, "a global record that renames all members")
        elif records.keys() & self.records.keys():
            raise self._damaged(position, "the header of the member before it is missing")
        else:
            self.records |= records
        return end

    def _pax(self, position: int, content: bytes) -> dict[str, str]:
        """The records of a pax header that are used: path, linkpath, size, and "sparse" for any record of sparse files."""
        records, start = {}, 0
        content = content.rstrip(b"\0")
        while start < len(content):
            match = _RECORD_LENGTH.match(content, start)
            end = start + int(match[1]) if match else 0
            keyword, equals, value = content[match.end() : end - 1].partition(b"=") if match else (b"", b"", b"")
            if not equals or content[end - 1 : end] != b"\n":
                raise self._damaged(position, "a malformed pax record")
            start = end
            if keyword.startswith(b"GNU.sparse"):
                records["sparse"] = ""
            elif keyword in (b"path", b"linkpath", b"size"):
                records[keyword.decode()] = value.decode("utf-8", "surrogateescape")
        return records

    def _recorded_size(self, position: int, size: int) -> int:
        text = self.records.get("size", str(size))
        if not re.fullmatch("[0-9]{1,20}", text):
            raise self._damaged(position, f"a size of {text[:30]}")
        return int(text)

    def _check_rest(self, file: BinaryIO, mark: int) -> None:
        while chunk := file.read(_CHUNK):
            if chunk.strip(b"\0"):
                raise InputError(
                    f"{shown(self.path)} has data after its end mark at byte {mark}: a damaged header, or several tars in one "
                    "file. Copy it again, or join tars with tar --concatenate"
                )

    def _damaged(self, position: int, why: str) -> InputError:
        return InputError(f"{shown(self.path)} is damaged at byte {position}: {why}. Copy it again")

    def _truncated(self, why: str) -> InputError:
        return InputError(f"{shown(self.path)} is truncated at byte {self.size}: {why}. Copy it again")


_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_RECORDS = (
    tarfile.XHDTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_VOLUME_LABEL = b"V"
_WITHOUT_CONTENT = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.FIFOTYPE,
    tarfile.DIRTYPE,
    _VOLUME_LABEL,
)


def _plain(name: str) -> str:
    """A name without leading "/" or "./" and without doubled slashes."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _blocks(size: int) -> int:
    """The number of bytes of the tar blocks that hold `size` bytes."""
    return -(-size // _BLOCK) * _BLOCK


def _unreadable(path: Path, what: str) -> str:
    way_out = "Unpack it to a plain .tar" if what.startswith("compressed") else "Get the file itself"
    return f"{shown(path)} is {what}, but members of a tar are read by offset. {way_out}"
