"""Atomic and durable writing: files and folders appear under their names complete and synced to disk, or not at all."""

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

# Errors by which a file system says that it has no fsync; CIFS and some FUSE file systems have none for folders.
_NOT_OFFERED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}
# Errors of a full or failing disk, as opposed to a wrong path.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EROFS}
_LONGEST_NAME = 255  # bytes, on Linux
# Temporary files of other machines are removed at this age: whether their writer still runs cannot be checked from here.
_FOREIGN_AGE_S = 24 * 3600


def checked_name(name: Any, source: str | Path, what: str) -> str:
    """The name, read from a file, once it is known to be safe as the name of a file or folder: one name, not a path.

    source: the file that holds the name; what: its field there. Raises InputError for separators, "..", an absolute path,
    unprintable characters, a value that is no text, and a name that is too long for a file system.
    """
    is_one = isinstance(name, str) and name not in ("", ".", "..") and not {"/", "\\"} & set(name)
    if not is_one or not name.isprintable() or len(name.encode()) > _LONGEST_NAME:
        raise InputError(
            f"{source}: {what}={ascii(name):.80} cannot name a file or folder: it must be one name without separators. Use "
            "another file, or correct the name in it"
        )
    return name


def inside(folder: Path, name: Any, source: str | Path, what: str) -> Path:
    """The path in `folder` for a name read from a file, checked so that writing to it cannot leave the folder.

    Raises InputError as `checked_name` does, and for a symbolic link that leads out of the folder.
    """
    path = folder / checked_name(name, source, what)
    if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{path} is a link that leads out of {folder}, and {source} names it. Remove the link first")
    return path


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """The path of a temporary file beside `path`, which is renamed to `path` when the block ends without an exception.

    Contents and name are synced to disk by then. The file has the permissions that the umask (or the folder's default ACL)
    gives, whatever a library called in the block sets. After an exception the temporary file is removed, and an earlier
    file is unchanged. Raises OSError, naming the file, when the disk is full or fails.
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
    """An open file that is written as by `atomic_file`."""
    with atomic_file(path) as temporary, open(temporary, mode) as file:
        yield file


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """The path of a temporary folder beside `path`, which replaces `path` when the block ends without an exception.

    Its files are synced to disk by then. After an exception the temporary folder is removed.
    """
    with temporary_folder(path) as temporary:
        yield temporary
        publish_folder(temporary, path)


@contextmanager
def temporary_folder(path: str | Path) -> Iterator[Path]:
    """The path of a temporary folder beside `path`, removed at the end unless `publish_folder` has renamed it."""
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
    """Syncs a folder's files to disk, then renames the folder to `path`, in place of an earlier one."""
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
    """Writes a .npy file atomically. Raises OSError with errno ENOSPC for a full disk, which np.save alone would not."""
    data = io.BytesIO()
    # Into memory first: on a full disk np.save reports only how many items it wrote, not that there is no space left.
    np.save(data, values)
    with atomic_open(path) as file:
        file.write(data.getbuffer())


def remove_folder(path: Path) -> None:
    """Removes a folder if it exists. It is renamed first, so that a crash never leaves a half-deleted folder visible."""
    removed = unfinished(path)
    with suppress(FileNotFoundError):
        path.replace(removed)
        shutil.rmtree(removed, ignore_errors=True)


def file_sha256(path: str | Path) -> str:
    """The SHA-256 checksum of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: str | Path) -> None:
    """Syncs a file or folder to disk, so that a later rename cannot become durable before the contents are.

    Does nothing on a file system without fsync. Raises OSError, naming the path, when the disk is full or fails.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        if os.path.isdir(path):  # a folder with write permission but without read permission
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
    """A unique temporary path beside `path`, whose name identifies the machine and the process that write it."""
    # Cut to 150 bytes: with the suffix the name has to stay within the 255 bytes of Linux file systems.
    name = os.fsdecode(os.fsencode(path.name)[:150])
    return path.with_name(f"{name}.{_machine()}-{os.getpid()}-{start_time(os.getpid())}-{secrets.token_hex(4)}.part")


def remove_leftovers(folder: str | Path, *locked: str) -> None:
    """Removes the temporary files in a folder that killed writers have left; those of running writers stay.

    locked: final names (or patterns) that this process alone may write. All their temporary files are removed, including
    those of other machines, where it cannot be checked whether the writer still runs.
    """
    with suppress(OSError):  # the folder does not exist, or this user may not read it
        for entry in list(os.scandir(folder)):
            if _is_leftover(entry, locked):
                with suppress(OSError):
                    shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)


def start_time(pid: int) -> int:
    """The start time of a process on this machine, in clock ticks after boot; 0 when it cannot be read, -1 when it has ended."""
    try:
        # Split after the program name, which stands in parentheses and may contain blanks.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return -1 if fields[0] in ("Z", "X") else int(fields[19])


def is_running(pid: int, started: int) -> bool:
    """Whether the process on this machine with this id is still running and has the given start time (ids are reused)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # the process of another user, whose start time may be hidden too
    return start_time(pid) in (started, 0)


@cache
def _machine() -> str:
    """A hash of the scope in which process ids are unique: the host, its boot and its PID namespace (container)."""
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
    # Once per folder and process: listing the folder before every write would be slow with 50,000 files in it.
    remove_leftovers(folder)


def _create(path: Path) -> int:
    """The permissions of an empty file that is created here."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        return os.fstat(handle).st_mode & 0o777
    finally:
        os.close(handle)


def _set_mode(path: Path, mode: int) -> None:
    # Some libraries (safetensors) replace the file by one that only its owner may read.
    if path.stat().st_mode & 0o777 != mode:
        with suppress(PermissionError):  # a file system without permissions
            path.chmod(mode)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Adds the path to errors of a full or failing disk that lack it, as errors of writes to an open file do."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_ERRORS and error.filename is None:
            error.filename = str(path)
        raise
