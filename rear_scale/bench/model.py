"""The device and the model of the benchmarks of training and sampling."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from rear_scale.config import ExperimentConfig
from rear_scale.device import describe, prepare, use_gpu, uses_cuda
from rear_scale.model import Generator, build_model
from rear_scale.model.attention import choose_kernel, use_kernel
from rear_scale.progress import say


def use_device() -> torch.device:
    """The GPU if there is one, else the CPU. Raises InputError for a GPU that cannot be used."""
    prepare()
    device = use_gpu(0) if uses_cuda() else torch.device("cpu")
    say(f"device: {describe(device)}")
    return device


def synchronize(device: torch.device) -> None:
    """Waits until all work submitted to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_s(device: torch.device, call: Callable[[], object], turns: int) -> float:
    """Seconds of a call: the best of several turns, after one that is not counted."""
    call()
    taken = []
    for _ in range(turns):
        synchronize(device)
        started = time.perf_counter()
        call()
        synchronize(device)
        taken.append(time.perf_counter() - started)
    return min(taken)


def random_model(cfg: ExperimentConfig, device: torch.device, *, with_heads: bool) -> Generator:
    """A model of a config with random weights, including those of AdaLN, which are zero at the start of training: products with
    zeros may be faster.

    Without heads (for sampling) in train.precision; with heads (for training) in float32, as master weights.
    """
    model = build_model(cfg, with_heads=with_heads)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "adaLN_modulation" in name and weight.ndim > 1:
                weight.copy_(0.02 * torch.randn(weight.shape, generator=generator))
    use_kernel(model, choose_kernel(cfg.model.kernel, device, cfg.train.precision, say))
    low = cfg.train.precision == "bf16" and not with_heads
    return model.to(device, torch.bfloat16 if low else torch.float32)
