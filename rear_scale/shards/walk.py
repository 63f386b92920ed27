"""Listing of the files below a folder by one set of rules for all commands, with the reasons for files that are left out."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from rear_scale.config import InputError
from rear_scale.progress import say_once

# Folders that operating systems and file servers create for their own use; the letter case varies.
_SYSTEM = frozenset(("__macosx", "lost+found", "@eadir", "$recycle.bin", "system volume information"))
_LONGEST = 200  # characters of a library's error message
_EXTENSIONS_NAMED = 5  # other extensions that a message lists at most

HIDDEN = "hidden or system names"
OTHER_FORMATS = "files of other formats"
LEADS_BACK = "links to folders that are read already"
LEADS_NOWHERE = "broken links"
OUTSIDE = "images outside of class folders"
BESIDE_TARS = "images beside tar shards"

NOT_UTF8 = "its name is not UTF-8"


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is always left out: hidden ones, AppleDouble copies, folders of the system."""
    return name.startswith(".") or name.lower() in _SYSTEM


def is_utf8(name: str) -> bool:
    """Whether a name from the file system is valid UTF-8. Python keeps other bytes as lone surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def shown(name: str | Path) -> str:
    """A name as messages show it: control characters and bytes that are not UTF-8 as \\xNN."""
    try:
        text = str(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # other lone surrogates, which JSON may contain
        text = str(name).encode("utf-8", "backslashreplace").decode()
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda match: ascii(match[0])[1:-1], text)


def reason(error: BaseException) -> str:
    """The message of an error on one line of bounded length, because libraries quote the damaged bytes."""
    text = re.sub(r"0x[0-9a-f]{6,}", "0x...", shown(" ".join(str(error).split())))
    name = type(error).__name__
    return name if not text else text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def in_parts(name: str) -> list[str]:
    """The sort key of a path: its parts, so that the files of one folder stay together."""
    return name.split("/")


class LeftOut:
    """The names that were left out: the count and a first example per reason."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.formats: Counter[str] = Counter()  # by extension
        self._first: dict[str, str] = {}

    def add(self, reason: str, name: str) -> None:
        self.counts[reason] += 1
        self._first.setdefault(reason, name)

    def add_format(self, name: str) -> None:
        """Adds a file of another format, counted by its extension."""
        stem, dot, extension = name.rpartition("/")[2].rpartition(".")
        self.formats[f".{extension.lower()}" if dot and stem else "without extension"] += 1
        self.add(OTHER_FORMATS, name)

    def line(self) -> str | None:
        """One line with all reasons, or None when nothing was left out."""
        parts = []
        for reason, count in sorted(self.counts.items()):
            detail = f"first: {shown(self._first[reason])}"
            if reason == OTHER_FORMATS:
                most = sorted(self.formats.items(), key=lambda item: (-item[1], item[0]))
                named = ", ".join(f"{shown(name)} {number:,}" for name, number in most[:_EXTENSIONS_NAMED])
                more = len(most) - _EXTENSIONS_NAMED
                detail = f"{named}{f' and {more} more' if more > 0 else ''}; {detail}"
            parts.append(f"{count:,} {reason} ({detail})")
        return f"left out: {'; '.join(parts)}" if parts else None

    def say(self, source: str | Path) -> None:
        """Prints the line, once per process."""
        if line := self.line():
            say_once(f"note: {shown(source)}: {line}")


class File(NamedTuple):
    """A file with one of the wanted extensions."""

    name: str  # path below the folder
    size: int  # bytes; -1 where it is not known
    mtime_ns: int
    problem: str | None  # why it cannot be read, as far as that is known without opening it


@dataclass
class Listing:
    """The files and folders below a folder."""

    folder: Path
    files: list[File] = field(default_factory=list)  # sorted by `in_parts`
    folders: list[str] = field(default_factory=list)  # names of the folders directly in it, sorted
    dangling: list[str] = field(default_factory=list)  # broken links directly in it without a wanted extension
    left_out: LeftOut = field(default_factory=LeftOut)


