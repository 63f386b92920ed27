"""Weights laid out once the way the CPU's matrix product reads them.

A step of decoding multiplies few rows by every weight of the model: what it costs is how fast the weights are read.
"""

# R rows of a decoding batch, I and O inputs and outputs of a layer

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from rear_scale.model import Generator

# Absent where torch was built without oneDNN.
_PACKS = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
_NOT_A_STEPS = ("adaLN_modulation", "codebook_proj", "align_mlp")  # layers that run on many rows at once, or never


class PackedLinear(nn.Module):
    """What a linear layer computes, for float32 on a CPU. Made for R rows; other numbers of rows cost more."""

    def __init__(self, linear: nn.Linear, rows: int) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., O] of x, float32 [..., I]."""
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def packed_for_decoding(model: Generator, rows: int) -> Generator:
    """The model with packed weights in its blocks and its output; itself where that cannot be.

    Shares every parameter with it, but the packed weights are copies: they do not follow a later change.
    """
    weight = next(model.parameters())
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not _PACKS:
        return model
    shared = copy.deepcopy(model, {id(kept): kept for kept in (*model.parameters(), *model.buffers())})
    for name, layer in list(shared.named_modules()):
        if isinstance(layer, nn.Linear) and not any(part in name for part in _NOT_A_STEPS):
            parent, _, own = name.rpartition(".")
            setattr(shared.get_submodule(parent), own, PackedLinear(layer, rows))
    return shared
