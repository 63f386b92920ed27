"""A background thread that decodes the tokens of one batch while those of the next are sampled."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

_workers: WeakSet[DecodeWorker] = WeakSet()  # all workers of this process


def wait_for_workers() -> None:
    """Returns when all workers of this process are idle. Raises the error of a worker's last call."""
    for worker in list(_workers):
        worker.wait()


class DecodeWorker:
    """One background thread with its own CUDA stream, which overlaps image decoding with the sampling of the next batch."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # A new Python thread would use one torch thread per core, and its kernels might then round differently.
        self.pool = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),))
        self.last: Future[None] | None = None
        _workers.add(self)

    def __enter__(self) -> DecodeWorker:
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown()  # the call in progress is finished, also after an exception here
        _workers.discard(self)
        if self.last is not None and error[0] is None:
            self.last.result()

    def wait(self) -> None:
        """Returns when the last call is complete, on the device too. Raises its error."""
        if self.last is not None:
            self.last.result()
        if self.stream is not None:
            self.stream.synchronize()

    def run(self, finish: Callable[..., object], *arguments: Any) -> None:
        """Starts a call in the thread, once the previous call is complete. Raises the error of the previous call."""
        if self.last is not None:
            self.last.result()
        self.last = self.pool.submit(self._on_stream, finish, arguments, self._drawn())

    def _drawn(self) -> torch.cuda.Event | None:
        return None if self.stream is None else torch.cuda.current_stream().record_event()

    def _on_stream(
        self, finish: Callable[..., object], arguments: tuple[Any, ...], sampled: torch.cuda.Event | None
    ) -> None:
        if self.stream is None or sampled is None:
            finish(*arguments)
            return
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(sampled)
            for argument in arguments:
                if isinstance(argument, Tensor):
                    argument.record_stream(
                        self.stream
                    )  # or the allocator may reuse its memory before this stream has read it
            finish(*arguments)
