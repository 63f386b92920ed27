"""The folder of a run: config, starts, status, metrics and events.

config.yaml      the resolved config            checkpoints/     see checkpoint/folder.py
starts.jsonl     one line per start: command, versions, commit, hosts, ranks, the step it began after, the status before it
status.json      state (running | done | preempted | failed), step, reason
metrics.jsonl    one line per logged step
events.jsonl     unusual events: skipped updates, loss spikes, checkpoints that could not be written, refused starts, a loss
                 that left the expected curve
branch.json      the run and the step from which this one branches off (train.branch_from), with hashes
fingerprints.json  hashes of the data, the first weights and the first batches, written when a run begins
tracebacks/      of ranks whose program has failed, the last one of each
rewind.json      the latest rewind after a loss spike, until the next checkpoint records it in its meta.json
"""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from rear_scale.checkpoint.folder import CHECKPOINTS, last_step
from rear_scale.config import ExperimentConfig, InputError, to_yaml
from rear_scale.device import uses_cuda
from rear_scale.files import DISK_ERRORS, atomic_open, remove_leftovers, write_text_atomically
from rear_scale.locks import locked
from rear_scale.progress import say
from rear_scale.run.fingerprints import NAME as FINGERPRINTS
from rear_scale.run.line_log import LineLog
from rear_scale.run.versions import commit, source_sha256, versions
from rear_scale.world import World

BRANCH = "branch.json"


class RunFolder:
    """The run folder, written by rank 0 alone. A full or failing disk is reported and does not end the run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.logs: dict[str, LineLog] = {}

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def lock(self) -> tuple[Path, str]:
        """The path of the lock file, and the message for a second process that tries to use the folder."""
        return (
            self.path / ".lock",
            f"run.dir={self.path} is in use by another process. Wait for it, stop it, or set another run.dir",
        )

    def locked(self) -> AbstractContextManager[None]:
        """A context that holds the folder's lock. Raises InputError when another process holds it."""
        return locked(*self.lock)

    def clear(self) -> None:
        """Removes temporary files of killed processes, except in the checkpoints. The caller must hold the lock."""
        names = (
            "config.yaml",
            "status.json",
            "metrics.jsonl",
            "evaluations.jsonl",
            "rewind.json",
            "report.html",
            FINGERPRINTS,
            BRANCH,
        )
        remove_leftovers(self.path, *names)
        for folder in (*self.path.glob("*/"), *self.path.glob("features/*/")):
            remove_leftovers(folder)

    def start(self, cfg: ExperimentConfig, world: World, step: int = 0, hosts: Sequence[str] = ()) -> None:
        """Records a start. step: the last step of the checkpoint that it continues; hosts: the host of each rank."""
        with _said():
            write_text_atomically(self.path / "config.yaml", to_yaml(cfg))
        # CPU kernels may round differently with another number of threads.
        code = {"source_sha256": source_sha256(), "threads": torch.get_num_threads()}
        about = {"step": step, "hosts": dict(Counter(hosts)), "folder": os.getcwd(), "after": self._status()}
        self._append("starts.jsonl", {**provenance(world), **code, **about})

    def record_fingerprints(self, values: dict[str, Any]) -> None:
        """Writes fingerprints.json: `values` as fingerprints.of_start returns them."""
        with _said():
            write_text_atomically(self.path / FINGERPRINTS, json.dumps(values, indent=1) + "\n")

    def record_branch(self, values: dict[str, Any]) -> None:
        """Writes branch.json: `values` as train.branch.Start.record returns them."""
        with _said():
            write_text_atomically(self.path / BRANCH, json.dumps(values, indent=1) + "\n")

    def set_status(self, state: str, step: int, reason: str) -> None:
        path = self.path / "status.json"
        text = json.dumps({"state": state, "step": step, "reason": reason}) + "\n"
        try:
            write_text_atomically(path, text)
        except OSError as error:
            try:
                _write_over(path, text.encode())
            except OSError:
                say(f"{path}: {error.strerror}. Not recorded: {state}, step {step}{f', {reason}' if reason else ''}")

    def refuse(self, reason: str) -> None:
        """Records why a start was refused, unless the run is done or in use by another process. Never raises."""
        with suppress(InputError, OSError), self.locked():
            if self.state() != "done":
                self.set_status("failed", last_step(self.path), reason)
                self.note("refused", last_step(self.path), reason=reason)

    def record_traceback(self, rank: int, error: BaseException) -> None:
        """Writes the traceback of an error that ends a rank, and notes its folder in the error. Never raises."""
        path = self.path / "tracebacks" / f"rank_{rank:05d}.txt"
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            where = f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {socket.gethostname()}"
            path.write_text(f"{where}\n{''.join(traceback.format_exception(error))}", errors="replace")
            error.add_note(f"The traceback of each rank is in {path.parent}")

    def state(self) -> str | None:
        """The state in status.json; None when there is none."""
        status = self._status()
        return None if status is None else status["state"]

    def _status(self) -> dict[str, Any] | None:
        """The values of status.json; None when there is none."""
        try:
            status = json.loads((self.path / "status.json").read_text())
            return status if "state" in status and isinstance(status, dict) else None
        except (OSError, ValueError, TypeError):
            return None

    def cut_metrics(self, step: int) -> None:
        """Removes the lines of later steps and an incomplete last line, so that every step appears once after a resume."""
        if not self.metrics.exists():
            return
        data = self.metrics.read_bytes()
        kept = b"".join(line + b"\n" for line in data.split(b"\n") if _logged_step(line) <= step)
        with _said():
            if data.startswith(kept):
                os.truncate(self.metrics, len(kept))  # needs no disk space, unlike a rewritten file
            else:
                with atomic_open(self.metrics) as file:
                    file.write(kept)

    def log(self, metrics: dict[str, Any]) -> None:
        self._append("metrics.jsonl", metrics)

    def in_a_number(self) -> str:
        """The last validation loss, or the last loss where there is none, as `val_loss 2.3456 at step 600`; empty without one."""
        try:
            lines = read_metrics(self.path)
            for name in ("val_loss", "loss"):
                for line in reversed(lines):
                    if isinstance(line.get(name), float):
                        return f"{name} {line[name]:.4f} at step {line['step']}"
        except (OSError, ValueError, KeyError, AttributeError):
            pass  # the run is done all the same
        return ""

    def note(self, event: str, step: int, **details: Any) -> None:
        """Adds a line to events.jsonl."""
        self._append("events.jsonl", {"event": event, "step": step, **details})

    def note_rewind(self, step: int, data_offset: int, rewinds: int) -> None:
        """Records a rewind to the checkpoint of a step in a file of its own, because that checkpoint was written before it."""
        with _said():
            values = {"step": step, "data_offset": data_offset, "rewinds": rewinds}
            write_text_atomically(self.path / "rewind.json", json.dumps(values) + "\n")

    def rewind_to(self, step: int, rewinds: int) -> dict[str, int]:
        """data_offset and rewinds of the latest rewind to the checkpoint of a step, if it is later than the checkpoint's own
        count `rewinds`; otherwise empty."""
        try:
            values = json.loads((self.path / "rewind.json").read_text())
            later = values["step"] == step and values["rewinds"] > rewinds
            return {name: int(values[name]) for name in ("data_offset", "rewinds")} if later else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def close(self) -> None:
        """Writes the lines that a full disk has not taken before, or reports that they are lost."""
        for log in self.logs.values():
            log.close()

    def _append(self, name: str, values: dict[str, Any]) -> None:
        self.logs.setdefault(name, LineLog(self.path / name)).append(json.dumps(values))


