"""TensorBoard: a sink that writes event files into the run folder, and the check of its package before a start."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from rear_scale.config import ExperimentConfig, InputError
from rear_scale.places import how_to_install
from rear_scale.run.folder import RunFolder
from rear_scale.run.sink import Sink
from rear_scale.shards.crops import decode_image

FOLDER = "tensorboard"  # in the run folder
_FLUSH_S = 30  # between two writes to the disk
_PART = "summary"  # a folder of the package, which a folder of the same name that hides it lacks


class TensorBoardSink(Sink):
    """Writes the metrics of steps, sample sheets and scores, under the names of metrics.jsonl and result.json."""

    title = "tensorboard"

    def log(self, metrics: dict[str, Any]) -> None:
        step = metrics["step"]
        numbers = {name: value for name, value in metrics.items() if name != "step" and type(value) in (float, int)}

        def write(events: _Events) -> None:
            for name, value in numbers.items():
                events.writer(step).add_scalar(name, value, step)

        self._put(write)

    def image(self, step: int, name: str, file: Path) -> None:
        def write(events: _Events) -> None:
            import numpy as np

            pixels = np.asarray(decode_image(file.read_bytes()))
            # A sheet that is made at a resume belongs to the step before the first one of this start.
            events.writer(step + 1).add_image(name, pixels, step, dataformats="HWC")

        self._put(write)

    def summary(self, values: dict[str, float], step: int) -> None:
        def write(events: _Events) -> None:
            for name, value in values.items():
                events.writer(None).add_scalar(f"scores/{name}", value, step)

        self._put(write)

    def _open(self) -> Any:
        return _Events(self.run.path / FOLDER)

    def _close(self, page: Any) -> None:
        page.close()


class _Events:
    """An event file, opened when the first entry is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None

    def writer(self, first: int | None) -> Any:
        """The SummaryWriter. first: the first step of this start; TensorBoard then drops that step and later ones of earlier
        starts. None = drop none."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder), purge_step=first, flush_secs=_FLUSH_S)
        return self._writer

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def open_sink(cfg: ExperimentConfig, run: RunFolder) -> TensorBoardSink | None:
    """The sink of a run; None where it is disabled. Rank 0 only."""
    return TensorBoardSink(cfg, run) if cfg.tensorboard.mode == "enabled" else None


def check_tensorboard(cfg: ExperimentConfig) -> None:
    """Raises InputError when TensorBoard is enabled, but its package is missing."""
    if cfg.tensorboard.mode == "disabled":
        return
    spec = importlib.util.find_spec("tensorboard")
    if spec is not None and spec.origin is not None and (Path(spec.origin).parent / _PART).is_dir():
        return
    hidden = f"is hidden by {Path(*list(spec.submodule_search_locations or [])[:1]).resolve()}, or " if spec else "is "
    raise InputError(
        f"tensorboard.mode=enabled needs the package tensorboard, which {hidden}not installed. Install it: "
        f"{how_to_install('tensorboard')}, or use tensorboard.mode=disabled"
    )
