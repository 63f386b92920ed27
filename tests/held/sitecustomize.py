"""A pause in training, under any launcher, for processes with this folder in PYTHONPATH.

HELD="6,11" or "6:1" are the steps, and the one rank, that pause. A paused rank goes on when it is asked to stop, or when the
file HELD_OPEN/STEP exists; so a test can meet a run at a known step.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
import time
from pathlib import Path


class _Pause(importlib.abc.MetaPathFinder):
    """Changes the loop as soon as it is imported."""

    def find_spec(self, name, path, target=None):
        if name != "rear_scale.train.loop":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (execute(module), _pause(module))
        return spec


def _pause(loop):
    steps, _, only_rank = os.environ["HELD"].partition(":")
    held = {int(step) for step in steps.split(",")}
    forward_and_loss, note = loop._Computation.__call__, loop.StopSignal._note
    asked = []

    def noted(self, *arguments):
        asked.append(arguments)
        note(self, *arguments)

    def paused(self, forward):
        door = Path(os.environ["HELD_OPEN"], str(self.step))
        if self.step in held and os.environ["RANK"] == (only_rank or os.environ["RANK"]):
            while not asked and not door.exists():
                time.sleep(0.05)
        return forward_and_loss(self, forward)

    loop._Computation.__call__ = paused
    loop.StopSignal._note = noted


if "HELD" in os.environ:
    sys.meta_path.insert(0, _Pause())
