"""The report as training, sampling and evaluation write it: beside their work, and never in its way."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from types import TracebackType

from rear_scale.config import InputError
from rear_scale.progress import say
from rear_scale.report.curves import Curves
from rear_scale.report.reading import RunFiles, is_run
from rear_scale.report.run_page import write_report
from rear_scale.world import World

_LEAST_PART = 100  # a report is written at a checkpoint when the last one took at most 1/100 of the time since then
_FIRST_S = 20.0  # of training before the first report; runs of seconds have the one at their end alone
_END_S = 60.0  # the longest wait for a report at the end of training
# Signals that the thread blocks, so that they are delivered to the main thread.
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


def try_to_write(folder: Path, files: RunFiles | None = None) -> bool:
    """Whether the report of a run was written. A failure is one line for the user."""
    try:
        write_report(folder, files)
        return True
    except Exception as error:  # whatever is wrong with files of other versions, or with the disk
        name = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        say(f"{folder / 'report.html'}: {' '.join(str(name).split())[:300]}. The report was not written")
        return False


def update_report(folder: Path | None, world_is_main: bool = True) -> None:
    """Writes the report of a run after its samples or scores; nothing for a folder that is no run, and on ranks other than 0."""
    if world_is_main and folder is not None and is_run(folder):
        try_to_write(folder)


class RunReport:
    """A hook on checkpoints, and a context around training, that writes the run's report in a thread of rank 0.

    All ranks may call it. Lines of metrics.jsonl are read once, so that a report of a long run costs as much as that of a short
    one. At the end, whatever it was, the report is written again, within a limited time; but not after a refused start.
    """

    def __init__(self, folder: Path, world: World) -> None:
        self.folder, self.active = folder, world.is_main
        self.curves: Curves | None = None
        self.thread: threading.Thread | None = None
        self.began, self.took = time.monotonic(), 0.0  # of the last report

    def __call__(self, step: int, path: Path) -> None:
        """Begins to write the report, unless one is being written or has just been."""
        if not self.active or (self.thread is not None and self.thread.is_alive()):
            return
        if time.monotonic() - self.began >= (_FIRST_S if self.thread is None else _LEAST_PART * self.took):
            self._begin()

    def __enter__(self) -> RunReport:
        self.began = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After a refused start the folder may belong to another run, or be in use by another process.
        if not self.active or isinstance(error, InputError) or not is_run(self.folder):
            return
        if self.thread is not None:
            self.thread.join(_END_S)
            if self.thread.is_alive():
                say(f"{self.folder / 'report.html'}: not written within {_END_S:.0f} s")
                return
        self._begin()
        assert self.thread is not None
        self.thread.join(_END_S)

    def _begin(self) -> None:
        self.began = time.monotonic()
        self.thread = threading.Thread(target=self._write, name="report", daemon=True)
        self.thread.start()

    def _write(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            files = RunFiles(self.folder, self.curves)
            self.curves = files.curves
            try_to_write(self.folder, files)
        except Exception as error:
            say(f"{self.folder / 'report.html'}: {type(error).__name__}: {error}. The report was not written")
        self.took = time.monotonic() - self.began
