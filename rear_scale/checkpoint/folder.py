"""Checkpoints in one form for every strategy and world size: float32 weights and AdamW moments by parameter name.

    <run>/checkpoints/step_00000100/part-00000.safetensors ...   keys param/NAME, exp_avg/NAME, exp_avg_sq/NAME
    <run>/checkpoints/step_00000100/meta.json                    step, config, data, files with checksums; written last
    <run>/checkpoints/latest                                     the name of the newest
    <run>/checkpoints/step_00000090.damaged                      one whose files have changed since: set aside, and not counted

A checkpoint is written under another name, read back, and renamed when it is complete, so each one that is visible is
whole.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rear_scale.checkpoint.meta import FORMAT, read_meta
from rear_scale.config import CheckpointConfig, InputError
from rear_scale.files import file_sha256, remove_leftovers, sync, write_text_atomically
from rear_scale.parallel.strategy import Kind, Strategy
from rear_scale.progress import say
from rear_scale.weight_file import save_tensors
from rear_scale.world import World

# Room for the names and meta.json.
_SPACE_MARGIN = 1.02


class Unwritten(OSError):
    """A checkpoint without which nothing can go on was not written."""


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint folder."""

    path: Path
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        """Updates done."""
        return self.meta["step"]

    @property
    def run(self) -> Path:
        """The folder that what is made of the checkpoint goes to."""
        return self.path.parent.parent

    def reader(self, kind: Kind) -> Callable[[str], Tensor]:
        """A function from parameter name to its full float32 tensor on the CPU."""
        index = self.meta["index"]
        handles: dict[str, Any] = {}

        def read(name: str) -> Tensor:
            key = f"{kind}/{name}"
            if key not in index:
                raise InputError(
                    f"{self.path} has no {key}. It was made by another model: check the model and heads of the config"
                )
            file = index[key]
            if file not in handles:
                handles[file] = safe_open(self.path / file, "pt")
            return handles[file].get_tensor(key)

        return read

    def has(self, kind: Kind) -> bool:
        return any(key.startswith(f"{kind}/") for key in self.meta["index"])

    def names(self) -> list[str]:
        """All parameters."""
        return [key.removeprefix("param/") for key in self.meta["index"] if key.startswith("param/")]


