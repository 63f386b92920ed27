"""Versions of the packages, and the git commit of this code."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import rear_scale
from rear_scale.places import PACKAGE


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on, of those that are installed."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    installed = {"python": platform.python_version()}
    for package in ("rear_scale", "torch", "deepspeed", "webdataset", "hydra-core", "numpy"):
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed


@cache
def commit() -> str:
    """The git commit of this code, marked when files differ from it; the version where git does not have this code.

    Asked of git once per process, which goes on with the code that it has loaded, whatever is committed or edited later.
    """
    try:
        # An installed copy may lie in an environment inside of a repository that is not ours.
        _git("ls-files", "--error-unmatch", Path(__file__).name)
        head, changed = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return f"version {rear_scale.__version__}"
    return f"{head}-changed" if changed else head


@cache
def source_sha256() -> str:
    """A hash of the Python files of the package: that of the code that runs, also where git has other changes or none."""
    content = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        content.update(f"{path.relative_to(PACKAGE)}\0".encode() + path.read_bytes() + b"\0")
    return content.hexdigest()


def _git(*arguments: str) -> str:
    """The output of a git command in the folder of this code. Raises OSError or CalledProcessError where there is none."""
    done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    return done.stdout.strip()
