"""How a launcher ends, in this process."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rear_scale import cli
from rear_scale.checkpoint.writer import Unwritten
from rear_scale.config import InputError


class Ended(BaseException):
    pass


@pytest.fixture
def end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Exit code and stderr of a launcher whose main raises."""

    def run(error: BaseException) -> tuple[int, str]:
        def main() -> None:
            raise error

        with pytest.raises(Ended) as caught:
            cli.run(main)
        return caught.value.args[0], capsys.readouterr().err

    def ended(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(os, "_exit", ended)
    return run


@pytest.mark.parametrize("rank", ["0", "abc", None])
def test_bad_input_is_said_at_once(end, monkeypatch: pytest.MonkeyPatch, rank: str | None) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert end(InputError("RANK=abc is not a whole number")) == (2, "error: RANK=abc is not a whole number\n")


def test_an_unusable_path_is_one_line(end, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file/folder", tmp_path / "file"):
        with pytest.raises(OSError) as caught:  # noqa: PT011 - of two kinds
            path.mkdir()
        code, said = end(caught.value)
        assert code == 2
        assert said.startswith(f"error: {path}: ")
        assert len(said.splitlines()) == 1
    code, said = end(OSError(errno.ENOSPC, "No space left on device"))
    assert (code, said.count("No space left on device"), len(said.splitlines())) == (1, 1, 1)


def test_other_errors_keep_their_traceback(end) -> None:
    for error in (FileNotFoundError(errno.ENOENT, "No such file", "x"), RuntimeError("odd")):
        code, said = end(error)
        assert code == 1
        assert "Traceback" in said


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EIO"])
def test_a_full_or_failing_disk_is_a_line_and_no_wrong_input(end, name: str) -> None:
    number = getattr(errno, name)
    code, said = end(OSError(number, os.strerror(number), "out/file"))
    assert (code, said) == (
        1,
        f"error: out/file: {os.strerror(number)}. Make room for it there, or name another place\n",
    )


def test_a_last_checkpoint_that_cannot_be_written_is_a_line(end) -> None:
    assert end(Unwritten("the checkpoint of the last step was not written: rank 0: no room")) == (
        1,
        "error: the checkpoint of the last step was not written: rank 0: no room\n",
    )


def test_ctrl_c_says_how_to_go_on(end) -> None:
    assert end(KeyboardInterrupt()) == (130, "stopped; the same command continues, and keeps what is finished\n")
    assert end(KeyboardInterrupt("at step 4")) == (130, "stopped; at step 4\n")
