"""Where the members of a local tar file lie, by reading its headers alone.

Strict where `tarfile` is lenient: whatever is not understood to the last byte is refused, because a reader that stops
early gives a smaller set without a word.
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
_LONGEST_RECORD = 1 << 20  # bytes, of what goes before a header to say more of it

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

    name: str  # without "./" at its front
    offset: int  # of its first byte in the tar
    size: int  # bytes

    @property
    def place(self) -> tuple[int, int]:
        return self.offset, self.size


@dataclass(frozen=True)
class TarSample:
    """One sample of a WebDataset shard: its members of one key."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)  # extension -> first byte and size of its content

    @property
    def first_byte(self) -> int:
        return min(offset for offset, _ in self.members.values())


def tar_shards(folder: str | Path) -> list[Path]:
    """The tar files directly in a folder by name, hidden ones left out. Raises InputError for a compressed one."""
    paths = sorted(
        path
        for path in Path(folder).iterdir()
        if (path.suffix == ".tar" or _COMPRESSED.search(path.name)) and not is_hidden(path.name) and not path.is_dir()
    )
    for path in paths:
        check_not_compressed(path)
    return paths


def check_not_compressed(path: Path) -> None:
    """Raises InputError for a tar that is compressed by its name: members are read from within the file."""
    if _COMPRESSED.search(path.name):
        raise InputError(_unreadable(path, "compressed"))


def members(path: Path, left_out: LeftOut | None = None) -> list[Member]:
    """The files of a tar in its order; hard links to earlier ones are resolved, hidden names left out.

    left_out: takes up what is left out. Raises InputError, naming file and byte, for a tar that is missing, compressed,
    truncated or damaged, that has bytes behind its end mark or a member twice, and for links, sparse files and devices.
    """
    if not path.is_file():
        what = "a link that leads nowhere" if path.is_symlink() else "not found"
        raise InputError(f"{what}: {shown(path)}. Copy the shard folder again")
    return _Reader(path, left_out or LeftOut()).read()


def scan(path: Path, left_out: LeftOut | None = None) -> list[TarSample]:
    """The samples of a tar file in file order: neighbouring members of one key, as webdataset groups them.

    Raises InputError as `members` does, and for a key or extension that comes twice.
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
                    f"{shown(path)}: the key {shown(key)} comes again at byte {member.offset}, apart from its other members. "
                    "Make the tar with its names in order (tar --sort=name), each key once"
                )
            last = samples[key] = TarSample(key)
        if extension in last.members:
            raise InputError(
                f"{shown(path)}: the key {shown(key)} has .{shown(extension)} twice, again at byte {member.offset}. Make the "
                "tar with each name once"
            )
        last.members[extension] = member.place
    return list(samples.values())


def split_name(name: str) -> tuple[str, str]:
    """Key and extension (in lower case) of a member, as webdataset splits them: at the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def read_member(path: Path, place: tuple[int, int]) -> bytes:
    """The content of a member that `members` or `scan` found at a place."""
    with open(path, "rb") as file:
        return read_place(file, place)


def read_place(file: BinaryIO, place: tuple[int, int]) -> bytes:
    """As `read_member`, of an open file."""
    offset, size = place
    file.seek(offset)
    return file.read(size)


