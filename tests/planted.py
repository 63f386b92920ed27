"""launchers/train.py with a fault in it: PLANT="nan|hang|spike|slow:RANK:STEP python planted.py --config ..."."""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path

import torch

from rear_scale.train import loop, telemetry

kind, rank, step = os.environ["PLANT"].split(":")
rank_env = os.environ.get("RANK", "0")
forward_and_loss = loop._Computation.__call__
slow_s = [0.0]
if kind == "slow":
    # In place of seconds, of which other processes of the machine take any number from either rank.
    telemetry.Clock._now = lambda self: slow_s[0]


def faulty(self, forward):
    here = rank == rank_env and (kind == "slow" or self.step == int(step))
    if here and kind == "hang":
        time.sleep(3600)
    if here and kind == "slow":
        with self.clock("forward"):
            slow_s[0] += 0.05
    loss, statistics = forward_and_loss(self, forward)
    if here and kind == "nan":
        return loss * math.nan, statistics * math.nan
    if here and kind == "spike":
        return loss, statistics + torch.tensor(100.0)
    return loss, statistics


loop._Computation.__call__ = faulty
sys.argv[0] = str(Path(__file__).resolve().parents[1] / "launchers" / "train.py")
code = compile(Path(sys.argv[0]).read_text(), sys.argv[0], "exec")
exec(code, {"__name__": "__main__", "__doc__": "", "__file__": sys.argv[0]})
