"""launchers/setup.sh under settings of pip and Python that would put packages elsewhere. Nothing is installed."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
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
    assert [call[0][2] for call in calls] == ["install"] * 3 + ["check"]
    assert calls[2][0][-1].startswith(".[train,")
    assert calls[2][1]["DS_BUILD_OPS"] == "0"
    for _, variables in calls:
        given = {name for name in variables if name.startswith("PIP_")}
        assert given - _SOURCES == {"PIP_CONFIG_FILE"}  # this machine's own pip.conf may name sources
        assert not {"PYTHONPATH", "PYTHONHOME"} & set(variables)


_NO_LOCKS = "#!/bin/sh\necho 'flock: 9: No locks available' >&2\nexit 71\n"


def without_locks(folder: Path) -> str:
    """A PATH whose flock does what it does on a file system without locks."""
    (folder / "bin").mkdir()
    (folder / "bin/flock").write_text(_NO_LOCKS)
    (folder / "bin/flock").chmod(0o755)
    return f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize("holder", [None, "{host} 4194305 17", "{host} {pid} 17"])
def test_a_file_takes_the_place_of_locks(tmp_path: Path, holder: str | None) -> None:
    """Also one that a set-up has left which was killed."""
    if holder is not None:
        text = holder.format(host=socket.gethostname(), pid=os.getpid())
        (tmp_path / ".venv.lock.holder").write_text(f"{text}\n")
    assert len(set_up(tmp_path, PATH=without_locks(tmp_path))) == 4
    assert not (tmp_path / ".venv.lock.holder").exists()


@pytest.mark.parametrize("host", ["here", "elsewhere"])
def test_a_set_up_that_goes_on_is_waited_for(tmp_path: Path, host: str) -> None:
    path = without_locks(tmp_path)
    holder, said = tmp_path / ".venv.lock.holder", tmp_path / "said"
    start = Path(f"/proc/{os.getpid()}/stat").read_text().rpartition(")")[2].split()[19]
    holder.write_text(f"{socket.gethostname() if host == 'here' else host} {os.getpid()} {start}\n")
    (tmp_path / "launchers").mkdir()
    shutil.copy(ROOT / "launchers/setup.sh", tmp_path / "launchers")
    with (
        open(said, "w") as output,
        subprocess.Popen(
            ["bash", tmp_path / "launchers/setup.sh"], env={**os.environ, "PATH": path}, stderr=output
        ) as process,
    ):
        while "If it is gone: rm '" not in said.read_text():
            assert process.poll() is None
            time.sleep(0.02)
        assert f"waiting for a set-up by process {os.getpid()} on " in said.read_text()
        process.kill()
    assert holder.exists()


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


@pytest.mark.parametrize(("script", "expected"), [("demo.sh", "--seeds 3"), ("test.sh", "Arguments go to pytest")])
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_installs_nothing(tmp_path: Path, script: str, expected: str, option: str) -> None:
    (tmp_path / "launchers").mkdir()
    for name in ("demo.sh", "demo.py", "test.sh"):
        shutil.copy(ROOT / "launchers" / name, tmp_path / "launchers")
    (tmp_path / "launchers/setup.sh").write_text("touch installed")
    command = ["bash", str(tmp_path / "launchers" / script), option]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert expected in done.stdout
    assert not (tmp_path / "installed").exists()


@pytest.mark.parametrize(
    ("option", "code", "said"), [("-h", 0, "PYTHON="), ("--help", 0, "PYTHON="), ("--hlep", 2, "")]
)
def test_a_set_up_with_an_option_installs_nothing(tmp_path: Path, option: str, code: int, said: str) -> None:
    (tmp_path / "launchers").mkdir()
    shutil.copy(ROOT / "launchers/setup.sh", tmp_path / "launchers")
    command = ["bash", str(tmp_path / "launchers/setup.sh"), option]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, said in done.stdout) == (code, True)
    assert ("takes no arguments, but was given --hlep" in done.stderr) == (code == 2)
    assert [path.name for path in tmp_path.iterdir()] == ["launchers"]
