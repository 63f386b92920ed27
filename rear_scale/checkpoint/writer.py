"""Writing of checkpoints: of a strategy in the background of training, of given tensors, and as a single weight file."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from rear_scale.checkpoint.folder import (
    LATEST,
    Checkpoint,
    clear,
    fault,
    folders,
    part_name,
    reason,
    set_aside,
    step_name,
    step_of,
    unpublished,
)
from rear_scale.checkpoint.meta import CONSOLIDATED, FORMAT, META
from rear_scale.config import CheckpointConfig
from rear_scale.files import atomic_folder, file_sha256, publish_folder, remove_folder, write_text_atomically
from rear_scale.parallel.strategy import StateName, Strategy
from rear_scale.progress import say
from rear_scale.weight_file import save_tensors, write_tensors
from rear_scale.world import World

# Disk space for tensor names and meta.json.
_SPACE_MARGIN = 1.02


class Unwritten(OSError):
    """A required checkpoint could not be written."""


class Writer:
    """Writes checkpoints in the background: training waits only for the copy to host memory.

    Each rank writes a part file in a thread. The threads use no collectives: the ranks exchange `state` together with the other
    values of a training step, and when all have written, `finish` makes the checkpoint visible.
    """

    IDLE, WRITING, WRITTEN, FAILED = range(4)
    what = "a checkpoint"  # for messages

    def __init__(self, root: Path, world: World, config: CheckpointConfig, resumed: Checkpoint | None = None) -> None:
        """resumed: the checkpoint that the run was resumed from, which this writer never removes."""
        self.root, self.world, self.config = root, world, config
        self.resumed = resumed.path if resumed else None
        self.intact = {self.resumed} if self.resumed else set()  # on rank 0: whose checksums were verified
        self.damaged: dict[Path, str] = {}  # on rank 0: found by the thread, to be renamed
        self.thread: threading.Thread | None = None
        self.error: str | None = None
        self.meta: dict[str, Any] = {}
        self.mine: dict[str, Tensor] = {}
        self.file = part_name(world.rank)

    @property
    def state(self) -> int:
        """The state of this rank's part: IDLE, WRITING, WRITTEN or FAILED."""
        if self.thread is None:
            return Writer.IDLE
        if self.thread.is_alive():
            return Writer.WRITING
        return Writer.WRITTEN if self.error is None else Writer.FAILED

    def states(self, strategy: Strategy) -> tuple[StateName, ...]:
        """The states of a strategy that are written."""
        return strategy.state_names

    def begin(self, step: int, strategy: Strategy, meta: dict[str, Any]) -> str | None:
        """Copies the state of a step and starts writing it. All ranks must call this, with no write in progress.

        Returns the problem, on all ranks, when it cannot be written (too little disk space), else None.
        """
        assert self.thread is None
        self.mine, self.error = _own_part(strategy, self.states(strategy), self.world), None
        self.meta = {"step": step, **meta}
        problem = self._prepare_folder()
        if problem is None:
            self.thread = threading.Thread(target=self._write, daemon=True)
            self.thread.start()
        return problem

    def finish(self) -> tuple[Path | None, str | None]:
        """Waits for all parts and makes the checkpoint visible. Returns (its folder, None) or (None, the problem).

        All ranks must call this while a write is in progress, and all get the same result.
        """
        assert self.thread is not None
        self.thread.join()
        self.thread = None
        written = self.world.gather((self.error, self.meta.get("part")))
        problem = next((f"rank {rank}: {error}" for rank, (error, _) in enumerate(written) if error), None)
        final = self.root / step_name(self.meta["step"])
        if self.world.is_main:
            try:
                if problem is None:
                    parts = [part for _, part in written if part is not None]
                    assert len(parts) == len(written), "a rank has neither a part nor an error"
                    self._publish(final, parts)
            except Exception as error:  # training goes on after any error
                problem = f"rank 0: {reason(error)}"
            if problem is not None:
                shutil.rmtree(unpublished(final), ignore_errors=True)
        problem = self.world.from_main(problem)
        return (final, None) if problem is None else (None, problem)

    def _prepare_folder(self) -> str | None:
        folder = unpublished(self.root / step_name(self.meta["step"]))
        needed = int(self.world.sum([sum(tensor.nbytes for tensor in self.mine.values())]).item())
        problem = None
        if self.world.is_main:
            try:
                clear(self.root)
                folder.mkdir(parents=True)
                free = shutil.disk_usage(self.root).free
                if free < needed * _SPACE_MARGIN:
                    problem = (
                        f"{self.root} has {free / 2**20:,.1f} MiB free, but {self.what} takes {needed / 2**20:,.1f} MiB"
                    )
                    shutil.rmtree(folder)
            except OSError as error:
                problem = str(error)
        return self.world.from_main(problem)

    def _write(self) -> None:
        path = unpublished(self.root / step_name(self.meta["step"])) / self.file
        try:
            save_tensors(path, self.mine)
            _verify(path, self.mine)
            self.meta["part"] = {**_listed(path), "keys": list(self.mine)}
            if self.world.is_main:
                self._verify_older()
        except Exception as error:  # training goes on after any error
            self.error = f"{path}: {reason(error)}"
        self.mine = {}

    def _verify_older(self) -> None:
        """Verifies the checksums of the older checkpoints that checkpoint.keep_last counts, each once."""
        wanted = self.config.keep_last - 1
        for path in reversed(folders(self.root)):
            if wanted == 0 or step_of(path) >= self.meta["step"]:
                continue
            if path not in self.intact and (problem := fault(path)):
                self.damaged[path] = problem
                continue
            self.intact.add(path)
            wanted -= 1

    def _publish(self, final: Path, parts: list[dict[str, Any]]) -> None:
        folder = unpublished(final)
        files = [{name: item[name] for name in ("file", "size", "sha256")} for item in parts]
        index = {key: item["file"] for item in parts for key in item["keys"]}
        meta = {name: value for name, value in self.meta.items() if name != "part"}
        _write_meta(folder, meta, files, index)
        publish_folder(folder, final)  # replaces a folder of the same step, saved again after a resume from before it
        self.intact.add(final)
        self._tidy(final)

    def settle(self) -> None:
        """Completes the publication of the checkpoint that the run was resumed from, if a kill interrupted it. Rank 0 only."""
        assert self.resumed is not None
        if len(folders(self.root)) > self.config.keep_last:
            self.meta = {"step": step_of(self.resumed)}
            self._verify_older()
        self._tidy(self.resumed)

    def _tidy(self, newest: Path) -> None:
        """Writes the name of the newest checkpoint to `latest`, and removes those that are not kept.

        Errors are only printed, because the checkpoint itself is complete.
        """
        latest, text = self.root / LATEST, f"{newest.name}\n"
        try:
            if not latest.exists() or latest.read_text() != text:
                write_text_atomically(latest, text)
            for path, problem in self.damaged.items():
                say(set_aside(path, problem))
            self.damaged = {}
            self._remove_older()
        except Exception as error:
            say(f"{newest} is written, but `latest` or older checkpoints could not be updated: {reason(error)}")

    def _remove_older(self) -> None:
        """Removes the checkpoints that checkpoint.keep_last and keep_every do not keep. Only intact ones count."""
        visible = folders(self.root)
        intact = [path for path in visible if path in self.intact]
        if len(intact) < self.config.keep_last:
            return
        oldest_kept = intact[-self.config.keep_last]
        for old in visible[: visible.index(oldest_kept)]:
            if old != self.resumed and (self.config.keep_every is None or step_of(old) % self.config.keep_every):
                remove_folder(old)


