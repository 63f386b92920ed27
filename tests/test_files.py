"""Files that appear whole or not at all, with the permissions that the user asks for."""

from __future__ import annotations

import ast
import errno
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, write_token_shards

from rear_scale import files, weight_file
from rear_scale.checkpoint import released as official
from rear_scale.checkpoint.writer import write_portable
from rear_scale.evaluate.metrics.statistics_file import write_statistics
from rear_scale.files import (
    atomic_file,
    atomic_folder,
    remove_leftovers,
    sync,
    write_array_atomically,
    write_text_atomically,
)
from rear_scale.sample import npz_writer as npz
from rear_scale.shards.reader import open_tokens
from rear_scale.tokenizer.compact import CompactTokenizer
from rear_scale.weight_file import save_tensors, write_tensors

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3)}

WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: write_text_atomically(path, "text"),
    "safetensors": lambda path: write_tensors(path, WEIGHTS, {"kind": "test"}),
    "released.safetensors": lambda path: official.write(path, WEIGHTS),
    "released.bin": lambda path: official.write(path, WEIGHTS),
    "tokenizer": lambda path: CompactTokenizer(16, 32, 8, 16).save(path),
    "samples.npz": lambda path: npz.write_samples(path, [np.zeros((2, 4, 4, 3), np.uint8)], 2, 4, np.zeros(2)),
    "array.npy": lambda path: write_array_atomically(path, np.zeros(5)),
    "statistics.npz": lambda path: write_statistics(path, {}, {}, {"count": 0}),
    "shards": lambda path: write_token_shards(path, 10),
    "cache": lambda path: open_tokens(write_token_shards(path.with_name("tokens"), 10), str(path)),
}


@pytest.fixture
def umask() -> Iterator[Callable[[int], object]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
@pytest.mark.parametrize("name", WRITERS)
def test_everything_written_follows_the_umask(
    tmp_path: Path, name: str, mask: int, umask: Callable[[int], object]
) -> None:
    umask(mask)
    WRITERS[name](tmp_path / name)
    for path in tmp_path.rglob("*"):
        wanted = (0o777 if path.is_dir() else 0o666) & ~mask
        assert path.stat().st_mode & 0o777 == wanted, f"{path}: {path.stat().st_mode:o}"
        assert path.suffix != ".part"


def test_an_exception_leaves_the_earlier_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("before")
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "one").write_text("half")
        raise ZeroDivisionError
    with pytest.raises(TypeError):
        save_tensors(tmp_path / "file", WEIGHTS, {"a": 1})  # type: ignore[dict-item]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "before"


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with atomic_folder(tmp_path / "folder") as temporary:
            write_text_atomically(temporary / text, text)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["folder", "folder/second"]


def test_two_writers_of_a_file_do_not_share_its_unfinished_name(tmp_path: Path) -> None:
    """As two containers do, whose processes have the same numbers."""
    one, other = files.unfinished(tmp_path / "block.npz"), files.unfinished(tmp_path / "block.npz")
    assert one != other
    assert one.parent == other.parent == tmp_path
    assert one.suffix == ".part"
    assert len(os.fsencode(files.unfinished(tmp_path / ("é" * 127)).name)) < 255


def failing_sync(monkeypatch: pytest.MonkeyPatch, number: int, *, folders: bool) -> None:
    real = os.fsync

    def fsync(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}") == folders:
            raise OSError(number, os.strerror(number))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS])
def test_a_file_system_without_fsync_of_folders_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    failing_sync(monkeypatch, number, folders=True)
    write_text_atomically(tmp_path / "file", "text")
    with atomic_folder(tmp_path / "folder") as temporary:
        write_tensors(temporary / "weights", WEIGHTS, None)
    assert (tmp_path / "file").read_text() == "text"
    assert (tmp_path / "folder/weights").exists()


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("name", ["text", "safetensors", "released.bin", "samples.npz"])
def test_a_disk_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> None:
    failing_sync(monkeypatch, number, folders=False)
    with pytest.raises(OSError, match=name) as raised:
        WRITERS[name](tmp_path / name)
    assert raised.value.errno == number
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["text", "released.bin", "samples.npz", "array.npy", "statistics.npz"])
def test_a_full_disk_is_named_whatever_library_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """/dev/full takes no byte."""
    (tmp_path / "full").symlink_to("/dev/full")
    monkeypatch.setattr(files, "unfinished", lambda path: tmp_path / "full")
    monkeypatch.setattr(files, "_create", lambda path: 0o666)
    with pytest.raises(OSError, match="No space left on device: .*" + name) as raised:
        WRITERS[name](tmp_path / name)
    assert raised.value.errno == errno.ENOSPC
    assert not (tmp_path / name).exists()


