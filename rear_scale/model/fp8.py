"""Matrix products of the blocks in 8-bit floating point, by torchao, which is imported only for train.fp8.

Weights do not change (names, float32 masters, checkpoints). Each product, in the forward and the backward pass, casts its two
factors with dynamic scaling: one scale per tensor, from the largest magnitude of its current values.
"""

from __future__ import annotations

import importlib.util
import logging

import torch
from torch import nn

from rear_scale.config import ExperimentConfig, InputError
from rear_scale.model.generator import Generator

# The sides of both factors must be multiples of this for the kernels.
MULTIPLE = 16
# Ada; the first generation with fp8 products.
_LEAST_CAPABILITY = (8, 9)


def check_fp8(cfg: ExperimentConfig, device: torch.device) -> None:
    """Raises InputError when train.fp8 is on, but torchao is not installed or this device cannot run it."""
    if not cfg.train.fp8:
        return
    lacking = []
    if importlib.util.find_spec("torchao") is None:
        lacking.append("the torchao package is not installed (pip install torchao)")
    if device.type != "cuda":
        lacking.append("it needs a CUDA device")
    elif torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        has, least = (
            ".".join(map(str, version)) for version in (torch.cuda.get_device_capability(device), _LEAST_CAPABILITY)
        )
        lacking.append(
            f"it needs a GPU of compute capability {least} or more, and {torch.cuda.get_device_name(device)} has {has}"
        )
    if lacking:
        raise InputError(f"train.fp8=true cannot run: {'; '.join(lacking)}. Or use train.fp8=false")


def use_fp8(model: Generator, *, emulate: bool = False) -> None:
    """Converts the qkv, projection and feed-forward layers of every block to fp8 products, in place.

    Layers with a side that is not a multiple of 16 are left out, and so are modulation and everything outside of blocks: output
    matrix, embeddings, reAR heads. emulate: cast as a GPU would, but multiply in float32, on any device.
    """
    # At its import torchao prints warnings about kernels that are not used here, and about its own use of torch.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    # The gradient of a weight sums over positions, whose number may not be a multiple of 16; its factors are padded.
    config = Float8LinearConfig(pad_inner_dim=True, emulate=emulate)
    convert_to_float8_training(model.blocks, module_filter_fn=_converted, config=config)


def _converted(module: nn.Module, name: str) -> bool:
    if not isinstance(module, nn.Linear):
        return False
    fits = module.in_features % MULTIPLE == 0 == module.out_features % MULTIPLE
    return fits and "adaLN_modulation" not in name
