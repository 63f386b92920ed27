"""launchers/slurm/task.sh binds a task to the cores beside its GPU: with a made-up nvidia-smi, system folder and taskset."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT, environment

BUS_IDS = ["00000000:1B:00.0", "00000000:43:00.0", "00000000:C3:00.0"]
CORES = {"0000:1b:00.0": "0-15,64-79", "0000:43:00.0": "0-15,64-79", "0000:c3:00.0": "32-47"}


def run_task(folder: Path, *, gpus: bool = True, refused: bool = False, **env: str) -> tuple[str, str, str]:
    """What was bound, the task's own output, and its errors."""
    programs = folder / "bin"
    programs.mkdir()
    listing = "\\n".join(BUS_IDS)
    scripts = {"taskset": f'echo "$@" >> {folder}/bound; exit {int(refused)}'}
    if gpus:
        scripts["nvidia-smi"] = f"printf '{listing}\\n'"
    for name, text in scripts.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    for bus_id, cores in CORES.items():
        (folder / "pci" / bus_id).mkdir(parents=True)
        (folder / "pci" / bus_id / "local_cpulist").write_text(cores + "\n")
    variables = environment(**{"REAR_PCI_DEVICES": str(folder / "pci"), **env})
    variables["PATH"] = f"{programs}:{variables['PATH']}"
    command = ["bash", str(ROOT / "launchers/slurm/task.sh"), "bash", "-c", 'echo "$$ $*"', "name", "a b", "c"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    bound = folder / "bound"
    return bound.read_text() if bound.exists() else "", done.stdout, done.stderr


@pytest.mark.parametrize(("local", "cores"), [("0", "0-15,64-79"), ("1", "0-15,64-79"), ("2", "32-47"), ("5", "32-47")])
def test_a_task_is_bound_to_the_cores_of_its_gpu(tmp_path: Path, local: str, cores: str) -> None:
    bound, output, _ = run_task(tmp_path, SLURM_LOCALID=local)
    process, *words = output.split(maxsplit=1)
    assert words == ["a b c\n"]
    # The task is the process that was bound.
    assert bound == f"--cpu-list --pid {cores} {process}\n"


@pytest.mark.parametrize(
    ("gpus", "env"),
    [
        (False, {"SLURM_LOCALID": "0"}),
        (True, {}),
        (True, {"SLURM_LOCALID": "0", "REAR_SRUN_OPTIONS": "--mpi=none --cpu-bind=cores"}),
        (True, {"SLURM_LOCALID": "0", "REAR_PCI_DEVICES": "/nowhere"}),
    ],
)
def test_a_task_runs_where_nothing_can_or_shall_be_bound(tmp_path: Path, gpus: bool, env: dict[str, str]) -> None:
    bound, output, error = run_task(tmp_path, gpus=gpus, **env)
    assert bound == error == ""
    assert output.endswith("a b c\n")


def test_cores_that_are_not_the_tasks_are_said(tmp_path: Path) -> None:
    _, output, error = run_task(tmp_path, refused=True, SLURM_LOCALID="2")
    assert error == "note: cores 32-47 of GPU 00000000:c3:00.0 are not this task's\n"
    assert output.endswith("a b c\n")


@pytest.mark.parametrize(
    ("output", "variables", "expected"),
    [
        ("slurm-rear_train-7.out", {}, "rear_train-7/job.out"),
        ("slurm-rear_train-7.out", {"SLURM_RESTART_COUNT": "1"}, "rear_train-7/job.1.out"),
        (
            "slurm-rear_train-8.out",
            {"SLURM_JOB_ID": "8", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"},
            "rear_train-8/job.out",
        ),
        ("mine.out", {}, None),
    ],
)
def test_the_output_of_a_job_goes_where_its_logs_are(
    tmp_path: Path, output: str, variables: dict[str, str], expected: str | None
) -> None:
    """As SLURM runs a batch script: with its output open to a file, to which it writes itself too."""
    environ = {"PATH": os.environ["PATH"], "SLURM_JOB_NAME": "rear_train", "SLURM_JOB_ID": "7", **variables}
    script = f"set -euo pipefail; echo before; source {ROOT}/launchers/slurm/common.sh; echo $REAR_LOGS"
    with open(tmp_path / output, "a") as file:
        subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environ, stdout=file, check=True, timeout=60)
        print("CANCELLED DUE TO TIME LIMIT", file=file)
    found = tmp_path / (f"runs/slurm/{expected}" if expected else output)
    assert (tmp_path / output).exists() == (expected is None)
    logs = f"runs/slurm/rear_train-{environ['SLURM_JOB_ID']}"
    assert found.read_text().splitlines() == ["before", logs, "CANCELLED DUE TO TIME LIMIT"]
