"""Versions of the packages, and the git commit of this code."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import rear_scale


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on, of those that are installed."""
    installed = {"python": platform.python_version()}
    for package in ("rear_scale", "torch", "deepspeed", "webdataset", "hydra-core", "numpy"):
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed


def commit() -> str:
    """The git commit of this code, marked when files differ from it; the version where git does not have this code."""
    here = Path(__file__)
    try:
        ask = {"cwd": here.parent, "capture_output": True, "text": True, "check": True}
        # An installed copy may lie in an environment inside of a repository that is not ours.
        subprocess.run(["git", "ls-files", "--error-unmatch", here.name], **ask)
        head = subprocess.run(["git", "rev-parse", "HEAD"], **ask).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **ask).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return f"version {rear_scale.__version__}"
    return f"{head}-changed" if changed else head