def test_safetensors_errors_of_the_disk_are_errors_of_the_operating_system(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file or directory.*nowhere/weights") as raised:
        write_tensors(tmp_path / "nowhere/weights", WEIGHTS, None)
    assert raised.value.errno == errno.ENOENT


DYING = """
import os, sys, time
from pathlib import Path
from rear_scale.files import atomic_file, atomic_folder
with atomic_file(sys.argv[1]) as file, atomic_folder(sys.argv[1] + "s") as folder:
    (folder / "half").write_text("half")
    print("ready", flush=True)
    time.sleep(3600)
"""


def test_leftovers_of_a_killed_writer_go_and_a_live_writer_is_left_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-c", DYING, str(tmp_path / "file")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert len(list(tmp_path.iterdir())) == 2
        remove_leftovers(tmp_path)
        assert len(list(tmp_path.iterdir())) == 2
        process.kill()
        process.wait()
    with atomic_file(tmp_path / "other") as own:
        own.write_text("text")  # the first write of this process into the folder
        assert list(tmp_path.iterdir()) == [own]
        remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_leftovers_of_other_machines_go_when_they_are_old_or_their_name_is_locked(tmp_path: Path) -> None:
    new, old, folder = (tmp_path / f"{name}.0123456789-7-7-01234567.part" for name in ("new", "old", "folder"))
    new.write_text("half")
    old.write_text("half")
    folder.mkdir()
    (folder / "half").write_text("half")
    (tmp_path / "mine.part").write_text("no temporary name of ours")
    for path in (old, folder):
        os.utime(path, (1, 1))
    remove_leftovers(tmp_path)
    assert sorted(path.name[:6] for path in tmp_path.iterdir()) == ["folder", "mine.p", "new.01"]
    remove_leftovers(tmp_path, "n*w")
    os.utime(folder / "half", (1, 1))
    os.utime(folder, (1, 1))
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.part"]


def test_a_process_number_that_was_given_out_again_is_another_process() -> None:
    started = files.start_time(os.getpid())
    assert files.is_running(os.getpid(), started)
    assert not files.is_running(os.getpid(), started - 1)
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)  # ended, and still in the table of processes
        assert not files.is_running(ended.pid, started)
    assert not files.is_running(ended.pid, started)


def test_a_folder_that_cannot_be_listed_needs_no_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: object, *arguments: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    (tmp_path / "file").write_text("text")
    monkeypatch.setattr(os, "open", refused)
    sync(tmp_path)
    with pytest.raises(PermissionError):
        sync(tmp_path / "file")


def test_the_files_of_a_zip_are_closed_before_they_are_renamed(tmp_path: Path) -> None:
    WRITERS["samples.npz"](tmp_path / "samples.npz")
    with zipfile.ZipFile(tmp_path / "samples.npz") as archive:
        assert archive.testzip() is None


def killed(write: Callable[[], object], monkeypatch: pytest.MonkeyPatch, patched: object, name: str) -> None:
    """Runs `write` in a process that ends, as by SIGKILL, where it would call a function."""
    if (child := os.fork()) == 0:
        monkeypatch.setattr(patched, name, lambda *arguments, **named: os._exit(9))
        try:
            write()
        finally:
            os._exit(1)  # never this process's pytest
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("moment", ["sync", "remove_folder", "publish_folder"])
def test_a_killed_conversion_does_not_block_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    tensors = {"param": WEIGHTS}

    def write() -> None:
        write_portable(tmp_path / "out", 3, tensors, {"config": {}})

    killed(write, monkeypatch, files, moment)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("out.")
    write()
    assert names(tmp_path) == {"out", "out/meta.json", "out/part-00000.safetensors"}


@pytest.mark.parametrize("name", [name for name in WRITERS if name not in ("shards", "cache")])
@pytest.mark.parametrize("moment", ["sync", "_set_mode"])
def test_what_a_killed_writer_leaves_goes_with_the_next_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, moment: str
) -> None:
    killed(lambda: WRITERS[name](tmp_path / name), monkeypatch, files, moment)
    assert len(names(tmp_path)) == 1
    WRITERS[name](tmp_path / name)
    assert names(tmp_path) == {name}


def test_a_killed_safetensors_writer_leaves_nothing_of_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(lambda: write_tensors(tmp_path / "file", WEIGHTS, None), monkeypatch, weight_file, "save_file")
    assert len(names(tmp_path)) == 2
    write_tensors(tmp_path / "file", WEIGHTS, None)
    assert names(tmp_path) == {"file"}


# Calls that write a part and rename it, or take the checksum of a file: by the modules that may make them.
_OWN_WAYS = {
    "rear_scale/files.py": "the one way",
    "rear_scale/locks.py": "takes over the file of a lock",
    "rear_scale/weight_file.py": "the library writes under a name of its own",
    "rear_scale/checkpoint/folder.py": "sets a damaged folder aside",
}


def _renames(path: Path) -> bool:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name, arguments = node.func.attr, len(node.args) + len(node.keywords)
            # With one argument it is a path's: those of texts take two.
            if name in {"rename", "renames", "fsync", "fdatasync", "file_digest", "mkstemp"}:
                return True
            if name == "replace" and (arguments == 1 or ast.unparse(node.func) == "os.replace"):
                return True
    return False


def test_files_are_replaced_and_steps_are_named_in_one_place() -> None:
    paths = [path for folder in ("rear_scale", "data", "launchers") for path in (ROOT / folder).rglob("*.py")]
    places = {path.relative_to(ROOT).as_posix(): path for path in paths}
    assert {place for place, path in places.items() if _renames(path)} == set(_OWN_WAYS)
    named = [place for place, path in places.items() if re.search(r"step_(\{|%)|step_[?*]", path.read_text())]
    assert named == ["rear_scale/checkpoint/folder.py"]
