"""Decoding the tokens of one batch while those of the next are drawn."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

_workers: WeakSet[DecodeWorker] = WeakSet()  # those of this process


def wait_for_workers() -> None:
    """Returns when no worker of this process computes anything. Raises what the last work of one raised."""
    for worker in list(_workers):
        worker.wait()


class DecodeWorker:
    """Runs one thing at a time in another thread, and on a stream of its own: tokens are decoded while others are drawn."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # A new thread would take as many threads as there are cores, and its kernels might round otherwise.
        self.pool = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),))
        self.last: Future[None] | None = None
        _workers.add(self)

    def __enter__(self) -> DecodeWorker:
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown()  # what was begun is finished, whatever happened here
        _workers.discard(self)
        if self.last is not None and error[0] is None:
            self.last.result()

    def wait(self) -> None:
        """Returns when the last work is done, on the device too. Raises what it raised."""
        if self.last is not None:
            self.last.result()
        if self.stream is not None:
            self.stream.synchronize()

    def run(self, finish: Callable[..., object], *arguments: Any) -> None:
        """Starts when the last one is done. Raises what that one raised."""
        if self.last is not None:
            self.last.result()
        self.last = self.pool.submit(self._on_stream, finish, arguments, self._drawn())

    def _drawn(self) -> torch.cuda.Event | None:
        return None if self.stream is None else torch.cuda.current_stream().record_event()

    def _on_stream(
        self, finish: Callable[..., object], arguments: tuple[Any, ...], drawn: torch.cuda.Event | None
    ) -> None:
        if self.stream is None or drawn is None:
            finish(*arguments)
            return
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(drawn)
            for argument in arguments:
                if isinstance(argument, Tensor):
                    argument.record_stream(self.stream)  # its memory is not for others before this stream has read it
            finish(*arguments)
