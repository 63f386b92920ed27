"""Counting of collectives: calls and bytes of every collective in a block of code, also of those that engines issue."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Collectives(TorchDispatchMode):
    """Calls and payload bytes by name of the collective. The payload is the whole tensor, gathered, scattered or reduced."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, inputs: Any = (), named: Any = None) -> Any:
        if operation.namespace in ("c10d", "_c10d_functional"):
            name = operation.overloadpacket.__name__
            tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
            collective = next(
                (collective for fragment, collective in COLLECTIVES.items() if fragment in name.replace("_", "")), None
            )
            # Norms and flags (at most 20 bytes) are not counted as payload.
            if collective is not None and sum(tensor.nbytes for tensor in tensors) > 20:
                self.calls[collective] += 1
                # Input and output differ in size by the number of ranks; the larger one is the whole tensor. A list holds
                # its pieces.
                first = inputs[0] if isinstance(inputs[0], (list, tuple)) else [inputs[0]]
                sides = [first, [t for t in tensors if not any(t is other for other in tree_leaves(first))]]
                sizes = [sum(t.nbytes for t in side if isinstance(t, torch.Tensor)) for side in sides]
                # In an exchange, a rank may send more than it receives, or less.
                self.bytes[collective] += sum(sizes) // 2 if collective == "all_to_all" else max(sizes)
        return operation(*inputs, **(named or {}))


# Part of the operator's name -> collective. Longer names come first, because "reduce" is part of several.
COLLECTIVES = {
    "reducescatter": "reduce_scatter",
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "alltoall": "all_to_all",
    "broadcast": "broadcast",
    "reduce": "reduce",
}
