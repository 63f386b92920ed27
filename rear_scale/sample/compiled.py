"""Decoding steps through torch.compile: what lies between matrix products and attention becomes one kernel each.

Norm and modulation are one kernel, the norms of queries and keys with the append to the cache another one, each gate with its sum
a third. Attention over the cache and the matrix products keep their kernels. One graph serves all blocks, steps and lengths of
the cache of one batch size: neither the position nor the length is a constant of it.

Compiled kernels round differently: in bfloat16 they keep intermediate results in float32, which uncompiled steps round. Logits
agree to 1e-4 (float32) and 0.05 (bfloat16) of the largest one. Kernels depend on shapes alone, so the images of a job do not
depend on the number of ranks, if all or none of them compile.
"""

# R rows of a decoding batch, H heads, S positions, K head width

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rear_scale.model import Generator
from rear_scale.model.generator import Decoding, Shape
from rear_scale.progress import say_once
from rear_scale.sample.batch import Batch
from rear_scale.sample.cached import Cache, CachedDecoding

_FASTER_ON = ("cuda",)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # of a logit, relative to the largest one
_BATCH_SIZES = 64  # each has a graph; torch's own limit of 8 is for functions whose graphs were meant to be few
_TRIED = 4  # tokens of the model with which the compiler is tried


def compiles_steps(choice: bool | str, kind: type[Generator], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the steps of a class of models are compiled. choice: sample.compile; auto asks whether that is faster on the device
    and works.

    Where auto would compile but the compiler fails, or gives other logits, prints a line and returns False.
    """
    if choice != "auto":
        return bool(choice)
    if device.type not in _FASTER_ON:
        return False
    problem = step_problem(kind, device, dtype)
    if problem is not None:
        say_once(
            f"sample.compile=auto: steps cannot be compiled here ({problem}); they run uncompiled, which is slower"
        )
    return problem is None


@cache
def step_problem(kind: type[Generator], device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason, in one line, why compiled steps of a class of models do not work on a device; None when they do.

    Tries a small model in advance, because a rank that failed later would sample the rest of a job by other kernels.
    """
    try:
        off = _difference(_small(kind).to(device, dtype).eval())
    # A compiler fails in many ways: no C compiler, no Triton, an unknown GPU, a full disk.
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    allowed = TOLERANCE.get(dtype, TOLERANCE[torch.float32])
    return None if off <= allowed else f"its logits differ by {off:.1e} of the largest, and {allowed:g} are allowed"


def _small(kind: type[Generator]) -> Generator:
    shape = Shape(2, 32, 2, 64, 2, 16, _TRIED, 4, grid=(2, 2))
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
        torch.manual_seed(0)
        model = kind(shape, ())
        for weight in model.parameters():
            nn.init.normal_(weight, std=0.1)
    return model


@torch.inference_mode()
def _difference(model: Generator) -> float:
    """The largest difference between compiled and uncompiled logits, relative to the largest logit; infinite if one is not
    finite."""
    device = next(model.parameters()).device
    ids = torch.arange(2, device=device)
    tokens = torch.arange(2 * _TRIED, device=device).view(2, _TRIED)
    states = [
        CachedDecoding(model, Batch(model, ids, ids, None, guided=True), compiled=compiled)
        for compiled in (None, CompiledBlocks(model))
    ]
    off = 0.0
    for step in range(_TRIED):
        eager, compiled = (state.next_logits(tokens[:, :step]).float() for state in states)
        if not compiled.isfinite().all():
            return float("inf")
        off = max(off, ((compiled - eager).abs().max() / eager.abs().max()).item())
    return off


class CompiledBlocks:
    """The blocks of a decoding step of one position, compiled."""

    def __init__(self, model: Generator) -> None:
        device = next(model.parameters()).device
        attend_to_cache()
        positions = range(model.prefix + model.num_tokens - 1)
        # One tensor for each position, made in advance: CUDA graphs need their addresses, and parts of one tensor would not be
        # aligned as compiled kernels expect. The ends are read by the CPU, which chooses what attention reads.
        self.positions = [torch.tensor([position], device=device) for position in positions]
        self.ends = [torch.tensor(position + 1) for position in positions]
        self.block = compile_block()

    def __call__(self, tables: Decoding, number: int, x: Tensor, start: int, cache: Cache) -> Tensor:
        """The output of one block for x [R, 1, D] at the position `start`, whose key and value are added to its cache."""
        cache.length = start + 1
        # The stride of a dimension of size 1 means nothing, but another one would be another graph.
        x = x.squeeze(1).unsqueeze(1)
        with torch._dynamo.config.patch(recompile_limit=_BATCH_SIZES):
            return self.block(
                tables.through,
                tables.blocks[number],
                x,
                cache.keys,
                cache.values,
                self.positions[start],
                self.ends[start],
                *tables.arguments(number, start, 1),
            )


def compile_block() -> Callable[..., Tensor]:
    """The compiled form of `_block`. Compiles at its first call for each shape."""
    # Static shapes, so that a kernel does not depend on the batch sizes before it; deterministic, so that the order in which a
    # kernel adds up does not depend on a measurement, which may end differently on every rank.
    return torch.compile(_block, dynamic=False, fullgraph=True, options={"deterministic": True})


def _block(
    through: Callable[..., Tensor],
    block: nn.Module,
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    end: Tensor,
    *arguments: Tensor,
) -> Tensor:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key = query.to(value.dtype), key.to(value.dtype)
        keys[:, :, position] = key
        values[:, :, position] = value
        return torch.ops.rear_scale.attend_to_cache(query, keys, values, end)

    return through(block, attend, x, *arguments)


@cache
def attend_to_cache() -> Any:
    """The operator rear_scale::attend_to_cache: attention of query [R, H, 1, K] over the first `end` (int64 on the CPU) positions
    of keys and values [R, H, S, K]. For the compiler it is one opaque kernel, so that its graph does not depend on the length."""

    # Registered when it is first needed, because torch imports its compiler for that.
    @torch.library.custom_op(
        "rear_scale::attend_to_cache",
        mutates_args=(),
        schema="(Tensor query, Tensor keys, Tensor values, Tensor end) -> Tensor",
    )
    def attend(query: Tensor, keys: Tensor, values: Tensor, end: Tensor) -> Tensor:
        length = int(end)
        return F.scaled_dot_product_attention(query, keys[:, :, :length], values[:, :, :length]).contiguous()

    @attend.register_fake
    def _(query: Tensor, keys: Tensor, values: Tensor, end: Tensor) -> Tensor:
        return query.new_empty(query.shape)

    return attend
