"""Python's garbage collector at fixed steps: it otherwise stops each rank at a moment of its own, for which all others wait."""

from __future__ import annotations

import gc
from types import TracebackType

_EVERY_STEPS = 100


class CollectAtSteps:
    """A context of training. Objects from before it are never looked at again inside; `stepped` collects every 100 steps."""

    def __enter__(self) -> CollectAtSteps:
        self.was_enabled = gc.isenabled()
        gc.collect()
        gc.freeze()
        gc.disable()
        return self

    def stepped(self, step: int) -> None:
        if step % _EVERY_STEPS == 0:
            gc.collect()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        gc.unfreeze()
        if self.was_enabled:
            gc.enable()
