"""Matrix products of the blocks in 8-bit floating point, by torchao: optional, and imported only when train.fp8 asks for it.

Weights stay what they are (names, float32 masters, checkpoints). Each product casts its two factors, with one scale per
tensor that is taken from its largest magnitude then and there, in the forward and in both products of the backward pass.
"""

from __future__ import annotations

import importlib.util
import logging

import torch
from torch import nn

from rear_scale.config import ExperimentConfig, InputError

# The kernels read both factors in pieces of as many values.
MULTIPLE = 16
# Ada and Hopper: the first with products of fp8.
_LEAST_CAPABILITY = (8, 9)


def check_fp8(cfg: ExperimentConfig, device: torch.device) -> None:
    """Raises InputError when train.fp8 is on and cannot run on this device, or torchao is not there."""
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


def use_fp8(model: nn.Module, *, emulate: bool = False) -> None:
    """Makes the products of qkv, projection and feed-forward of every block run in fp8, in place.

    Products with a side that is no multiple of 16 stay as they are, and so do modulation and whatever is not in a block:
    output matrix, embeddings, reAR heads. emulate: casts as a GPU would, then multiplies in float32, on any device.
    """
    # When imported it warns of kernels for other purposes that it could not load, and of its own use of torch.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    # The gradient of a weight sums over positions, whose number need not be a multiple of 16: those factors are padded.
    config = Float8LinearConfig(pad_inner_dim=True, emulate=emulate)
    convert_to_float8_training(model.blocks, module_filter_fn=_converted, config=config)


def _converted(module: nn.Module, name: str) -> bool:
    fits = module.in_features % MULTIPLE == 0 == module.out_features % MULTIPLE
    return fits and "adaLN_modulation" not in name
