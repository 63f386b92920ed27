"""Python with a pause in training: HELD="6,12" or "6:1" (steps, and the one rank that pauses).

A paused rank goes on when it is asked to stop, or when HELD_OPEN/STEP exists; so a test can meet a run at a known step.
Used in place of the interpreter: `held_train.py launchers/train.py --config ...`.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from pathlib import Path

if sys.argv[1] == "-m":
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])

from rear_scale.train import guard, loop

steps, _, only_rank = os.environ["HELD"].partition(":")
held = {int(step) for step in steps.split(",")}
forward_and_loss = loop._Computation.__call__
note = guard.StopSignal._note
asked = False


def noted(self, *arguments):
    global asked
    asked = True
    note(self, *arguments)


def paused(self, forward):
    door = Path(os.environ["HELD_OPEN"], str(self.step))
    if self.step in held and os.environ["RANK"] == (only_rank or os.environ["RANK"]):
        while not asked and not door.exists():
            time.sleep(0.05)
    return forward_and_loss(self, forward)


loop._Computation.__call__ = paused
guard.StopSignal._note = noted
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
