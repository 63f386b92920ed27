"""What may go wrong in the middle of a run, and how all ranks then do the same: signals, numbers that are not finite, loss
spikes, ranks that hang."""

from __future__ import annotations

import faulthandler
import math
import os
import signal
import statistics
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from rear_scale.checkpoint.folder import last_step
from rear_scale.config import ExperimentConfig
from rear_scale.progress import say
from rear_scale.run.folder import RunFolder
from rear_scale.world import World

EXIT_PREEMPTED = 75  # sysexits.h: try again later
EXIT_INTERRUPTED = 130  # as shells count a process that SIGINT has ended
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
_MAY_BE_IGNORED = (signal.SIGHUP, signal.SIGINT)
# Fewer losses than this say nothing about what is usual.
_FEWEST_LOSSES = 20
_DUMP_S = 30.0  # how long a hanging rank may take to write down its last collectives


class Preempted(SystemExit):
    """Saved, and wants to be started again. Every rank raises it, after the last meeting."""

    def __init__(self) -> None:
        super().__init__(EXIT_PREEMPTED)


class StopSignal:
    """Notes SIGTERM, SIGUSR1, SIGHUP and SIGINT instead of dying of them. A second SIGINT (Ctrl-C) ends the process at once.

    SIGHUP and SIGINT stay ignored where they are: nohup and scripts ask for that.
    A thread reads the signals, because Python's handlers wait for the main thread, which may be in a collective.
    """

    def __init__(self, run: RunFolder, world: World) -> None:
        self.run, self.world = run, world
        self.received: str | None = None
        self.before: dict[int, Any] = {}
        self.pipe: tuple[int, int] | None = None
        self.wakeup_before = -1

    def __enter__(self) -> StopSignal:
        # Python takes signals in the main thread alone.
        if threading.current_thread() is threading.main_thread():
            self.pipe = os.pipe()
            os.set_blocking(self.pipe[1], False)
            self.wakeup_before = signal.set_wakeup_fd(self.pipe[1], warn_on_full_buffer=False)
            for number in _SIGNALS:
                if number not in _MAY_BE_IGNORED or signal.getsignal(number) is not signal.SIG_IGN:
                    self.before[number] = signal.signal(number, self._note)
            threading.Thread(target=self._listen, args=(self.pipe[0],), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.pipe is not None:
            signal.set_wakeup_fd(self.wakeup_before)
            os.close(self.pipe[1])  # which ends the thread

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name

    def _listen(self, pipe: int) -> None:
        interrupts = 0
        while numbers := os.read(pipe, 64):
            for number in numbers:
                interrupts += number == signal.SIGINT
                if number in _SIGNALS:
                    self.received = signal.Signals(number).name
            if interrupts == 1 and self.world.is_main and signal.SIGINT in numbers:
                say("Ctrl-C: this step is finished and saved first. Ctrl-C again ends at once")
            if interrupts > 1:
                self._end()
        os.close(pipe)

    def _end(self) -> None:
        try:
            if self.world.is_main:
                saved = last_step(self.run.path)
                self.run.set_status("failed", saved, f"ended by Ctrl-C; the same command continues from step {saved}")
                say(f"stopped; the same command continues from step {saved}")
        finally:
            os._exit(EXIT_INTERRUPTED)


class Watchdog:
    """Ends this process, with the stacks of its threads in `<run>/stacks/`, when it makes no progress for too long.

    A rank that waits for one that hangs or is gone makes none either, so all of them end within the same time.
    """

    def __init__(self, timeout_s: float, run: RunFolder, world: World) -> None:
        self.timeout_s, self.run, self.world = timeout_s, run, world
        self.doing, self.step, self.beats = "start", 0, 0
        self.stopped = threading.Event()
        self.paused = False
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watchdog:
        if self.timeout_s:
            self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopped.set()

    def beat(self, doing: str, step: int) -> None:
        """Progress: what begins now."""
        self.doing, self.step = doing, step
        self.beats += 1

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Around what may take any time."""
        self.paused = True
        yield
        self.beat("go on", self.step)
        self.paused = False

    def _watch(self) -> None:
        # Counted in waits and not read from a clock: a job that is suspended (SIGSTOP, scontrol suspend) does not run here
        # either.
        wait_s = min(1.0, self.timeout_s / 4)
        idle_s, beats = 0.0, self.beats
        while not self.stopped.wait(wait_s):
            idle_s = 0.0 if self.paused or beats != self.beats else idle_s + wait_s
            beats = self.beats
            if idle_s > self.timeout_s:
                self._end()

    def _end(self) -> None:
        what = f"step {self.step}, {self.doing}"
        path = self.run.path / "stacks" / f"rank_{self.world.rank:05d}.txt"
        say(
            f"rank {self.world.rank} made no progress for {self.timeout_s:.0f} s ({what}): a rank hangs or is gone. "
            f"The stacks of this one are in {path}"
        )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Under its own name at once: what is written before the process ends is all that there will be.
            with open(path, "w") as file:
                file.write(f"{what}\n")
                file.flush()
                faulthandler.dump_traceback(file)
            reason = f"no progress for {self.timeout_s:.0f} s in {what}; see stacks/"
            if self.world.peers is not None:
                if lost := self.world.peers.lost():
                    say(lost)
                    reason = f"{reason}. {lost}"
                self.world.peers.tell(reason)
            if self.world.is_main:
                self.run.set_status("failed", last_step(self.run.path), reason)
            # NCCL's own watchdog would write it later than this one ends the process.
            dump_collectives(self.run.path / "collectives" / f"rank_{self.world.rank}")
        finally:
            os._exit(1)


def dump_collectives(path: Path) -> None:
    """Writes the last collectives of this rank, as its process group has recorded them, for `torchfrtrace` to compare the
    ranks. Writes nothing when they do not come within _DUMP_S seconds: what hangs may hold their lock."""
    c10d = torch._C._distributed_c10d
    # Only builds with NCCL have the first one; the other knows gloo's.
    dump = getattr(c10d, "_dump_nccl_trace", None) or getattr(c10d, "_dump_fr_trace", None)
    if dump is None:
        return
    path.parent.mkdir(exist_ok=True)
    # Under its own name at once, as the stacks.
    writer = threading.Thread(target=lambda: path.write_bytes(dump()), daemon=True)
    writer.start()
    writer.join(_DUMP_S)


class LossSpikeDetector:
    """Which losses are far above those before them."""

    def __init__(self, cfg: ExperimentConfig) -> None:
        self.sigma = cfg.guard.spike_sigma
        self.window: deque[float] = deque(maxlen=cfg.guard.spike_window)

    def __call__(self, loss: float) -> bool:
        """Whether this loss is one. Neither spikes nor numbers that are not finite count among the losses to come."""
        if not math.isfinite(loss):
            return False
        if len(self.window) >= min(_FEWEST_LOSSES, self.window.maxlen or 0):
            usual, spread = statistics.fmean(self.window), statistics.pstdev(self.window)
            # A flat curve would make a spike of every ripple.
            if loss > usual + self.sigma * max(spread, 1e-3 * abs(usual)):
                return True
        self.window.append(loss)
        return False


def shard_positions(ids: list[int], shards: list[Any], folder: str | Path) -> str:
    """In words, where samples lie: "shard-000003.tar: 17, 42; ..."."""
    found: dict[str, list[int]] = {}
    first = 0
    for shard in shards:
        inside = [number - first for number in ids if first <= number < first + shard.samples]
        if inside:
            found[shard.file] = sorted(inside)
        first += shard.samples
    return "; ".join(f"{Path(folder) / name}: {', '.join(map(str, rows))}" for name, rows in found.items())
