"""Counts what travels: every collective of a block, whoever calls it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Collectives(TorchDispatchMode):
    """Calls and payload bytes by kind. The payload is the whole tensor: what is gathered, what is scattered, what is reduced."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, inputs: Any = (), named: Any = None) -> Any:
        if operation.namespace in ("c10d", "_c10d_functional"):
            name = operation.overloadpacket.__name__
            tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
            collective = next(
                (collective for fragment, collective in KINDS.items() if fragment in name.replace("_", "")), None
            )
            # Norms and flags are not payload.
            if collective is not None and sum(tensor.nbytes for tensor in tensors) > 20:
                self.calls[collective] += 1
                # The larger side is the whole one; lists are the pieces of it.
                first = inputs[0] if isinstance(inputs[0], (list, tuple)) else [inputs[0]]
                sides = [first, [t for t in tensors if not any(t is other for other in tree_leaves(first))]]
                self.bytes[collective] += max(
                    sum(t.nbytes for t in side if isinstance(t, torch.Tensor)) for side in sides
                )
        return operation(*inputs, **(named or {}))


# Longer names first.
KINDS = {
    "reducescatter": "reduce_scatter",
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "broadcast": "broadcast",
    "reduce": "reduce",
}