class Writer:
    """Writes checkpoints of a run while it goes on: training waits for the copy to host memory alone.

    Each rank writes a part of the folder in a thread of its own. Nothing collective happens there: the ranks tell each other
    `state` in step with training, and when all have written, `finish` makes the checkpoint visible.
    """

    IDLE, WRITING, WRITTEN, FAILED = range(4)

    def __init__(self, root: Path, world: World, config: CheckpointConfig, resumed: Checkpoint | None = None) -> None:
        """resumed: the checkpoint that the run goes on from, which stays for as long as this writer is in use."""
        self.root, self.world, self.config = root, world, config
        self.resumed = resumed.path if resumed else None
        self.intact = {self.resumed} if self.resumed else set()  # on rank 0: known to be, by their checksums
        self.damaged: dict[Path, str] = {}  # on rank 0: found by the thread, to be set aside
        self.thread: threading.Thread | None = None
        self.error: str | None = None
        self.meta: dict[str, Any] = {}
        self.mine: dict[str, Tensor] = {}
        self.file = f"part-{world.rank:05d}.safetensors"

    @property
    def state(self) -> int:
        """This rank's part: IDLE, WRITING, WRITTEN or FAILED."""
        if self.thread is None:
            return Writer.IDLE
        if self.thread.is_alive():
            return Writer.WRITING
        return Writer.WRITTEN if self.error is None else Writer.FAILED

    def begin(self, step: int, strategy: Strategy, meta: dict[str, Any]) -> str | None:
        """Copies the state of a step and starts to write it. All ranks must call this, with no write going on.

        Returns what is wrong when it cannot be written here (too little disk space), on all ranks.
        """
        assert self.thread is None
        self.mine, self.error, self.meta = _own_share(strategy, self.world), None, {"step": step, **meta}
        problem = self._prepare_folder()
        if problem is None:
            self.thread = threading.Thread(target=self._write, daemon=True)
            self.thread.start()
        return problem

    def finish(self) -> tuple[Path | None, str | None]:
        """Waits for all parts and makes the checkpoint visible: (its folder, None), or (None, what went wrong).

        All ranks must call this while a write goes on, and all get the same answer.
        """
        assert self.thread is not None
        self.thread.join()
        self.thread = None
        written = self.world.gather((self.error, self.meta.get("part")))
        problem = next((f"rank {rank}: {error}" for rank, (error, _) in enumerate(written) if error), None)
        final = self.root / _folder_name(self.meta["step"])
        if self.world.is_main:
            try:
                if problem is None:
                    self._publish(final, [part for _, part in written])
            except Exception as error:  # whatever it is, training goes on
                problem = f"rank 0: {_what(error)}"
            if problem is not None:
                shutil.rmtree(_hidden(final), ignore_errors=True)
        problem = self.world.from_main(problem)
        return (final, None) if problem is None else (None, problem)

    def _prepare_folder(self) -> str | None:
        part = _hidden(self.root / _folder_name(self.meta["step"]))
        needed = int(self.world.sum([sum(tensor.nbytes for tensor in self.mine.values())]).item())
        problem = None
        if self.world.is_main:
            try:
                clear(self.root)
                part.mkdir(parents=True)
                free = shutil.disk_usage(self.root).free
                if free < needed * _SPACE_MARGIN:
                    problem = f"{self.root} has {free / 2**20:,.1f} MiB free, but a checkpoint takes {needed / 2**20:,.1f} MiB"
                    shutil.rmtree(part)
            except OSError as error:
                problem = str(error)
        return self.world.from_main(problem)

    def _write(self) -> None:
        path = _hidden(self.root / _folder_name(self.meta["step"])) / self.file
        try:
            save_tensors(path, self.mine)
            _verify(path, self.mine)
            self.meta["part"] = {
                "file": self.file,
                "size": path.stat().st_size,
                "sha256": file_sha256(path),
                "keys": list(self.mine),
            }
            if self.world.is_main:
                self._look_at_older()
        except Exception as error:  # whatever it is, training goes on
            self.error = f"{path}: {_what(error)}"
        self.mine = {}

    def _look_at_older(self) -> None:
        """Takes the checksums, once, of those that checkpoint.keep_last counts beside the new one."""
        wanted = self.config.keep_last - 1
        for path in reversed(_folders(self.root)):
            if wanted == 0 or _step_of(path) >= self.meta["step"]:
                continue
            if path not in self.intact and (fault := _fault(path, 0, 1)):
                self.damaged[path] = fault
                continue
            self.intact.add(path)
            wanted -= 1

    def _publish(self, final: Path, parts: list[dict[str, Any]]) -> None:
        part = _hidden(final)
        files = [{name: item[name] for name in ("file", "size", "sha256")} for item in parts]
        index = {key: item["file"] for item in parts for key in item["keys"]}
        meta = {name: value for name, value in self.meta.items() if name != "part"}
        text = json.dumps({"format": FORMAT, **meta, "files": files, "index": index}, indent=1)
        write_text_atomically(part / "meta.json", text)
        _remove(final)  # the same step, saved again after a resume from before it
        part.replace(final)
        sync(self.root)
        self.intact.add(final)
        self._tidy(final)

    def settle(self) -> None:
        """What a kill has left undone of publishing the checkpoint that the run goes on from. Rank 0 alone."""
        assert self.resumed is not None
        if len(_folders(self.root)) > self.config.keep_last:
            self.meta = {"step": _step_of(self.resumed)}
            self._look_at_older()
        self._tidy(self.resumed)

    def _tidy(self, newest: Path) -> None:
        """Names the newest checkpoint in `latest`, and removes those that are not kept. What goes wrong there is said: that
        checkpoint is visible by now."""
        latest, text = self.root / "latest", f"{newest.name}\n"
        try:
            if not latest.exists() or latest.read_text() != text:
                write_text_atomically(latest, text)
            for path, fault in self.damaged.items():
                say(_set_aside(path, fault))
            self.damaged = {}
            self._remove_older()
        except Exception as error:
            say(f"{newest} is written, but its surroundings are not in order: {_what(error)}")

    def _remove_older(self) -> None:
        """Removes what checkpoint.keep_last and keep_every do not keep. Intact ones alone count."""
        visible = _folders(self.root)
        intact = [path for path in visible if path in self.intact]
        if len(intact) < self.config.keep_last:
            return
        oldest_kept = intact[-self.config.keep_last]
        for old in visible[: visible.index(oldest_kept)]:
            if old != self.resumed and (self.config.keep_every is None or _step_of(old) % self.config.keep_every):
                _remove(old)


