"""Builds JIT-compiled C++ and CUDA operators once per machine, in a subprocess with a timeout.

Otherwise torch builds them in every rank, and all ranks wait forever for the lock file of a killed build.
"""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch.utils.cpp_extension import get_default_build_root

from rear_scale.config import InputError
from rear_scale.locks import locked
from rear_scale.progress import say
from rear_scale.world import end_with_parent

# Compiling takes two minutes; nine minutes were measured on two busy cores.
BUILD_TIMEOUT_S = 1800.0


@contextmanager
def built(name: str, code: str, wanted_by: str, timeout_s: float = BUILD_TIMEOUT_S) -> Iterator[None]:
    """A context manager in which an operator can be loaded: it is compiled first, by `code` in a subprocess, if needed.

    One process of a machine is inside at a time. Raises InputError that begins with `wanted_by` when the code fails or takes
    longer than timeout_s.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    # A folder of this project alone, so that the holder of its lock is the only one who builds in it.
    folder = root / "rear_scale" / f"python{platform.python_version()}_torch{torch.__version__}"
    before = {name: os.environ.get(name) for name in ("TORCH_EXTENSIONS_DIR", "PATH")}
    with locked(folder / ".building"):
        (folder / name / "lock").unlink(missing_ok=True)
        # ninja is installed beside python, which is not in PATH unless the environment is activated.
        programs = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
        os.environ.update(TORCH_EXTENSIONS_DIR=str(folder), PATH=programs)
        try:
            if not list((folder / name).glob("*.so")):
                say(f"compiling {name} in {folder}")
                _run(code, f"{wanted_by}: {name} could not be compiled", timeout_s)
            yield
        finally:
            for variable, value in before.items():
                os.environ.pop(variable, None)
                if value is not None:
                    os.environ[variable] = value


def _run(code: str, problem: str, timeout_s: float) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=partial(end_with_parent, signal.SIGKILL),
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise InputError(f"{problem} within {timeout_s:.0f} s. Use optim.backend=auto") from None
    finally:
        # The whole process group, which includes the compilers that it started.
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode:
        last = (output.strip().splitlines() or ["no output"])[-1]
        raise InputError(
            f"{problem} ({last}). It needs a C++ compiler, and on GPUs the CUDA toolkit of torch's version. Install them, or use "
            "optim.backend=auto"
        )