class _Reader:
    """One pass over the headers of a tar."""

    def __init__(self, path: Path, left_out: LeftOut) -> None:
        self.path, self.left_out = path, left_out
        self.size = path.stat().st_size
        self.places: dict[str, tuple[int, int]] = {}  # of all files, by name
        self.said: dict[str, str] = {}  # by the records before a header: path, linkpath, size

    def read(self) -> list[Member]:
        found = []
        with open(self.path, "rb") as file:
            for position, info in self._headers(file):
                member = self._member(position, info)
                if member is not None:
                    found.append(member)
        return found

    def _headers(self, file: BinaryIO) -> Iterator[tuple[int, tarfile.TarInfo]]:
        """Position and header of each member, up to the end mark. Checks that nothing but zeros comes behind that."""
        position = 0
        while True:
            file.seek(position)
            block = file.read(_BLOCK)
            if len(block) < _BLOCK and position:
                raise self._truncated("it has no end mark")
            if block and not block.strip(b"\0"):
                if self.said:
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
                raise self._damaged(position, f"no tar header there ({error})") from error
            if info.type in _RECORDS:
                position = self._record(file, position, info)
                continue
            info.size = self._said_size(position, info.size)
            end = position + _BLOCK + (0 if info.type in _WITHOUT_CONTENT else _blocks(info.size))
            if end > self.size:
                raise self._truncated(f"its last member goes on to byte {end}")
            yield position, info
            self.said = {}
            position = end

    def _member(self, position: int, info: tarfile.TarInfo) -> Member | None:
        """The file that a header stands for, or None for a folder and for what is left out."""
        name = _plain(self.said.get("path", info.name))
        parts = name.split("/")
        if info.type == tarfile.DIRTYPE or info.type == _VOLUME_LABEL:
            return None
        if ".." in parts or not name:
            raise self._damaged(position, f"the name {shown(info.name)!r} is no place inside a folder")
        place = (position + _BLOCK, info.size)
        if info.type == tarfile.LNKTYPE:
            place = self.places.get(_plain(self.said.get("linkpath", info.linkname)), place)
        if name in self.places:
            raise InputError(
                f"{shown(self.path)}: {shown(name)} comes twice, again at byte {position}. Make the tar with each name once"
            )
        hidden = any(map(is_hidden, parts))
        what = self._not_a_file(info)
        if what is not None and not hidden:
            raise InputError(f"{shown(self.path)}, byte {position}: {shown(name)} is {what}")
        self.places[name] = place
        if hidden:
            self.left_out.add(HIDDEN, name)
            return None
        return Member(name, *place)

    def _not_a_file(self, info: tarfile.TarInfo) -> str | None:
        """What a member is that has no content of its own here, with a way out; None for a file."""
        if info.type == tarfile.GNUTYPE_SPARSE or "sparse" in self.said:
            return "a sparse file, whose bytes do not lie in a row. Make the tar without --sparse"
        if info.type == tarfile.SYMTYPE:
            return f"a link to {shown(info.linkname)}. Make the tar with the files themselves (tar --dereference)"
        if info.type == tarfile.LNKTYPE:
            target = self.said.get("linkpath", info.linkname)
            if _plain(target) in self.places:
                return None
            return f"a link to {shown(target)}, which is not before it in the tar. Make the tar with --hard-dereference"
        if info.type not in _FILES:
            return f"of type {info.type!r}, which is no file. Make the tar of ordinary files"
        return None

    def _record(self, file: BinaryIO, position: int, info: tarfile.TarInfo) -> int:
        """Takes up what a record says of the next header. Returns where it ends."""
        end = position + _BLOCK + _blocks(max(info.size, 0))
        if not 0 <= info.size <= _LONGEST_RECORD:
            raise self._damaged(position, f"a record of {info.size} bytes before a header")
        if end > self.size:
            raise self._truncated(f"its last member goes on to byte {end}")
        content = file.read(info.size)
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            field_name = "path" if info.type == tarfile.GNUTYPE_LONGNAME else "linkpath"
            text = content.rstrip(b"\0")
            if b"\0" in text:
                raise self._damaged(position, "a long name of another form")
            records = {field_name: text.decode("utf-8", "surrogateescape")}
        else:
            records = self._pax(position, content)
        if info.type == tarfile.XGLTYPE:
            if records.keys() & {"path", "linkpath", "size", "sparse"}:
                raise self._damaged(position, "one record names all members")
        elif records.keys() & self.said.keys():
            raise self._damaged(position, "the header of the member before it is missing")
        else:
            self.said |= records
        return end

    def _pax(self, position: int, content: bytes) -> dict[str, str]:
        """The records of a pax header that matter here: path, linkpath, size, and "sparse" for any of sparse files."""
        found, start = {}, 0
        content = content.rstrip(b"\0")
        while start < len(content):
            match = _RECORD_LENGTH.match(content, start)
            end = start + int(match[1]) if match else 0
            keyword, equals, value = content[match.end() : end - 1].partition(b"=") if match else (b"", b"", b"")
            if not equals or content[end - 1 : end] != b"\n":
                raise self._damaged(position, "a pax record of another form")
            start = end
            if keyword.startswith(b"GNU.sparse"):
                found["sparse"] = ""
            elif keyword in (b"path", b"linkpath", b"size"):
                found[keyword.decode()] = value.decode("utf-8", "surrogateescape")
        return found

    def _said_size(self, position: int, size: int) -> int:
        text = self.said.get("size", str(size))
        if not re.fullmatch("[0-9]{1,20}", text):
            raise self._damaged(position, f"a size of {text[:30]}")
        return int(text)

    def _check_rest(self, file: BinaryIO, mark: int) -> None:
        while chunk := file.read(_CHUNK):
            if chunk.strip(b"\0"):
                raise InputError(
                    f"{shown(self.path)} goes on behind its end mark at byte {mark}: a damaged header, or several tars in one "
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
    """A name without "/" or "./" at its front and doubled slashes."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _blocks(size: int) -> int:
    """Bytes of the whole blocks that hold `size` bytes."""
    return -(-size // _BLOCK) * _BLOCK


def _unreadable(path: Path, what: str) -> str:
    way_out = "Unpack it to a plain .tar" if what.startswith("compressed") else "Get the file itself"
    return f"{shown(path)} is {what}, but its members are read from within it. {way_out}"
