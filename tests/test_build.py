from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from rear_scale.config import InputError
from rear_scale.optim.compile_op import built

# Stands for a compiler: leaves what it makes where torch's would.
COMPILES = """
import os, pathlib
folder = pathlib.Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "operator"
assert not (folder / "lock").exists()
folder.mkdir(exist_ok=True)
(folder / "operator.so").write_text("compiled")
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return tmp_path


def test_an_operator_is_compiled_once_and_a_dead_builds_lock_is_cleared(root: Path) -> None:
    with built("operator", COMPILES, "test"):
        folder = Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "operator"
        assert (folder / "operator.so").exists()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(root)
    (folder / "lock").touch()
    with built("operator", "raise SystemExit('compiled again')", "test"):
        assert not (folder / "lock").exists()
    (folder / "operator.so").unlink()
    (folder / "lock").touch()
    with built("operator", COMPILES, "test"):
        assert (folder / "operator.so").exists()


def test_a_compiler_that_fails_is_quoted(root: Path) -> None:
    problem = r"optim\.backend=x: operator could not be compiled \(RuntimeError: no c\+\+\)\. It needs a C\+\+ compiler"
    with pytest.raises(InputError, match=problem), built("operator", "raise RuntimeError('no c++')", "optim.backend=x"):
        pass


def test_a_compiler_that_hangs_is_ended(root: Path) -> None:
    seconds = f"{4000 + os.getpid()}.5"  # of this test alone, on a machine that runs it more than once
    hangs = f"import subprocess; subprocess.run(['sleep', '{seconds}'])"
    with (
        pytest.raises(InputError, match=r"operator could not be compiled within 2 s\. Use optim\.backend=auto"),
        built("operator", hangs, "optim.backend=x", timeout_s=2),
    ):
        pass
    left = [found for found in psutil.process_iter(["cmdline"]) if found.info["cmdline"] == ["sleep", seconds]]
    assert not psutil.wait_procs(left, 60)[1]
