"""Files and folders that appear under their names complete and durable, or not at all."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np

from rear_scale.config import InputError

# How a file system answers that it does not offer fsync: CIFS and some FUSE file systems do not, for folders.
_NOT_OFFERED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}
# A full or failing disk, not a path that was named wrongly.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EROFS}
_LONGEST_NAME = 255  # bytes, on Linux
_FOREIGN_AGE_S = 24 * 3600  # a leftover of another machine that nobody has changed for so long has no writer any more


def checked_name(name: Any, source: str | Path, what: str) -> str:
    """A name that stands in a file and becomes the name of a file or folder: one name, not a path.

    source: the file that it stands in; what: its field there. Raises InputError for anything else: separators, "..", an
    absolute path, characters that are not printed, a name that is no text or longer than file systems have them.
    """
    is_one = isinstance(name, str) and name not in ("", ".", "..") and not {"/", "\\"} & set(name)
    if not is_one or not name.isprintable() or len(name.encode()) > _LONGEST_NAME:
        raise InputError(
            f"{source}: {what}={ascii(name):.80} is no name of a file or folder: it must be one name without separators. Use "
            "another file, or mend the name in it"
        )
    return name


def inside(folder: Path, name: Any, source: str | Path, what: str) -> Path:
    """Where to write what has a name that stands in a file: in `folder`, and not through a link that leads out of it.

    Raises InputError as `checked_name` does, and for such a link.
    """
    path = folder / checked_name(name, source, what)
    if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{path} is a link that leads out of {folder}, and {source} names it. Remove the link first")
    return path


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A temporary file beside `path`, to be written to in the block, which is renamed to `path` when the block ends well.

    Bytes and name are on the disk then. The file has the permissions that the umask (or the folder's default ACL) gives,
    whatever the block's library sets. After an exception nothing remains, and an earlier file is as it was.
    Raises OSError, naming the file, when the disk is full or fails.
    """
    path = Path(path)
    _sweep_once(path.parent)
    temporary = unfinished(path)
    try:
        with _named(path):
            mode = _create(temporary)
            yield temporary
            _set_mode(temporary, mode)
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_open(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """`atomic_file`, opened for writing, for what writes to an open file."""
    with atomic_file(path) as temporary, open(temporary, mode) as file:
        yield file


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path`, which is renamed to `path` when the block ends well, in place of an earlier one.

    Its files are on the disk then. After an exception nothing remains.
    """
    with temporary_folder(path) as temporary:
        yield temporary
        publish_folder(temporary, path)


@contextmanager
def temporary_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path`, which is removed at the end unless `publish_folder` has renamed it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep_once(path.parent)
    temporary = unfinished(path)
    try:
        with _named(path):
            temporary.mkdir()
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish_folder(temporary: Path, path: str | Path) -> None:
    """Renames a folder to `path`, in place of an earlier one, when its files are on the disk."""
    path = Path(path)
    for file in temporary.iterdir():
        sync(file)
    sync(temporary)
    remove_folder(path)
    temporary.replace(path)
    sync(path.parent)


def write_text_atomically(path: str | Path, text: str) -> None:
    """Writes a text file; a reader sees the old or the new text, never a part of it."""
    with atomic_file(path) as temporary:
        temporary.write_text(text)


def write_array_atomically(path: str | Path, values: np.ndarray) -> None:
    """Writes a .npy file as np.save does, and raises an error of a full disk that names it as such."""
    data = io.BytesIO()
    np.save(data, values)
    # Not to the file: of a full disk np.save says how many items it wrote, and not that there is no room.
    with atomic_open(path) as file:
        file.write(data.getbuffer())


def remove_folder(path: Path) -> None:
    """Removes a folder if it is there. It is renamed first, so that a kill leaves no half of it under its name."""
    removed = unfinished(path)
    with suppress(FileNotFoundError):
        path.replace(removed)
        shutil.rmtree(removed, ignore_errors=True)


def file_sha256(path: str | Path) -> str:
    """The SHA-256 checksum of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: str | Path) -> None:
    """Writes a file or folder down to the disk, so that a rename never shows a file whose bytes are not there yet.

    A file system that offers no such call is left to its own ways. Raises OSError, naming the path, when the disk is full
    or fails.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        if os.path.isdir(path):  # a folder that may be written to and not be listed
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NOT_OFFERED:
            raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(handle)


def unfinished(path: Path) -> Path:
    """A temporary name beside a path that no other writer has and that says which process writes it."""
    # 255 bytes is the most that a name may have.
    name = os.fsdecode(os.fsencode(path.name)[:150])
    return path.with_name(f"{name}.{_machine()}-{os.getpid()}-{start_time(os.getpid())}-{secrets.token_hex(4)}.part")


def remove_leftovers(folder: str | Path, *locked: str) -> None:
    """Removes what writers that were killed have left in a folder under temporary names; a live writer's stays.

    locked: names (or patterns) that no other process writes, so that all that is left of them goes, also of writers on other
    machines, of whom nobody here knows whether they are alive.
    """
    with suppress(OSError):  # no such folder, or one that is not ours
        for entry in list(os.scandir(folder)):
            if _is_leftover(entry, locked):
                with suppress(OSError):
                    shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)


def start_time(pid: int) -> int:
    """When a process of this machine started, in clock ticks after boot; 0 when that cannot be read, -1 when it has ended."""
    try:
        # The name of the program, in parentheses, may hold blanks.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return -1 if fields[0] in ("Z", "X") else int(fields[19])


def is_running(pid: int, started: int) -> bool:
    """Whether the process of this machine with that number is still the one that started then."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's, whose start may be hidden too
    return start_time(pid) in (started, 0)


@cache
def _machine() -> str:
    """Where process numbers mean the same: a host since its last boot, and a container of its own there."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return _short_hash(f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}")
    return _short_hash(socket.gethostname())


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _is_leftover(entry: os.DirEntry[str], locked: tuple[str, ...]) -> bool:
    name_parts = re.fullmatch(r"(.+)\.([0-9a-f]{10})-(\d+)-(\d+)-[0-9a-f]{8}\.part", entry.name, re.DOTALL)
    if name_parts is None:
        return False
    if any(fnmatchcase(name_parts[1], pattern) for pattern in locked):
        return True
    if name_parts[2] == _machine():
        return not is_running(int(name_parts[3]), int(name_parts[4]))
    inside = list(os.scandir(entry.path)) if entry.is_dir(follow_symlinks=False) else []
    changed = max(item.stat(follow_symlinks=False).st_mtime for item in (entry, *inside))
    return time.time() - changed > _FOREIGN_AGE_S


@cache
def _sweep_once(folder: Path) -> None:
    # By the first write of this process into a folder: a listing before each would be slow among 50,000 files.
    remove_leftovers(folder)


def _create(path: Path) -> int:
    """Makes an empty file and returns its permissions."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        return os.fstat(handle).st_mode & 0o777
    finally:
        os.close(handle)


def _set_mode(path: Path, mode: int) -> None:
    # Some libraries replace the file by one that only its owner may read.
    if path.stat().st_mode & 0o777 != mode:
        with suppress(PermissionError):  # a file system without permissions
            path.chmod(mode)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Puts the path into an error of a full or failing disk that has none, as those of writes to an open file."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_ERRORS and error.filename is None:
            error.filename = str(path)
        raise
