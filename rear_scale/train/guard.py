"""Run-time guards: stop signals, the hang watchdog and loss spikes. The loop decides on all ranks identically
(consensus.StepConsensus)."""

from __future__ import annotations

import faulthandler
import math
import os
import signal
import statistics
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from rear_scale.checkpoint.folder import last_step
from rear_scale.config import ExperimentConfig
from rear_scale.progress import say
from rear_scale.run.folder import RunFolder
from rear_scale.shards.record import TarShard
from rear_scale.world import World

EXIT_PREEMPTED = 75  # sysexits.h: try again later
EXIT_INTERRUPTED = 130  # the exit code by which shells report a process ended by SIGINT
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
_MAY_BE_IGNORED = (signal.SIGHUP, signal.SIGINT)
# With fewer losses, mean and deviation are not yet known well enough to call one a spike.
_FEWEST_LOSSES = 20
_DUMP_S = 30.0  # time limit for a hanging rank to write out its last collectives


class Preempted(SystemExit):
    """Exit code 75: the run is saved and can be started again. Raised on all ranks in the same step."""

    def __init__(self) -> None:
        super().__init__(EXIT_PREEMPTED)


# As signal.signal takes and returns it; None = set by code that is no Python.
_Handler = Callable[[int, FrameType | None], Any] | int | None


class StopSignal:
    """Records SIGTERM, SIGUSR1, SIGHUP and SIGINT instead of ending the process. A second SIGINT (Ctrl-C) ends it at once.

    SIGHUP and SIGINT stay ignored where they are ignored at the start, as nohup and scripts set them. A thread reads the
    signals, because Python's handlers run in the main thread, which may be blocked in a collective.
    """

    def __init__(self, run: RunFolder, world: World) -> None:
        self.run, self.world = run, world
        self.received: str | None = None
        self.before: dict[int, _Handler] = {}
        self.pipe: tuple[int, int] | None = None
        self.wakeup_before = -1

    def __enter__(self) -> StopSignal:
        # Python installs signal handlers only in the main thread.
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
            os.close(self.pipe[1])  # the thread then reads the end of the pipe and ends

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
                say("Ctrl-C: finishing and saving this step first. Press Ctrl-C again to end at once")
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
    """Ends this process when it makes no progress for too long, after writing the stacks of its threads to `<run>/stacks/`.

    A rank that waits in a collective for a hanging or ended rank makes no progress either, so all ranks end within that time.
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
        """Records progress. doing: the activity that begins now, for the message about a hang."""
        self.doing, self.step = doing, step
        self.beats += 1

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Stops the watchdog for a block that may take any length of time."""
        self.paused = True
        yield
        self.beat("go on", self.step)
        self.paused = False

    def _watch(self) -> None:
        # Idle time is counted in waits instead of read from a clock, because a clock also runs while the job is suspended
        # (SIGSTOP, scontrol suspend).
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
            f"rank {self.world.rank} made no progress for {self.timeout_s:.0f} s ({what}): a rank hangs or has ended. "
            f"The stacks of rank {self.world.rank} are in {path}"
        )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Not written atomically: even an incomplete file helps, if the process ends during the write.
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
            # NCCL's own watchdog would write the dump only after this one has ended the process.
            dump_collectives(self.run.path / "collectives" / f"rank_{self.world.rank}")
        finally:
            os._exit(1)


def dump_collectives(path: Path) -> None:
    """Writes the last collectives of this rank, recorded by torch's flight recorder, for `torchfrtrace` to compare the ranks.

    Gives up after _DUMP_S seconds, because the hanging thread may hold the recorder's lock.
    """
    c10d = torch._C._distributed_c10d
    # The first function exists only in builds with NCCL; the second records gloo's collectives.
    dump = getattr(c10d, "_dump_nccl_trace", None) or getattr(c10d, "_dump_fr_trace", None)
    if dump is None:
        return
    path.parent.mkdir(exist_ok=True)
    # Not written atomically, for the same reason as the stacks.
    writer = threading.Thread(target=lambda: path.write_bytes(dump()), daemon=True)
    writer.start()
    writer.join(_DUMP_S)


class LossSpikeDetector:
    """Tells losses that are far above the mean of those before them (guard.spike_sigma standard deviations)."""

    def __init__(self, cfg: ExperimentConfig) -> None:
        self.sigma = cfg.guard.spike_sigma
        self.window: deque[float] = deque(maxlen=cfg.guard.spike_window)

    def __call__(self, loss: float) -> bool:
        """Whether this loss is a spike. Spikes and non-finite losses do not enter the window for later losses."""
        if not math.isfinite(loss):
            return False
        if len(self.window) >= min(_FEWEST_LOSSES, self.window.maxlen or 0):
            mean, deviation = statistics.fmean(self.window), statistics.pstdev(self.window)
            # The deviation has a floor of 0.1% of the mean, or a flat curve would flag every fluctuation.
            if loss > mean + self.sigma * max(deviation, 1e-3 * abs(mean)):
                return True
        self.window.append(loss)
        return False


def shard_positions(ids: list[int], shards: Sequence[TarShard], folder: str | Path) -> str:
    """The shards and positions of samples, for messages: "shard-000003.tar: 17, 42; ..."."""
    by_shard: dict[str, list[int]] = {}
    first = 0
    for shard in shards:
        inside = [number - first for number in ids if first <= number < first + shard.samples]
        if inside:
            by_shard[shard.file] = sorted(inside)
        first += shard.samples
    return "; ".join(f"{Path(folder) / name}: {', '.join(map(str, rows))}" for name, rows in by_shard.items())
