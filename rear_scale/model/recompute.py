"""Activation checkpointing of blocks, and their compilation and fp8 products.

Blocks are changed in place and keep their names, so that weights, sharding and checkpoints are not affected. Features between
blocks (the taps of reAR) are outputs of blocks, which are kept and not recomputed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from rear_scale.config import ExperimentConfig
from rear_scale.model.compiled import compiled_block, compiles_blocks
from rear_scale.model.fp8 import use_fp8
from rear_scale.model.generator import Generator

_CPU = torch.device("cpu")

# Matrix products and attention: nearly all of the arithmetic. Everything else (norms, modulation, GELU, dropout) is cheap to
# recompute and takes most of the memory.
_KEPT = {
    getattr(torch.ops.aten, name)
    for name in (
        "mm",
        "addmm",
        "bmm",
        "_scaled_mm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
}


# The operator of the flash-attn package, if it registers one.
_KEPT_BY_NAME = ("flash_attn::_flash_attn_forward",)


def prepare_blocks(model: Generator, cfg: ExperimentConfig, device: torch.device = _CPU) -> None:
    """Applies train.fp8, train.compile and train.activation_checkpointing to `model.blocks`.

    Call it before an engine wraps the model. device: where it will run, which decides train.compile=auto.
    """
    train = cfg.train
    if train.fp8:
        use_fp8(model)
    settings: dict[str, Any] = {
        "use_reentrant": False,
        # Saving the state of the random generator synchronizes with the GPU, so only where dropout must be repeated.
        "preserve_rng_state": bool(cfg.model.dropout or cfg.model.attn_dropout),
    }
    if train.activation_checkpointing == "selective":
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    compiled = compiles_blocks(cfg, device)
    for number, block in enumerate(model.blocks):
        if compiled:
            block.forward = compiled_block(block.forward)
        if recomputed(cfg, number):
            block.forward = partial(_checkpointed, block.forward, settings)


def recomputed(cfg: ExperimentConfig, block: int) -> bool:
    """Whether anything of a block (from 0) is recomputed."""
    policy = cfg.train.activation_checkpointing
    return policy in ("full", "selective") or (policy == "every_n" and block % cfg.train.recompute_every_n == 0)


def _checkpointed(forward: Any, settings: dict[str, Any], *inputs: Any) -> Any:
    # Without gradients (validation, sampling) nothing is recomputed.
    return checkpoint(forward, *inputs, **settings) if torch.is_grad_enabled() else forward(*inputs)


def _policy(context: Any, operation: Any, *inputs: Any, **named: Any) -> CheckpointPolicy:
    packet = getattr(operation, "overloadpacket", None)
    kept = packet in _KEPT or str(getattr(operation, "name", str)()).startswith(_KEPT_BY_NAME)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
