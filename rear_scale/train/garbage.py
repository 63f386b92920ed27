"""Garbage collection at fixed steps. Python otherwise collects at a different moment on each rank, and every collection on one
rank delays all others at the next collective."""

from __future__ import annotations

import gc
from types import TracebackType

_EVERY_STEPS = 100


class CollectAtSteps:
    """A context manager that turns off automatic garbage collection; `stepped` collects every 100 steps, on all ranks at once.

    Objects that exist at its start are frozen: collections inside skip them. A program that has frozen its objects itself keeps
    them frozen, and no others are: Python can only unfreeze all.
    """

    def __enter__(self) -> CollectAtSteps:
        self.was_enabled = gc.isenabled()
        self.freezes = gc.get_freeze_count() == 0
        gc.collect()
        if self.freezes:
            gc.freeze()
        gc.disable()
        return self

    def stepped(self, step: int) -> None:
        if step % _EVERY_STEPS == 0:
            gc.collect()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.freezes:
            gc.unfreeze()
        if self.was_enabled:
            gc.enable()
