"""How a launcher ends, in this process."""

from __future__ import annotations

import errno
import os
import sys
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
        f"error: out/file: {os.strerror(number)}. Make room for it there, or choose another path\n",
    )


def test_a_last_checkpoint_that_cannot_be_written_is_a_line(end) -> None:
    assert end(Unwritten("the checkpoint of the last step was not written: rank 0: no room")) == (
        1,
        "error: the checkpoint of the last step was not written: rank 0: no room\n",
    )


def test_ctrl_c_says_how_to_go_on(end) -> None:
    assert end(KeyboardInterrupt()) == (130, "stopped; the same command continues, and keeps what is finished\n")
    assert end(KeyboardInterrupt("at step 4")) == (130, "stopped; at step 4\n")


@pytest.fixture
def end_of_rank(end, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[str]]:
    """The lines on stderr of a launcher whose main raises, as one rank of 8. others: ranks with the same error meanwhile."""
    monkeypatch.setenv("REAR_LOGS", str(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "8")

    def run(error: BaseException, rank: int, *others: int) -> list[str]:
        def wait(seconds: float) -> None:
            (own,) = tmp_path.glob(f".rear_scale-*-{rank}")
            for other in others:
                own.with_name(f"{own.name.removesuffix(str(rank))}{other}").touch()

        monkeypatch.setattr(cli.time, "sleep", wait)
        monkeypatch.setenv("RANK", str(rank))
        return end(error)[1].splitlines()

    return run


def test_the_same_error_of_many_ranks_is_said_once(end_of_rank, tmp_path: Path) -> None:
    def said(error: str, *ranks: int) -> list[str]:
        return [line for rank in ranks for line in end_of_rank(InputError(error), rank)]

    assert said("no shards", 0, 1, 2) == ["error: no shards"]
    assert said("no GPU on this node", 3, 2, 5) == ["error on rank 3: no GPU on this node"]
    assert said("GPU 1 is gone", 1) == ["error on rank 1: GPU 1 is gone"]
    assert end_of_rank(InputError("no memory"), 3, 7, 4, 5) == ["error on ranks 3-5, 7: no memory"]
    # What an earlier start of the same job has left silences nobody.
    for mark in tmp_path.iterdir():
        os.utime(mark, (0, 0))
    assert said("no shards", 1, 2) == ["error on rank 1: no shards"]


def test_the_same_traceback_of_many_ranks_is_printed_once(end_of_rank, tmp_path: Path) -> None:
    def fault(rank: int) -> ValueError:
        return ValueError(f"index out of range on cuda:{rank}")  # one error, although each rank words it otherwise

    lines = end_of_rank(fault(2), 2, 0, 1, 3)
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-2:] == ["ValueError: index out of range on cuda:2", "error on ranks 0-3: ValueError, see above"]
    assert end_of_rank(fault(0), 0) == []
    assert end_of_rank(fault(3), 3) == []
    # Another error is another one, also later.
    assert end_of_rank(KeyError("x"), 1)[-1] == "error on rank 1: KeyError, see above"
    # Marks of ranks are gone, so that nothing is left but one per error.
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "python {here}launchers/sample.py --checkpoint 'a b'"),
        (
            {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"},
            "torchrun --nproc-per-node 2 {here}launchers/sample.py --checkpoint 'a b'",
        ),
        (
            {
                "SLURM_PROCID": "0",
                "SLURM_NTASKS": "4",
                "SLURM_LOCALID": "0",
                "SLURM_STEP_ID": "0",
                "SLURM_JOB_NUM_NODES": "2",
            },
            "sbatch --nodes 2 {here}launchers/slurm/sample.sbatch --checkpoint 'a b'",
        ),
    ],
)
def test_the_next_command_is_started_as_this_one_was(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variables: dict[str, str], expected: str
) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")] + ["RANK", "LOCAL_RANK", "WORLD_SIZE"]:
        monkeypatch.delenv(name, raising=False)
    address = {"MASTER_ADDR": "a", "MASTER_PORT": "1"} if variables else {}
    for name, value in {**variables, **address, "PATH": str(Path(sys.executable).parent)}.items():
        monkeypatch.setenv(name, value)
    for script, here in (("launchers/train.py", ""), ("/x/launchers/train.py", "/x/"), ("data/prepare_digits.py", "")):
        monkeypatch.setattr(sys, "argv", [script])
        assert cli.typed("sample", "--checkpoint", "a b") == expected.format(here=here)
    cli.end("runs/x", "loss 2.5", "python next.py")
    assert capsys.readouterr().err == "done: runs/x (loss 2.5)\nnext: python next.py\n"
    monkeypatch.setenv("RANK", "1")
    cli.end("runs/x")
    assert capsys.readouterr().err == ""


def test_a_reader_of_a_pipe_that_has_ended_is_no_error(
    end: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in `runs.py | head -1`."""

    class Closed:
        def write(self, text: str) -> None: ...

        def flush(self) -> None:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    broken = BrokenPipeError(errno.EPIPE, "Broken pipe")
    code, shown = end(broken)  # of another pipe
    assert code == 1
    assert "Traceback" in shown
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Closed())
        assert end(broken) == (141, "")
