"""Lock files between processes, with a fallback for file systems that do not support locks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shlex
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rear_scale.config import InputError
from rear_scale.files import is_running, start_time
from rear_scale.progress import say

_POLL_S = 0.5
_UNREADABLE_S = (
    10.0  # a holder file that stays unreadable for this long was left by a process that died while writing it
)


@contextmanager
def locked(path: Path, refusal: str | None = None) -> Iterator[None]:
    """Holds an exclusive lock on a lock file, which is created with its folder and removed at the end. The kernel releases the
    lock when the process dies.

    Where the file system has no locks (Lustre without -o flock, some NFS), a file PATH.holder, created exclusively, records
    the process that holds the lock; another process takes it over once that process has ended. refusal: the message of the
    InputError raised when another process holds the lock; None = wait for it. Raises InputError too where no lock file can
    be created.
    """
    handle = _take(path, refusal)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        with suppress(OSError):
            if _read(_holder(path)) == _record():
                _holder(path).unlink()
        os.close(handle)


def remove_unheld(path: Path) -> None:
    """Removes a lock file that a killed process has left; a lock file that a process holds stays.

    To be called only once the work that the lock protects is complete."""
    if path.exists():
        with suppress(InputError, OSError), locked(path, "held"):
            pass


def _take(path: Path, refusal: str | None) -> int:
    while True:
        handle = _open(path)
        try:
            if _flock(path, handle, refusal):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _open(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except PermissionError:
            if not path.exists():
                raise
            return os.open(path, os.O_RDONLY)  # left by another user's killed process in a folder of a group
    except OSError as error:
        raise InputError(
            f"{path.parent} cannot be locked against other processes: {path} cannot be opened ({error.strerror}). Get write "
            "permission there, or write elsewhere"
        ) from None


def _flock(path: Path, handle: int, refusal: str | None) -> bool:
    """Locks an open lock file. False when its last holder has removed the file since it was opened here, so that it must be
    opened again."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (fcntl.LOCK_NB if refusal else 0))
    except BlockingIOError:
        raise InputError(refusal) from None
    except OSError as error:
        if error.errno == errno.EBADF:  # NFS refuses exclusive locks on files opened for reading only
            raise InputError(
                f"{path} belongs to another user, and its lock cannot be taken. If no process uses {path.parent}, remove it: "
                f"rm {shlex.quote(str(path))}"
            ) from None
        _hold(_holder(path), refusal, error)
        return True
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), path.stat())
    return False


def _holder(path: Path) -> Path:
    return path.with_name(f"{path.name}.holder")


def _hold(holder: Path, refusal: str | None, missing: OSError) -> None:
    """Creates the holder file, as soon as no other process holds the lock. missing: the error that locks are not supported."""
    waiting_since: float | None = None
    empty_since = time.monotonic()
    while True:
        try:
            handle = os.open(holder, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            pass
        except OSError as error:
            raise InputError(
                f"the file system of {holder.parent} has no locks ({missing.strerror}), and {holder} cannot be created in their "
                f"place ({error.strerror}). Get write permission there, or write elsewhere"
            ) from None
        else:
            try:
                with open(handle, "w") as file:
                    file.write(json.dumps(_record()))
            except BaseException:
                holder.unlink(missing_ok=True)
                raise
            return
        record = _read(holder)
        if record is not None:
            empty_since = time.monotonic()
            if _is_gone(record):
                _take_away(holder, record)
                continue
        elif time.monotonic() - empty_since < _UNREADABLE_S:
            time.sleep(0.05)  # the holder file is being written, or was removed
            continue
        if refusal is not None:
            raise InputError(f"{refusal}. {_said(holder, record)}")
        if waiting_since is None:
            waiting_since = time.monotonic()
            say(f"waiting: {_said(holder, record)}")
        time.sleep(_POLL_S)


def _record() -> dict[str, Any]:
    """The identity of this process, in terms that any machine can compare: host, boot, container, process, SLURM job."""
    record = {"host": socket.gethostname(), "pid": os.getpid(), "start": start_time(os.getpid())}
    with suppress(OSError):
        record["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        record["pids"] = os.readlink("/proc/self/ns/pid")  # process ids are unique only within a container
    if "SLURM_JOB_ID" in os.environ:
        job = ("SLURM_CLUSTER_NAME", "SLURM_JOB_ID")
        record["job"] = " ".join(os.environ.get(name, "") for name in job)
        record["restarts"] = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    return record


def _read(holder: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(holder.read_text())
        return record if isinstance(record["pid"], int) and isinstance(record["start"], int) else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _is_gone(record: dict[str, Any]) -> bool:
    own = _record()
    if (record.get("boot"), record.get("pids")) == (own.get("boot"), own.get("pids")):
        return record.get("host") == own["host"] and not is_running(record["pid"], record["start"])
    if "job" in own and record.get("job") == own["job"] and record.get("restarts", 0) < own["restarts"]:
        return True  # written by this SLURM job before it was requeued: that start of the job has ended
    # True also for the same machine if it has rebooted since; hosts called localhost cannot be told apart.
    return (
        record.get("host") == own["host"]
        and record.get("boot") != own.get("boot")
        and not own["host"].startswith("localhost")
    )


def _take_away(holder: Path, record: dict[str, Any]) -> None:
    """Removes the holder file of an ended process, unless another process has just replaced it by its own."""
    aside = holder.with_name(f"{holder.name}.{secrets.token_hex(4)}")
    with suppress(OSError):
        holder.rename(aside)
        if _read(aside) == record:
            aside.unlink()
        else:
            aside.rename(holder)


def _said(holder: Path, record: dict[str, Any] | None) -> str:
    if record is None:
        return f"{holder} does not name the process that holds it. If there is none, remove it: rm {shlex.quote(str(holder))}"
    return (
        f"{holder} is held by process {record['pid']} on {record.get('host')}. If that process has ended, remove the file: "
        f"rm {shlex.quote(str(holder))}"
    )
