"""Causal self-attention with normalized queries and keys.

The attention itself is computed by a kernel or, in cached decoding, by a function of the caller; everything else is shared.
"""

# B images, S positions, D width, H heads, K head width

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rear_scale.config import InputError
from rear_scale.progress import Say

_FLASH_CAPABILITY = (8, 0)  # the least compute capability of the package's kernels
# (query, key, value), each [B, H, S, K] -> [B, H, S, K]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Kernel(Protocol):
    """Causal attention: position s sees positions 0..s. Each tensor is [B, H, S, K]."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor: ...


def sdpa(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """Attention by torch's own kernels."""
    # is_causal and not a mask tensor, which would exclude the flash kernel and double the work.
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)


def flash(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """Attention by the flash-attn package, on CUDA in bf16 or fp16."""
    from flash_attn import flash_attn_func

    inputs = (tensor.transpose(1, 2) for tensor in (query, key, value))  # the package takes [B, S, H, K]
    return flash_attn_func(*inputs, dropout_p=dropout, causal=True).transpose(1, 2)


KERNELS: dict[str, Kernel] = {"sdpa": sdpa, "flash": flash}


def choose_kernel(name: str, device: torch.device, precision: str, report: Say | None = None) -> str:
    """The name of the kernel for model.kernel (auto, sdpa or flash). Called once per run.

    auto: flash where the package is installed and works, else sdpa; `report` gets a line where it is installed but does not
    work. Raises InputError for flash where it does not work.
    """
    if name == "sdpa":
        return name
    elsewhere = [
        reason
        for reason, absent in (
            ("it needs a CUDA device", device.type != "cuda"),
            ("it needs train.precision=bf16", precision != "bf16"),
        )
        if absent
    ]
    installed = importlib.util.find_spec("flash_attn") is not None
    lacking = [] if installed else ["the flash-attn package is not installed"]
    if installed and not elsewhere:
        lacking = _flash_faults(device)
        if lacking and name == "auto" and report is not None:
            report(f"model.kernel=auto: sdpa, because {'; '.join(lacking)}")
    if name == "flash" and (lacking or elsewhere):
        reasons = "; ".join([*lacking, *elsewhere])
        raise InputError(f"model.kernel=flash cannot run: {reasons}. Use model.kernel=sdpa or auto")
    return "sdpa" if lacking or elsewhere else "flash"


def _flash_faults(device: torch.device) -> list[str]:
    """The reasons why the installed flash-attn package cannot run on a GPU; empty when it can."""
    capability = torch.cuda.get_device_capability(device)
    if capability < _FLASH_CAPABILITY:
        has, least = (".".join(map(str, version)) for version in (capability, _FLASH_CAPABILITY))
        return [f"flash-attn needs a GPU of compute capability {least} or more, and this one has {has}"]
    try:
        # Its extension is built for one version of torch and CUDA, and fails to load with others.
        importlib.import_module("flash_attn")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        return [f"the flash-attn package cannot be imported ({first})"]
    return []


def use_kernel(model: nn.Module, name: str) -> None:
    """Sets the kernel of every attention module of a model."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.kernel = KERNELS[name]


class Attention(nn.Module):
    """Self-attention whose queries and keys are normalized by `norm`, which the heads share, and then rotated, if at all."""

    kernel: Kernel = staticmethod(sdpa)

    def __init__(
        self, width: int, num_heads: int, attn_dropout: float, dropout: float, norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        self.num_heads, self.attn_dropout, self.dropout = num_heads, attn_dropout, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = norm(width // num_heads)
        self.k_norm = norm(width // num_heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, attend: Attend | None = None, rotation: Tensor | None = None) -> Tensor:
        """The output, [B, S, D], for x [B, S, D]. Without `attend`, position s sees positions 0..s of x.

        rotation: float [B or 1, S, K / 2, 2], cosine and sine of each position's rotary angles.
        """
        B, S, D = x.shape
        query, key, value = self.qkv(x).view(B, S, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key = self.q_norm(query), self.k_norm(key)
        if rotation is not None:
            query, key = rotated(query, rotation), rotated(key, rotation)
        attended = (attend or self.causal)(query, key, value)
        return F.dropout(self.proj(attended.transpose(1, 2).reshape(B, S, D)), self.dropout, self.training)

    def causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # Under autocast, norms return float32, but the kernels need one dtype.
        query, key = query.to(value.dtype), key.to(value.dtype)
        return self.kernel(query, key, value, self.attn_dropout if self.training else 0.0)


def rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """x [B, H, S, K] with its pairs (x[2i], x[2i + 1]) rotated by rotation [B or 1, S, K / 2, 2]."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = rotation[:, None].unbind(-1)
    return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1).flatten(-2).to(x.dtype)