def save(
    root: Path, step: int, strategy: Strategy, world: World, meta: dict[str, Any], config: CheckpointConfig
) -> Path:
    """Writes the checkpoint of a step and waits for it. All ranks must call this. Returns its folder.

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


def _own_share(strategy: Strategy, world: World) -> dict[str, Tensor]:
    """Host copies of the tensors that this rank writes: about the same number of bytes on each."""
    mine: dict[str, Tensor] = {}
    filled = [0] * world.size
    for kind in strategy.kinds:
        # Gathering is collective, so every rank walks through all of them and keeps its own.
        for name, tensor in strategy.tensors(kind):
            owner = filled.index(min(filled))
            filled[owner] += tensor.numel()
            if owner == world.rank:
                mine[f"{kind}/{name}"] = tensor.to("cpu", torch.float32, copy=True).contiguous()
    return mine


def _verify(path: Path, expected: dict[str, Tensor]) -> None:
    """Reads a part back. Raises OSError when the disk gives something else."""
    with safe_open(path, "pt") as file:
        for key, tensor in expected.items():
            # As bits: a number that is not one differs from itself.
            if not torch.equal(file.get_tensor(key).view(torch.int32), tensor.view(torch.int32)):
                raise OSError(f"{key} reads back as something else")


def newest(root: Path, world: World, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest intact checkpoint of a run, or None when it has none. All ranks must call this, with the run locked.

    A damaged one is passed over: renamed to step_XXXXXXXX.damaged and named through `report` on rank 0.
    """
    for path in reversed(world.from_main(_folders(root) if world.is_main else None)):
        # The ranks share the reading out among themselves, and learn of each other's findings.
        faults = [fault for fault in world.gather(_fault(path, world.rank, world.size)) if fault]
        if not faults:
            return open_checkpoint(path)
        if world.is_main:
            report(_set_aside(path, faults[0]))
    return None


def open_checkpoint(path: Path) -> Checkpoint:
    """Raises InputError when the folder is not a complete checkpoint of ours."""
    return Checkpoint(path, read_meta(path))


def find(path: Path) -> Checkpoint:
    """The newest checkpoint of a run folder, or a checkpoint folder itself. Raises InputError when there is none."""
    if (path / "meta.json").exists():
        return open_checkpoint(path)
    folders = _folders(path / "checkpoints")
    if not folders:
        raise InputError(
            f"--checkpoint {path}: it has no checkpoints/step_XXXXXXXX. "
            "Name a run folder with a checkpoint, or a checkpoint folder"
        )
    return open_checkpoint(folders[-1])


def load_weights(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Fills a plain model. It may lack parameters of the checkpoint (the heads), but not have others."""
    read = checkpoint.reader("param")
    model.load_state_dict({name: read(name) for name, _ in model.named_parameters()})


def restore(checkpoint: Checkpoint, strategy: Strategy) -> None:
    """Sets master weights and moments of a strategy that was built around a model with the checkpoint's weights in it.

    All ranks must call this. (An engine's copies of the weights are made when it is built, and not set again here.)
    """
    for kind in strategy.kinds:
        # Averaging may begin at any time: with the weights as they are then.
        stored = "param" if kind == "ema" and not checkpoint.has("ema") else kind
        strategy.load_tensors(kind, checkpoint.reader(stored), checkpoint.meta["optimizer_step"])


def _folders(root: Path) -> list[Path]:
    """Visible checkpoints, oldest first."""
    return sorted(path for path in root.glob("step_????????") if path.is_dir())


def _folder_name(step: int) -> str:
    return f"step_{step:08d}"


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _hidden(final: Path) -> Path:
    return final.with_suffix(".tmp")


def _remove(folder: Path) -> None:
    """Out of sight first, so that a kill leaves no half of it visible."""
    if folder.exists():
        gone = folder.with_suffix(".old.tmp")
        shutil.rmtree(gone, ignore_errors=True)
        folder.replace(gone)
        shutil.rmtree(gone, ignore_errors=True)


def clear(root: Path) -> None:
    """Removes what a killed run was writing or removing. For the process that has locked the run, while it writes none."""
    for leftover in root.glob("step_*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    remove_leftovers(root, "*")


def _set_aside(path: Path, fault: str) -> str:
    """Renames a damaged checkpoint, so that nothing counts it any more. Returns what to say."""
    said = f"{path} is damaged and passed over: {fault}"
    names = (path.with_name(f"{path.name}.damaged{number}") for number in ("", *(f".{n}" for n in range(2, 1000))))
    try:
        aside = path.replace(next(name for name in names if not name.exists()))
    except OSError as error:
        return f"{said}. It could not be renamed ({error})"
    return f"{said}. It is kept as {aside.name}: remove it, or rename it back if it is whole after all"


def _what(error: Exception) -> str:
    return (
        str(error) if isinstance(error, OSError | SafetensorError | InputError) else f"{type(error).__name__}: {error}"
    )


def _fault(path: Path, rank: int, world_size: int) -> str | None:
    """What is wrong with this rank's share of a checkpoint's files, or None."""
    try:
        for number, item in enumerate(open_checkpoint(path).meta["files"]):
            if number % world_size != rank:
                continue
            file = path / item["file"]
            if file.stat().st_size != item["size"]:
                return f"{file.name} has {file.stat().st_size} bytes, not {item['size']}"
            if file_sha256(file) != item["sha256"]:
                return f"{file.name} does not match its checksum"
            with safe_open(file, "pt"):
                pass
    except Exception as error:  # corrupt files make the readers raise all kinds of exceptions
        return _what(error)
    return None
