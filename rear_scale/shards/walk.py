"""The files below a folder, by one set of rules for all commands: which are read, which are not, and why."""

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

# Folders that operating systems and file servers keep for themselves; their spelling varies in case.
_SYSTEM = frozenset(("__macosx", "lost+found", "@eadir", "$recycle.bin", "system volume information"))
_LONGEST = 200  # characters of an error of a library
_EXTENSIONS_NAMED = 5  # of the formats that are not read

HIDDEN = "hidden or system names"
OTHER_FORMATS = "files of other formats"
LEADS_BACK = "links to folders that are read already"
LEADS_NOWHERE = "links that lead nowhere"
OUTSIDE = "images outside of class folders"
BESIDE_TARS = "images beside tar shards"

NOT_UTF8 = "its name is not UTF-8"


def is_hidden(name: str) -> bool:
    """Whether a single name is left out everywhere: hidden files and folders, AppleDouble copies, folders of the system."""
    return name.startswith(".") or name.lower() in _SYSTEM


def is_utf8(name: str) -> bool:
    """Whether a name from the file system, whose other bytes Python keeps as lone surrogates, is text."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def shown(name: str | Path) -> str:
    """A name for a line of text: control characters and bytes that are not UTF-8 as \\xNN."""
    try:
        text = str(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # other lone surrogates, as JSON may have
        text = str(name).encode("utf-8", "backslashreplace").decode()
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: ascii(found[0])[1:-1], text)


def reason(error: BaseException) -> str:
    """What an error says, in one line of bounded length: libraries quote the damaged bytes."""
    text = re.sub(r"0x[0-9a-f]{6,}", "0x...", shown(" ".join(str(error).split())))
    name = type(error).__name__
    return name if not text else text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def in_parts(name: str) -> list[str]:
    """The key that files are sorted by: folder by folder, so that the files of one stay together."""
    return name.split("/")


class LeftOut:
    """What was not read: how often each reason applied, and its first example."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.formats: Counter[str] = Counter()  # by extension
        self._first: dict[str, str] = {}

    def add(self, reason: str, name: str) -> None:
        self.counts[reason] += 1
        self._first.setdefault(reason, name)

    def add_format(self, name: str) -> None:
        """A file whose extension is none of those that are read."""
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
        """Tells the user, once in a process."""
        if line := self.line():
            say_once(f"note: {shown(source)}: {line}")


class File(NamedTuple):
    """A file with one of the wanted extensions."""

    name: str  # path below the folder
    size: int  # bytes; -1 where it is not known
    mtime_ns: int
    problem: str | None  # why it cannot be read, as far as its folder tells


@dataclass
class Listing:
    """What lies below a folder."""

    folder: Path
    files: list[File] = field(default_factory=list)  # sorted by `in_parts`
    folders: list[str] = field(default_factory=list)  # names of the folders directly in it, sorted
    dangling: list[str] = field(
        default_factory=list
    )  # links directly in it that lead nowhere and have no wanted extension
    left_out: LeftOut = field(default_factory=LeftOut)


def walk(folder: str | Path, extensions: Collection[str]) -> Listing:
    """The files below a folder whose extension, in lower case and without its dot, is one of `extensions`.

    Hidden names and folders of the system are left out at every depth. A link to a folder is followed unless that folder
    is read already, lies above, or is `folder` itself: real folders come first, then links by name, so that the result
    depends on the names alone. Files that cannot be read (links that lead nowhere, pipes, names that are not UTF-8) are
    listed with their problem. Raises InputError for a folder that cannot be listed: its files would be missing unnoticed.
    """
    return _Walk(Path(folder), extensions).run()


class _Walk:
    def __init__(self, folder: Path, extensions: Collection[str]) -> None:
        self.found, self.extensions = Listing(folder), frozenset(extensions)
        self.seen: set[tuple[int, int]] = set()  # device and inode of each folder
        self.links: list[str] = []  # to folders, not yet followed

    def run(self) -> Listing:
        for parent in Path(os.path.realpath(self.found.folder)).parents:
            self._is_new(os.stat(parent))
        pending = [""]
        while pending:
            folder = pending.pop()
            pending += reversed(self._read(folder))
            if not pending and self.links:
                self.links.sort(key=in_parts, reverse=True)
                pending.append(self.links.pop())
        self.found.files.sort(key=lambda file: in_parts(file.name))
        self.found.folders.sort()
        return self.found

    def _path(self, name: str) -> str:
        return os.path.join(self.found.folder, name) if name else str(self.found.folder)

    def _is_new(self, status: os.stat_result) -> bool:
        """Whether a folder was not met before; it is from now on."""
        identity = status.st_dev, status.st_ino
        new = identity not in self.seen
        self.seen.add(identity)
        return new

    def _leads_up(self, link: str) -> bool:
        """Whether a link leads to `folder` or a folder above it, and so cannot be one of its classes."""
        target, root = Path(os.path.realpath(self._path(link))), Path(os.path.realpath(self.found.folder))
        return target == root or target in root.parents

    def _read(self, folder: str) -> list[str]:
        """Takes up the entries of one folder, unless it is read already. The real folders among them, sorted."""
        real: list[str] = []
        try:
            if not self._is_new(os.stat(self._path(folder))):
                self.found.left_out.add(LEADS_BACK, folder)
                if folder in self.found.folders and self._leads_up(folder):
                    self.found.folders.remove(folder)
                return real
            with os.scandir(self._path(folder)) as entries:
                in_order = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise InputError(
                f"{shown(self._path(folder))} cannot be listed ({error.strerror}), so its files would be missing. Allow "
                "reading it, or move it away"
            ) from error
        for entry in in_order:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if is_hidden(entry.name):
                self.found.left_out.add(HIDDEN, name)
            elif self._is_folder(entry):
                if not folder:
                    self.found.folders.append(name)
                if entry.is_symlink():
                    self.links.append(name)
                else:
                    real.append(name)
            elif extension_of(entry.name) in self.extensions:
                self.found.files.append(self._file(name))
            elif entry.is_symlink() and not os.path.exists(entry.path):
                self.found.left_out.add(LEADS_NOWHERE, name)
                if not folder:
                    self.found.dangling.append(name)
            else:
                self.found.left_out.add_format(name)
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
    """In lower case, without its dot; empty for a name without one."""
    stem, _, extension = name.rpartition(".")
    return extension.lower() if stem else ""


def _why(error: OSError, path: str) -> str:
    if os.path.islink(path) and isinstance(error, FileNotFoundError):
        return "a link that leads nowhere"
    return error.strerror or type(error).__name__
