"""The package deepspeed, imported with the settings that it reads at import, and its fused Adam."""

from __future__ import annotations

import logging
import os
import warnings

import torch

from rear_scale.optim.compile_op import built

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.git_version_info import installed_ops
from deepspeed.ops.adam import FusedAdam
from deepspeed.ops.op_builder import FusedAdamBuilder

# On CPUs, DeepSpeed compiles a shared-memory all-reduce when it starts, and stops where there is no C++ compiler.
# Gloo alone is as fast here.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
# It reports every setting of every start; warnings are what a user can act on.
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)

# Its calls of older torch.distributed names are its own affair.
warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)


def fused_adam() -> type[torch.optim.Optimizer]:
    """The optimizer of optim.backend=deepspeed, with its operator loaded: compiled on first use unless DeepSpeed was
    installed with it. Raises InputError when it cannot be compiled here."""
    builder = FusedAdamBuilder()
    if installed_ops.get(builder.name, False):
        return FusedAdam
    code = "import deepspeed; from deepspeed.ops.op_builder import FusedAdamBuilder; FusedAdamBuilder().load()"
    with built(builder.name, code, "optim.backend=deepspeed"):
        builder.load()
    return FusedAdam
