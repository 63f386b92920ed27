"""One process at a time, also where the file system has no locks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from helpers import start, write_token_shards

from rear_scale import locks
from rear_scale.checkpoint.convert import convert
from rear_scale.config import InputError, TokenizerConfig
from rear_scale.locks import locked, remove_unheld
from rear_scale.optim.compile_op import built
from rear_scale.run.folder import RunFolder
from rear_scale.shards.plain import index_plain
from rear_scale.shards.reader import open_tokens

NO_LOCKS = [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP]


@pytest.fixture(params=[0, *NO_LOCKS], ids=lambda number: errno.errorcode.get(number, "locks"))
def any_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    if request.param:
        without_locks(monkeypatch, request.param)
    return request.param


def without_locks(monkeypatch: pytest.MonkeyPatch, number: int = errno.ENOSYS) -> None:
    def flock(handle: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_a_second_process_is_refused_and_nothing_remains(tmp_path: Path, any_system: int) -> None:
    path = tmp_path / "folder/.lock"
    for _ in range(2):
        with locked(path, "mine"):
            for _ in range(2):  # a refusal takes the lock from nobody
                with pytest.raises(InputError, match="^theirs") as refused, locked(path, "theirs"):
                    pass
            said = f"is held by process {os.getpid()} on .*: rm {path}.holder"
            assert bool(any_system) == bool(refused.match(said) if any_system else False)
        assert list(path.parent.iterdir()) == []


def test_a_waiting_process_comes_next(tmp_path: Path, any_system: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_POLL_S", 0.01)
    inside: list[int] = []

    def enter(number: int) -> None:
        with locked(tmp_path / ".lock"):
            inside.append(number)
            assert len(inside) == 1
            inside.remove(number)

    with locked(tmp_path / ".lock"):
        threads = [threading.Thread(target=enter, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        threads[0].join(0.1)
        assert all(thread.is_alive() for thread in threads)
    for thread in threads:
        thread.join(300)
        assert not thread.is_alive()
    assert list(tmp_path.iterdir()) == []


def in_the_cache(folder: Path) -> None:
    open_tokens(write_token_shards(folder / "tokens", 10), str(folder / "cache"))


def of_an_operator(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
        with built("operator", "", "test"):
            pass


def of_a_run(folder: Path) -> None:
    with (
        RunFolder(folder).locked(),
        pytest.raises(InputError, match="is in use by another"),
        RunFolder(folder).locked(),
    ):
        pass


def of_plain_shards(folder: Path) -> None:
    with webdataset.TarWriter(str(folder / "part-0.tar")) as tar:
        tar.write({"__key__": "0", "tokens.npy": np.arange(16, dtype=np.uint16), "cls": 3})
    tokenizer = TokenizerConfig(num_tokens=16, codebook_size=32)
    first = index_plain(folder, tokenizer, folder, on_error="raise", max_skipped_fraction=0.0)
    with pytest.MonkeyPatch.context() as patch:
        refusing(patch, errno.EROFS, os.O_CREAT)  # an index that is there needs no lock
        assert index_plain(folder, tokenizer, folder, on_error="raise", max_skipped_fraction=0.0) == first


@pytest.mark.parametrize("use", [in_the_cache, of_an_operator, of_a_run, of_plain_shards])
def test_every_lock_works_without_those_of_the_file_system(tmp_path: Path, any_system: int, use: Any) -> None:
    use(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if "lock" in path.name or "holder" in path.name]


DYING = """
import errno, fcntl, sys, time
from pathlib import Path
from rear_scale.locks import locked, remove_unheld
from rear_scale.checkpoint.convert import convert
def flock(*arguments):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = flock
with locked(Path(sys.argv[1]), "no"):
    print("ready", flush=True)
    time.sleep(3600)
