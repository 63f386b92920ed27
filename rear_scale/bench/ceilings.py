"""Measured peak rates of a device (matrix products and memory reads), with which decoding steps are compared."""

from __future__ import annotations

import torch

from rear_scale.bench.model import best_s

_SIZE = {"cuda": 8192, "cpu": 1024}  # side of the square matrices
_BYTES = {"cuda": 2**31, "cpu": 2**27}  # read from memory; far larger than the caches
_TURNS = 5


def product_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product (the best of several)."""
    size = _SIZE[device.type]
    one = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / best_s(device, lambda: one @ one, _TURNS)


def read_bytes_per_s(device: torch.device) -> float:
    """Bytes per second of a sum over a large array (the best of several)."""
    values = torch.ones(_BYTES[device.type] // 4, device=device)
    return _BYTES[device.type] / best_s(device, values.sum, _TURNS)