def save(
    root: Path, step: int, strategy: Strategy, world: World, meta: dict[str, Any], config: CheckpointConfig
) -> Path:
    """Writes the checkpoint of a step and waits for it. Returns its folder. All ranks must call this.

    Raises OSError, on all ranks, when it cannot be written.
    """
    writer = Writer(root, world, config)
    problem = writer.begin(step, strategy, meta)
    path = None
    if problem is None:
        path, problem = writer.finish()
    if path is None:
        raise Unwritten(f"the checkpoint of step {step} was not written: {problem}")
    return path


def _own_part(strategy: Strategy, states: Iterable[StateName], world: World) -> dict[str, Tensor]:
    """Host copies of the tensors that this rank writes: about the same number of bytes on every rank."""
    mine: dict[str, Tensor] = {}
    filled = [0] * world.size
    for state_name in states:
        # Gathering is collective, so every rank iterates over all tensors and keeps its own.
        for name, tensor in strategy.tensors(state_name):
            owner = filled.index(min(filled))
            filled[owner] += tensor.numel()
            if owner == world.rank:
                mine[f"{state_name}/{name}"] = tensor.to("cpu", torch.float32, copy=True).contiguous()
    return mine


def _verify(path: Path, expected: dict[str, Tensor]) -> None:
    """Reads a part file back. Raises OSError when its content differs."""
    with safe_open(path, "pt") as file:
        for key, tensor in expected.items():
            # Compare bit patterns, because NaN != NaN.
            if not torch.equal(file.get_tensor(key).view(torch.int32), tensor.view(torch.int32)):
                raise OSError(f"{key} reads back with other content")


def write_portable(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], meta: dict[str, Any]) -> None:
    """Writes a checkpoint folder atomically. tensors: by state name and parameter name."""
    keyed = {
        f"{state_name}/{name}": value.float().contiguous()
        for state_name, named in tensors.items()
        for name, value in named.items()
    }
    with atomic_folder(folder) as temporary:
        file = temporary / part_name(0)
        save_tensors(file, keyed)
        _write_meta(temporary, {"step": step, **meta}, [_listed(file)], dict.fromkeys(keyed, file.name))


def write_linked(folder: Path, source: Checkpoint, meta: dict[str, Any]) -> None:
    """Writes a checkpoint folder with the tensors of another one and its own meta.json, atomically.

    Part files are hard links where the file system has them, which take no space (nothing ever writes into a part file), and
    copies elsewhere.
    """
    with atomic_folder(folder) as temporary:
        for item in source.meta["files"]:
            try:
                os.link(source.path / item["file"], temporary / item["file"])
            except OSError:
                shutil.copyfile(source.path / item["file"], temporary / item["file"])
        _write_meta(temporary, {"step": source.step, **meta}, source.meta["files"], source.meta["index"])


def _listed(file: Path) -> dict[str, Any]:
    """The entry of a finished part file in meta.json."""
    return {"file": file.name, "size": file.stat().st_size, "sha256": file_sha256(file)}


def _write_meta(folder: Path, meta: dict[str, Any], files: list[dict[str, Any]], index: dict[str, str]) -> None:
    """Writes meta.json, which completes the folder. index: from a tensor's key to the file that holds it."""
    text = json.dumps({"format": FORMAT, **meta, "files": files, "index": index}, indent=1)
    write_text_atomically(folder / META, text)


def write_consolidated(path: Path, source: Checkpoint, weights: dict[str, Tensor]) -> None:
    """Writes one safetensors file of float32 weights by official names, with config and step of their source in its header."""
    header = {"kind": CONSOLIDATED, "step": source.step, "config": source.meta["config"]}
    header["tokenizer_sha256"] = source.meta.get("tokenizer_sha256", "")
    if "average" in source.meta:  # of an average of the weights: how it was made
        header["average"] = source.meta["average"]
    write_tensors(path, weights, header)