"""


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_locks(monkeypatch)
    path = tmp_path / ".lock"
    with start("python", "-c", DYING, path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with (
            pytest.raises(InputError, match=f"theirs. .* is held by process {process.pid} on "),
            locked(path, "theirs"),
        ):
            pass
        process.kill()
        process.wait()
    with locked(path, "theirs"):
        pass
    assert list(tmp_path.iterdir()) == []


def record(**changes: object) -> dict[str, object]:
    return {**locks._record(), **changes}


@pytest.mark.parametrize(
    ("changes", "gone"),
    [
        ({}, False),
        ({"start": 1}, True),  # its number was given out again
        ({"pid": 2**22 + 1}, True),
        ({"host": "another", "boot": "another"}, False),
        ({"host": "another"}, False),  # a container with the machine's processes
        ({"boot": "another"}, True),  # the machine was started again
        ({"pids": "another"}, False),  # a container that counts its processes by itself
        ({"host": "another", "boot": "another", "job": "c 7", "restarts": 0}, True),  # this job, before it was requeued
        ({"host": "another", "boot": "another", "job": "c 7", "restarts": 1}, False),
        ({"host": "another", "boot": "another", "job": "d 7", "restarts": 0}, False),
    ],
)
def test_a_holder_is_gone_only_where_that_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], gone: bool
) -> None:
    without_locks(monkeypatch)
    for name, value in {"SLURM_CLUSTER_NAME": "c", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}.items():
        monkeypatch.setenv(name, value)
    path = tmp_path / ".lock"
    (tmp_path / ".lock.holder").write_text(json.dumps(record(**changes)))
    refused = pytest.raises(InputError, match=f"theirs.*on {changes.get('host', '')}.*: rm {path}.holder")
    with nullcontext() if gone else refused, locked(path, "theirs"):
        pass
    assert (tmp_path / ".lock.holder").exists() != gone


@pytest.mark.parametrize("text", ["", "[]", "null", '{"pid": "x", "start": 1}', "\x00"])
def test_a_holder_that_says_nothing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    without_locks(monkeypatch)
    monkeypatch.setattr(locks, "_UNREADABLE_S", 0.1)
    (tmp_path / ".lock.holder").write_text(text)
    with (
        pytest.raises(InputError, match="does not name the process that holds it. If there is none, remove it: rm"),
        locked(tmp_path / ".lock", "theirs"),
    ):
        pass


def refusing(monkeypatch: pytest.MonkeyPatch, number: int, flag: int) -> None:
    real = os.open

    def opened(path: Any, flags: int, *arguments: Any, **named: Any) -> int:
        if flags & flag and ".lock" in str(path):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, flags, *arguments, **named)

    monkeypatch.setattr(os, "open", opened)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_lock_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    refusing(monkeypatch, number, os.O_CREAT)
    with (
        pytest.raises(InputError, match=f"cannot be locked .*{tmp_path}/.lock cannot be opened .{os.strerror(number)}"),
        locked(tmp_path / ".lock", "theirs"),
    ):
        pass
    monkeypatch.undo()
    without_locks(monkeypatch, errno.ENOLCK)
    refusing(monkeypatch, number, os.O_EXCL)
    with (
        pytest.raises(InputError, match=r"has no locks \(No locks available\), and .*holder cannot be created"),
        locked(tmp_path / ".lock", "theirs"),
    ):
        pass


def test_a_lock_file_that_a_colleague_has_left_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be read, and the folder belongs to the group."""
    (tmp_path / ".lock").touch()
    refusing(monkeypatch, errno.EACCES, os.O_RDWR)
    with (
        locked(tmp_path / ".lock", "mine"),
        pytest.raises(InputError, match="theirs"),
        locked(tmp_path / ".lock", "theirs"),
    ):
        pass
    (tmp_path / ".lock").touch()
    without_locks(monkeypatch, errno.EBADF)
    with pytest.raises(InputError, match="belongs to another user.* remove it: rm"), locked(tmp_path / ".lock", "mine"):
        pass


def test_a_lock_that_a_killed_process_left_is_removed_and_a_held_one_stays(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    remove_unheld(lock)
    assert not list(tmp_path.iterdir())
    lock.touch()
    remove_unheld(lock)
    assert not list(tmp_path.iterdir())
    with locked(lock):
        remove_unheld(lock)
        assert lock.exists()


def test_the_lock_of_a_conversion_that_was_killed_when_all_was_there_goes(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / ".out.lock").touch()
    with pytest.raises(InputError, match="exists. Name another"):
        convert(tmp_path, None, [], "portable", tmp_path / "out")
    assert not (tmp_path / ".out.lock").exists()
