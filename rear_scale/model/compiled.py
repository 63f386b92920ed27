"""torch.compile of blocks: the decision, a test of the compiler, and one graph for any number of distinct classes."""

# B images, U distinct classes of a batch

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from rear_scale.config import ExperimentConfig, wants_compile
from rear_scale.model.modulation import rows_of
from rear_scale.progress import say


def compiles_blocks(cfg: ExperimentConfig, device: torch.device) -> bool:
    """Whether blocks are compiled on a device: train.compile, or for auto whether that is faster there and works.

    Where auto would compile but the compiler fails, prints a line and returns False.
    """
    if cfg.train.compile != "auto":
        return bool(cfg.train.compile)
    if not wants_compile(cfg, device.type):
        return False
    problem = compiler_problem(device)
    if problem is not None:
        say(f"train.compile=auto: torch.compile does not work here ({problem}); blocks run uncompiled, which is slower")
    return problem is None


@cache
def compiler_problem(device: torch.device) -> str | None:
    """The error of torch's compiler on a device in one line; None when it compiles and runs a small block and its backward pass.

    Tested in advance because kernels are compiled at their first call, perhaps in a backward pass, too late for a fallback.
    """
    try:
        norm, linear = nn.LayerNorm(16, device=device), nn.Linear(16, 16, device=device)

        def forward(x: Tensor, table: Tensor, class_index: Tensor) -> Tensor:
            return nn.functional.gelu(linear(norm(x) * rows_of(table, class_index)))

        table = torch.ones(3, 4, 16, device=device, requires_grad=True)
        class_index = torch.tensor([0, 2, 1, 0, 2], device=device)
        compiled_block(forward)(torch.ones(5, 4, 16, device=device), table, class_index).sum().item()
        compiled_block(forward)(torch.ones(5, 4, 16, device=device), table, class_index).sum().backward()
    # A compiler fails in many ways: no C compiler, no Triton, an unknown GPU, a full disk.
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def compiled_block(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A block's forward(x, condition [U, ...], class_index) compiled, with one graph for any number of distinct classes U.

    Blocks without a condition are compiled without that treatment.
    """
    # Only the forward function is compiled, so that hooks of engines stay outside of the graph.
    compiled = torch.compile(forward)

    def call(x: Tensor, *arguments: Any) -> Tensor:
        if len(arguments) == 2 and isinstance(arguments[1], Tensor):
            # In every block, because hooks of engines may replace the tensor between blocks, and with it the mark.
            torch._dynamo.maybe_mark_dynamic(arguments[0], 0)
        return compiled(x, *arguments)

    return call
