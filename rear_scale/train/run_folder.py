"""The folder of a run: what was asked, what ran it, how far it is.

config.yaml      the resolved config            checkpoints/     see parallel/checkpoint.py
starts.jsonl     one line per start: command, versions, commit, host, ranks
status.json      state (running | done | preempted | failed), step, reason
metrics.jsonl    one line per logged step
events.jsonl     what went out of the ordinary: updates left out, loss spikes, checkpoints that could not be written
"""

from __future__ import annotations

import json
import math
import platform
import shlex
import socket
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from rear_scale.config import ExperimentConfig, to_yaml
from rear_scale.files import remove_leftovers, write_text_atomically
from rear_scale.locks import locked
from rear_scale.versions import commit, versions
from rear_scale.world import World


class RunFolder:
    """Written by rank 0 alone."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def lock(self) -> tuple[Path, str]:
        """The file that keeps a second process out of the folder, and what that process is told."""
        return (
            self.path / ".lock",
            f"run.dir={self.path} is in use by another process. Wait for it, stop it, or set another run.dir",
        )

    def locked(self) -> AbstractContextManager[None]:
        """Keeps a second process out of the folder. Raises InputError when one is in it."""
        return locked(*self.lock)

    def clear(self) -> None:
        """Removes what killed processes have left unfinished beside the checkpoints. For a process that has locked the run."""
        remove_leftovers(self.path, "config.yaml", "status.json", "metrics.jsonl", "evaluations.jsonl")
        for folder in (*self.path.glob("*/"), *self.path.glob("features/*/")):
            remove_leftovers(folder)

    def start(self, cfg: ExperimentConfig, world: World) -> None:
        write_text_atomically(self.path / "config.yaml", to_yaml(cfg))
        with open(self.path / "starts.jsonl", "a") as file:
            file.write(json.dumps(provenance(world)) + "\n")

    def set_status(self, state: str, step: int, reason: str) -> None:
        write_text_atomically(
            self.path / "status.json", json.dumps({"state": state, "step": step, "reason": reason}) + "\n"
        )

    def state(self) -> str | None:
        """The state in status.json; None when it says none."""
        try:
            return json.loads((self.path / "status.json").read_text())["state"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def cut_metrics(self, step: int) -> None:
        """Drops what was logged after a step, and a line that a kill left unfinished: every step appears once."""
        if not self.metrics.exists():
            return
        kept = [line for line in self.metrics.read_text().splitlines() if _logged_step(line) <= step]
        write_text_atomically(self.metrics, "".join(f"{line}\n" for line in kept))

    def log(self, metrics: dict[str, Any]) -> None:
        with open(self.metrics, "a") as file:
            file.write(json.dumps(metrics) + "\n")

    def note(self, event: str, step: int, **details: Any) -> None:
        """A line in events.jsonl."""
        with open(self.path / "events.jsonl", "a") as file:
            file.write(json.dumps({"event": event, "step": step, **details}) + "\n")


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The logged steps of a run folder."""
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def provenance(world: World) -> dict[str, Any]:
    """What is running: command, versions, commit, machine."""
    on_gpu = world.device.type == "cuda"
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(sys.argv),
        "commit": commit(),
        "versions": versions(),
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name(world.device) if on_gpu else platform.processor() or platform.machine(),
        "world_size": world.size,
        "launcher": world.ranks.launcher,
    }


def _logged_step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf
