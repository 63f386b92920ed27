"""Measurement of a few real steps with a run's own blocks on this machine's device, to correct the time model of cost.py."""

from __future__ import annotations

import platform
import statistics
import time
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from rear_scale.config import ExperimentConfig, derive
from rear_scale.device import prepare, use_gpu, uses_cuda
from rear_scale.model import build_model
from rear_scale.model.attention import choose_kernel, use_kernel
from rear_scale.model.flops import recomputed_flops_per_image, train_flops_per_image
from rear_scale.model.fp8 import check_fp8
from rear_scale.model.recompute import prepare_blocks
from rear_scale.objective import Objective, Task
from rear_scale.parallel import open_strategy
from rear_scale.progress import say
from rear_scale.scaling.cluster import Cluster, cluster_of
from rear_scale.scaling.cost import step_time
from rear_scale.world import Ranks, World

# Numbers of blocks and images that suffice to measure a rate and fit on any machine, for a GPU and for a CPU.
_BLOCKS, _IMAGES = {"cuda": 8, "cpu": 2}, {"cuda": 8, "cpu": 1}
_STEPS = 3


@dataclass(frozen=True)
class Measured:
    """The time of a training step on this machine, beside the time that the planner assumes."""

    device: str
    blocks: int
    micro_batch_size: int
    step_time_s: float  # median
    measured_tflops: float  # TFLOP/s of a whole step
    assumed_tflops: float  # TFLOP/s of the same step by the time model, on the cluster's GPU
    slowness: float  # measured time over modelled time

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def measure(cfg: ExperimentConfig, cluster: Cluster) -> Measured:
    """The measured time of updates of a model with fewer blocks of the same width, on one device without communication."""
    prepare()
    device = use_gpu(0) if uses_cuda() else torch.device("cpu")
    cfg = _shortened(cfg, device.type)
    world = World(Ranks(0, 0, 1, 1, None, None, "single"), device)
    plan = derive(cfg, 1, None)
    model = build_model(cfg)
    with torch.no_grad():
        for weight in model.parameters():
            weight.uniform_(-0.02, 0.02)
    modelled = step_time(cfg, cluster_of(1, cluster.gpu, cluster.device), 1, model).total_s
    flops = cfg.train.micro_batch_size * (train_flops_per_image(cfg) + recomputed_flops_per_image(cfg))
    check_fp8(cfg, device)
    use_kernel(model, choose_kernel(cfg.model.kernel, device, cfg.train.precision, say))
    codebook = torch.randn(cfg.tokenizer.codebook_size, cfg.tokenizer.codebook_dim)
    model.set_codebook(codebook)
    prepare_blocks(model, cfg, device)
    strategy = open_strategy(cfg, plan, world)
    strategy.build(model)
    objective = Objective(cfg, plan, codebook, device)
    B, N = cfg.train.micro_batch_size, cfg.tokenizer.num_tokens
    tokens = torch.randint(cfg.tokenizer.codebook_size, (B, N), device=device)
    classes = torch.arange(B, device=device) % cfg.model.num_classes

    def compute(forward: nn.Module) -> tuple[Tensor, Tensor]:
        return objective.loss(forward(tokens, classes, None), Task(tokens, tokens, None, None))

    times = []
    for _ in range(1 + _STEPS):
        started = time.perf_counter()
        strategy.forward_backward(compute, 0)
        strategy.grad_norm().item()
        strategy.step(1e-6)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    median = statistics.median(times[1:])
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU {platform.machine()}"
    rates = (flops / median / 1e12, flops / modelled / 1e12)
    return Measured(name, cfg.model.depth, B, median, *rates, slowness=median / modelled)


def _shortened(cfg: ExperimentConfig, device: str) -> ExperimentConfig:
    depth, images = min(cfg.model.depth, _BLOCKS[device]), min(cfg.train.global_batch_size, _IMAGES[device])
    heads = cfg.objective.heads
    encode_tap, decode_tap = (None if tap is None else min(tap, depth) for tap in (heads.encode_tap, heads.decode_tap))
    terms = {
        term: {name: min(value, depth) if name.endswith("tap") else value for name, value in settings.items()}
        for term, settings in cfg.objective.terms.items()
    }
    return replace(
        cfg,
        # Modulation per image, because the modelled step assumes it too.
        model=replace(cfg.model, depth=depth, modulation="per_sample"),
        objective=replace(
            cfg.objective, heads=replace(heads, encode_tap=encode_tap, decode_tap=decode_tap), terms=terms
        ),
        strategy=replace(cfg.strategy, name="single", cpu_offload=False, reshard_after_forward=True),
        optim=replace(cfg.optim, backend="auto"),
        train=replace(cfg.train, global_batch_size=images, micro_batch_size=images),
    )
