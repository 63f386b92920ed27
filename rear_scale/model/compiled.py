"""Blocks through torch.compile: where that is wanted, whether the compiler works here, and one graph for any classes."""

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
    """Whether blocks are compiled on a device: train.compile, or for auto what is faster there and works.

    Where auto would compile and the compiler fails, one line says so and blocks stay as they are.
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
    """In one line, what is wrong with torch's compiler on a device; None when it compiles and runs a small block and its
    backward pass. Kernels are compiled at their first call, which may be in a backward pass: too late to fall back."""
    try:
        norm, linear = nn.LayerNorm(16, device=device), nn.Linear(16, 16, device=device)

        def forward(x: Tensor, table: Tensor, rows: Tensor) -> Tensor:
            return nn.functional.gelu(linear(norm(x) * rows_of(table, rows)))

        table = torch.ones(3, 4, 16, device=device, requires_grad=True)
        rows = torch.tensor([0, 2, 1, 0, 2], device=device)
        compiled_block(forward)(torch.ones(5, 4, 16, device=device), table, rows).sum().item()
        compiled_block(forward)(torch.ones(5, 4, 16, device=device), table, rows).sum().backward()
    # A compiler fails in many ways: no C compiler, no Triton, an unknown GPU, a full disk.
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def compiled_block(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A block's forward(x, condition [U, ...], rows) compiled, with one graph for any number of distinct classes U.

    Blocks without a condition pass through as any function does.
    """
    # The forward pass alone: the hooks of engines around it stay outside the graph.
    compiled = torch.compile(forward)

    def call(x: Tensor, *arguments: Any) -> Tensor:
        if len(arguments) == 2 and isinstance(arguments[1], Tensor):
            # Engines' hooks may have wrapped the tensor anew, so each block says it of what it gets.
            torch._dynamo.maybe_mark_dynamic(arguments[0], 0)
        return compiled(x, *arguments)

    return call
