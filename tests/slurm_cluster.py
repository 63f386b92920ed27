"""A SLURM cluster of two nodes on this machine: real daemons on loopback addresses, all of their files in one folder.

Each node has two processors and two GPUs, whose device files are empty: enough for SLURM to hand them out, and nothing that
torch would see.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
from helpers import BIN, ROOT, environment

from rear_scale.world import end_with_parent, free_port

# Names that resolve anywhere, so that ranks meet by SLURM_STEP_NODELIST as they do on a real cluster.
NODES = ("127.0.0.1", "127.0.0.2")
# Debian puts the daemons there, which is not in everybody's PATH.
_SEARCH = os.pathsep.join((os.environ["PATH"], "/usr/sbin", "/sbin"))
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")


def missing() -> str | None:
    """The reason why a cluster cannot run on this machine; None where it can."""
    lacking = [name for name in _PROGRAMS if shutil.which(name, path=_SEARCH) is None]
    return f"{', '.join(lacking)} not found; launchers/test.sh --install-slurm installs SLURM" if lacking else None


class Cluster:
    """A context manager that starts the cluster, and at its end stops all processes that it has started."""

    def __init__(self) -> None:
        # Not below pytest's folder: the path of a socket has at most 108 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.daemons: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> Cluster:
        self._write_files()
        self._start("munged", "--foreground", "--force", "--key-file", "munge.key", "--socket", "munge.socket",
                    "--pid-file", "munge.pid", "--log-file", "munge.log", "--seed-file", "munge.seed")  # fmt: skip
        self._until(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._start("slurmctld", "-D", "-i", "-f", "slurm.conf")
        for node in NODES:
            self.start_node(node)
        self._until(lambda: self.run("sinfo", "-h", "-o", "%T").split() == ["idle"], "idle nodes")
        return self

    def __exit__(self, *error: object) -> None:
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
        for daemon in self.daemons.values():
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
        # What they leave behind (steps outlive their slurmd) is known by the variable that only our jobs have.
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.pid != os.getpid() and process.environ().get("SLURM_CONF") == str(self.conf):
                    process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def conf(self) -> Path:
        return self.folder / "slurm.conf"

    def start_node(self, node: str) -> None:
        self._start("slurmd", "-D", "-N", node, "-f", "slurm.conf", name=node)

    def kill_node(self, node: str) -> None:
        """Kills a node's slurmd, its steps and their processes all at once, like a power failure."""
        tasks = [
            process
            for process in psutil.process_iter()
            if self._variables(process).get("SLURM_CONF") == str(self.conf)
            and self._variables(process).get("SLURMD_NODENAME") == node
        ]
        steps = {task.parent() for task in tasks} - set(tasks)
        self.daemons[node].kill()
        for process in [*tasks, *(step for step in steps if step and "slurmstepd" in step.name())]:
            with suppress(psutil.Error):
                process.kill()
        self.daemons[node].wait()

    @staticmethod
    def _variables(process: psutil.Process) -> dict[str, str]:
        try:
            return process.environ()
        except psutil.Error:
            return {}

    def submit(self, script: str | Path, *arguments: str | Path, options: list[str], logs: Path, **env: str) -> int:
        """The number of a job of one of launchers/slurm (or of another script); its output and logs go to a folder."""
        logs.mkdir(exist_ok=True)
        path = str(ROOT / script) if str(script).startswith("launchers/") else str(script)
        command = ["sbatch", "--parsable", f"--output={logs}/job.out", *options, path, *map(str, arguments)]
        return int(
            self.run(*command, REAR_LOGS=str(logs), REAR_PYTHON=env.pop("REAR_PYTHON", str(BIN / "python")), **env)
        )

    def job(self, number: int) -> dict[str, str]:
        """The fields that `scontrol show job` prints: JobState, Restarts, NodeList, ..."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", "-o", str(number))))

    def wait(self, number: int, *states: str, timeout_s: float = 240) -> dict[str, str]:
        """Waits until the job is in one of these states or has ended."""
        ends = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", *states}
        self._until(lambda: self.job(number)["JobState"] in ends, f"job {number} to be {states}", timeout_s)
        return self.job(number)

    def run(self, *command: str, **env: str) -> str:
        return subprocess.run(
            command,
            cwd=ROOT,
            env=environment(SLURM_CONF=str(self.conf), **env),
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout

    def _start(self, program: str, *arguments: str, name: str | None = None) -> None:
        paths = [str(self.folder / word) if "." in word and word not in NODES else word for word in arguments]
        with open(self.folder / f"{name or program}.out", "a") as out:
            self.daemons[name or program] = subprocess.Popen(
                [shutil.which(program, path=_SEARCH) or program, *paths],
                env=environment(SLURM_CONF=str(self.conf)),
                stdout=out,
                stderr=out,
                # A killed pytest takes them with it.
                preexec_fn=lambda: end_with_parent(signal.SIGTERM),
            )

    def _until(self, condition: Callable[[], bool], what: str, timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            with suppress(subprocess.CalledProcessError):
                if condition():
                    return
            for name, daemon in self.daemons.items():
                if daemon.poll() not in (None, -signal.SIGKILL):
                    raise RuntimeError(f"{name} has ended: {(self.folder / f'{name}.out').read_text()[-2000:]}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {timeout_s} s for {what}\n" + self.run("scontrol", "show", "job"))
            time.sleep(0.2)

    def _write_files(self) -> None:
        folder, user = self.folder, getpass.getuser()
        (folder / "state").mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        # munged refuses a socket that other users could not reach.
        folder.chmod(0o755)
        for index in range(2):
            (folder / f"gpu{index}").touch()
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")
        version = subprocess.run(
            [shutil.which("slurmd", path=_SEARCH) or "slurmd", "-V"], capture_output=True, text=True, check=True
        ).stdout
        if tuple(map(int, re.findall(r"\d+", version)[:2])) >= (23, 11):
            # Containers have no cgroups to give away.
            (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        nodes = "".join(
            f"NodeName={node} NodeAddr={node} NodeHostname=localhost Port={free_port()} CPUs=2 RealMemory=1000 Gres=gpu:2\n"
            for node in NODES
        )
        # cred_expire: seconds until a requeued job may start again (fewer than 5 would mean 120). SlurmdTimeout: until a
        # silent node is taken for dead. KillWait: between SIGTERM and SIGKILL.
        # FirstJobId: ranks meet at a port made of it, so that two clusters on one machine do not meet each other.
        self.conf.write_text(
            f"""
ClusterName=loopback
FirstJobId={free_port()}
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={free_port()}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
GresTypes=gpu
ReturnToService=2
SlurmdTimeout=6
KillWait=25
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=1
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
""",
        )


def running_cluster() -> Iterator[Cluster]:
    with Cluster() as cluster:
        yield cluster
