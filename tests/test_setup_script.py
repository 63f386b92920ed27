"""launchers/setup.sh under settings of pip and Python that would put packages elsewhere. Nothing is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

# The .venv's Python: pip's installations are written down, everything else is done.
_PYTHON = """#!{python}
import json, os, subprocess, sys
if sys.argv[1:4] in (["-m", "pip", "install"], ["-m", "pip", "check"]):
    with open({log!r}, "a") as file:
        file.write(json.dumps([sys.argv[1:], dict(os.environ)]) + "\\n")
    sys.exit()
sys.exit(subprocess.run([{python!r}, *sys.argv[1:]]).returncode)
"""

_SOURCES = {f"PIP_{name}" for name in ("INDEX_URL", "EXTRA_INDEX_URL", "FIND_LINKS", "CERT", "PROXY", "TRUSTED_HOST")}


def set_up(folder: Path, pip_conf: str = "", **env: str) -> list[tuple[list[str], dict[str, str]]]:
    """The calls of pip, with their variables, of a set-up in a copy of the project."""
    (folder / "launchers").mkdir()
    for name in ("constraints.txt", "pyproject.toml", "launchers/setup.sh"):
        shutil.copy(ROOT / name, folder / name)
    python, log = folder / ".venv/bin/python", folder / "log"
    python.parent.mkdir(parents=True)
    python.write_text(_PYTHON.format(python=sys.executable, log=str(log)))
    python.chmod(0o755)
    (folder / "config/pip").mkdir(parents=True)
    (folder / "config/pip/pip.conf").write_text(pip_conf)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    done = subprocess.run(
        ["bash", folder / "launchers/setup.sh"],
        env={**clean, "XDG_CONFIG_HOME": str(folder / "config"), "HOME": str(folder), **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.parametrize(
    ("pip_conf", "env"),
    [
        ("[global]\nuser = true\n[install]\ntarget = /elsewhere\nprefix = /elsewhere\nno-deps = true\n", {}),
        (
            "",
            {
                **dict.fromkeys(("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_CONSTRAINT", "PYTHONPATH"), "/elsewhere"),
                **dict.fromkeys(("PIP_USER", "PIP_REQUIRE_VIRTUALENV", "PIP_NO_DEPS", "PIP_DRY_RUN"), "1"),
                "PYTHONHOME": "/nowhere",
            },
        ),
    ],
)
def test_packages_go_into_the_environment(tmp_path: Path, pip_conf: str, env: dict[str, str]) -> None:
    calls = set_up(tmp_path, pip_conf, **env)
    assert [call[0][2] for call in calls] == ["install"] * 4 + ["check"]
    for _, variables in calls:
        given = {name for name in variables if name.startswith("PIP_")}
        assert given - _SOURCES == {"PIP_CONFIG_FILE"}  # this machine's own pip.conf may name sources
        assert not {"PYTHONPATH", "PYTHONHOME"} & set(variables)


def test_where_packages_come_from_is_kept(tmp_path: Path) -> None:
    pip_conf = (
        "[global]\nindex-url = https://mirror/simple\nextra-index-url =\n    https://a\n    https://b\nuser = true\n"
        "proxy = http://proxy:1\n[install]\nproxy = http://proxy:2\n"
    )
    ((_, variables), *_) = set_up(tmp_path, pip_conf, PIP_CERT="/a file.pem", PIP_INDEX_URL="https://nearer/simple")
    expected = {
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_INDEX_URL": "https://nearer/simple",
        "PIP_EXTRA_INDEX_URL": "https://a https://b",
        "PIP_PROXY": "http://proxy:2",
        "PIP_CERT": "/a file.pem",
    }
    assert {name: variables.get(name) for name in expected} == expected
