"""The oldest versions that pyproject.toml names: an environment of them, in which a handful of test files pass."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers import ROOT, environment
from packaging.requirements import Requirement
from packaging.version import Version

# The files that use most of the packages' interfaces: configs, images and plots, shards, weight files, models, engines.
FILES = (
    "test_crops.py",
    "test_deepspeed_parts.py",
    "test_interop.py",
    "test_model.py",
    "test_overrides.py",
    "test_reader.py",
    "test_report.py",
)
EXTRAS = ("train", "demo", "test")
NOT_RUN = ("ipykernel", "mypy", "nbclient", "ruff", "types-pyyaml")  # none of these test files uses them


def oldest(text: str) -> tuple[str, str]:
    """The name of a required package and its oldest version."""
    requirement = Requirement(text)
    (lower,) = [item.version for item in requirement.specifier if item.operator == ">="]
    return requirement.name.lower(), lower


def all_oldest() -> dict[str, str]:
    """The oldest version of every package that the tests use, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(text for extra in EXTRAS for text in project["optional-dependencies"][extra])]
    return {name: version for name, version in map(oldest, wanted) if name not in NOT_RUN}


def test_every_requirement_has_a_lower_bound_below_the_pinned_version() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.lower().split("==") for line in lines if not line.startswith("#"))
    for name, lower in all_oldest().items():
        assert Version(lower) <= Version(pinned[name]), name


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_the_oldest_versions_work(tmp_path: Path) -> None:
    """Takes a package index, some 6 GB of disk (torch brings its CUDA libraries) and, on two cores, half an hour."""
    base = shutil.which("python3.11") if sys.version_info[:2] != (3, 11) else sys.executable
    if base is None:
        pytest.skip("the oldest versions are published for Python 3.11, which is not here")
    versions = all_oldest()
    python = tmp_path / "venv/bin/python"
    subprocess.run([base, "-m", "venv", tmp_path / "venv"], check=True)
    deepspeed = versions.pop("deepspeed")
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*install, *(f"{name}=={lower}" for name, lower in versions.items()), "setuptools", "wheel"], check=True
    )
    # As launchers/setup.sh does: its build imports torch.
    build = [
        "--no-build-isolation",
        f"deepspeed=={deepspeed}",
        *(f"{name}=={lower}" for name, lower in versions.items()),
    ]
    subprocess.run([*install, *build], check=True, env={**os.environ, "DS_BUILD_OPS": "0"})
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/{name}" for name in FILES)],
        cwd=ROOT,
        env=environment(PYTHONPATH=str(ROOT), PATH=f"{python.parent}{os.pathsep}{os.environ['PATH']}"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