def walk(folder: str | Path, extensions: Collection[str]) -> Listing:
    """The files below a folder whose extension, in lower case and without its dot, is one of `extensions`.

    Hidden names and folders of the system are left out at every depth. A link to a folder is followed unless that folder
    is read already, contains `folder`, or is `folder` itself. Real folders are read first, then links by name, so that the
    result depends on the names alone. Unreadable files (broken links, pipes, names that are not UTF-8) are listed with their
    problem. Raises InputError for a folder that cannot be listed, because its files would be missing silently.
    """
    return _Walk(Path(folder), extensions).run()


class _Walk:
    """One traversal of a folder."""

    def __init__(self, folder: Path, extensions: Collection[str]) -> None:
        self.listing, self.extensions = Listing(folder), frozenset(extensions)
        self.seen: set[tuple[int, int]] = set()  # device and inode of each folder
        self.links: list[str] = []  # to folders, not yet followed

    def run(self) -> Listing:
        for parent in Path(os.path.realpath(self.listing.folder)).parents:
            self._is_new(os.stat(parent))
        pending = [""]
        while pending:
            folder = pending.pop()
            pending += reversed(self._read(folder))
            if not pending and self.links:
                self.links.sort(key=in_parts, reverse=True)
                pending.append(self.links.pop())
        self.listing.files.sort(key=lambda file: in_parts(file.name))
        self.listing.folders.sort()
        return self.listing

    def _path(self, name: str) -> str:
        return os.path.join(self.listing.folder, name) if name else str(self.listing.folder)

    def _is_new(self, status: os.stat_result) -> bool:
        """Whether a folder was not visited before. Marks it as visited."""
        identity = status.st_dev, status.st_ino
        new = identity not in self.seen
        self.seen.add(identity)
        return new

    def _leads_up(self, link: str) -> bool:
        """Whether a link leads to `folder` or a folder that contains it, and so cannot be one of its classes."""
        target, root = Path(os.path.realpath(self._path(link))), Path(os.path.realpath(self.listing.folder))
        return target == root or target in root.parents

    def _read(self, folder: str) -> list[str]:
        """Adds the entries of one folder, unless it was visited. Returns the folders among them that are no links, sorted."""
        real: list[str] = []
        try:
            if not self._is_new(os.stat(self._path(folder))):
                self.listing.left_out.add(LEADS_BACK, folder)
                if folder in self.listing.folders and self._leads_up(folder):
                    self.listing.folders.remove(folder)
                return real
            with os.scandir(self._path(folder)) as entries:
                in_order = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise InputError(
                f"{shown(self._path(folder))} cannot be listed ({error.strerror}), so its files would be missing. Make "
                "it readable, or move it away"
            ) from error
        for entry in in_order:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if is_hidden(entry.name):
                self.listing.left_out.add(HIDDEN, name)
            elif self._is_folder(entry):
                if not folder:
                    self.listing.folders.append(name)
                if entry.is_symlink():
                    self.links.append(name)
                else:
                    real.append(name)
            elif extension_of(entry.name) in self.extensions:
                self.listing.files.append(self._file(name))
            elif entry.is_symlink() and not os.path.exists(entry.path):
                self.listing.left_out.add(LEADS_NOWHERE, name)
                if not folder:
                    self.listing.dangling.append(name)
            else:
                self.listing.left_out.add_format(name)
        return real

    @staticmethod
    def _is_folder(entry: os.DirEntry[str]) -> bool:
        try:
            return entry.is_dir()
        except OSError:  # a link to itself, say
            return False

    def _file(self, name: str) -> File:
        try:
            status = os.stat(self._path(name))
        except OSError as error:
            return File(name, -1, 0, _why(error, self._path(name)))
        if not stat.S_ISREG(status.st_mode):
            return File(name, -1, 0, "not a regular file")
        return File(name, status.st_size, status.st_mtime_ns, None if is_utf8(name) else NOT_UTF8)


def extension_of(name: str) -> str:
    """The extension of a name in lower case without its dot; empty for a name without one."""
    stem, _, extension = name.rpartition(".")
    return extension.lower() if stem else ""


def _why(error: OSError, path: str) -> str:
    if os.path.islink(path) and isinstance(error, FileNotFoundError):
        return "a broken link"
    return error.strerror or type(error).__name__
