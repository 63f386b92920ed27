"""Weights packed into the memory layout of the CPU's matrix product (oneDNN).

A decoding step multiplies few rows by all weights of the model, so its time is that of reading the weights from memory.
"""

# R rows of a decoding batch, I and O inputs and outputs of a layer

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from rear_scale.model import Generator

# Absent where torch was built without oneDNN.
_PACKS = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
_UNPACKED = (
    "adaLN_modulation",
    "codebook_proj",
    "align_mlp",
)  # layers that run on many rows at once, or not in decoding


class PackedLinear(nn.Module):
    """A linear layer with packed weights, for float32 on a CPU. The layout is optimal for inputs of R rows."""

    def __init__(self, linear: nn.Linear, rows: int) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output float32 [..., O] for x, float32 [..., I]."""
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def packed_for_decoding(model: Generator, rows: int) -> Generator:
    """A copy of the model with packed weights in its blocks and its output; the model itself where packing is not supported.

    The copy shares the model's parameters, except for the packed weights, which do not follow later changes.
    """
    weight = next(model.parameters())
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not _PACKS:
        return model
    shared = copy.deepcopy(model, {id(kept): kept for kept in (*model.parameters(), *model.buffers())})
    for name, layer in list(shared.named_modules()):
        if isinstance(layer, nn.Linear) and not any(part in name for part in _UNPACKED):
            parent, _, own = name.rpartition(".")
            setattr(shared.get_submodule(parent), own, PackedLinear(layer, rows))
    return shared
