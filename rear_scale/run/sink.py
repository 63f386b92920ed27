"""A sink of metrics beside metrics.jsonl, such as a wandb page: it never delays a run, and never decides how the run ends."""

from __future__ import annotations

import queue
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from rear_scale.config import ExperimentConfig
from rear_scale.progress import say
from rear_scale.run.folder import RunFolder

_MOST_WAITING = 10_000  # entries
# Seconds that the end of a run waits for entries to be sent; fewer after a signal or an error, when a scheduler may kill the job.
_FINISH_S, _FINISH_AFTER_ERROR_S = 120.0, 20.0
# Signals that the sink's thread blocks, so that they are delivered to the main thread.
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


class Sink(ABC):
    """Sends entries from a background thread, which opens the sink too.

    No method raises, and none blocks except `finish`, which waits for a limited time. The first problem is reported and stops
    sending; unsent entries are counted. metrics.jsonl holds all entries.
    """

    title: ClassVar[str]  # in messages

    def __init__(self, cfg: ExperimentConfig, run: RunFolder) -> None:
        self.cfg, self.run = cfg, run
        self.waiting: queue.Queue[Callable[[Any], None] | None] = queue.Queue(_MOST_WAITING)
        self.unsent = 0
        self.problem: str | None = None
        self.exit_code = 0
        self.thread = threading.Thread(target=self._run, name=self.title, daemon=True)
        self.thread.start()

    @abstractmethod
    def log(self, metrics: dict[str, Any]) -> None:
        """Adds the metrics of a step."""

    @abstractmethod
    def image(self, step: int, name: str, file: Path) -> None:
        """Adds an image file, which the thread reads later."""

    @abstractmethod
    def summary(self, values: dict[str, float], step: int) -> None:
        """Adds scores of the checkpoint of a step."""

    @abstractmethod
    def _open(self) -> Any:
        """What entries are sent to. Called in the thread; may raise anything."""

    @abstractmethod
    def _close(self, page: Any) -> None:
        """Ends what `_open` has returned. Called in the thread; may raise anything."""

    def finish(self, exit_code: int) -> None:
        """Sends the waiting entries, within a limited time, and reports the number of unsent ones."""
        self.exit_code = exit_code
        limit_s = _FINISH_AFTER_ERROR_S if exit_code else _FINISH_S
        end = time.monotonic() + limit_s
        with suppress(queue.Full):  # the thread is stuck; the join below reports it
            self.waiting.put(None, timeout=limit_s)
        self.thread.join(max(0.0, end - time.monotonic()))
        if self.thread.is_alive():
            self._give_up(f"sending did not finish within {limit_s:.0f} s")
        self._drop_waiting()
        if self.unsent:
            say(f"{self.title}: {self.unsent} entries were not sent; {self.run.metrics} has them")

    def _put(self, send: Callable[[Any], None]) -> None:
        try:
            if self.problem is None:
                self.waiting.put_nowait(send)
                return
        except queue.Full:
            pass
        self.unsent += 1

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        doing = "start"
        send: Callable[[Any], None] | None = None
        try:
            page = self._open()
            doing = "sending"
            while (send := self.waiting.get()) is not None:
                send(page)
            doing = "end"
            self._close(page)
        except BaseException as error:  # wandb raises SystemExit and KeyboardInterrupt too
            self.unsent += send is not None
            self._give_up(f"{doing}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")

    def _give_up(self, problem: str) -> None:
        if self.problem is not None:
            return
        self.problem = problem
        self._drop_waiting()
        say(f"{self.title}: {problem}. The run continues without {self.title}")

    def _drop_waiting(self) -> None:
        while True:
            try:
                self.unsent += self.waiting.get_nowait() is not None
            except queue.Empty:
                return