def is_config_of_run(path: Path) -> bool:
    """Whether a file is the config that a run has saved in its folder."""
    return path.name == "config.yaml" and (path.parent / "starts.jsonl").is_file()


@contextmanager
def _said() -> Iterator[None]:
    """A context that reports an error of a full or failing disk instead of raising it."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        say(f"{error.filename}: {error.strerror}")


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The metrics of all logged steps of a run folder."""
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def read_fingerprints(run: Path) -> dict[str, Any]:
    """The values of a run folder's fingerprints.json; empty where it has none, as those of runs before it was written."""
    try:
        values = json.loads((run / FINGERPRINTS).read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file of a run folder; empty without the file. A line that is not complete is left out."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        with suppress(ValueError):
            found.append(json.loads(line))
    return [values for values in found if isinstance(values, dict)]


def device_name(device: torch.device | None = None) -> str:
    """The name of a GPU or of this machine's processor. device: None = what this process computes on."""
    on_gpu = uses_cuda() if device is None else device.type == "cuda"
    return torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine()


def provenance(world: World) -> dict[str, Any]:
    """The command, versions, commit and machine of this process, to be recorded with results."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(sys.argv),
        "commit": commit(),
        "versions": versions(),
        "host": socket.gethostname(),
        "device": device_name(world.device),
        "world_size": world.size,
        "launcher": world.ranks.launcher,
    }


def _write_over(path: Path, data: bytes) -> None:
    """Overwrites a file in place. Unlike an atomic write, this needs no space on a full disk."""
    handle = os.open(path, os.O_WRONLY)
    try:
        os.write(handle, data)
        os.ftruncate(handle, len(data))
    finally:
        os.close(handle)


def _logged_step(line: bytes) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
