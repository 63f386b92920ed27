"""What the ranks tell one another once per training step."""

from __future__ import annotations

import math

from torch import Tensor

from rear_scale.checkpoint.writer import Writer
from rear_scale.world import World


class StepConsensus:
    """One all-gather per step, before the update: loss, stop request and checkpoint state of every rank."""

    def __init__(self, world: World, loss: Tensor, grad_norm: Tensor, stop: bool, writer: Writer) -> None:
        # Loss and norm are sent from the device and copied to the host once: the only synchronization with the GPU in a step.
        self.rows = world.table([stop, writer.state], [loss, grad_norm])
        stops, states, losses, norms = self.rows.T
        self.grad_norm = norms[world.rank].item()
        self.loss = losses.mean().item()
        self.bad_ranks = (~losses.isfinite()).nonzero()[:, 0].tolist()
        self.stop_ranks = stops.nonzero()[:, 0].tolist()
        self.all_written = bool((states >= Writer.WRITTEN).all())
        # The norm is global and therefore equal on all ranks.
        self.finite = not self.bad_ranks and math.isfinite(self.grad_norm)
