"""Import of the package deepspeed with the settings that it reads at import, and its fused Adam."""

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

# On CPUs, DeepSpeed compiles a shared-memory all-reduce at its start, and fails without a C++ compiler. Turned off, because
# gloo alone is as fast here.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
# DeepSpeed logs every setting at every start. Only warnings are of use to a user.
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)

# DeepSpeed calls deprecated functions of torch.distributed; a user cannot act on that warning.
warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)


def fused_adam() -> type[torch.optim.Optimizer]:
    """The optimizer class of optim.backend=deepspeed, with its operator loaded.

    Compiles the operator on its first use, unless DeepSpeed was installed with it. Raises InputError when that fails.
    """
    builder = FusedAdamBuilder()
    if installed_ops.get(builder.name, False):
        return FusedAdam
    code = "import deepspeed; from deepspeed.ops.op_builder import FusedAdamBuilder; FusedAdamBuilder().load()"
    with built(builder.name, code, "optim.backend=deepspeed"):
        builder.load()
    return FusedAdam
